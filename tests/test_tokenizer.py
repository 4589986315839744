"""Every preset of the tokenizer: the same weights as ever, the same verbs,
errors in one line, files of earlier versions"""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokkit.core import tensors_hash
from tokkit.layers import ViT, to_timm
from tokkit.tokenizers import TOKENIZERS, Tokenizer, TokenizerCfg, fit_spec, make_tokenizer
from tokkit.zoo_tokenizers import (init_from_dinov2, load_robustok, robustok_names, robustok_state,
                                   robustok_teacher)

GOLDEN = {  # preset: hashes of the weights of seeds 0 and 1. Published results were made with these weights
    'tiny': ('a47ec38143', '4456bd5fe8'), 'tiny-16': ('e1d9605dc8', '00b9c15294'),
          'tiny-rgb': ('178cb7bea6', '20b88a9381'),
    'tiny-1d': ('45fdb0080d', 'c54a5fdba7'), 'tiny-kl0': ('1ac433e2a6', '28be4561b2'),
          'tiny-cnn': ('83df357a7a', '93ec4311fb'),
    'small': ('4fef5670d6', '996583e363'),
}


@pytest.mark.parametrize('name', GOLDEN)
def test_weights_of_a_preset_never_change(name):
    assert tuple(tensors_hash(make_tokenizer(name, seed=s).state_dict()) for s in (0, 1)) == GOLDEN[name]


def test_fingerprint_knows_configuration_weights_and_the_measured_scale():
    tok = make_tokenizer('tiny')
    two = make_tokenizer('tiny', heads=2)
    assert (tensors_hash(two.state_dict()) == tensors_hash(tok.state_dict())
            and two.fingerprint != tok.fingerprint)
    assert make_tokenizer('tiny', seed=1).fingerprint != tok.fingerprint
    before = tok.fingerprint
    fit_spec(tok, images(tok.cfg))
    assert tok.fingerprint != before and tok.spec.std != 1


def images(cfg, n=2):
    return torch.rand(n, cfg.channels, cfg.size, cfg.size, generator=torch.Generator().manual_seed(0))*2-1


SMALL = [name for name, cfg in TOKENIZERS.items() if cfg.size <= 64]


@pytest.mark.parametrize('name', SMALL)
@torch.no_grad()
def test_verbs_agree(name):
    tok = make_tokenizer(name).eval()
    x = images(tok.cfg)
    spec = tok.spec
    q = tok.quantize(tok.encode(x))
    assert q.zq.shape == (2, *spec.shape)
    assert tok.reconstruct(x).shape == x.shape
    if spec.codebook_size is None:
        with pytest.raises(ValueError, match='continuous latents'): tok.tokenize(x)
        return
    ids = tok.tokenize(x)
    assert tuple(ids.shape[1:]) == (spec.ids_shape or spec.shape[:1]) and int(ids.max()) < spec.codebook_size
    assert (tok.detokenize(ids)-tok.reconstruct(x)).abs().max() < 1e-5


@pytest.mark.parametrize('name', SMALL)
def test_gradients_reach_every_weight(name):
    tok = make_tokenizer(name).train()
    x = images(tok.cfg, 4)
    q = tok.quantize(tok.encode(x))
    ((tok.decode(q.zq)-x).square().mean()+q.loss).backward()
    unreached = [k for k, p in tok.named_parameters() if p.requires_grad
                 and (p.grad is None or not torch.isfinite(p.grad).all())]
    assert not unreached
    assert tok.last_layer.grad.abs().sum() > 0 and any(tok.last_layer is p for p in tok.decoder.parameters())


@pytest.mark.parametrize('name', SMALL)
def test_files(name, tmp_path):
    tok = make_tokenizer(name)
    back = Tokenizer.load(tok.save(tmp_path/'tok'))
    assert (back.fingerprint == tok.fingerprint and back.spec == tok.spec and back.cfg == tok.cfg
            and not back.training)


def test_files_of_earlier_versions_load(tmp_path):
    tok = make_tokenizer('tiny-1d')
    tok.save(tmp_path)
    config = json.loads((tmp_path/'config.json').read_text())
    for field in ('quantizer', 'quantizer_options', 'positions', 'class_token', 'layer_scale', 'multipliers',
                  'z_channels'):
        del config['cfg'][field]
    del config['spec']['ids_shape']
    (tmp_path/'config.json').write_text(json.dumps(config))
    # they carried no copy of it
    save_file(load_file(tmp_path/'model.safetensors'), tmp_path/'model.safetensors')
    with pytest.warns(UserWarning, match='was written by an earlier version'): back = Tokenizer.load(tmp_path)
    assert back.fingerprint == tok.fingerprint and back.spec == tok.spec and back.cfg == tok.cfg


@pytest.mark.parametrize('fields,said', [
    (dict(size=30), 'patch must divide size, got patch 4 and size 30'),
    (dict(kind='mamba'), 'kind must be one of vit, robustok, cnn, taming, maskgit, maetok'),
    (dict(quantizer='magic'), 'quantizer must be one of vq, pq'),
    (dict(heads=5), 'heads must divide width, got 5 heads and width 64'),
    (dict(kind='robustok', heads=5), 'heads must divide width, got 5 heads and width 64'),
    (dict(kind='robustok', latents=10), 'shared positions need a square number of latents, got 10'),
    (dict(kind='robustok', positions='none'), "positions must be shared or own, got 'none'"),
    (dict(kind='robustok', quantizer='pq'), '2 groups need latents > 0'),
    (dict(kind='cnn', latents=4), 'a cnn needs a patch that is a power of 2'),
    (dict(kind='taming'), '5 multipliers need patch 16 and latents 0, got patch 4'),
    (dict(latents=-1), 'latents must be a whole number in 0..65536, got -1'),
    *((dict(quantizer=q, codebook_size=0), f'{q} needs a codebook_size')
      for q in ('pq', 'rq', 'msrq', 'lfq', 'bsq', 'fsq')),
    *(({name: 0}, f'{name} must be a whole number in 1..') for name in
      ('size', 'channels', 'patch', 'width', 'depth', 'heads', 'code_dim', 'z_channels')),
    (dict(quantizer='lfq', codebook_size=500), 'signs make a power of 2 of codes, got 500'),
    (dict(backbone_options=dict(window=3)), "vit has no option 'window'; it has none"),
])
def test_a_bad_configuration_is_one_clear_line(fields, said):
    with pytest.raises(ValueError) as e: TokenizerCfg(**fields)
    assert said in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('quantizer,dim', [('lfq', 9), ('bsq', 9), ('fsq', 3)])
def test_quantizers_that_choose_their_channels_say_so_in_the_configuration(quantizer, dim, tmp_path):
    tok = make_tokenizer('tiny', quantizer=quantizer)
    assert tok.cfg.code_dim == dim == tok.spec.shape[1]
    assert tok.fingerprint == make_tokenizer('tiny', quantizer=quantizer, code_dim=dim).fingerprint
    tok.save(tmp_path)
    config = json.loads((tmp_path/'config.json').read_text())
    # as files of earlier versions say
    config['cfg']['code_dim'] = 16
    (tmp_path/'config.json').write_text(json.dumps(config))
    save_file(load_file(tmp_path/'model.safetensors'), tmp_path/'model.safetensors')
    with pytest.warns(UserWarning, match='was written by an earlier version'):
        assert Tokenizer.load(tmp_path).fingerprint == tok.fingerprint


@pytest.mark.parametrize('name', ['tiny', 'tiny-kl', 'tiny-kl0'])
def test_fit_spec_measures_in_eval_mode_in_batches_and_puts_the_modes_back(name):
    tok = make_tokenizer(name, width=16, depth=1)
    x = images(tok.cfg, 260)
    before = tensors_hash(tok.state_dict())
    tok.train()
    tok.encoder.eval()
    modes = [m.training for m in tok.modules()]
    spec = fit_spec(tok, x)
    assert ([m.training for m in tok.modules()] == modes and tensors_hash(tok.state_dict()) == before
            and fit_spec(tok, x) == spec)
    with torch.no_grad(): zq = tok.eval().quantize(tok.encode(x)).zq
    assert abs(spec.mean-zq.mean()) < 1e-5 and abs(spec.std-zq.std()) < 1e-5
    tok.train()
    with pytest.raises(ValueError, match='takes images'): fit_spec(tok, x[..., :20])
    assert tok.training


def test_an_unknown_option_of_a_quantizer_is_one_clear_line():
    with pytest.raises(ValueError) as e: make_tokenizer('tiny', quantizer_options=dict(magic=1))
    assert 'magic' in str(e.value) and 'commitment' in str(e.value) and '\n' not in str(e.value)


def test_images_of_another_shape():
    for name in ('tiny', 'tiny-robustok', 'tiny-taming'):
        with pytest.raises(ValueError, match=r'takes images \(b, 1, 28, 28\), got \(2, 3, 28, 28\)'):
            make_tokenizer(name).encode(torch.zeros(2, 3, 28, 28))


@pytest.mark.parametrize('call,said', [
    (lambda: make_tokenizer('huge'), "no tokenizer preset 'huge'; there are tiny"),
    (lambda: make_tokenizer('tiny', codes=5), 'TokenizerCfg has no codes'),
    (lambda: make_tokenizer('tiny').detokenize(torch.full((1, 49), 512)), 'ids must be in 0..511'),
    (lambda: Tokenizer.load('nowhere'), 'holds no saved Tokenizer'),
])
def test_a_wrong_call_is_one_clear_line(call, said):
    with pytest.raises((ValueError, FileNotFoundError)) as e: call()
    assert said in str(e.value) and '\n' not in str(e.value)


def test_a_damaged_file_is_one_clear_line(tmp_path):
    make_tokenizer('tiny').save(tmp_path)
    with open(tmp_path/'model.safetensors', 'r+b') as f: f.truncate(1000)
    with pytest.raises(ValueError, match='is damaged'): Tokenizer.load(tmp_path)


def test_a_product_quantizer_comes_back_from_the_released_layout():
    groups = dict(quantizer='pq', quantizer_options=dict(groups=2), refine=0)
    pq = make_tokenizer('tiny-robustok', **groups)
    back = load_robustok(make_tokenizer('tiny-robustok', seed=1, **groups), robustok_state(pq))
    assert back.fingerprint == pq.fingerprint


def theirs(**sizes): return make_tokenizer('tiny-robustok', refine=0, **sizes)
def timm(): return {to_timm(k): v for k, v in ViT(70, 14, 3, 64, 2, 4).state_dict().items()}

@pytest.mark.parametrize('call,said', [
    (lambda: robustok_names(make_tokenizer('tiny')), "knows the kinds robustok and taming, got 'vit'"),
    (lambda: robustok_names(make_tokenizer('tiny-robustok')), 'take refine=0'),
    (lambda: robustok_names(make_tokenizer('tiny-taming', quantizer='lfq')),
     'known for the quantizers vq and pq'),
    (lambda: load_robustok(theirs(codebook_size=64), robustok_state(theirs())),
     'quantize.embedding.weight: (512, 16) instead of (64, 16)'),
    (lambda: load_robustok(theirs(), 'main-train.pt'), 'no file main-train.pt'),
    (lambda: robustok_teacher(robustok_state(theirs())), 'hold no teacher'),
    (lambda: init_from_dinov2(theirs(depth=3), timm()), 'missing (blocks.2.norm1.weight'),
    (lambda: init_from_dinov2(make_tokenizer('tiny'), timm()), "fit the kind robustok, got 'vit'"),
])
def test_what_the_released_code_has_no_name_for(call, said):
    with pytest.raises((ValueError, FileNotFoundError)) as e: call()
    assert said in str(e.value) and '\n' not in str(e.value)


def test_weights_do_not_depend_on_the_global_generator():
    torch.manual_seed(1)
    one = make_tokenizer('tiny-robustok').fingerprint
    before = torch.get_rng_state()
    assert make_tokenizer('tiny-robustok').fingerprint == one and torch.equal(torch.get_rng_state(), before)


def test_drop_path_grows_with_depth_and_rests_in_evaluation():
    tok = make_tokenizer('tiny-robustok', depth=3, drop_path=.5)
    for part in (tok.encoder, tok.decoder): assert [b.drop_path.rate for b in part.vit.blocks] == [0, .25, .5]
    x = images(tok.cfg)
    with torch.no_grad():
        assert (not torch.equal(tok.train().encode(x), tok.encode(x))
                and torch.equal(tok.eval().encode(x), tok.encode(x)))
    assert ([b.drop_path.rate
             for b in make_tokenizer('tiny', depth=1, drop_path=.5).encoder.body.blocks] == [.5])

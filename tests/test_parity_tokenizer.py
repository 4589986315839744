"""The paper's tokenizer against values recorded from the released code:
every tensor on the way, losses, gradients, names and shapes"""
import json, os, sys, types
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save_file

from tokkit.layers import ViT, load_vit, to_timm
from tokkit.training import VitTeacher, contrastive_loss
from tokkit.zoo_tokenizers import (init_from_dinov2, load_robustok, robustok_names, robustok_state,
                                   robustok_teacher)
from tokkit.published import read_checkpoint
from tokkit.perturbation import OFFICIAL, LatentPerturbation
from tokkit.quantizers import codebook_usage
from tokkit.tokenizers import TOKENIZERS, Tokenizer, TokenizerCfg, make_tokenizer

# the teacher's images
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((.485, .456, .406), (.229, .224, .225)))


def recorded(fixtures, name, *prefixes):
    "Configuration and tensors of a recording; one dictionary a prefix"
    with safe_open(fixtures/f'{name}.safetensors', 'pt') as f:
        config = json.loads(f.metadata()['config'])
        tensors = {k: f.get_tensor(k) for k in f.keys()}
    return (config,
            *({k.removeprefix(f'{p}.'): v for k, v in tensors.items() if k.startswith(f'{p}.')}
              for p in prefixes))


def close(got, want, tolerance=1e-5):
    assert got.shape == want.shape, f"{tuple(got.shape)} instead of {tuple(want.shape)}"
    assert (got-want).abs().max() <= tolerance*want.abs().max().clamp_min(1e-12)


def tokens(maps): return rearrange(maps, 'b d h w -> b (h w) d')


def paper_tokenizer(config, state, **changes):
    "Our tokenizer of the recording's sizes, with its weights"
    cfg = TokenizerCfg(64, 3, 8, 'robustok', latents=64, width=config['embed_dim'], depth=config['depth'],
                       heads=config['num_heads'],
                       codebook_size=config['codebook_size'],
                       code_dim=config['codebook_embed_dim']*config['product_quant'],
                       refine=0, **changes)
    return load_robustok(Tokenizer(cfg), state).eval()


@pytest.fixture(scope='module')
def dino(fixtures):
    config, sd, given, out, train, grad = recorded(fixtures, 'tok_dino_tiny', 'sd', 'in', 'out', 'train',
                                                   'grad')
    return config, sd, given, out, train, grad


@torch.no_grad()
def test_encoder_and_quantizer(dino):
    config, sd, given, out, *_ = dino
    tok = paper_tokenizer(config, sd)
    x = given['images']
    close(tok.encoder.sequence(x), out['enc_sequence_before_blocks'])
    close(tok.encoder.features(x), out['encoder'])
    z = tok.encode(x)
    close(z, tokens(out['h']))
    q = tok.quantize(z)
    assert torch.equal(q.ids, out['indices']) and torch.equal(tok.tokenize(x), out['indices'])
    close(q.zq, tokens(out['fhat']))


@torch.no_grad()
def test_decoder(dino):
    config, sd, given, out, *_ = dino
    tok = paper_tokenizer(config, sd)
    zq = tokens(out['fhat'])
    close(tok.decoder.sequence(zq), out['dec_sequence_before_blocks'])
    close(tok.decode(zq), out['decode'])
    close(tok.reconstruct(given['images']).clamp(-1, 1), out['img_to_reconstructed_img'])
    close(tok.codes(out['indices']), tokens(out['codebook_entry']))
    close(tok.detokenize(out['indices']), out['decode_tokens'])


@torch.no_grad()
def test_teacher(dino):
    config, sd, given, out, *_ = dino
    tok = paper_tokenizer(config, sd)
    teacher = robustok_teacher(sd, heads=config['num_heads'])
    x = (given['images']*.5+.5-MEAN)/STD
    close(x, out['sem_input'])
    feature = teacher(x)[:, 0]
    close(feature, out['sem_feature'])
    # as the semantic loss takes it
    close(VitTeacher(teacher)(given['images'])[:, 0], out['sem_feature'])
    close(tok.encoder.out(feature), out['sem_z_s'])


def trained(dino, monkeypatch):
    "One forward pass as in training, with the recorded draws in place of ours"
    config, sd, given, out, *_ = dino
    tok = paper_tokenizer(config, sd).train()
    # the recording was a first step
    tok.quantizer.steps.zero_()
    shape = given['images'].shape[0], 64
    monkeypatch.setattr(torch, 'rand', lambda *a, **k: given['rand'].view(shape))
    monkeypatch.setattr(torch, 'randint', lambda *a, **k: given['randint'].view(shape))
    z = tok.encode(given['images'])
    q = tok.quantize(z)
    plug = LatentPerturbation(config['alpha'], config['beta'], config['delta'], **OFFICIAL)
    p = plug(z, q, tok.quantizer)
    xh = tok.decode(p.zq)
    semantic = config['sem_loss_weight']*contrastive_loss(tok.encoder.out(out['sem_feature']), p.zq.mean(1))
    return tok, q, p, xh, semantic


def test_training_forward(dino, monkeypatch):
    config, sd, given, out, train, _ = dino
    tok, q, p, xh, semantic = trained(dino, monkeypatch)
    assert torch.equal(q.ids.flatten(), train['nearest_indices'])
    chosen = int(len(q.ids)*config['beta'])
    assert torch.equal(p.ids[:chosen].flatten(),
                       train['perturbed_indices_all'].view(q.ids.shape)[:chosen].flatten())
    assert torch.equal(p.ids[chosen:], q.ids[chosen:])
    close(xh, train['decode'])
    close(q.codebook_loss, train['vq_loss'])
    close(q.commitment_loss, train['commit_loss'])
    close(semantic, train['sem_loss'])
    close(tok.quantizer.usage, train['ema_vocab_hit_SV'])
    assert abs(100*codebook_usage(tok.quantizer.usage)[0]-train['codebook_usage'].item()) < 1e-3
    close(10*(xh*given['loss_weight']).mean()+q.loss+semantic, train['total'])


def test_gradients(dino, monkeypatch):
    _, _, given, _, _, grad = dino
    tok, q, p, xh, semantic = trained(dino, monkeypatch)
    (10*(xh*given['loss_weight']).mean()+q.loss+semantic).backward()
    names = robustok_names(tok)
    ours = dict(tok.named_parameters())
    assert grad
    for name, want in grad.items(): close(ours[names[name]].grad.view(want.shape), want, 1e-4)


def test_product_quantizer(fixtures):
    config, sd, given, out, train = recorded(fixtures, 'tok_pq2_tiny', 'sd', 'in', 'out', 'train')
    tok = paper_tokenizer(config, sd, quantizer='pq', quantizer_options=dict(groups=2))
    x = given['images']
    with torch.no_grad():
        z = tok.encode(x)
        close(rearrange(z, 'b n (p d) -> b d (p n) 1', p=2), out['h'])
        assert torch.equal(tok.tokenize(x), torch.stack([out['indices0'], out['indices1']], -1))
        close(tok.reconstruct(x).clamp(-1, 1), out['img_to_reconstructed_img'])
    q = tok.train().quantize(tok.encode(x))
    close(tok.decode(q.zq), train['decode'])
    close(q.codebook_loss, train['vq_loss'])
    close(q.commitment_loss, train['commit_loss'])
    feature = robustok_teacher(sd, heads=config['num_heads'])((x*.5+.5-MEAN)/STD)[:, 0]
    # the released code lets the last group carry the meaning
    last = q.zq.chunk(2, -1)[-1].mean(1)
    semantic = contrastive_loss(F.linear(feature, tok.encoder.out.weight, tok.encoder.out.bias), last)
    close(config['sem_loss_weight']*semantic, train['sem_loss'])


@torch.no_grad()
def test_convolutional_tokenizer(fixtures):
    config, sd, given, out = recorded(fixtures, 'tok_cnn_tiny', 'sd', 'in', 'out')
    tok = Tokenizer(TokenizerCfg(32, 3, 4, 'taming', width=config['ch'], depth=config['num_res_blocks'],
                                 multipliers=config['ch_mult'],
                                 z_channels=config['z_channels']))
    # the recording has encoder and decoder only
    own = {k: v for k, v in robustok_state(tok).items() if 'quant' in k}
    load_robustok(tok, own | {k: v.float() for k, v in sd.items()}).eval()
    close(tok.encoder.features(given['images']), out['z'])
    close(tok.decoder.from_features(out['z']), out['rec'])


@pytest.mark.parametrize('preset,recording,teacher',
                         [('base', 'tokenizer_main_train', True), ('base-cnn', 'tokenizer_cnn_vq16', False)])
def test_names_and_shapes_at_full_size(preset, recording, teacher, fixtures):
    with torch.device('meta'):
        state = robustok_state(Tokenizer(TOKENIZERS[preset]), ViT(256, 16) if teacher else None)
    got = {k: [list(v.shape), str(v.dtype).removeprefix('torch.')] for k, v in state.items()}
    assert got == json.loads((fixtures/'state_dict_shapes.json').read_text())[recording]


def test_dinov2_weights_for_another_image_and_patch_size(fixtures):
    _, given, want = recorded(fixtures, 'dinov2_init_resample', 'in', 'out')
    vit = ViT(256, 16, 3, width=8, depth=0, heads=2)
    load_vit(vit, given
             | {k: v for k, v in vit.state_dict().items() if k.startswith('norm')
                or k == 'patch_embed.proj.bias'})
    for name, value in want.items(): close(vit.state_dict()[name], value)


def tiny(seed=0, **changes):
    cfg = TokenizerCfg(16, 3, 4, 'robustok', latents=16, width=32, depth=1, heads=2, codebook_size=16,
                       code_dim=4, refine=0)
    return make_tokenizer(cfg, seed=seed, **changes)


class Wish:
    "A checkpoint that runs a command while it is read"
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f'touch {self.path}',)


def settings(monkeypatch):
    """The command line as the released code pickles it,
    with classes of a package that is gone when the file is read"""
    module = types.ModuleType('gone_scalars')
    class ScalarFloat(float):
        def __new__(cls, *args, width=None, **kwargs): return super().__new__(cls, *args)
    class CommentedSeq(list): pass
    for cls in (ScalarFloat, CommentedSeq):
        cls.__module__ = module.__name__
        cls.__qualname__ = cls.__name__
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    number = ScalarFloat(3e-5)
    row = CommentedSeq([16])
    number.width = 4
    row.line = Namespace(col=2)
    return Namespace(lr=number, v_patch_nums=row, config='main-train.yaml')


@pytest.mark.parametrize('protocol', [2, 4])
def test_checkpoint_with_foreign_objects_and_a_command(protocol, tmp_path, monkeypatch):
    raw = tiny(1)
    average = tiny(2)
    optimizer = dict(state={0: dict(step=torch.tensor(3.), exp_avg=torch.zeros(2))},
                     param_groups=[dict(lr=1e-4, params=[0])])
    torch.save(dict(model=robustok_state(raw, ViT(16, 4, 3, 32, 1, 2)), ema=robustok_state(average),
                    optimizer=optimizer, steps=7,
                    args=settings(monkeypatch), wish=Wish(tmp_path/'ran')), tmp_path/'main-train.pt',
               pickle_protocol=protocol)
    monkeypatch.delitem(sys.modules, 'gone_scalars')
    assert load_robustok(tiny(), tmp_path/'main-train.pt').fingerprint == average.fingerprint
    assert load_robustok(tiny(), tmp_path/'main-train.pt', 'model').fingerprint == raw.fingerprint
    assert robustok_teacher(tmp_path/'main-train.pt', 'model', heads=2).grid == (4, 4)
    assert not (tmp_path/'ran').exists()
    with pytest.raises(ValueError, match="holds no 'best'; it has model, ema, optimizer, steps, args, wish"):
        read_checkpoint(tmp_path/'main-train.pt', 'best')


def test_the_command_would_have_run_otherwise(tmp_path):
    torch.save(dict(wish=Wish(tmp_path/'ran')), tmp_path/'x.pt')
    torch.load(tmp_path/'x.pt', weights_only=False)
    assert (tmp_path/'ran').exists()


def test_parameters_are_read_and_what_is_not_read_is_named(tmp_path):
    noted = torch.nn.Parameter(torch.ones(2))
    noted.note = Wish(tmp_path/'ran')
    torch.save(dict(ema=dict(a=torch.nn.Parameter(torch.zeros(2)), b=noted)), tmp_path/'x.pt')
    _, back = read_checkpoint(tmp_path/'x.pt')
    assert (torch.equal(back['a'], torch.zeros(2)) and torch.equal(back['b'], torch.ones(2))
            and not hasattr(back['b'], 'note'))
    torch.save(dict(ema=dict(a=torch.zeros(2), b=torch.eye(2).to_sparse())), tmp_path/'y.pt')
    with pytest.raises(ValueError, match=r'1 weights are of a kind .* \(b: _rebuild_sparse_tensor\)') as e:
        read_checkpoint(tmp_path/'y.pt')
    assert '\n' not in str(e.value) and not (tmp_path/'ran').exists()


def test_damaged_and_foreign_files_are_one_clear_line(tmp_path):
    torch.save(dict(model=robustok_state(tiny())), tmp_path/'whole.pt')
    data = (tmp_path/'whole.pt').read_bytes()
    (tmp_path/'half.pt').write_bytes(data[:len(data)//2])
    (tmp_path/'text.pt').write_text('hello')
    torch.save([1, 2], tmp_path/'list.pt')
    for name, said in (('half.pt', "no checkpoint in torch's zip format"),
                       ('text.pt', "no checkpoint in torch's zip format"),
                       ('list.pt', 'holds no dictionary'), ('none.pt', 'no file')):
        with pytest.raises((ValueError, FileNotFoundError), match=said) as e:
            read_checkpoint(tmp_path/name)
        assert '\n' not in str(e.value)


def test_weights_that_do_not_fit_are_named_in_their_own_names(tmp_path):
    state = robustok_state(tiny())
    moved = {k: v for k, v in state.items() if k != 'decoder.mask_token'}
    moved |= {'extra': torch.zeros(1), 'quant_conv.weight': torch.zeros(4, 16, 1, 1)}
    save_file(moved, tmp_path/'x.safetensors')
    with pytest.raises(ValueError) as e: load_robustok(tiny(), tmp_path/'x.safetensors')
    said = str(e.value)
    assert '1 missing (decoder.mask_token)' in said and '1 unknown (extra)' in said and '\n' not in said
    assert 'quant_conv.weight: (4, 16, 1, 1) instead of (4, 32, 1, 1)' in said and 'x.safetensors' in said


def test_start_from_dinov2_in_a_file(tmp_path):
    weights = ({to_timm(k): v for k, v in ViT(70, 14, 3, 32, 1, 2).state_dict().items()}
               | {'mask_token': torch.zeros(1, 32)})
    save_file(weights, tmp_path/'dinov2.safetensors')
    tok = tiny()
    before = tiny()
    init_from_dinov2(tok, tmp_path/'dinov2.safetensors')
    for part in (tok.encoder, tok.decoder):
        assert torch.equal(part.vit.blocks[0].mlp[0].weight, weights['blocks.0.mlp.fc1.weight'])
        assert (torch.equal(part.vit.pos_embed[:, 0], weights['pos_embed'][:, 0])
                and part.vit.pos_embed.shape == (1, 17, 32))
    assert torch.equal(tok.encoder.latent_tokens, before.encoder.latent_tokens)
    assert torch.equal(tok.decoder.head.proj.weight, before.decoder.head.proj.weight)
    bad = ({k: v for k, v in weights.items() if k != 'norm.bias'}
           | {'blocks.0.attn.proj.bias': torch.zeros(31)})
    save_file(bad, tmp_path/'bad.safetensors')
    with pytest.raises(ValueError, match=r'bad.safetensors: 1 missing \(norm.bias\), 1 of another shape '
                                         r'\(blocks.0.attn.proj.bias'):
        init_from_dinov2(tok, tmp_path/'bad.safetensors')
    with pytest.raises(FileNotFoundError, match='no file'): init_from_dinov2(tok, tmp_path/'none.safetensors')


def test_usage_of_loaded_weights_is_not_overwritten_by_the_first_step():
    state = robustok_state(tiny())
    state['quantize.ema_vocab_hit_SV'] += 5
    tok = load_robustok(tiny(), state).train()
    tok.quantize(tok.encode(torch.zeros(2, 3, 16, 16)))
    assert (tok.quantizer.usage > 4).all()

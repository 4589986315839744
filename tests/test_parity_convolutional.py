"""Published convolutional tokenizers against values recorded from the authors' code:
activations on the way, ids, images, losses and gradients; names and shapes of the full-size files"""
import json, re

import pytest
import torch
import torch.nn.functional as F
from test_parity_tokenizer import close, recorded, tokens

from tokkit.quantizers import choice_entropies
from tokkit.published import PUBLISHED, by_rules
from tokkit.zoo_tokenizers import (ibq_state, ibq_tokenizer, maskgit_rules, maskgit_state, maskgit_tokenizer,
                                   var_rules, var_state, var_tokenizer, vqgan_lc_state, vqgan_lc_tokenizer,
                                   vqgan_rules, vqgan_state, vqgan_tokenizer)


def sizes(config):
    "Fields of `TokenizerCfg` from a configuration of taming-transformers"
    network = config['ddconfig']
    attended = network['attn_resolutions']
    levels = [l for l in range(len(network['ch_mult'])) if network['resolution']//2**l in attended]
    return dict(multipliers=tuple(network['ch_mult']), size=network['resolution'], width=network['ch'],
                depth=network['num_res_blocks'], z_channels=network['z_channels'],
                codebook_size=config['n_embed'], code_dim=config['embed_dim'],
                backbone_options=dict(attention=tuple(levels)))

def activations(model, rules):
    "What every module gives while the block runs, by the authors' name"
    found = {}
    def keep(name):
        def hook(_, __, out): found[by_rules(f'{name}.', rules).removesuffix('.')] = out
        return hook
    for name, module in model.named_modules(): module.register_forward_hook(keep(name))
    return found

def check_quantizer(tok, given, out, train):
    "Loss and gradients of the quantizer alone"
    vq = tok.quantizer.train()
    z = tokens(out['prequant']).requires_grad_()
    q = vq(z)
    close(q.loss, train['loss'])
    slope, rows = torch.autograd.grad(q.loss, [z, vq.embedding.weight], retain_graph=True)
    close(slope, tokens(train['grad_prequant']), 1e-4)
    close(rows, train['grad_embedding'], 1e-4)
    straight, = torch.autograd.grad((q.zq*tokens(given['w'])).sum(), z)
    close(straight, tokens(train['grad_prequant_st']), 1e-4)
    vq.eval()

def check_images(tok, given, out, out2):
    "Latents, ids and images, of two sizes"
    x = given['images']
    close(tok.encoder.features(x), out['encoder'])
    close(tok.encode(x), tokens(out['prequant']))
    assert torch.equal(tok.tokenize(x), out['indices'])
    close(tok.quantize(tok.encode(x)).zq, tokens(out['quant']))
    close(tok.reconstruct(x), out['image'])
    close(tok.detokenize(out['indices']), out['image_from_indices'])
    close(tok.detokenize(given['indices']), out['detokenized'])
    other = tok.sized(*given['images2'].shape[2:])
    assert torch.equal(other.tokenize(given['images2']), out2['indices'])
    close(other.reconstruct(given['images2']), out2['image'])

def check_taps(tok, rules, x, taps):
    "Activations on the way, the first image's first four channels"
    found = activations(tok, rules)
    tok.reconstruct(x)
    for name, want in taps.items():
        got = found.get(name, found.get(f'{name}.conv'))
        close(got[:1,:4], want)


@pytest.fixture(scope='module')
def vqgan(fixtures):
    config, sd, *rest = recorded(fixtures, 'zoo/taming_vqgan', 'sd', 'in', 'out', 'out2', 'train', 'tap')
    tok = vqgan_tokenizer(**sizes(config))
    tok.load_state_dict(vqgan_state(tok, {k: v.float() for k, v in sd.items()}))
    return tok.eval(), *rest

@torch.no_grad()
def test_vqgan_images_and_ids(vqgan):
    tok, given, out, out2, _, taps = vqgan
    check_images(tok, given, out, out2)
    close(tok.decoder.embed(tok.codes(out['indices'])), tokens(out['post_quant']))
    close(tok.quantize(tok.encode(given['images'])).loss, out['loss'])

@torch.no_grad()
def test_vqgan_on_the_way(vqgan):
    tok, given, *_, taps = vqgan
    check_taps(tok, vqgan_rules(3), given['images'], taps)

def test_vqgan_quantizer_in_training(vqgan):
    tok, given, out, _, train, _ = vqgan
    check_quantizer(tok, given, out, train)


@pytest.fixture(scope='module')
def maskgit(fixtures):
    config, sd, given, out, train = recorded(fixtures, 'zoo/maskgit_vqgan', 'sd', 'in', 'out', 'train')
    m = config['model']
    tok = maskgit_tokenizer(tuple(m['channel_mult']), m['resolution'], width=m['hidden_channels'],
                            depth=m['num_res_blocks'], codebook_size=config['num_embeddings'],
                            code_dim=config['embedding_dim'])
    tok.load_state_dict(maskgit_state(tok, {k: v.float() for k, v in sd.items()}))
    return tok.eval(), given, out, train

@torch.no_grad()
def test_maskgit_images_and_ids(maskgit):
    tok, given, out, _ = maskgit
    x = 2*given['images']-1                         # theirs lie in [0,1]
    z = tok.encode(x)
    close(z, tokens(out['z']))
    assert torch.equal(tok.tokenize(x), out['indices'])
    close(tok.quantize(z).zq, tokens(out['z_q']))
    close((tok.reconstruct(x)+1)/2, out['decoded_unclamped'])
    close((tok.detokenize(out['indices'])+1).div(2).clamp(0, 1), out['decoded'])
    distances = torch.cdist(z.flatten(0, 1), tok.codebook).square()
    close(distances, out['distances'])
    close((-distances/.7).softmax(1).view_as(out['soft_code_T0.7']), out['soft_code_T0.7'])

@torch.no_grad()
def test_maskgit_on_the_way(maskgit):
    tok, given, out, _ = maskgit
    found = activations(tok, maskgit_rules(3))
    tok.reconstruct(2*given['images']-1)
    names = dict(enc='encoder', dec='decoder')
    taps = {k: v for k, v in out.items() if k.partition('.')[0] in names}
    assert len(taps) == 12
    for name, want in taps.items():
        part, _, rest = name.partition('.')
        close(found[f'{names[part]}.{rest}'], want)

def test_maskgit_quantizer_in_training(maskgit):
    tok, given, out, train = maskgit
    vq = tok.quantizer.train()
    z = tokens(out['z']).requires_grad_()
    q = vq(z)
    close(q.loss, train['loss'])
    close(q.zq, tokens(train['z_q']))
    total = q.loss+(q.zq*tokens(given['loss_weight'])).sum()
    slope, rows = torch.autograd.grad(total, [z, vq.embedding.weight])
    close(slope, tokens(train['grad_z']), 1e-4)
    close(rows, train['grad_codebook'], 1e-4)
    vq.eval()


@pytest.fixture(scope='module')
def var(fixtures):
    config, sd, *rest = recorded(fixtures, 'zoo/var_vqvae', 'sd', 'in', 'out', 'train', 'tap')
    scales = tuple(config['v_patch_nums'])
    tok = var_tokenizer(tuple(config['ch_mult']), 32, scales, width=config['ch'],
                        depth=config['num_res_blocks'], z_channels=config['z_channels'],
                        codebook_size=config['vocab_size'], code_dim=config['z_channels'])
    kept = {k: v.float() for k, v in sd.items() if not k.endswith('ema_vocab_hit_SV')}
    tok.load_state_dict(var_state(tok, kept))
    return tok.eval(), *rest

def one_row(parts):
    "Ids of all scales, one after the other; theirs lie in a list"
    return torch.cat([parts[f'indices.{s}'] for s in range(5)], 1)

@torch.no_grad()
def test_var_images_and_ids(var):
    tok, given, out, *_ = var
    x = given['images']
    close(tok.encoder.features(x), out['encoder'])
    close(tok.encode(x), tokens(out['prequant']))
    ids = tok.tokenize(x)
    assert torch.equal(ids, one_row(out))
    for s, hat in enumerate(tok.quantizer.progress(ids)): close(hat, tokens(out[f'fhat.{s}']))
    close(tok.reconstruct(x), out['image_unclamped'])
    close(tok.reconstruct(x).clamp(-1, 1), out['image'])
    close(tok.detokenize(one_row(given)).clamp(-1, 1), out['detokenized'])
    close(tok.decoder.embedded(tok.quantize(tok.encode(x)).zq), out['post_quant'])
    before_last = tok.quantizer.progress(ids)[-2]
    close(tok.decode(before_last).clamp(-1, 1), out['image_before_last'])

@torch.no_grad()
def test_var_on_the_way(var):
    tok, given, *_, taps = var
    check_taps(tok, var_rules(3), given['images'], taps)

@torch.no_grad()
def test_var_what_a_generator_of_scales_is_given(var):
    "The map so far on the next scale's grid: a generator's input, in training and step by step"
    tok, given, out, *_ = var
    def on_grid(hat, side): return F.interpolate(tokens_to_map(hat), size=(side, side), mode='area')
    scales = tok.quantizer.scales
    hats = tok.quantizer.progress(tok.tokenize(given['images']))
    seen = [on_grid(hat, side).flatten(2).mT for hat, side in zip(hats, scales[1:])]
    close(torch.cat(seen, 1), out['var_input'])
    hats = tok.quantizer.progress(one_row(given))
    for s, (hat, side) in enumerate(zip(hats, scales[1:])): close(on_grid(hat, side), out[f'next_input.{s}'])
    close(tokens_to_map(hats[-1]), out['generated_fhat'])

def tokens_to_map(z): return z.mT.unflatten(2, (8, 8))

def test_var_quantizer_in_training(var):
    tok, given, out, train, _ = var
    vq = tok.quantizer.train()
    z = tokens(out['prequant']).requires_grad_()
    q = vq(z)
    close(q.loss, train['loss'])
    close(q.zq, tokens(train['fhat']))
    rules = var_rules(3)
    def theirs(name): return by_rules(f'quantizer.{name}', rules).removeprefix('quantize.')
    names = {theirs(name): p for name, p in vq.named_parameters()}
    grads = {k.removeprefix('grad.'): v for k, v in train.items() if k.startswith('grad.')}
    slope, *found = torch.autograd.grad(q.loss, [z, *(names[name] for name in grads)], retain_graph=True)
    close(slope, tokens(train['grad_prequant']), 1e-4)
    for name, got in zip(grads, found): close(got, grads[name], 1e-4)
    straight, = torch.autograd.grad((q.zq*tokens(given['w'])).sum(), z)
    close(straight, tokens(train['grad_prequant_st']), 1e-4)
    vq.eval()


@pytest.fixture(scope='module')
def lc(fixtures):
    config, sd, *rest = recorded(fixtures, 'zoo/vqgan_lc', 'sd', 'in', 'out', 'train')
    fields = sizes(config|dict(n_embed=config['n_vision_words']))
    tok = vqgan_lc_tokenizer(**fields, source=config['codebook_dim'])
    tok.load_state_dict(vqgan_lc_state(tok, {k: v.float() for k, v in sd.items()}))
    return tok.eval(), *rest

def test_vqgan_lc(lc):
    tok, given, out, train = lc
    with torch.no_grad():
        x = given['images']
        close(tok.encoder.features(x), out['encoder'])
        close(tok.encode(x), tokens(out['prequant']))
        close(tok.codebook, out['projected_codebook'])
        assert torch.equal(tok.tokenize(x), out['indices'])
        q = tok.quantize(tok.encode(x))
        close(q.zq, tokens(out['quant']))
        close(q.loss, out['loss'])
        close(tok.decoder.embed(q.zq), tokens(out['post_quant']))
        close(tok.reconstruct(x), out['image'])
        close(tok.detokenize(given['indices']), out['detokenized'])
    vq = tok.quantizer.train()
    z = tokens(out['prequant']).requires_grad_()
    q = vq(z)
    close(q.loss, train['loss'])
    wanted = [z, vq.projection.weight, vq.projection.bias]
    slope, weight, bias = torch.autograd.grad(q.loss, wanted, retain_graph=True)
    close(slope, tokens(train['grad_prequant']), 1e-4)
    close(weight, train['grad_projection_weight'], 1e-4)
    close(bias, train['grad_projection_bias'], 1e-4)
    straight, = torch.autograd.grad((q.zq*tokens(given['w'])).sum(), z)
    close(straight, tokens(train['grad_prequant_st']), 1e-4)
    vq.eval()


@pytest.fixture(scope='module')
def ibq(fixtures):
    config, sd, *rest = recorded(fixtures, 'zoo/ibq', 'sd', 'in', 'out', 'raw', 'train')
    theirs = {k: v.float() for k, v in sd.items() if not re.search(r'model_ema\.(decay|num_updates)$', k)}
    made = []
    for state in (theirs, {k: v for k, v in theirs.items() if not k.startswith('model_ema.')}):
        tok = ibq_tokenizer(**sizes(config))
        tok.load_state_dict(ibq_state(tok, state))
        made.append(tok.eval())
    return *made, *rest

@torch.no_grad()
def test_ibq_images_and_ids(ibq):
    "By the averaged weights, which its authors evaluate with, and by the others"
    tok, plain, given, out, raw, _ = ibq
    x = given['images']
    close(tok.encoder.features(x), out['encoder'])
    close(tok.encode(x), tokens(out['prequant']))
    assert torch.equal(tok.tokenize(x), out['indices'])
    close(tok.quantize(tok.encode(x)).zq, tokens(out['quant']))
    close(tok.reconstruct(x), out['image'])
    close(tok.codes(out['indices']), tokens(out['codes']))
    close(tok.detokenize(out['indices']), out['image_from_indices'])
    close(tok.detokenize(given['indices']), out['detokenized'])
    close(plain.encode(x), tokens(raw['prequant']))
    assert torch.equal(plain.tokenize(x), raw['indices'])
    close(plain.reconstruct(x), raw['image'])

def test_ibq_quantizer_in_training(ibq):
    _, tok, given, _, raw, train = ibq
    vq = tok.quantizer.train()
    z = tokens(raw['prequant']).requires_grad_()
    q = vq(z)
    each, over_all, entropy = choice_entropies(z@vq.embedding.weight.T, vq.temperature)
    close(q.loss, train['quant_loss'])
    close(each, train['sample_entropy'])
    close(over_all, train['avg_entropy'])
    close(entropy, train['entropy_loss'])
    decoded = (q.zq*tokens(given['w'])).sum()
    for total, ending in ((q.loss, ''), (decoded, '_st'), (entropy, '_entropy')):
        slope, rows = torch.autograd.grad(total, [z, vq.embedding.weight], retain_graph=True)
        close(slope, tokens(train[f'grad_prequant{ending}']), 1e-4)
        close(rows, train[f'grad_embedding{ending}'], 1e-4)
    vq.eval()


FULL = [('vqgan-lc-f16', 'shapes_cnn_vq', 'vqgan_lc_f16_dim8'),
        ('ibq-16384', 'shapes_cnn_vq', 'ibq_16384'),
        ('var-vae', 'shapes_cnn_vq', 'var_vae_ch160v4096z32'),
        ('vqgan-f16-1024', 'shapes_cnn_vq', 'taming_vqgan_f16_1024'),
        ('vqgan-f16-16384', 'shapes_cnn_vq', 'taming_vqgan_f16_16384'),
        ('ldm-vq-f8', 'shapes_cnn_vq', 'latent_diffusion_vq_f8'),
        ('maskgit-vqgan', 'shapes_titok_maskgit', 'maskgit_vqgan')]

@pytest.mark.parametrize('name, file, key', FULL)
def test_names_and_shapes_at_full_size(fixtures, name, file, key):
    shapes = json.loads((fixtures/'zoo'/f'{file}.json').read_text())[key]
    with torch.device('meta'):
        theirs = {k: torch.empty(shape, dtype=getattr(torch, dtype)) for k, (shape, dtype) in shapes.items()
                  if not any(re.search(pattern, k) for pattern in PUBLISHED[name].ignored)}
        tok = PUBLISHED[name].build()
    ours = PUBLISHED[name].rename(tok, theirs)      # strict: raises where a name is missing or too many
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in tok.state_dict().items()}

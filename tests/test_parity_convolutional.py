"""Published convolutional tokenizers against values recorded from the authors' code:
activations on the way, ids, images, losses and gradients; names and shapes of the full-size files"""
import json

import pytest
import torch
from test_parity_tokenizer import close, recorded, tokens

from tokkit.zoo import (PUBLISHED, by_rules, maskgit_rules, maskgit_state, maskgit_tokenizer, vqgan_rules,
                        vqgan_state, vqgan_tokenizer)


def sizes(config):
    "Fields of `TokenizerCfg` from a configuration of taming-transformers"
    network = config['ddconfig']
    return dict(multipliers=tuple(network['ch_mult']), size=network['resolution'], width=network['ch'],
                depth=network['num_res_blocks'], z_channels=network['z_channels'],
                codebook_size=config['n_embed'], code_dim=config['embed_dim'])

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


FULL = [('vqgan-f16-1024', 'shapes_cnn_vq', 'taming_vqgan_f16_1024'),
        ('vqgan-f16-16384', 'shapes_cnn_vq', 'taming_vqgan_f16_16384'),
        ('ldm-vq-f8', 'shapes_cnn_vq', 'latent_diffusion_vq_f8'),
        ('maskgit-vqgan', 'shapes_titok_maskgit', 'maskgit_vqgan')]

@pytest.mark.parametrize('name, file, key', FULL)
def test_names_and_shapes_at_full_size(fixtures, name, file, key):
    shapes = json.loads((fixtures/'zoo'/f'{file}.json').read_text())[key]
    with torch.device('meta'):
        theirs = {k: torch.empty(shape, dtype=getattr(torch, dtype)) for k, (shape, dtype) in shapes.items()}
        tok = PUBLISHED[name].build()
    ours = PUBLISHED[name].rename(tok, theirs)      # strict: raises where a name is missing or too many
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in tok.state_dict().items()}

"""SoftVQ with a modulated decoder against values recorded from the authors' code, under their tensor names:
activations on the way, latents, images, the entropy loss and gradients"""
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from recordings import encoded, outputs
from test_parity_tokenizer import close, recorded

from tokkit.perturbation import LatentPerturbation
from tokkit.published import PUBLISHED
from tokkit.tokenizers import load_tokenizer
from tokkit.zoo import load
from tokkit.zoo_tokenizers import softvq_tokenizer

NAME = 'zoo/softvq_movq'


def network(sizes): return sizes['embed_dim'], sizes['depth'], sizes['num_heads']

def register(config, name):
    "An entry of the recorded size; codebooks and kinds of network are read off the file"
    build = partial(softvq_tokenizer, network(config['encoder_dims']), network(config['decoder_dims']),
                    config['num_latent_tokens'], config['image_size'], patch=config['enc_patch_size'])
    PUBLISHED.register(name, replace(PUBLISHED['softvq-b-32'], build=build, title=name))

@pytest.fixture(scope='module')
def softvq(fixtures, tmp_path_factory):
    "A file and its configuration as they are published, of the recorded size, through `load`"
    config, sd, *rest = recorded(fixtures, NAME, 'sd', 'in', 'out', 'train', 'grad')
    folder = tmp_path_factory.mktemp('softvq')
    save_file(sd, folder/'model.safetensors')
    (folder/'config.json').write_text(json.dumps(config))
    register(config, 'softvq-small')
    tok = load('softvq-small', folder/'model.safetensors')
    del PUBLISHED._things['softvq-small']
    return tok, config, *rest

def test_what_was_taken(softvq, tmp_path):
    "Codebooks by the file, temperature and scale by its configuration; a saved copy has them too"
    tok, config, given, *_ = softvq
    assert sum(tok.loaded.ignored.values()) == 4
    assert tok.quantizer.embedding.shape == (config['num_codebooks'], config['codebook_size'],
                                             config['codebook_embed_dim'])
    assert (tok.spec.mean, tok.spec.std) == (config['vq_mean'], config['vq_std'])
    assert tok.spec.codebook_size is None
    assert (tok.quantizer.temperature, tok.quantizer.entropy) == (config['tau'],
                                                                  config['entropy_loss_ratio'])
    tok.quantizer.temperature = .2      # of a configuration that says so
    tok.cfg = replace(tok.cfg, quantizer_options=tok.cfg.quantizer_options|dict(temperature=.2))
    copy = load_tokenizer(tok.save(tmp_path/'copy'))
    x = given['images']
    with torch.no_grad(): assert torch.equal(copy.reconstruct(x), tok.reconstruct(x))
    tok.quantizer.temperature = config['tau']
    tok.cfg = replace(tok.cfg, quantizer_options=tok.cfg.quantizer_options|dict(temperature=config['tau']))

def test_a_file_of_other_sizes_is_refused(fixtures):
    _, sd = recorded(fixtures, NAME, 'sd')
    entry = PUBLISHED['softvq-l-64']
    with torch.device('meta'): tok = entry.built(sd)
    assert tok.quantizer.embedding.shape == sd['quantize.embedding'].shape
    with pytest.raises(ValueError, match='of another shape') as e: entry.rename(tok, sd)
    assert '\n' not in str(e.value)

def test_a_quantizer_without_normalisation_is_refused(softvq):
    tok, config, *_ = softvq
    with pytest.raises(ValueError, match='codebook_l2_norm false'):
        PUBLISHED['softvq-b-32'].configure(tok, config|dict(codebook_l2_norm=False))

@torch.no_grad()
def test_activations_and_images(softvq):
    tok, config, given, out, *_ = softvq
    encoder, decoder = tok.encoder.body, tok.decoder.body
    parts = dict(enc_block0=encoder.blocks[0], dec_block0=decoder.blocks[0],
                 dec_block_last=decoder.blocks[-1])
    with outputs(**parts) as found:
        encoded(tok, close, given, out)
        close(tok.to_latents(given['images']), out['latents'])
        close(tok.decoder.sequence(out['latents']), out['dec_sequence'])
        close(tok.reconstruct(given['images']), out['reconstruction'])
    for name, got in found.items(): close(got, out[name])
    close(tok.from_latents(given['latents_normalised']*tok.spec.std+tok.spec.mean),
          out['decode_denormalised'])

@torch.no_grad()
def test_largest_weights(softvq):
    "Their ids lie flat by codebook, image and place, under a shape that says otherwise"
    tok, config, _, out, *_ = softvq
    ids = tok.quantizer.likeliest(out['pre_quant'])
    by_book = ids.unflatten(1, (config['num_codebooks'], -1)).transpose(0, 1)
    assert torch.equal(by_book.flatten(), out['indices'].flatten())
    zq = tok.quantize(out['pre_quant']).zq
    close(F.cosine_similarity(zq, out['pre_quant'], dim=-1).mean()[None], out['zq_z_cos'])

def test_quantizer_in_training(softvq):
    tok, _, given, out, train, grad = softvq
    vq = tok.quantizer.train()
    z = out['pre_quant'].clone().requires_grad_()
    q = vq(z)
    close(q.loss[None], train['entropy_loss'])
    slope, rows = torch.autograd.grad((q.zq*given['grad_weight']).sum(), [z, vq.embedding], retain_graph=True)
    close(slope, grad['pre_quant'], 1e-4)
    close(rows, grad['embedding'], 1e-4)
    slope, rows = torch.autograd.grad(q.prior_loss, [z, vq.embedding], allow_unused=True)
    assert slope.any() and rows is None
    vq.eval()

def test_damage_is_noise(softvq):
    tok, _, given, *_ = softvq
    z = tok.encode(given['images'])
    q = tok.quantize(z)
    noisy = LatentPerturbation(kind='gaussian', strength=.5, beta=1.)(z, q, tok.quantizer)
    assert noisy.ids is None and (noisy.zq != q.zq).all()
    with pytest.raises(ValueError, match='continuous latents'):
        LatentPerturbation(kind='nearest')(z, q, tok.quantizer)
    with pytest.raises(ValueError, match='no id names') as e: tok.quantizer.codes(torch.zeros(1, dtype=int))
    assert '\n' not in str(e.value)

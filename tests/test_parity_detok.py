"""DeTok against values recorded from the authors' code, under their tensor names"""
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from einops import rearrange
from recordings import check_full_size, outputs
from test_parity_tokenizer import close, recorded

from tokkit.core import make_rng
from tokkit.published import PUBLISHED
from tokkit.tokenizers import (ChannelScale, TokenizerCfg, detok_turns, fit_spec, mix_noise,
                               reconstruct_damaged, visible_patches)
from tokkit.zoo import load
from tokkit.zoo_tokenizers import detok_tokenizer


def maps(z): return rearrange(z, 'b (h w) d -> b d h w', h=4)

@pytest.fixture(scope='module')
def detok(fixtures, tmp_path_factory):
    "A file as it is published, of the recorded size, through `load`"
    config, sd, *rest = recorded(fixtures, 'zoo/detok', 'sd', 'in', 'out', 'mask', 'noise')
    def sizes(side):
        network = config['sizes'][config[f'vit_{side}_model_size']]
        return network['width'], network['layers'], network['heads']
    build = partial(detok_tokenizer, config['img_size'], sizes('enc'), sizes('dec'),
                    patch=config['patch_size'], code_dim=config['token_channels'])
    file = tmp_path_factory.mktemp('detok')/'small.pth'
    torch.save(dict(model={k: torch.zeros_like(v) for k, v in sd.items()}, model_ema=sd, epoch=3), file)
    PUBLISHED.register('detok-small', replace(PUBLISHED['detok-bb'], build=build, title='small'))
    tok = load('detok-small', file)
    del PUBLISHED._things['detok-small']
    return tok, config, *rest

def test_averaged_weights_are_taken(detok):
    tok, *_ = detok
    assert tok.loaded.weights == 'model_ema' and not tok.loaded.ignored

def test_turns(detok):
    _, _, _, out, *_ = detok
    turns = detok_turns((4, 4), 16)
    close(torch.cat([turns[...,0], turns[...,1]], 1)[None], out['rope'], 1e-6)

@torch.no_grad()
def test_activations_and_images(detok):
    tok, _, given, out, *_ = detok
    encoder, decoder = tok.encoder.body, tok.decoder.body
    parts = dict(enc_sequence=encoder.ln_pre, enc_block0=encoder.blocks[0], dec_sequence=decoder.ln_pre,
                 dec_block_last=decoder.blocks[-1])
    with outputs(**parts) as found:
        x = given['images']
        close(torch.cat(tok.encode(x).chunk(2, -1)), torch.cat([out['mean'], out['logvar']]))
        z = tok.to_latents(x)
        close(z, out['mean'])
        image = tok.from_latents(z)
    assert set(found) == set(parts)
    for name, got in found.items(): close(got, out[name])
    close(image, out['decoded'])
    close((tok.reconstruct(x)/2+.5).clamp(0, 1), out['reconstruct'])

@torch.no_grad()
def test_scale_of_each_channel(detok):
    tok, _, given, out, *_ = detok
    scale = ChannelScale(given['mean'], given['std'])
    z = scale.normalize(tok.to_latents(given['images']))
    close(maps(z), out['tokenize'])
    image = tok.from_latents(scale.denormalize(rearrange(out['tokenize'], 'b d h w -> b (h w) d')))
    close((image/2+.5).clamp(0, 1), out['detokenize'])

@torch.no_grad()
def test_drawn_latents_and_divergence(detok, monkeypatch):
    tok, _, given, out, *_ = detok
    moments = tok.encode(given['images'])
    for row, divergence in zip(moments, out['kl']):
        mean_over_elements = tok.quantizer(row[None]).prior_loss/tok.quantizer.kl
        close(mean_over_elements*row.numel()/2, divergence)
    monkeypatch.setattr(torch, 'randn_like', lambda *_: given['posterior_noise'])
    drawn = tok.quantizer.train()(moments).zq
    tok.quantizer.eval()
    close(drawn, out['sampled'])

@torch.no_grad()
def test_hidden_patches(detok):
    tok, config, given, _, mask, _ = detok
    visible = visible_patches(mask['rand'], config['mask_ratio_used'])
    assert torch.equal(visible, mask['ids_restore'].argsort(1)[:,:8])
    z = tok.quantize(tok.encoder(given['images'], visible)).zq
    close(z, mask['latents'])
    close(tok.decoder(z, visible), mask['decoded'])

def test_noise(detok):
    _, config, _, out, _, noise = detok
    level = noise['level'].flatten()
    close(mix_noise(out['mean'], level, noise['normal'], config['gamma']), noise['latents'])

@torch.no_grad()
def test_damaged_reconstruction_is_made_of_these(detok, monkeypatch):
    "Their draws in the place of ours: patches, then noise"
    tok, config, given, _, mask, noise = detok
    few = noise['normal'][:,:8]
    draws = iter([mask['rand'], noise['level'].flatten()])
    monkeypatch.setattr(torch, 'rand', lambda *_, **__: next(draws))
    monkeypatch.setattr(torch, 'randn', lambda *_, **__: few)
    visible = visible_patches(mask['rand'], .5)
    z = mix_noise(mask['latents'], noise['level'].flatten(), few, config['gamma'])
    close(reconstruct_damaged(tok, given['images'], .5, config['gamma']), tok.decoder(z, visible))

@pytest.mark.parametrize('n, hidden', [(256, .7), (16, .5), (10, .7), (10, 0.), (7, .9)])
def test_how_many_are_seen(n, hidden):
    seen = visible_patches(torch.rand(3, n, generator=make_rng(0)), hidden)
    assert seen.shape == (3, math.ceil(n*(1-hidden))) and all(len(row.unique()) == len(row) for row in seen)

def test_hidden_patches_are_learned_from(detok):
    "A gradient reaches the mask token, every layer of the decoder, and the encoder"
    tok, _, given, *_ = detok
    reconstruct_damaged(tok, given['images'], .5, rng=make_rng(0)).square().mean().backward()
    for name, p in tok.named_parameters(): assert p.grad is not None and p.grad.abs().max() > 0, name
    tok.zero_grad()

def test_its_scale_is_measured(detok):
    tok, _, given, *_ = detok
    before = tok.spec
    spec = fit_spec(tok, given['images'])
    tok.spec = before
    assert spec.std != 1 and spec.shape == (16, 6)

def test_what_goes_wrong():
    for heads in (5, 16): # does not divide the width; leaves four channels
        with pytest.raises(ValueError, match='heads must divide width'):
            TokenizerCfg(32, 3, 8, 'detok', width=64, heads=heads)
    with pytest.raises(ValueError, match='heads must divide width'):
        TokenizerCfg(32, 3, 8, 'detok', width=64, heads=4, backbone_options=dict(decoder=(30, 1, 4)))


@pytest.mark.parametrize('name', ['detok-bb', 'detok-bb-tuned'])
def test_names_and_shapes_at_full_size(fixtures, name):
    shapes, theirs, model = check_full_size(fixtures, 'shapes_gpt_maetok_sit.json', 'detok_BB',
                                            PUBLISHED[name])
    assert len(model.state_dict()) == len(theirs) == len(shapes)

"""MAETok against values recorded from the authors' code, under their tensor names"""
import json, re
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from recordings import check_full_size, encoded, outputs
from test_parity_tokenizer import close, recorded

from tokkit.zoo_tokenizers import MAETOK_UNUSED, maetok_tokenizer
from tokkit.published import PUBLISHED
from tokkit.zoo import load

NAME = 'zoo/maetok'


def sizes(config):
    "Arguments of `maetok_tokenizer`"
    network = config['encoder_dims']
    return dict(size=config['image_size'], latents=config['num_latent_tokens'],
                patch=config['enc_patch_size'], width=network['embed_dim'], depth=network['depth'],
                heads=network['num_heads'], code_dim=config['codebook_embed_dim'])

@pytest.fixture(scope='module')
def maetok(fixtures, tmp_path_factory):
    "A file and its configuration as they are published, of the recorded size, through `load`"
    config, sd, given, out = recorded(fixtures, NAME, 'sd', 'in', 'out')
    folder = tmp_path_factory.mktemp('maetok')
    save_file(sd, folder/'model.safetensors')
    (folder/'config.json').write_text(json.dumps(config))
    build = partial(maetok_tokenizer, **sizes(config))
    PUBLISHED.register('maetok-small', replace(PUBLISHED['maetok-b-128'], build=build, title='small'))
    tok = load('maetok-small', folder/'model.safetensors')
    del PUBLISHED._things['maetok-small']
    return tok, config, given, out

def test_a_configuration_that_lies_about_is_not_taken(fixtures, tmp_path, monkeypatch):
    "Tensors have no folder: a config.json of the working directory is somebody else's"
    config, sd = recorded(fixtures, NAME, 'sd')
    monkeypatch.chdir(tmp_path)
    (tmp_path/'config.json').write_text(json.dumps(config))
    build = partial(maetok_tokenizer, **sizes(config))
    PUBLISHED.register('maetok-tensors', replace(PUBLISHED['maetok-b-128'], build=build, title='tensors'))
    with pytest.warns(UserWarning, match='no config.json beside the weights'):
        tok = load('maetok-tensors', sd)
    del PUBLISHED._things['maetok-tensors']
    assert (tok.spec.mean, tok.spec.std) == (0., 1.)

def test_what_was_taken(maetok):
    tok, config, *_ = maetok
    assert sum(tok.loaded.ignored.values()) == 8
    assert (tok.spec.mean, tok.spec.std) == (config['vq_mean'], config['vq_std'])

@torch.no_grad()
def test_activations_and_images(maetok):
    tok, config, given, out = maetok
    encoder, decoder = tok.encoder.body, tok.decoder.body
    parts = dict(enc_block0=encoder.blocks[0], dec_block0=decoder.blocks[0],
                 dec_block_last=decoder.blocks[-1])
    with outputs(**parts) as found:
        z = encoded(tok, close, given, out)
        close(tok.quantize(z).zq, out['latents'])
        close(tok.decoder.sequence(z), out['dec_sequence'])
        close(tok.reconstruct(given['images']), out['reconstruction'])
    for name, got in found.items(): close(got, out[name])
    latents = given['latents_normalised']*tok.spec.std+tok.spec.mean
    close(tok.from_latents(latents), out['decode_denormalised'])

def test_the_generators_scale(maetok):
    _, config, *_ = maetok
    entry = PUBLISHED['maetok-sit-xl']
    generator = entry.build(n=8, dim=6, width=32, depth=1, heads=4)
    entry.configure(generator, config)
    assert (generator.cfg.mean, generator.cfg.std) == (config['vq_mean'], config['vq_std'])


FULL = [('maetok-b-128', 'maetok_b_128_plain_decoder_assumed'), ('maetok-sit-xl', 'maetok_sit_xl_1_128x32')]

@pytest.mark.parametrize('name, key', FULL)
def test_names_and_shapes_at_full_size(fixtures, name, key):
    shapes, theirs, _ = check_full_size(fixtures, 'shapes_gpt_maetok_sit.json', key, PUBLISHED[name])
    assert len(shapes)-len(theirs) == sum(bool(re.search(p, k)) for k in shapes for p in MAETOK_UNUSED)

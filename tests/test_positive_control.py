"""The positive control of healing: errors that can be undone are undone. If this fails, the pipeline is
broken, whatever studies of real generators say"""
from dataclasses import replace

import pytest
import torch

from tokkit.data import fashion_mnist
from tokkit.features import get_extractor, spectrum_extractor
from tokkit.metrics import gfid, mean_card
from tokkit.posttraining import channel_pairs, clean_pairs, ErrorChannel, posttrain_decoder
from tokkit.tokenizers import decode_all, make_tokenizer
from tokkit.training import ImageTraining, train_tokenizer

SHARP = dict(perceptual=0., distribution=.1, distribution_kind='frechet',
             distribution_options=dict(layers=(1, 4), size=28))


@pytest.fixture(scope='module')
def trained():
    "A small tokenizer, and 2,000 images it has learnt from"
    images = fashion_mnist('train', 2000)
    tok = make_tokenizer('tiny', width=32, depth=1, codebook_size=64)
    train_tokenizer(tok, images, ImageTraining(epochs=8, batch=50, **SHARP), device='cpu')
    return tok, images


def measured(tok, latents, test) -> dict:
    "Cards of two judges, and of the error of every image"
    made = decode_all(tok, latents).clamp(-1, 1)
    judges = dict(lite0=get_extractor('efficientnet_lite0', 28), spectrum=spectrum_extractor(channels=1))
    cards = {name: gfid(made, test, judge, bootstrap=20, device='cpu') for name, judge in judges.items()}
    return cards | dict(pixels=mean_card('pixels', (made-test[:][0]).square().mean((1, 2, 3)), 20, 0))


@pytest.mark.parametrize('kind', ['fixed', 'random'])
def test_known_errors_are_healed(trained, kind):
    """What can be undone is healed by the error of each image and by every judge that sees the damage;
    what can only be guessed, by the error of each image"""
    tok, images = trained
    test = fashion_mnist('test', 500)
    errors = ErrorChannel(kind, 16)
    how = ImageTraining(epochs=4, batch=50, lr=2e-3, **SHARP)
    arms = dict(control=clean_pairs(tok, images), healed=channel_pairs(tok, images, errors, 'train'))
    decoders = {arm: posttrain_decoder(tok, pairs, how, device='cpu')[0] for arm, pairs in arms.items()}
    hurt = channel_pairs(tok, test, errors, 'test').latents
    clean = channel_pairs(tok, test, replace(errors, rate=0.)).latents
    assert torch.equal(clean, clean_pairs(tok, test).latents)
    control, healed = (measured(decoders[arm], hurt, test) for arm in arms)
    unhurt = measured(decoders['control'], clean, test)
    seen = [name for name in control if control[name].change(unhurt[name]).value > 10]
    assert 'pixels' in seen and len(seen) >= 2
    gains = {name: healed[name].change(control[name]) for name in (seen if kind == 'fixed' else ['pixels'])}
    assert all(gain.value < -2*gain.se for gain in gains.values()), gains
    # on clean tokens the healed decoder has nothing to win
    assert measured(decoders['healed'], clean, test)['pixels'].value > .97*unhurt['pixels'].value

"""Every published tokenizer's network, small, through everything: latents and back, pFID, perturbed training,
pairs with a generator of its latents, a step of post-training, saved and read back"""
from functools import partial

import pytest
import torch

from tokkit.core import make_rng
from tokkit.data import fashion_mnist, ImageSet
from tokkit.generators import make_generator
from tokkit.metrics import pfid
from tokkit.perturbation import LatentPerturbation
from tokkit.posttraining import latent_pairs, posttrain_decoder
from tokkit.tokenizers import Tokenizer, TokenizerCfg, load_tokenizer
from tokkit.training import ImageTraining, train_tokenizer
from tokkit.published import PUBLISHED
from tokkit.zoo_tokenizers import (detok_tokenizer, gigatok_tokenizer, ibq_tokenizer, llamagen_tokenizer,
                                   maetok_tokenizer, magvit2_tokenizer, maskgit_tokenizer, softvq_tokenizer,
                                   taef2_tokenizer, titok_tokenizer, var_tokenizer, vqgan_lc_tokenizer,
                                   vqgan_tokenizer)

SIDE = 32
NETWORK = dict(multipliers=(1, 1, 2), size=SIDE, width=32, depth=1, codebook_size=64)
INNER = dict(multipliers=(1, 1, 2), width=32, depth=1, codebook_size=64, code_dim=8)
LINE = dict(encoder=(32, 1, 4), decoder=(32, 1, 4), latents=6, size=SIDE, patch=4)

def robustok():
    return Tokenizer(TokenizerCfg(SIDE, 3, 8, 'robustok', latents=16, width=32, depth=1, heads=4,
                                  codebook_size=64, code_dim=8, refine=0))

def tatitok():
    "Its text is read once, as somebody who has only images would do it"
    tok = titok_tokenizer(**LINE, codebook_size=64, text=(7, 20))
    tok.decoder.read(torch.randn(7, 20))
    return tok

# what builds each, as it is registered -> the same network, small
SMALL = {
    'robustok': robustok,
    'llamagen': partial(llamagen_tokenizer, **NETWORK, z_channels=16),
    'vqgan': partial(vqgan_tokenizer, **NETWORK, z_channels=16, code_dim=8),
    'vqgan-lc': partial(vqgan_lc_tokenizer, **NETWORK, z_channels=16, code_dim=8, source=16),
    'ibq': partial(ibq_tokenizer, **NETWORK, z_channels=16, code_dim=8),
    'maskgit': partial(maskgit_tokenizer, **NETWORK, code_dim=8),
    'magvit2': partial(magvit2_tokenizer, **NETWORK),
    'var': partial(var_tokenizer, **NETWORK, z_channels=8, code_dim=8, scales=(1, 2, 4, 8)),
    'titok': partial(titok_tokenizer, **LINE, legacy=True, pixels=INNER, codebook_size=64),
    'titok-vq': partial(titok_tokenizer, **LINE, codebook_size=64),
    'titok-vae': partial(titok_tokenizer, **LINE, quantizer='kl', codebook_size=0, code_dim=4),
    'tatitok': tatitok,
    'maetok': partial(maetok_tokenizer, SIDE, 6, width=32, depth=1, heads=4, code_dim=4),
    'gigatok': partial(gigatok_tokenizer, (32, 1, 4), (32, 1, 4), SIDE, dict(width=16, depth=1), patch=4,
                       latents=16, multipliers=(1, 1, 2), z_channels=16, codebook_size=64, entropy=.1),
    'softvq': partial(softvq_tokenizer, **LINE, segments=2, codebook_size=64, code_dim=4),
    'taef2': partial(taef2_tokenizer, SIDE),
    'detok': partial(detok_tokenizer, SIDE, (32, 1, 4), (32, 1, 4), patch=8, code_dim=4),
}

def function_of(build): return getattr(build, 'func', build)

def test_every_entry_has_its_small_network():
    "A family that is published and not driven below would be missed"
    driven = {function_of(build) for build in SMALL.values()}
    built = {function_of(entry.build) for entry in PUBLISHED.values() if not entry.tokenizer}
    assert {f.__name__ for f in built-driven} == {'_base_tokenizer'}        # of robustok, driven by its size

@pytest.fixture(scope='module')
def images():
    grey = fashion_mnist('test', 8, size=SIDE)
    three = grey.images.expand(-1, 3, -1, -1).contiguous()
    return ImageSet(three, grey.labels, grey.classes, 'in three channels')

@pytest.fixture(scope='module', params=SMALL)
def tok(request):
    torch.manual_seed(0)
    made = SMALL[request.param]().eval()
    made.last_layer.data.mul_(.1)           # random weights would leave [-1,1] by far
    return made

@torch.no_grad()
def test_latents_and_back(tok, images):
    x = images[:][0]
    latents = tok.to_latents(x)
    assert torch.equal(latents, tok.to_latents(x))
    made = tok.from_latents(latents)
    assert made.shape == x.shape and made.isfinite().all()
    assert (latents.dtype == torch.long) == bool(tok.spec.codebook_size)

def test_pfid(tok, images):
    codes = dict(alphas=(.5,), deltas=(2,))
    doses = codes if tok.spec.codebook_size else dict(kind='gaussian', strengths=(.3,))
    card = pfid(tok, images, bootstrap=0, **doses)
    assert card.value > 0 and card.metric == 'pFID'

def test_perturbed_training(tok, images, tmp_path):
    "A step of training; of a model that is wrapped, and trained by its own code, the damage on the way"
    kind = {} if tok.spec.codebook_size else dict(kind='gaussian', strength=.3)
    damage = LatentPerturbation(.5, 1., 2, **kind)
    if not isinstance(tok, Tokenizer):
        tok.decoder.train()
        with damage.attach(tok.decoder, rng=make_rng(0), latents=True) as handle, torch.no_grad():
            tok.reconstruct(images[:][0])
        tok.decoder.eval()
        assert handle.rate > 0
        return
    learns = load_tokenizer(tok.save(tmp_path/'copy'))
    history = train_tokenizer(learns, images, ImageTraining(epochs=1, batch=8, perceptual=0.), damage)
    assert history.recon.notna().all() and learns.fingerprint != tok.fingerprint

def test_pairs_posttraining_and_file(tok, images, tmp_path):
    kind = 'ar' if tok.spec.codebook_size else 'flow'
    generator = make_generator(kind, tok.spec, len(images.classes), width=32, depth=1, heads=4).eval()
    pairs = latent_pairs(generator, tok, images, .5, seed=0)
    healed, history = posttrain_decoder(tok, pairs, ImageTraining(epochs=1, batch=8, perceptual=0.))
    assert len(history) and healed.fingerprint != tok.fingerprint
    mine, theirs = dict(tok.named_parameters()), dict(healed.named_parameters())
    assert any(not torch.equal(p, theirs[name]) for name, p in mine.items())
    assert load_tokenizer(healed.save(tmp_path/'healed')).fingerprint == healed.fingerprint

"""Tokenizers of other people, from a class of one's own to the autoencoders of diffusers, through everything:
metrics, perturbed training, a generator of their latents, pairs, post-training, sliders"""
import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn

from tokkit.adapters import from_diffusers, wrap_generator, wrap_tokenizer
from tokkit.core import make_rng
from tokkit.data import fashion_mnist, ImageSet
from tokkit.generators import sample_batches
from tokkit.metrics import gfid, ifid, pfid, rfid
from tokkit.perturbation import LatentPerturbation, perturbation
from tokkit.posttraining import clean_pairs, latent_pairs, match_distribution, posttrain_decoder
from tokkit.tokenizers import decode_all
from tokkit.training import ImageTraining
from tokkit.ui import BeforeAfterExplorer, NoiseExplorer, PerturbationExplorer

diffusers = pytest.importorskip('diffusers')
SIZE = 32

class Words(nn.Module):
    "Codes under a name of their own"
    def __init__(self):
        super().__init__()
        self.words = nn.Parameter(torch.randn(64, 4))
    def forward(self, z):
        rows = z.flatten(2).mT if z.ndim == 4 else z
        ids = torch.cdist(rows, self.words[None]).argmin(-1)
        return self.words[ids].mT.reshape(z.shape) if z.ndim == 4 else self.words[ids]

class Own(nn.Module):
    "A class that knows nothing of this kit; images in [0,1]"
    def __init__(self):
        super().__init__()
        self.enc = nn.Conv2d(1, 4, 4, 4)
        self.vq = Words()
        self.dec = nn.ConvTranspose2d(4, 1, 4, 4)

class Line(Own):
    "Tokens in a row, which lie on no grid"
    def __init__(self):
        super().__init__()
        self.enc = nn.Sequential(nn.Flatten(), nn.Linear(SIZE**2, 32), nn.Unflatten(1, (8, 4)))
        self.dec = nn.Sequential(nn.Flatten(), nn.Linear(32, SIZE**2), nn.Unflatten(1, (1, SIZE, SIZE)))

def own(model):
    functions = dict(encode=lambda m, x: m.enc(x), decode=lambda m, z: m.dec(z), codebook='vq.words')
    return model, dict(**functions, image_range=(0., 1.), learns='dec')

LEVELS = dict(block_out_channels=(8, 8, 8), down_block_types=('DownEncoderBlock2D',)*3,
              up_block_types=('UpDecoderBlock2D',)*3, norm_num_groups=4, mid_block_add_attention=False)
AUTOENCODERS = {
    'AutoencoderKL': lambda: diffusers.AutoencoderKL(1, 1, latent_channels=4, **LEVELS),
    'VQModel': lambda: diffusers.VQModel(1, 1, latent_channels=4, num_vq_embeddings=64, **LEVELS),
    'AutoencoderTiny': lambda: diffusers.AutoencoderTiny(
        1, 1, encoder_block_out_channels=(8,)*4, decoder_block_out_channels=(8,)*4),
    'AutoencoderDC': lambda: diffusers.AutoencoderDC(
        1, 8, encoder_block_out_channels=(16, 32), decoder_block_out_channels=(16, 32),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ())),
}
OWN = dict(own=Own, line=Line)
NAMES = [*OWN, *AUTOENCODERS]

@pytest.fixture(scope='module')
def train(): return fashion_mnist('train', 96, size=SIZE)
@pytest.fixture(scope='module')
def test(): return fashion_mnist('test', 64, size=SIZE)

@pytest.fixture(scope='module', params=NAMES)
def tok(request, test):
    torch.manual_seed(0)
    few = test[:8][0]
    if request.param not in OWN: return from_diffusers(AUTOENCODERS[request.param]().eval(), few)
    model, how = own(OWN[request.param]())
    return wrap_tokenizer(model, images=few, **how)

def generator(tok):
    "Draws latents around those of a blank image; keeps what it is told to keep"
    spec = tok.spec
    def sample(labels, keep=None, rng=None):
        shape = (len(labels), *(spec.shape if spec.codebook_size is None else spec.shape[:1]))
        if spec.codebook_size: made = torch.randint(spec.codebook_size, shape, generator=rng)
        else: made = torch.randn(shape, generator=rng)*spec.std+spec.mean
        if keep is None: return made
        real, sigma = keep
        real = real.flatten(2).mT if real.ndim == 4 else real
        stays = torch.rand(shape[:2], generator=rng) < sigma
        return torch.where(stays if spec.codebook_size else stays[..., None], real, made)
    return wrap_generator(sample=sample, tok=tok, classes=10)


def test_is_measured(tok, train, test):
    how = dict(n=64, bootstrap=3)
    noise, codes = dict(kind='gaussian', strengths=(.2, .5)), dict(alphas=(.5,), deltas=(4,))
    doses = noise if tok.codebook is None else codes
    clean, hurt = rfid(tok, test, **how), pfid(tok, test, **doses, **how)
    assert clean.settings['model'] and 'here' in clean.settings['image_range']
    assert clean.value > 0 and hurt.value > 0 and ifid(tok, test, train=train, top_k=3, **how).value > 0

def test_is_healed(tok, train, test):
    gen = generator(tok)
    how = ImageTraining(epochs=1, batch=32, lr=1e-3, perceptual=0., distribution=.1,
                        distribution_kind='moments')
    before = tok.fingerprint
    frozen = {n: p.clone() for n, p in tok.named_parameters()}
    learns = {id(p) for p in tok.decoder.parameters()}
    pairs = latent_pairs(gen, tok, train, sigma=.7)
    assert 0 < pairs.about['drawn_differ']
    samples = sample_batches(gen, train.labels, seed=1)[0]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        healed = [posttrain_decoder(tok, clean_pairs(tok, train), how)[0],
                  posttrain_decoder(tok, pairs, how)[0], match_distribution(tok, samples, train, how)[0]]
    assert tok.fingerprint == before and len({before, *(t.fingerprint for t in healed)}) == 4
    for name, p in tok.named_parameters():
        for other in healed:
            same = torch.equal(dict(other.named_parameters())[name], frozen[name])
            assert same or id(p) in learns, f'{name} moved, and is no part of the decoder'
    measured = sample_batches(gen, 64, seed=2)[0]
    assert gfid(decode_all(healed[1], measured), test, bootstrap=3).value > 0

def test_is_perturbed_while_it_trains(tok, test):
    model = tok.model
    given = dict(codebook='words') if isinstance(model, Own) else {}
    target = model.vq if isinstance(model, Own) else model
    if tok.codebook is not None: damage = LatentPerturbation(alpha=.5, beta=1., delta=4)
    else:
        damage = perturbation('gaussian', strength=1.)
        if type(model).__name__ != 'AutoencoderKL': target, given = tok.decoder, dict(latents=True)
    x = test[:4][0]
    target.train()
    with damage.attach(target, rng=make_rng(0), **given) as handle:
        if isinstance(model, Own): model.dec(model.vq(model.enc(x)))
        else: model(x)
    target.eval()
    assert handle.rate > 0

def test_is_looked_at(tok, test):
    if tok.codebook is None: explorer = NoiseExplorer(tok, test, n=3, strength=.5)
    else: explorer = PerturbationExplorer(tok, test, n=3, alpha=.5, delta=4)
    assert explorer.picture().size[0] > 0 and 'RMSE' in explorer.numbers()

def test_before_and_after(tok, train):
    healed = deepcopy(tok)
    with torch.no_grad():
        for p in healed.decoder.parameters(): p += .05
    explorer = BeforeAfterExplorer(tok, healed, generator(tok), train, n=3, sigma=.7)
    assert explorer.picture().size[0] > 0 and 'after' in explorer.numbers()
    assert explorer.compared().changed > 0 and explorer.compared().differ > 0

def test_images_of_unequal_sides_are_healed():
    "24 x 40 pixels through metrics, pairs, free samples and both ways of post-training"
    pixels = torch.randint(256, (96, 1, 24, 40), generator=make_rng(0), dtype=torch.uint8)
    images = ImageSet(pixels, torch.arange(96)%10, name='wide')
    torch.manual_seed(0)
    model, how = own(Own())
    tok = wrap_tokenizer(model, images=images[:8][0], **how)
    assert tok.spec.grid == (6, 10) and rfid(tok, images, n=64, bootstrap=3).value > 0
    gen = generator(tok)
    training = ImageTraining(epochs=1, batch=32, perceptual=0., distribution=.1,
                             distribution_kind='moments')
    samples = sample_batches(gen, images.labels, seed=1)[0]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        healed = [posttrain_decoder(tok, latent_pairs(gen, tok, images, sigma=.7), training)[0],
                  match_distribution(tok, samples, images, training)[0]]
    assert len({tok.fingerprint, *(t.fingerprint for t in healed)}) == 3

def test_whose_function_failed(test, train):
    model, how = own(Own())
    with pytest.raises(ValueError, match=r"encode of Own raised IndexError on a tensor \(8, 1, 32, 32\)"):
        wrap_tokenizer(model, images=test[:8][0], **how|dict(encode=lambda m, x: [x][1]))
    tok = wrap_tokenizer(model, images=test[:8][0], **how)
    def broken(labels): raise KeyError('no such table')
    gen = wrap_generator(sample=broken, tok=tok, classes=10)
    told = r'sample of generator raised KeyError for labels up to 9 \(classes=10'
    with pytest.raises(ValueError, match=told):
        sample_batches(gen, 64)

def test_images_in_another_range_are_said(test):
    model, how = own(Own())
    with pytest.warns(UserWarning, match=r'no value below 0; ours are in \[-1,1\]'):
        wrap_tokenizer(model, images=(test[:8][0]+1)/2, **how)

"iFID against a slow version of itself, and what it refuses"
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from test_evaluate import judge
from tokkit.core import make_rng
from tokkit.data import fashion_mnist
from tokkit.metrics import Card, rfid
from tokkit.metrics.ifid import _nearest
from tokkit.metrics import draw_near, ifid, nearest_latents, slerp
from tokkit.features import FeatureStats
from tokkit.metrics import frechet_distance
from tokkit.tokenizers import make_tokenizer


class Patches(nn.Module):
    "Latents are 4x4 patches"
    codebook = None
    fingerprint = 'patches'
    def encode(self, x): return x.unfold(2, 4, 4).unfold(3, 4, 4).reshape(len(x), 49, 16)
    def quantize(self, z): return SimpleNamespace(zq=z)
    def decode(self, z): return z.view(-1, 7, 7, 4, 4).transpose(2, 3).reshape(-1, 1, 28, 28)
    def reconstruct(self, x): return self.decode(self.encode(x))


@pytest.fixture(scope='module')
def images(): return fashion_mnist('test', n=100)

@pytest.fixture(scope='module')
def train(): return fashion_mnist('train', n=300)


def test_ifid_is_what_it_says(images, train):
    tok = Patches()
    e = judge()
    x = images[:][0]
    y = train[:][0]
    c = ifid(tok, images, train=train, top_k=3, extractor=e, bootstrap=3, seed=4)
    a, b = (tok.encode(v).flatten(1) for v in (x, y))
    cosine = torch.cosine_similarity(a[:, None], b[None], dim=2)
    top = cosine.argsort(1, descending=True)[:, :3]
    p = torch.softmax(-(a[:, None]-b[top]).pow(2).mean(2).double(), 1)
    drawn = top.gather(1, torch.multinomial(p, 1, generator=make_rng(4, 'ifid')))[:, 0]
    half = torch.stack([slow_slerp(u, v) for u, v in zip(a, b[drawn])])
    want = frechet_distance(*(FeatureStats.from_features(e(v)) for v in (tok.decode(half), x)))
    assert (isinstance(c, Card) and c.value == pytest.approx(want, rel=1e-3) and c.metric == 'iFID'
            and len(c.replicates) == 3)
    settings = dict(top_k=3, t=.5, how='slerp', same_class=False, train_n=300)
    assert {k: c.settings[k] for k in settings} == settings

def slow_slerp(u, v):
    angle = torch.arccos((u@v)/(u.norm()*v.norm()))
    return (torch.sin(angle/2)*u+torch.sin(angle/2)*v)/torch.sin(angle)


def test_slerp_ends_middle_and_parallel():
    a, b = torch.randn(2, 6, 3, 4, generator=make_rng(0, 'slerp'))
    assert torch.allclose(slerp(a, b, 0.), a, atol=1e-6) and torch.allclose(slerp(a, b, 1.), b, atol=1e-6)
    assert (torch.allclose(slerp(a, 2*a, .5), 1.5*a, atol=1e-5)
            and torch.allclose(slerp(a, -a, .5), 0*a, atol=1e-6))
    assert slerp(a.half(), b.half()).dtype == torch.half and slerp(0*a, b, .25).allclose(b/4)


def test_neighbours_do_not_depend_on_the_chunks():
    rng = make_rng(0, 'near')
    z = torch.randn(20, 8, generator=rng)
    pool = torch.randn(100, 8, generator=rng)
    pool[50:] = pool[:50]                                                # ties: the first one counts
    a = nearest_latents(z, [pool], 5)
    b = nearest_latents(z, pool.split(7), 5)
    assert (torch.equal(a.index, b.index) and torch.allclose(a.cosine, b.cosine, atol=1e-6)
            and (a.cosine.diff(dim=1) <= 1e-6).all())
    assert set(draw_near(a, make_rng(0)).tolist()) <= set(a.index.flatten().tolist())


def test_same_class_stays_in_the_class(images, train):
    a = Patches().encode(images[:][0])
    b = Patches().encode(train[:][0])
    near = nearest_latents(a, b.split(64), 4, images.labels, train.labels)
    assert (train.labels[near.index] == images.labels[:, None]).all()


@pytest.mark.parametrize('kind', ['tiny-16', 'tiny-kl0'])
def test_codes_and_continuous_latents(images, train, kind):
    tok = make_tokenizer(kind, width=16, depth=1)
    e = judge()
    a = ifid(tok, images, train=train, extractor=e, bootstrap=0, n=60, seed=1)
    assert (a == ifid(tok, images, train=train, extractor=e, bootstrap=0, n=60, seed=1) and a.n == 60
            and a.settings['tokenizer'] == tok.fingerprint)
    zero = ifid(tok, images, train=train, extractor=e, bootstrap=0, t=0.)
    assert zero.value == pytest.approx(rfid(tok, images, e, bootstrap=0).value, rel=1e-3)


@pytest.mark.parametrize('more,words', [
    (dict(top_k=0), 'top_k must be at least 1, got 0'), (dict(t=-.1), 't must be in'),
    (dict(t=2.), 't must be in [0, 1], got 2.0'),
    (dict(how='arc'), "how must be 'slerp' or 'linear', got 'arc'"), (dict(n=101), 'n must be in 2..100'),
    (dict(top_k=301), 'only 300 training images to choose from'),
    (dict(top_k=60, same_class=True), 'training images of its class')])
def test_refusals(images, train, more, words):
    with pytest.raises(ValueError) as e: ifid(Patches(), images, train=train, extractor=judge(), **more)
    assert words in str(e.value) and '\n' not in str(e.value)


def test_refused_tokenizers_and_tensors(images, train):
    with pytest.raises(ValueError, match='SimpleNamespace lacks encode, quantize, decode'):
        ifid(SimpleNamespace(), images, train=train)
    with pytest.raises(ValueError, match='same_class needs sets of images with labels'):
        ifid(Patches(), images[:][0], train=train, extractor=judge(), same_class=True)


def test_the_measured_images_are_no_training_set(images):
    with pytest.raises(ValueError, match='the measured images themselves'):
        ifid(Patches(), images, train=fashion_mnist('test', n=100), extractor=judge())


@pytest.mark.parametrize('codes', [False, True])
def test_an_image_is_not_its_own_neighbour(images, train, codes):
    """However it came among them: as a part, drawn by n, as a tensor,
    once among many; also where latents are codes"""
    class Coded(Patches):
        def quantize(self, z): return SimpleNamespace(zq=z.round() if codes else z)
    tok = Coded()
    e = judge()
    with pytest.raises(ValueError, match='the measured images themselves'):
        ifid(tok, images, train=images, extractor=e, n=50)
    several = torch.cat([train[:][0], images[70:71][0]])
    for measured, others, n, words in ((images, fashion_mnist('test', n=200), 20,
                                        '20 of the measured images'),
                                       (images[:][0], images, None, '100 of the measured'),
                                       (images, several, None, r'1 of the measured images are .* \(first: '
                                                               r'image 70 is 300 of train\)')):
        with pytest.raises(ValueError, match=words) as caught:
            ifid(tok, measured, train=others, extractor=e, n=n, top_k=3)
        assert '\n' not in str(caught.value)


def test_one_latent_of_many_images_is_no_reason_to_refuse(images, train):
    class Collapsed(Patches):
        def quantize(self, z): return SimpleNamespace(zq=torch.zeros_like(z))
    c = ifid(Collapsed(), images, train=train, extractor=judge(), bootstrap=0)
    assert (c.value == pytest.approx(rfid(SimpleNamespace(codebook=None,
                                                          reconstruct=lambda x: torch.zeros_like(x)), images,
                                          judge(), bootstrap=0).value, rel=1e-3))


def test_the_search_is_made_where_the_latents_are():
    "Not one tensor of it is made on the CPU, and labels and chunks follow; the meta device knows shapes only"
    z = torch.empty(5, 3, 2, device='meta')
    near = _nearest(z.flatten(1), [torch.empty(4, 3, 2), torch.empty(4, 3, 2, device='meta')], 3,
                    torch.arange(5)%2, torch.arange(8)%2)
    assert ({t.device.type for t in near} == {'meta'}
            and near.index.shape == near.cosine.shape == near.distance.shape == (5, 3))

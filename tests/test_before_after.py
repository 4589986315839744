"The explorer of two decoders without a browser: same latents, honest numbers, and only decoders may differ"
from copy import deepcopy
from functools import lru_cache

import numpy as np, pytest, torch

from tokkit.generators import ARCfg, ARGenerator
from tokkit.ui import BeforeAfterExplorer
from tokkit.data import fashion_mnist
from tokkit.generators import FlowCfg, FlowGenerator
from tokkit.generators import sample_batches
from tokkit.generators import MaskedCfg, MaskedGenerator
from tokkit.posttraining import clean_pairs
from tokkit.tokenizers import reencode
from tokkit.posttraining import posttrain_decoder
from tokkit.tokenizers import make_tokenizer
from tokkit.training import ImageTraining
from tokkit.ui import image_tiles

SMALL = dict(classes=10, width=16, depth=1, heads=2)
KINDS = 'ar', 'masked', 'flow', 'ar levels', 'ar scales'


@pytest.fixture(scope='module')
def images(): return fashion_mnist('test', n=12)


@lru_cache
def trio(kind):
    """A tokenizer, the same after a short post-training, and a generator of its latents;
    the last two barely trained"""
    torch.manual_seed(0)
    tok = make_tokenizer({'flow':'tiny-kl', 'ar levels':'tiny-pq', 'ar scales':'tiny-msrq'}.get(kind,
                                                                                                'tiny')).eval()
    if kind == 'flow': g = FlowGenerator(FlowCfg(*tok.spec.shape, **SMALL))
    else:
        cfg = dict(n=70 if 'scales' in kind else 49, codebook_size=tok.spec.codebook_size, levels=2
                   if 'levels' in kind else 1, **SMALL)
        g = MaskedGenerator(MaskedCfg(**cfg)) if kind == 'masked' else ARGenerator(ARCfg(**cfg))
    healed, _ = posttrain_decoder(tok, clean_pairs(tok, fashion_mnist('train', 64)),
                                  ImageTraining(epochs=1, batch=32, lr=1e-2, perceptual=0.), device='cpu')
    return tok, healed.eval(), g.eval()

def explorer(images, kind='ar', n=4, **state): return BeforeAfterExplorer(*trio(kind), images, n=n, **state)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('source', ['tokens', 'reencode'])
def test_same_latents_through_both(kind, source, images):
    tok, healed, g = trio(kind)
    e = explorer(images, kind, sigma=.6, source=source, seed=3, page=1)
    p, (x, labels) = e.compared(), images[4:8]
    with torch.no_grad():
        real = tok.to_latents(x)
        drawn = sample_batches(g, labels, seed=3, keep=(real, .6))[0]
        if source == 'reencode': drawn = reencode(tok, drawn)
        assert torch.equal(p.x, x) and torch.equal(p.real, real) and torch.equal(p.latents, drawn)
        assert (torch.equal(p.before, tok.from_latents(drawn).clamp(-1, 1))
                and torch.equal(p.after, healed.from_latents(drawn).clamp(-1, 1)))
    assert not torch.equal(p.before, p.after), "post-training changed nothing, so this test shows nothing"
    assert not tok.training and not healed.training


def test_sigma_is_the_fraction_kept(images):
    none, half, all_ = (explorer(images, n=12, sigma=s).compared() for s in (0, .5, 1))
    assert all_.differ == 0 and torch.equal(all_.latents, all_.real)
    # each is kept by chance: 588 draws, standard error .02
    assert .44 < half.differ < .56 and none.differ > .95
    free = sample_batches(trio('ar')[2], images[:12][1], seed=0)[0]
    assert torch.equal(none.latents, free), "sigma 0 is a free sample of the same label"


def test_numbers(images):
    e = explorer(images, sigma=.5)
    p = e.compared()
    grey = lambda a, b: ((a.clamp(-1, 1)-b.clamp(-1, 1)).double()**2).mean().sqrt().item()*127.5
    assert (p.changed == pytest.approx(grey(p.before, p.after), rel=1e-5)
            and p.far == pytest.approx((grey(p.before, p.x), grey(p.after, p.x)), rel=1e-5))
    new = (p.latents != p.real).double().mean().item()
    assert e.numbers() == (
        f"{new:.1%} of ids are not the image's · RMSE in grey levels: "
        f"after − before {p.changed:.1f}, before − image {p.far[0]:.1f}, after − image {p.far[1]:.1f}")
    assert ('no image belongs to them' in explorer(images, sigma=0).numbers()
            and 'before − image' not in explorer(images, sigma=0).numbers())
    flow = explorer(images, 'flow', sigma=.5)
    q = flow.compared()
    assert (q.differ == pytest.approx(((q.latents-q.real).square().mean().sqrt()/q.real.std()).item())
            and 'standard deviations' in flow.numbers())


def test_view(images):
    e = explorer(images)
    heights = {kind: explorer(images, kind).picture().size[1] for kind in KINDS}
    assert heights['ar'] == heights['masked'] > heights['flow'], "the map is for one id a token"
    assert heights['flow'] == heights['ar levels'] == heights['ar scales'], "the map is for one id a token"
    assert e.picture(footer=True).size[1] > heights['ar']
    a = e.picture()
    b = explorer(images).picture()
    assert a.tobytes() == b.tobytes()
    assert a.tobytes() != e.set(seed=1).picture().tobytes()
    p = e.set(seed=0).compared()
    pixels = np.asarray(a)
    def at(x):
        return [i for i in range(len(pixels)-83)
                if np.array_equal(pixels[i:i+84, 126:210], image_tiles(x)[0])]
    assert [at(x) for x in (p.x, p.before, p.after)] == [[0], [90], [180]], ("image, before and after, from "
                                                                             "above")
    before = e.state
    strip = e.static_strip((1, .5, 0))
    assert e.state == before and strip.size[1] > a.size[1]


def test_weights_count(images):
    tok, healed, g = trio('ar')
    mine = deepcopy(healed)
    e = BeforeAfterExplorer(tok, mine, g, images, n=4, sigma=.5)
    p = e.compared()
    assert e.compared() is p
    with torch.no_grad(): next(mine.decoder.parameters()).add_(.1)
    assert not torch.equal(e.compared().after, p.after), "a decoder trained on is looked at anew"
    assert torch.equal(e.compared().latents, p.latents)


def test_faults(images):
    tok, healed, g = trio('ar')
    other = deepcopy(tok)
    with torch.no_grad(): next(other.encoder.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match=r"differ beyond their decoders, first in encoder\."):
        BeforeAfterExplorer(tok, other, g, images)
    with pytest.raises(ValueError, match="draws ids .* of 256 codes, the tokenizer decodes ids .* of 512 "
                                         "codes"):
        BeforeAfterExplorer(tok, healed, ARGenerator(ARCfg(n=49, codebook_size=256, **SMALL)), images)
    with pytest.raises(ValueError, match="needs at least one image, got none"):
        BeforeAfterExplorer(tok, healed, g, images.subset(range(0)))
    with pytest.raises(ValueError, match="n must be"): BeforeAfterExplorer(tok, healed, g, images, n=0)
    for says, state in (("sigma must be", dict(sigma=1.5)), ("source must be 'reencode' or 'tokens', got "
                                                             "'png'", dict(source='png')),
                        ("no knob 'sigmas'", dict(sigmas=1))):
        with pytest.raises(ValueError, match=says): explorer(images).set(**state)
    e = explorer(images, n=64)
    assert e.n == 12 and e.knobs['page'].disabled


def test_draws_once(images, monkeypatch):
    import tokkit.ui.before_after as module
    calls = []
    monkeypatch.setattr(module, 'sample_batches', lambda *a, **k: calls.append(1) or sample_batches(*a, **k))
    e = explorer(images)
    e.compared()
    e.set(source='reencode').compared()
    e.set(source='tokens').compared()
    assert len(calls) == 1, "another view of the same draw"
    e.set(seed=1).compared()
    e.set(sigma=.2).compared()
    e.set(page=1).compared()
    assert len(calls) == 4

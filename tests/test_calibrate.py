"""The dose nearest to a generator: closed form, recovery of known doses,
quantizers of several levels, bad input"""

import numpy as np
import pytest
import torch

from away import Away
from tokkit.analysis import (Calibration, both, calibrate, calibrated_cells, code_features, delta_nodes,
                             latents_of, mmd_plane, recovery, smoothed, window_means)
from tokkit.core import make_rng
from tokkit.data import fashion_mnist
from tokkit.metrics import Doses
from tokkit.metrics import mmd2
from tokkit.quantizers import kmeans_centres, nearest_codes
from tokkit.perturbation import Level, perturb_codes
from tokkit.quantizers import FiniteScalarQuantizer, MultiScaleResidualQuantizer, ProductQuantizer


@pytest.fixture(scope='module')
def patches():
    "Real images as ids of patches (3000 49), and the codes (128 16)"
    x, _ = fashion_mnist('train', n=3000)[:]
    cut = torch.nn.functional.unfold(x, 4, stride=4).transpose(1, 2)
    book = kmeans_centres(cut[:200].reshape(-1, 16), 128)
    return nearest_codes(cut, book)[..., 0], book


@pytest.mark.parametrize('rate', ['exact', 'bernoulli'])
@pytest.mark.parametrize('include_self', [True, False])
def test_closed_form_is_the_mean_of_draws(patches, rate, include_self):
    ids = patches[0][:400]
    book = patches[1]
    f = code_features(book, ids.flatten().bincount(minlength=128), 8)
    d, = smoothed(f, Level(128, book, None, None), torch.arange(128), [6], include_self)
    a = 20/49
    def w(p, q): return window_means(p[ids], q[ids], (7, 7))[0]
    closed = w(f, f)+a*(w(d, f)+w(f, d))+both(a, 49, rate)*w(d, d)
    draws = torch.stack([window_means(f[k], f[k], (7, 7))[0] for i in range(40)
                         for k in [perturb_codes(ids, book, a, 6, rate=rate, include_self=include_self,
                                                 rng=make_rng(i))]])
    z = (draws.mean(0)-closed)/(draws.std(0)/40**.5+1e-6)
    assert z.square().mean().sqrt() < 1.3
    wrong = w(f, f)+a*(w(d, f)+w(f, d))            # without the windows that are hit twice
    assert ((draws.mean(0)-wrong)/(draws.std(0)/40**.5+1e-6)).square().mean().sqrt() > 1.5


def test_what_cannot_be_calibrated_is_named(patches):
    ids, book = patches
    shapes = r'generated ids have shape \(48,\) an image, real ones \(49,\)'
    for asked, says in (((ids[:1000, :48], ids[1000:2000], book), shapes),
                        ((ids[:1000], ids[1000:2000], book[:100]), 'the codebook has 100 codes')):
        with pytest.raises(ValueError, match=says): calibrate(*asked)
    for options, says in ((dict(deltas=[300]), r'deltas must be whole numbers in 1\.\.128'),
                          (dict(bootstrap=0), 'bootstrap must be at least 2')):
        with pytest.raises(ValueError, match=says): calibrate(ids[:1000], ids[1000:2000], book, **options)


def test_window_means_by_brute_force():
    a = torch.randn(4, 6, 2)
    b = torch.randn(4, 6, 3)
    got = window_means(a, b, (2, 3), 2)
    g = a.view(4, 2, 3, 2)
    h = b.view(4, 2, 3, 3)
    across = torch.stack([torch.outer(g[i, r, c], h[i, r, c+1]) for i in (2, 3) for r in range(2)
                          for c in range(2)]).mean(0)
    down = torch.stack([torch.outer(g[i, 0, c], h[i, 1, c]) for i in (2, 3) for c in range(3)]).mean(0)
    assert torch.allclose(got[1], torch.cat([across.flatten(), down.flatten()]), atol=1e-5)


def test_recovers_known_doses(patches):
    """Twenty generators whose dose is known: both intervals hold it in at least 18,
    and are narrower than half the plane"""
    study = recovery(*patches, trials=20, n=600, deltas=(4, 32), bootstrap=60)
    assert study.holds.sum() >= 18, study
    assert study[['alpha_width', 'delta_width']].max().max() < .5, study
    assert study[['alpha', 'delta']].drop_duplicates().shape[0] > 15


def test_the_same_seed_the_same_answer(patches):
    ids, book = patches
    made = perturb_codes(ids[:500], book, .5, 8, rng=make_rng(1))
    one, two = (calibrate(made, ids[500:1000], book, bootstrap=30) for _ in range(2))
    assert (str(one) == str(two) and np.array_equal(one.replicates, two.replicates)
            and np.array_equal(one.plane, two.plane))
    assert calibrate(made.numpy().astype('u2'), ids[500:1000], book, bootstrap=30).alpha == one.alpha
    assert one.plane.shape == (len(one.alphas), len(one.deltas)) and isinstance(one, Calibration)
    assert (calibrated_cells(one) == dict(alphas=[one.alpha], deltas=[one.delta], rate='exact',
                                          include_self=True))
    assert len(one.frame()) == one.plane.size and one.plot() is not None


def test_rate_and_self_are_what_was_said(patches):
    ids, book = patches
    for how in (dict(rate='bernoulli'), dict(include_self=False)):
        c = calibrate(perturb_codes(ids[:1000], book, .5, 10, rng=make_rng(2), **how), ids[1000:2000], book,
                      bootstrap=60, **how)
        assert c.alpha_interval[0] < .5 < c.alpha_interval[1], (how, c)
        assert c.delta_interval[0] <= 10 <= c.delta_interval[1], (how, c)
    assert c.hit == c.alpha
    assert calibrated_cells(c) == dict(alphas=[c.alpha], deltas=[c.delta], rate='exact', include_self=False)
    assert Doses(**calibrated_cells(c)).deltas == [c.delta]                 # `pfid` takes them


def class_by_class(ids):
    "As a folder lies on disk: here, darker images first"
    return ids[ids.float().mean(1).argsort()]


def test_images_may_come_class_by_class(patches):
    "Fewer generated than real images, both sorted: the dose is found, and the plane's least cell is the dose"
    ids, book = patches
    book = book[order := book.mean(1).argsort()]
    ids = order.argsort()[ids]                          # codes named by brightness
    made = perturb_codes(ids[:1000], book, .6, 8, rng=make_rng(0))
    real = class_by_class(ids[1000:])
    for generated in (made, class_by_class(made)):
        c = calibrate(generated, real, book, bootstrap=30)
        assert c.delta_interval[0] <= 8 <= c.delta_interval[1] and c.left < .1, c
        plane = mmd_plane(generated, real, book, (.6,), (8,), n=500)
        assert abs(plane.value[0]) < 4*plane.se[0], plane


def test_codes_may_lie_on_another_device(patches):
    ids, book = patches
    q = Away(128, 16, l2_norm=False)
    with torch.no_grad(): q.embedding.weight.copy_(book)
    q.here = False
    made = perturb_codes(ids[:400], book, .5, 8, rng=make_rng(0))
    assert calibrate(made, ids[400:800], q, bootstrap=10).alpha == pytest.approx(.5, abs=.2)
    assert len(mmd_plane(made, ids[400:800], q, (.5,), (8,))) == 1 and latents_of(made, q).shape == (400, 784)
    assert len(recovery(ids, q, trials=1, n=300, bootstrap=5)) == 1 and not q.here


@pytest.mark.parametrize('quantizer',
                         [ProductQuantizer(64, 16, 2), FiniteScalarQuantizer((5, 5, 4)),
                          MultiScaleResidualQuantizer(64, 8, scales=(1, 2, 4))],
                         ids=['product', 'lattice', 'scales'])
def test_every_discrete_quantizer(quantizer):
    "Ids with structure (each row of latents is a smooth walk), whatever the levels"
    n = 16
    z = torch.randn(800, n, quantizer.dim or 16, generator=make_rng(3)).cumsum(1)/3
    ids = quantizer.eval()(z).ids
    made = perturb_codes(ids[:400], quantizer, .6, 12, rng=make_rng(4))
    c = calibrate(made, ids[400:], quantizer, bootstrap=30, deltas=[2, 4, 8, 16, 32])
    assert abs(c.alpha-.6) < .25 and 6 <= c.delta <= 24, c


def test_plane_is_the_mmd_of_latents(patches):
    ids, book = patches
    plane = mmd_plane(ids[:100], ids[100:200], book, (0., .5), (4,), kernel='linear')
    assert (plane.value[0] == pytest.approx(mmd2(book[ids[:100]].flatten(1), book[ids[100:200]].flatten(1),
                                                 'linear').value))
    assert len(plane) == 2 and plane.se.gt(0).all()


def test_nodes():
    for low, high in ((2, 2), (1, 7), (3, 4096)):
        nodes = delta_nodes(low, high)
        assert nodes[0] == low and nodes[-1] == high and nodes == sorted(set(nodes))


def test_bad_input(patches):
    ids, book = patches
    for bad, says in ((dict(deltas=[0, 4]), 'deltas must be whole numbers'),
                      (dict(alphas=[-.1, 1]), 'alphas must be fractions'),
                      (dict(level=2), 'level must be in'),
                      (dict(bootstrap=0), 'bootstrap must be at least 2'), (dict(bootstrap=1), 'got 1'),
                      (dict(rate='poisson'), "rate must be 'exact' or 'bernoulli'"),
                      (dict(deltas=[128], include_self=False), 'deltas must be whole numbers in 1..127')):
        with pytest.raises(ValueError, match=says): calibrate(ids[:300], ids[300:600], book, **bad)
    with pytest.raises(ValueError, match='at least 200 real images, got 10'):
        calibrate(ids[:300], ids[:10], book)
    with pytest.raises(ValueError, match='take one tokenizer for both'):
        calibrate(ids[:300]+200, ids[300:600], book)
    with pytest.raises(ValueError, match='two disjoint sets'): recovery(ids, book, n=2000)

"""Precision, recall, density, coverage by brute force;
the inception score against closed forms and torchmetrics"""
import sys

import numpy as np
import pytest
import torch

from tokkit.metrics import density_coverage, inception_score, precision_recall


def sets(n=60, m=50, d=3):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, d)), rng.normal(size=(m, d))*.5+.3


def inside(points, centres, k):
    "Which points lie in which balls, written out"
    r = np.sort(np.linalg.norm(centres[:,None]-centres[None], axis=-1), 1)[:,k]
    return np.array([[np.linalg.norm(p-c) <= r[i] for i, c in enumerate(centres)] for p in points])


@pytest.mark.parametrize('k', [1, 3, 10])
def test_precision_recall_by_brute_force(k):
    real, fake = sets()
    got = precision_recall(real, fake, k)
    assert (got.precision == pytest.approx(inside(fake, real, k).any(1).mean())
            and got.recall == pytest.approx(inside(real, fake, k).any(1).mean()))
    assert (precision_recall(real, real+1000) == (0., 0.)
            and precision_recall(torch.from_numpy(real), real) == (1., 1.))


@pytest.mark.parametrize('k', [1, 5, 10])
def test_density_coverage_by_brute_force(k):
    real, fake = sets()
    table = inside(fake, real, k)
    got = density_coverage(real, fake, k)
    assert (got.density == pytest.approx(table.sum()/(k*len(fake)))
            and got.coverage == pytest.approx(table.any(0).mean()))


def test_far_from_the_origin():
    "Squares of a million must not swallow distances of one"
    real, fake = sets()
    assert precision_recall(real+1e6, fake+1e6) == precision_recall(real, fake)
    assert density_coverage(real+1e6, fake+1e6) == density_coverage(real, fake)


def test_strips_change_nothing(monkeypatch):
    real, fake = sets()
    whole = precision_recall(real, fake), density_coverage(real, fake)
    monkeypatch.setattr(sys.modules['tokkit.metrics.precision_recall'], '_STRIP', 130)
    assert (precision_recall(real, fake), density_coverage(real, fake)) == whole


def test_expected_values_of_equal_distributions():
    "Whatever the features are: density 1, coverage by counting orders"
    rng = np.random.default_rng(0)
    n = 200
    k = 5
    got = np.array([density_coverage(rng.normal(size=(n, 8)), rng.normal(size=(n, 8)), k) for _ in range(40)])
    want = 1-np.prod([(n-i)/(2*n-i) for i in range(1, k+1)])
    assert np.allclose(got.mean(0), [1, want], atol=.04)


def test_inception_score_closed_forms():
    assert inception_score(np.eye(4).repeat(5, 0), 1).value == pytest.approx(4)
    assert inception_score(np.full((20, 4), .25), 2) == pytest.approx((1, 0, 0), abs=1e-9)
    p = np.array([[.9, .1], [.2, .8]])
    m = p.mean(0)
    assert (inception_score(p, 1).value == pytest.approx(np.exp((p*np.log(p/m)).sum(1).mean()))
            and inception_score(p, 1).se is None)


@pytest.mark.parametrize('splits', [1, 4, 10])
def test_inception_score_matches_torchmetrics(splits, monkeypatch):
    image = pytest.importorskip('torchmetrics.image.inception', reason="torchmetrics is not installed: pip "
                                                                       "install 'tokkit-lab[dev]'")
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))*2
    theirs = image.InceptionScore(feature=torch.nn.Identity(), splits=splits)
    theirs.features = [logits]
    order = torch.randperm(40)
    monkeypatch.setattr(torch, 'randperm', lambda *a, **k: order)
    mean, std = theirs.compute()
    got = inception_score(logits.softmax(1), splits)
    assert got.value == pytest.approx(float(mean), rel=1e-5)
    if splits > 1:
        assert (got.spread == pytest.approx(float(std), rel=1e-3)
                and got.se == pytest.approx(got.spread/splits**.5))


def test_images_in_the_order_of_their_classes():
    "Parts are drawn by chance, by default always the same"
    p = np.eye(10).repeat(50, 0)*.9+.01
    assert inception_score(p).value > 5 and inception_score(p) == inception_score(p)
    assert inception_score(p, rng=torch.Generator().manual_seed(1)) != inception_score(p)


@pytest.mark.parametrize('call,words', [
    (lambda f: precision_recall(f, f[:,:2]), 'of 3 and of 2 dimensions'),
    (lambda f: precision_recall(f, f, k=60), 'k must be in 1..59'),
    (lambda f: density_coverage(f, f[:4], k=5), 'k must be in 1..3'),
    (lambda f: density_coverage(f, f[:0]), 'at least 2 images on either side'),
    (lambda f: density_coverage(f*np.inf, f), 'hold NaN or infinity'),
    (lambda f: inception_score(f), 'apply a softmax to logits'),
    (lambda f: inception_score(np.full((5, 2), .5)), 'splits in 1..5 for 5 images, got 10'),
    (lambda f: inception_score(f[:0]), 'for 0 images'),
])
def test_errors(call, words):
    with pytest.raises(ValueError) as e: call(sets()[0])
    assert words in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('distances', ['double', 'single', 'half'])
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_feature_that_is_no_number_is_refused_wherever_it_stands(distances, bad):
    real = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    fake = real.clone()
    fake[1500, 2] = bad
    for pair in ((real, fake), (fake, real)):
        with pytest.raises(ValueError, match='hold NaN or infinity'):
            precision_recall(*pair, distances=distances)

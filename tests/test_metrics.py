"Distances against recorded values, closed forms, scipy and scikit-learn; extractors against the package's own network"
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.linalg import sqrtm
from torch import nn

from tokkit import features
from tokkit.data import fashion_mnist, from_uint8, to_uint8
from tokkit.features import FeatureExtractor, efficientnet_lite0, efficientnet_taps, extract, get_extractor
from tokkit.metrics import (FeatureStats, bootstrap_frechet, bootstrap_weights, frechet_distance, mse, precision_recall, psnr,
                            weighted_stats)

GOLDEN = Path(__file__).parent/'golden'
stats = FeatureStats.from_features


def by_sqrtm(p, q):
    return ((p.mean-q.mean)**2).sum()+np.trace(p.cov)+np.trace(q.cov)-2*np.trace(sqrtm(p.cov@q.cov).real)


def test_recorded_distance():
    r = np.load(GOLDEN/'frechet.npz')
    p, q = stats(r['A']), stats(r['B'])
    assert frechet_distance(p, q) == pytest.approx(float(r['fid']), rel=1e-6)
    assert abs(frechet_distance(p, p)-float(r['fid_self'])) < 1e-9


def test_fixture_is_the_recorded_one(fixtures):
    a, b = np.load(GOLDEN/'frechet.npz'), np.load(fixtures/'frechet.npz')
    assert all(np.array_equal(a[k], b[k]) for k in b.files)


@pytest.mark.parametrize('n,m,d', [(50, 60, 8), (400, 300, 64), (20, 30, 64), (20, 300, 64), (300, 20, 64), (2, 2, 5), (65, 64, 64)])
def test_against_sqrtm(n, m, d):
    rng = np.random.default_rng(n*m+d)
    p, q = stats(rng.normal(size=(n, d))*rng.uniform(.1, 3, d)), stats(rng.normal(size=(m, d))+rng.normal(size=d))
    assert frechet_distance(p, q) == pytest.approx(by_sqrtm(p, q), rel=1e-6 if min(n, m) > d else 1e-4)
    assert frechet_distance(p, q) == pytest.approx(frechet_distance(q, p), rel=1e-8)


@settings(max_examples=25)
@given(st.integers(2, 30), st.integers(2, 12), st.floats(-3, 3), st.floats(.1, 4))
def test_closed_forms(n, d, shift, scale):
    f = np.random.default_rng(n*100+d).normal(size=(n, d))
    f -= f.mean(0)
    p = stats(f)
    got, want = frechet_distance(p, stats(scale*f+shift)), d*shift**2+(scale-1)**2*np.trace(p.cov)
    assert got == pytest.approx(want, rel=1e-6, abs=1e-7*np.trace(p.cov))


@settings(max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 5))
def test_streaming_equals_whole(sizes, d):
    parts = [np.random.default_rng(i).normal(size=(n, d))*10+1000 for i, n in enumerate(sizes)]
    s = stats(parts[0])
    for f in parts[1:]: s = s.update(torch.from_numpy(f))
    whole = np.concatenate(parts)
    assert s.n == len(whole) and np.allclose(s.mean, whole.mean(0), rtol=1e-12)
    if len(whole) > 1: assert np.allclose(s.cov, np.cov(whole.T).reshape(d, d), rtol=1e-6, atol=1e-8)


def test_statistics_of_float16_and_integers_are_double():
    f = torch.randn(50, 3).half()
    assert stats(f).cov.dtype == np.float64 and np.allclose(stats(f).cov, np.cov(f.double().numpy().T))


@pytest.mark.parametrize('call,words', [
    (lambda f: stats(f*np.nan), 'hold NaN or infinity'),
    (lambda f: stats(f[0]), 'expected features (n d)'),
    (lambda f: stats(f[:0]), 'at least one feature vector'),
    (lambda f: frechet_distance(stats(f[:1]), stats(f)), 'at least 2 images'),
    (lambda f: frechet_distance(stats(f[:,:2]), stats(f)), 'of 2 and of 4 dimensions'),
    (lambda f: precision_recall(f, f[:,:2]), 'of 4 and of 2 dimensions'),
    (lambda f: precision_recall(f, f, k=30), 'k must be in 1..29'),
])
def test_errors(call, words):
    with pytest.raises(ValueError) as e: call(np.random.default_rng(0).normal(size=(30, 4)))
    assert words in str(e.value) and '\n' not in str(e.value)


def test_weights_are_drawing_with_replacement():
    w = bootstrap_weights(40, 7, seed=3)
    f = np.random.default_rng(0).normal(size=(40, 5))
    s, repeated = weighted_stats(f, w), np.repeat(f, w.astype(int), axis=0)
    assert w.sum() == 40 and s.n == 40 and np.allclose(s.cov, np.cov(repeated.T)) and np.allclose(s.mean, repeated.mean(0))
    assert np.array_equal(w, bootstrap_weights(40, 7, seed=3)) and not np.array_equal(w, bootstrap_weights(40, 8, seed=3))
    counts = np.mean([np.bincount(bootstrap_weights(200, i).astype(int), minlength=3)[:3]/200 for i in range(50)], axis=0)
    assert np.allclose(counts, [.368, .368, .184], atol=.02)     # Poisson(1)


def test_bootstrap_error_is_the_spread():
    "The claimed standard error against the spread over many independent samples"
    rng, q = np.random.default_rng(1), stats(np.random.default_rng(0).normal(size=(20000, 4)))
    sets = [rng.normal(size=(300, 4))+.5 for _ in range(200)]
    spread = np.std([frechet_distance(stats(f), q) for f in sets])
    claimed = np.mean([bootstrap_frechet(f, q, replicates=60).std(ddof=1) for f in sets[:6]])
    assert .75 < claimed/spread < 1.35


def test_pairs_are_resampled_together():
    "A reconstruction that differs from its image by a constant: no luck of the draw is left"
    f = np.random.default_rng(0).normal(size=(100, 3))
    assert np.allclose(bootstrap_frechet(f+2, f, replicates=5), 3*2**2)
    assert np.array_equal(bootstrap_frechet(f+2, f, 5), bootstrap_frechet(f+2, lambda i: weighted_stats(f, bootstrap_weights(100, i)), 5))


def test_precision_recall_by_brute_force():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(60, 3)), rng.normal(size=(50, 3))*.5+.3
    def inside(points, manifold, k):
        d = np.linalg.norm(manifold[:,None]-manifold[None], axis=-1)
        r = np.sort(d, 1)[:,k]
        return np.mean([(np.linalg.norm(manifold-p, axis=1) <= r).any() for p in points])
    assert precision_recall(real, fake, 3) == pytest.approx((inside(fake, real, 3), inside(real, fake, 3)))
    assert precision_recall(real, real+1000) == (0., 0.)


def test_pixel_measures_match_torchmetrics():
    metrics = pytest.importorskip('torchmetrics.functional.image', reason="torchmetrics is not installed: pip install 'tokkit[dev]'")
    x, y = torch.rand(5, 3, 16, 16)*2-1, torch.rand(5, 3, 16, 16)*2-1
    assert torch.allclose(psnr(y, x), metrics.peak_signal_noise_ratio(y, x, data_range=2., reduction='none', dim=(1, 2, 3)), atol=1e-4)
    assert torch.equal(mse(x*9, x.sign()), mse(x.mul(9).clamp(-1, 1), x.sign()))


# features

@pytest.mark.parametrize('variant,layer,size', [('lite0', 11, 64), ('lite0', 16, 224), ('lite2', 7, 260)])     # lite2's own padding is made for 260 px
def test_folding_changes_nothing(variant, layer, size):
    net = features._network(variant)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        h = net._swish(net._bn0(net._conv_stem(x)))
        for b in net._blocks[:layer]: h = b(h)
        got = features._Trunk(variant, (layer,))(x)[0]
    assert torch.allclose(got, h, atol=1e-4*float(h.abs().max()))


def test_extractor_rounds_resizes_and_repeats():
    judge, x = efficientnet_lite0(3, 32), fashion_mnist('test', n=8)[:][0]
    with torch.no_grad():
        f = judge(x)
        assert torch.equal(f, judge(from_uint8(to_uint8(x+.003)))) and torch.equal(f, judge(x+.003))     # below half a level
        assert torch.allclose(f, judge(x.expand(-1, 3, -1, -1)), atol=1e-5)
    assert judge.train().training is False and not any(p.requires_grad for p in judge.parameters())


@pytest.mark.parametrize('batch', [1, 7, 64, 100])
def test_the_callers_batches_change_no_bit(batch):
    judge, x = get_extractor('efficientnet_lite0.b3@32'), fashion_mnist('test', n=130)[:][0]
    assert torch.equal(extract(judge, iter(x.split(batch)), 'cpu'), extract(judge, x, 'cpu'))


def test_a_module_of_ones_own():
    f = extract(FeatureExtractor('flat', nn.Flatten(), mean=(0.,), std=(1.,)), torch.ones(3, 1, 2, 2), 'cpu')
    assert torch.equal(f, torch.ones(3, 4)) and f.dtype == torch.float32


@pytest.mark.parametrize('size', [28, 31, 32, 48, 64])
def test_taps_at_any_size(size):
    x = torch.zeros(2, 1, size, size, requires_grad=True)
    maps = efficientnet_taps()(x)
    assert [m.shape[-1] for m in maps] == [-(-size//s) for s in (2, 4, 8)]
    sum(m.sum() for m in maps).backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize('name,words', [('dinov2', 'cannot be loaded yet'), ('vgg', 'got '), ('efficientnet_lite0.b99@32', '1..16')])
def test_unknown_extractors(name, words):
    with pytest.raises(ValueError, match=words) as e: get_extractor(name)
    assert '\n' not in str(e.value)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'torch_fidelity', None)
    with pytest.raises(ImportError, match=r"pip install 'tokkit\[pretrained\]'"): features.inception()

"""Distances against recorded values, closed forms, scipy and scikit-learn;
extractors against the package's own network"""
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.linalg import sqrtm
from torch import nn

from tokkit.features import (efficientnet, efficientnet_lite0, efficientnet_taps, extract,
                             extractors, FeatureExtractor, FeatureStats, get_extractor)
from tokkit.metrics import pixel
from tokkit.data import fashion_mnist, from_uint8, to_uint8
from tokkit.metrics import (bootstrap_frechet, bootstrap_weights, fd_infinity, frechet_distance, load_samples,
                            load_stats, mse, psnr, save_samples, save_stats, ssim, weighted_stats)

GOLDEN = Path(__file__).parent/'golden'
stats = FeatureStats.from_features


def by_sqrtm(p, q):
    return ((p.mean-q.mean)**2).sum()+np.trace(p.cov)+np.trace(q.cov)-2*np.trace(sqrtm(p.cov@q.cov).real)


def test_recorded_distance():
    r = np.load(GOLDEN/'frechet.npz')
    p = stats(r['A'])
    q = stats(r['B'])
    assert frechet_distance(p, q) == pytest.approx(float(r['fid']), rel=1e-6)
    assert abs(frechet_distance(p, p)-float(r['fid_self'])) < 1e-9


def test_fixture_is_the_recorded_one(fixtures):
    a = np.load(GOLDEN/'frechet.npz')
    b = np.load(fixtures/'frechet.npz')
    assert all(np.array_equal(a[k], b[k]) for k in b.files)


@pytest.mark.parametrize('n,m,d',
                         [(50, 60, 8), (400, 300, 64), (20, 30, 64), (20, 300, 64), (300, 20, 64), (2, 2, 5),
                          (65, 64, 64)])
def test_against_sqrtm(n, m, d):
    rng = np.random.default_rng(n*m+d)
    p = stats(rng.normal(size=(n, d))*rng.uniform(.1, 3, d))
    q = stats(rng.normal(size=(m, d))+rng.normal(size=d))
    assert frechet_distance(p, q) == pytest.approx(by_sqrtm(p, q), rel=1e-6 if min(n, m) > d else 1e-4)
    assert frechet_distance(p, q) == pytest.approx(frechet_distance(q, p), rel=1e-8)


@settings(max_examples=25)
@given(st.integers(2, 30), st.integers(2, 12), st.floats(-3, 3), st.floats(.1, 4))
def test_closed_forms(n, d, shift, scale):
    f = np.random.default_rng(n*100+d).normal(size=(n, d))
    f -= f.mean(0)
    p = stats(f)
    got = frechet_distance(p, stats(scale*f+shift))
    want = d*shift**2+(scale-1)**2*np.trace(p.cov)
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


@pytest.mark.parametrize('n', [1, 700, 1024, 3000, 5000])
def test_the_batch_size_changes_no_bit(n):
    "Statistics are those of fixed blocks, however the features arrive"
    f = np.random.default_rng(n).normal(size=(n, 20))*np.logspace(-3, 3, 20)+1e3
    whole = stats(f)
    for size in (1, 7, 64, 1000, 1024, n):
        s = FeatureStats.stream(torch.from_numpy(f[i:i+size]) for i in range(0, n, size))
        assert s.n == n and np.array_equal(s.mean, whole.mean) and np.array_equal(s.cov, whole.cov)
    assert np.allclose(whole.mean, f.mean(0), rtol=1e-13)
    if n > 1:
        assert np.allclose(whole.cov, np.cov(f.T), rtol=1e-10, atol=1e-10*np.sqrt(np.outer(*[f.var(0)]*2)))
    assert np.array_equal(whole.cov, whole.cov.T)


def test_memory_does_not_grow_with_the_number():
    def peak(n, d=200):
        tracemalloc.start()
        FeatureStats.stream(np.full((100, d), float(i)) for i in range(n//100))
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used
    assert peak(40_000) < 1.1*peak(4_000) < 5*(1024*200*8+2*200*200*8)


def test_statistics_of_float16_and_integers_are_double():
    f = torch.randn(50, 3).half()
    assert stats(f).cov.dtype == np.float64 and np.allclose(stats(f).cov, np.cov(f.double().numpy().T))


@pytest.mark.parametrize('call,words', [
    (lambda f: stats(f*np.nan), 'hold NaN or infinity'),
    (lambda f: stats(f[0]), 'expected features (n d)'),
    (lambda f: stats(f[:0]), 'at least one feature vector'),
    (lambda f: frechet_distance(stats(f[:1]), stats(f)), 'at least 2 images'),
    (lambda f: frechet_distance(stats(f[:,:2]), stats(f)), 'of 2 and of 4 dimensions'),
    (lambda f: stats(f, 'a.b1@32').merge(stats(f, 'a.b2@32')),
     'features by a.b1@32 and by a.b2@32 cannot be compared'),
    (lambda f: frechet_distance(stats(f, 'a'), stats(f, 'b')), 'features by a and by b cannot be compared'),
    (lambda f: FeatureStats.stream([f, f[:,:3]]),
     'a batch of 4-dimensional features is followed by one of 3'),
    (lambda f: FeatureStats.stream(iter(())), 'at least one feature vector'),
    (lambda f: frechet_distance(stats(f), FeatureStats(9, np.zeros(4), -np.eye(4))), 'negative eigenvalues'),
    (lambda f: frechet_distance(FeatureStats(9, np.zeros(4), np.diag([1, 1, -.1, 1])), stats(f)),
     'an eigenvalue of -'),
    (lambda f: frechet_distance(stats(f), FeatureStats(9, np.zeros(4), np.ones((4, 4))-2*np.eye(4))),
     'negative eigenvalues'),
    (lambda f: frechet_distance(stats(f), FeatureStats(9, np.zeros(4), np.full((4, 4), np.nan))),
     'NaN or infinity'),
    (lambda f: frechet_distance(stats(f, 'a', 'print 1'), stats(f, 'a', 'print 2')),
     'two extractors of the name a cannot be compared: fingerprints print 1 and print 2'),
    (lambda f: stats(f, 'a', 'print 1').merge(stats(f, '', 'print 2')), 'two extractors of the name a'),
    (lambda f: weighted_stats(f, np.zeros(30)), 'a sum of 1 or more, got 30 that sum to 0'),
    (lambda f: weighted_stats(f, np.ones(29)), 'a weight for each of 30 vectors'),
    (lambda f: fd_infinity(f[:7], f), 'fewer than 4 for a part'),
    (lambda f: fd_infinity(f, f, parts=(3, 3)), 'at least two different numbers of parts'),
    (lambda f: fd_infinity(f[:,:2], stats(f)), 'of 2 and of 4 dimensions'),
])
def test_errors(call, words):
    with pytest.raises(ValueError) as e: call(np.random.default_rng(0).normal(size=(30, 4)))
    assert words in str(e.value) and '\n' not in str(e.value)


def test_rank_deficient_against_singular_values():
    "With few images the root's trace is the sum of the singular values of one small table"
    rng = np.random.default_rng(0)
    f = rng.normal(size=(30, 200))
    g = rng.normal(size=(50, 200))*rng.uniform(.1, 2, 200)+.1
    p = stats(f)
    q = stats(g)
    root = np.linalg.svd((f-f.mean(0))@(g-g.mean(0)).T, compute_uv=False).sum()/np.sqrt(29*49)
    want = ((p.mean-q.mean)**2).sum()+np.trace(p.cov)+np.trace(q.cov)-2*root
    assert frechet_distance(p, q) == pytest.approx(want, rel=1e-10) == frechet_distance(q, p)


def test_rounding_is_clipped():
    "Statistics that went through single precision have eigenvalues slightly below zero"
    f = np.random.default_rng(0).normal(size=(20, 60))
    p = stats(f)
    q = stats(np.random.default_rng(1).normal(size=(40, 60)))
    rounded = FeatureStats(p.n, p.mean, p.cov.astype(np.float32).astype(float))
    assert np.linalg.eigvalsh(rounded.cov)[0] < 0
    assert (frechet_distance(rounded, q) == pytest.approx(frechet_distance(p, q),
                                                          rel=1e-3) == frechet_distance(q, rounded))


def test_the_value_does_not_depend_on_what_was_asked_before():
    f = np.random.default_rng(0).normal(size=(100, 30))
    p = stats(f[:50])
    q = stats(f[40:])
    r = stats(f[:60])
    first = frechet_distance(p, q)
    frechet_distance(q, p)
    frechet_distance(r, p)  # both have kept their factors
    assert frechet_distance(p, q) == first == frechet_distance(stats(f[:50]), stats(f[40:]))


def test_the_limit_of_many_images():
    "Two Gaussians whose distance is known: 8 dimensions apart by 1, the second twice as wide"
    rng = np.random.default_rng(0)
    d = 8
    truth = d*1+d*(2-1)**2
    found = []
    plain = []
    exact = FeatureStats(10**6, np.ones(d), 4*np.eye(d))
    for _ in range(200):
        f = rng.normal(size=(80, d))
        found.append(fd_infinity(f, exact, bootstrap=0).value)
        plain.append(frechet_distance(stats(f), exact))
    bias = np.mean(plain)-truth
    assert bias > 5*np.std(plain)/200**.5 and abs(np.mean(found)-truth) < .5*bias
    one = fd_infinity(f, exact, bootstrap=40)
    assert (.6 < one.se/np.std(found) < 1.8 and len(one.replicates) == 40
            and one == fd_infinity(f, exact, bootstrap=40))
    assert one.distances[0] == pytest.approx(plain[-1], rel=1e-9) and one.sizes[:2] == (80, 40)


@pytest.mark.parametrize('n,d', [(8, 3), (16, 8)])
@pytest.mark.parametrize('fixed', [True, False])
def test_the_limit_of_few_images_has_an_honest_error(n, d, fixed):
    "Parts of four: some replicates would leave one without images. The error is still that of the spread"
    rng = np.random.default_rng(n)
    exact = FeatureStats(10**6, np.ones(d), 4*np.eye(d))
    def real(): return exact if fixed else rng.normal(size=(n, d))*2+1
    found = np.std([fd_infinity(rng.normal(size=(n, d)), real(), bootstrap=0).value for _ in range(150)])
    claimed = [fd_infinity(rng.normal(size=(n, d)), real(), bootstrap=40) for _ in range(10)]
    assert (.6 < np.mean([c.se for c in claimed])/found < 2.2
            and np.isfinite([c.replicates for c in claimed]).all())


def test_the_limit_of_equal_sets_is_zero():
    f = np.random.default_rng(0).normal(size=(400, 6))
    assert abs(fd_infinity(f, f, bootstrap=0).value) < 1e-9
    apart = fd_infinity(f[:200], f[200:], bootstrap=40)
    assert abs(apart.value) < 4*apart.se < apart.distances[0]*4


def test_statistics_in_files(tmp_path):
    s = stats(np.random.default_rng(0).normal(size=(50, 4)), 'judge', 'ab12')
    t = stats(np.ones((3, 2)))
    save_stats(tmp_path/'s.npz', s, t)
    back = load_stats(tmp_path/'s.npz')
    assert ((back.n, back.extractor, back.fingerprint,
             load_stats(tmp_path/'s.npz', fingerprint='').fingerprint) == (50, 'judge', 'ab12', '')
            and np.array_equal(back.cov, s.cov) and np.array_equal(back.mean, s.mean))
    assert np.array_equal(load_stats(tmp_path/'s.npz', 3, spatial=True).mean, t.mean)
    with np.load(tmp_path/'s.npz') as z: assert {'mu', 'sigma', 'mu_s', 'sigma_s'} <= set(z.files)
    with pytest.raises(ValueError, match='features by judge and by other'):
        frechet_distance(back, stats(np.eye(4), 'other'))
    with pytest.raises(ValueError, match='fingerprints ab12 and cd34'):
        frechet_distance(back, stats(np.eye(4), 'judge', 'cd34'))
    assert [f.name for f in tmp_path.iterdir()] == ['s.npz']


def test_statistics_of_older_files_and_of_others(tmp_path):
    "Ours had no fingerprint once; others' hold images, which are not read, and say nothing else"
    mean = np.zeros(3)
    cov = np.eye(3)
    np.savez(tmp_path/'old.npz', mu=mean, sigma=cov, n=7, extractor='judge')
    old = load_stats(tmp_path/'old.npz')
    assert ((old.n, old.extractor, old.fingerprint) == (7, 'judge', '')
            and frechet_distance(old, stats(np.eye(3), 'judge', 'ab12')) > 0)
    with open(tmp_path/'adm.npz', 'wb') as f:
        np.savez(f, mu=mean, sigma=cov, mu_s=mean, sigma_s=cov, arr_0=np.zeros((10, 9, 9, 3), np.uint8))
    whole = (tmp_path/'adm.npz').read_bytes()
    at = whole.index(b'arr_0.npy')+200
    # a checksum that only reading the images would meet
    (tmp_path/'adm.npz').write_bytes(whole[:at]+b'torn'+whole[at+4:])
    assert load_stats(tmp_path/'adm.npz', 50).n == load_stats(tmp_path/'adm.npz', 50, spatial=True).n == 50
    with pytest.raises(ValueError, match='not a whole .npz file'): load_samples(tmp_path/'adm.npz')


@pytest.mark.parametrize('arrays,words', [
    (dict(mu=np.zeros(3)), 'expected the arrays mu, sigma, found mu'),
    (dict(mu=np.zeros(3), sigma=np.eye(3)), 'does not say of how many images'),
    (dict(mu=np.zeros(3), sigma=np.eye(4), n=5), 'do not fit'),
    (dict(mu=np.zeros(3), sigma=np.eye(3)*np.nan, n=5), 'NaN or infinity'),
    (dict(mu=np.zeros(3), sigma=np.triu(np.ones((3, 3))), n=5), 'not symmetric'),
    (None, 'not a whole .npz file'),
])
def test_statistics_that_cannot_be_read(tmp_path, arrays, words):
    if arrays is None: (tmp_path/'f.npz').write_bytes(b'PK\3\4 torn')
    else: np.savez(tmp_path/'f.npz', **arrays)
    with pytest.raises(ValueError) as e: load_stats(tmp_path/'f.npz')
    assert words in str(e.value) and '\n' not in str(e.value)


def test_samples_in_files(tmp_path):
    x = torch.rand(6, 3, 5, 5)*2-1
    grey = torch.rand(6, 1, 5, 5)*2-1
    save_samples(tmp_path/'x.npz', x, torch.arange(6))
    with np.load(tmp_path/'x.npz') as z:
        assert z['arr_0'].dtype == np.uint8 and z['arr_0'].shape == (6, 5, 5, 3)
    back = load_samples(tmp_path/'x.npz')
    assert torch.equal(back.images, to_uint8(x)) and torch.equal(back.labels, torch.arange(6))
    save_samples(tmp_path/'g.npz', grey)
    assert torch.equal(load_samples(tmp_path/'g.npz').images, to_uint8(grey).expand(-1, 3, -1, -1))
    with pytest.raises(ValueError, match='expected images'): save_samples(tmp_path/'w.npz', x[:0])
    with pytest.raises(ValueError, match='got numbers up to 255'):
        save_samples(tmp_path/'w.npz', x.sign()*255)
    np.savez(tmp_path/'w.npz', arr_0=np.zeros((3, 4, 4, 3)))
    with pytest.raises(ValueError, match='expected arr_0 as uint8'): load_samples(tmp_path/'w.npz')


def test_weights_are_drawing_with_replacement():
    w = bootstrap_weights(40, 7, seed=3)
    f = np.random.default_rng(0).normal(size=(40, 5))
    s = weighted_stats(f, w)
    repeated = np.repeat(f, w.astype(int), axis=0)
    assert (w.sum() == 40 and s.n == 40 and np.allclose(s.cov, np.cov(repeated.T))
            and np.allclose(s.mean, repeated.mean(0)))
    assert (np.array_equal(w, bootstrap_weights(40, 7, seed=3))
            and not np.array_equal(w, bootstrap_weights(40, 8, seed=3)))
    counts = np.mean([np.bincount(bootstrap_weights(200, i).astype(int), minlength=3)[:3]/200
                      for i in range(50)], axis=0)
    assert np.allclose(counts, [.368, .368, .184], atol=.02)     # Poisson(1)


def test_bootstrap_error_is_the_spread():
    "The claimed standard error against the spread over many independent samples"
    rng = np.random.default_rng(1)
    q = stats(np.random.default_rng(0).normal(size=(20000, 4)))
    sets = [rng.normal(size=(300, 4))+.5 for _ in range(200)]
    spread = np.std([frechet_distance(stats(f), q) for f in sets])
    claimed = np.mean([bootstrap_frechet(f, q, replicates=60).std(ddof=1) for f in sets[:6]])
    assert .75 < claimed/spread < 1.35


def test_pairs_are_resampled_together():
    "A reconstruction that differs from its image by a constant: no luck of the draw is left"
    f = np.random.default_rng(0).normal(size=(100, 3))
    assert np.allclose(bootstrap_frechet(f+2, f, replicates=5), 3*2**2)
    assert np.array_equal(bootstrap_frechet(f+2, f, 5),
                          bootstrap_frechet(f+2, lambda i: weighted_stats(f, bootstrap_weights(100, i)), 5))


def test_pixel_measures_match_torchmetrics():
    metrics = pytest.importorskip('torchmetrics.functional.image', reason="torchmetrics is not installed: "
                                                                          "pip install 'tokkit-lab[dev]'")
    x = torch.rand(5, 3, 16, 16)*2-1
    y = torch.rand(5, 3, 16, 16)*2-1
    assert torch.allclose(psnr(y, x),
                          metrics.peak_signal_noise_ratio(y, x, data_range=2., reduction='none',
                                                          dim=(1, 2, 3)), atol=1e-4)
    assert torch.equal(mse(x*3, x.sign()), mse(x.mul(3).clamp(-1, 1), x.sign()))


@pytest.mark.parametrize('shape', [(5, 3, 16, 16), (4, 1, 28, 28), (2, 3, 6, 40)])
def test_ssim_matches_torchmetrics(shape):
    """On [0,1] with range 1, where the field measures;
    on [-1,1] grey would be the zero of its products of means"""
    metrics = pytest.importorskip('torchmetrics.functional.image', reason="torchmetrics is not installed: "
                                                                          "pip install 'tokkit-lab[dev]'")
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))*2-1
    for y in (x, x*.5, -x, x.roll(1, 3)*.7+.3*x, x*.5-.5, x.clamp(-1, 0)):
        want = metrics.structural_similarity_index_measure(y.double()/2+.5, x.double()/2+.5, data_range=1.,
                                                           reduction='none')
        assert torch.allclose(ssim(y, x).double(), want, atol=1e-6)
    with pytest.raises(ValueError, match='half the window is 5 pixels wide'): ssim(x[...,:5], x[...,:5])


@pytest.mark.parametrize('measure', [mse, psnr, ssim])
@pytest.mark.parametrize('change,words',
                         [(lambda x: x*255, 'got numbers up to 255'),
                          (lambda x: x/0, 'got numbers up to nan')])
def test_what_is_no_images(measure, change, words):
    x = torch.ones(3, 1, 16, 16)
    x[:, :, 0] = 0
    for a, b in ((change(x), x), (x, change(x))):
        with pytest.raises(ValueError) as e: measure(a, b)
        assert words in str(e.value) and '\n' not in str(e.value)
    # overshoot is clamped on both sides
    assert torch.equal(measure(x*1.5, x*1.5), measure(x, x))


@pytest.mark.parametrize('change,words', [
    (lambda x: x.mul(127).to(torch.uint8),
     'mse: expected reconstructions in [-1,1], got torch.uint8; see from_uint8'),
    (lambda x: x[..., :12], 'mse: expected two batches of one shape (b c h w), got (3, 1, 16, 12) and (3, 1, '
                            '16, 16)'), (lambda x: x[:0], 'got (0, 1, 16, 16) and')])
def test_what_signatures_say_is_said_without_them(change, words):
    "The shapes in the signatures are checked in tests only"
    x = torch.ones(3, 1, 16, 16)
    with pytest.raises(ValueError) as e: pixel._both(change(x), x, 'mse')
    assert words in str(e.value) and '\n' not in str(e.value)


# features

# lite2's own padding is made for 260 px
@pytest.mark.parametrize('variant,layer,size', [('lite0', 11, 64), ('lite0', 16, 224), ('lite2', 7, 260)])
def test_folding_changes_nothing(variant, layer, size):
    net = efficientnet._network(variant)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        h = net._swish(net._bn0(net._conv_stem(x)))
        for b in net._blocks[:layer]: h = b(h)
        got = efficientnet._Trunk(variant, (layer,))(x)[0]
    assert torch.allclose(got, h, atol=1e-4*float(h.abs().max()))


def test_extractor_rounds_resizes_and_repeats():
    judge = efficientnet_lite0(3, 32)
    x = fashion_mnist('test', n=8)[:][0]
    with torch.no_grad():
        f = judge(x)
        # below half a level
        assert torch.equal(f, judge(from_uint8(to_uint8(x+.003)))) and torch.equal(f, judge(x+.003))
        assert torch.allclose(f, judge(x.expand(-1, 3, -1, -1)), atol=1e-5)
    assert judge.train().training is False and not any(p.requires_grad for p in judge.parameters())


@pytest.mark.parametrize('batch', [1, 7, 64, 100])
def test_the_callers_batches_change_no_bit(batch):
    judge = get_extractor('efficientnet_lite0.b3@32')
    x = fashion_mnist('test', n=130)[:][0]
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


@pytest.mark.parametrize('name,words', [('vgg', 'got '), ('efficientnet_lite0.b99@32', '1..16')])
def test_unknown_extractors(name, words):
    with pytest.raises(ValueError, match=words) as e: get_extractor(name)
    assert '\n' not in str(e.value)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'torch_fidelity', None)
    with pytest.raises(ImportError, match=r"pip install 'tokkit-lab\[pretrained\]'"): extractors.inception()

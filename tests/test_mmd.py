"MMD and KID against brute force, closed forms and torchmetrics; errors against the spread"
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from tokkit.metrics import mmd as kernels
from tokkit.metrics import get_kernel, jackknife, kid, mmd2, mmd2_linear


def data(n=40, m=30, d=4, seed=0, shift=0.):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=rng).double(), torch.randn(m, d, generator=rng).double()+shift


def brute(name, x, y):
    "Value of one pair, written out"
    d = x@y/len(x)
    s = ((x-y)**2).sum()
    return {'linear': d, 'polynomial[3]': (d+1)**3, 'polynomial[2]': (d+1)**2,
            'gaussian[1,2]': (torch.exp(-s/2)+torch.exp(-s/8))/2}[name]


NAMES = ['linear', 'polynomial[3]', 'polynomial[2]', 'gaussian[1,2]']


@pytest.mark.parametrize('name', NAMES)
def test_all_pairs_by_brute_force(name):
    x, y = data(7, 6)
    def table(a, b): return torch.stack([torch.stack([brute(name, u, v) for v in b]) for u in a])
    xx = table(x, x)
    yy = table(y, y)
    xy = table(x, y)
    unbiased = (xx.sum()-xx.trace())/42+(yy.sum()-yy.trace())/30-2*xy.mean()
    assert mmd2(x, y, name).value == pytest.approx(float(unbiased), rel=1e-10)
    assert (mmd2(x, y, name, biased=True).value == pytest.approx(float(xx.mean()+yy.mean()-2*xy.mean()),
                                                                 rel=1e-10))
    assert mmd2(x, y, name).kernel == name


@pytest.mark.parametrize('biased', [False, True])
@pytest.mark.parametrize('name', NAMES)
def test_the_error_leaves_out_one_after_the_other(name, biased):
    "The jackknife from row sums is the one that measures again"
    x, y = data(9, 7, shift=.5)
    def left(s): return [torch.cat([s[:i], s[i+1:]]) for i in range(len(s))]
    vx = [mmd2(s, y, name, biased).value for s in left(x)]
    vy = [mmd2(x, s, name, biased).value for s in left(y)]
    assert mmd2(x, y, name, biased).se == pytest.approx(np.hypot(jackknife(vx), jackknife(vy)), rel=1e-8)


def test_jackknife_of_a_mean_is_its_standard_error():
    v = np.random.default_rng(0).normal(size=50)
    assert jackknife((v.sum()-v)/49) == pytest.approx(v.std(ddof=1)/50**.5)


@settings(max_examples=20)
@given(st.integers(3, 40), st.integers(3, 40), st.integers(1, 5))
def test_strips_change_nothing(n, m, rows):
    x, y = data(n, m)
    whole = mmd2(x, y, 'gaussian[2]')
    strip = kernels.STRIP
    try:
        kernels.STRIP = rows*m
        parts = mmd2(x, y, 'gaussian[2]')
    finally: kernels.STRIP = strip
    assert (parts.value == pytest.approx(whole.value, rel=1e-9, abs=1e-12)
            and parts.se == pytest.approx(whole.se, rel=1e-9))


def test_linear_time_is_the_mean_over_disjoint_pairs():
    x, y = data(11, 8)
    k = get_kernel('gaussian[1]')
    h = [float(k(x[i:i+1], x[i+1:i+2])
               +k(y[i:i+1], y[i+1:i+2])-k(x[i:i+1], y[i+1:i+2])-k(x[i+1:i+2], y[i:i+1]))
         for i in (0, 2, 4, 6)]
    got = mmd2_linear(x, y, k)
    assert got.value == pytest.approx(np.mean(h)) and got.se == pytest.approx(np.std(h, ddof=1)/2)
    again = [mmd2_linear(x, y, k, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert again[0] == again[1] != got


@pytest.mark.parametrize('estimate', [mmd2, mmd2_linear])
def test_error_is_the_spread_and_there_is_no_bias(estimate):
    values, errors = zip(*[estimate(*data(60, 60, seed=i, shift=.4), 'gaussian[2]')[:2] for i in range(150)])
    far = (estimate(*data(3000, 3000, seed=999, shift=.4), 'gaussian[2]') if estimate is mmd2
           else mmd2(*data(3000, 3000, seed=999, shift=.4), 'gaussian[2]'))
    assert .8 < np.mean(errors)/np.std(values) < 1.25
    assert abs(np.mean(values)-far.value) < 4*np.hypot(np.std(values)/150**.5, far.se)


def test_the_median_is_found_once_and_named():
    x, y = data(30, 20)
    k = get_kernel('gaussian[median/2, median, median*3]')
    fitted = k.fit(x, y)
    median = float(torch.pdist(torch.cat([x, y])).median())
    assert fitted.numbers == pytest.approx((median/2, median, 3*median)) and not fitted.medians
    assert fitted.fit(x*9) is fitted and k.name == 'gaussian[median*0.5,median,median*3]'
    assert mmd2(x, y, k).value == mmd2(x, y, fitted).value and mmd2(x, y, k).kernel == fitted.name
    assert get_kernel(k.name) == k and get_kernel(k) is k


@pytest.mark.parametrize('name',
                         ['', 'gauss', 'gaussian[', 'gaussian[-1]', 'gaussian[median+1]',
                          'gaussian[median/0]', 'polynomial[median]',
                          'polynomial[2,3]', 'polynomial[0]', 'linear[1]', 'gaussian[x]',
                          'gaussian[nan]', 'gaussian[1]]', 'cosine', 'gaussian[0]', 'polynomial[1.5]',
                          'gaussian[mean]', 'linear[2]'])
def test_names_that_are_none(name):
    if name == 'gaussian[':
        assert get_kernel(name) == get_kernel('gaussian')
        return
    with pytest.raises(ValueError) as e: get_kernel(name)
    assert repr(name) in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('biased', [False, True])
def test_pairs_are_left_out_together(name, biased):
    "An image and its own reconstruction: never compared, and one draw"
    x, e = data(8, 8)
    y = x+.3*e
    def value(a, b):
        h = torch.stack([torch.stack([brute(name, a[i], a[j])
                                      +brute(name, b[i], b[j])-brute(name, a[i], b[j])-brute(name, a[j],
                                                                                             b[i])
                                      for j in range(len(a))]) for i in range(len(a))])
        return float(h.mean() if biased else (h.sum()-h.trace())/(len(a)*(len(a)-1)))
    got = mmd2(x, y, name, biased, paired=True)
    assert got.value == pytest.approx(value(x, y), rel=1e-9)
    left = [value(*(torch.cat([s[:i], s[i+1:]]) for s in (x, y))) for i in range(8)]
    assert got.se == pytest.approx(jackknife(left), rel=1e-8)
    if not biased: assert kid(x, y, kernel=name, paired=True)[:2] == got[:2]


@pytest.mark.parametrize('kernel', ['polynomial', 'gaussian[2]'])
def test_perfect_reconstructions_have_a_distance_of_zero(kernel):
    x = data(300, 1)[0]
    value, se = kid(x, x, kernel=kernel, paired=True)[:2]
    # as if independent: below zero
    assert abs(value) < 1e-10 and se < 1e-10 and kid(x, x, kernel=kernel).value < -1e-4


def test_pairs_have_no_bias_and_an_honest_error():
    """Copies a little off: their distribution is a Gaussian of known width,
    so the truth is that of independent sets"""
    def pairs(i, n=60):
        x, e = data(n, n, seed=i)
        return x, x*.8+.3*e
    values, errors = zip(*[mmd2(*pairs(i), 'gaussian[2]', paired=True)[:2] for i in range(150)])
    width = (.8**2+.3**2)**.5
    x, y = data(3000, 3000, seed=999)
    truth = mmd2(x, y*width, 'gaussian[2]')
    assert abs(np.mean(values)-truth.value) < 4*np.hypot(np.std(values)/150**.5, truth.se)
    # near zero on the safe side
    assert .8 < np.mean(errors)/np.std(values) < 2
    apart = np.mean([mmd2(*pairs(i), 'gaussian[2]').value for i in range(150)])
    assert apart < truth.value-10*np.std(values)/150**.5


@pytest.mark.parametrize('how',
                         [dict(), dict(subsets=3, subset_size=25), dict(subsets=1, subset_size=25),
                          dict(subsets=40, subset_size=25)])
def test_the_error_of_kid_is_that_of_its_value(how):
    values, errors = zip(*[kid(*data(60, 60, seed=i, shift=.4), rng=torch.Generator().manual_seed(i),
                               **how)[:2] for i in range(120)])
    assert .8 < np.mean(errors)/np.std(values) < 1.25


def test_never_more_than_a_strip_of_the_table(monkeypatch):
    x, y = data(50, 40)
    sizes = []
    plain = kernels.Kernel.__call__
    def spy(self, a, b):
        sizes.append(len(a)*len(b))
        return plain(self, a, b)
    monkeypatch.setattr(kernels.Kernel, '__call__', spy)
    monkeypatch.setattr(kernels, 'STRIP', 200)
    for paired in (False, True): kid(x[:40], y, paired=paired)
    assert max(sizes) <= 200


@pytest.mark.parametrize('subsets,size', [(1, 40), (5, 25)])
def test_kid_matches_torchmetrics(subsets, size, monkeypatch):
    image = pytest.importorskip('torchmetrics.image.kid', reason="torchmetrics is not installed: pip install "
                                                                 "'tokkit-lab[dev]'")
    x, y = data(40, 40, 16)
    want = []
    rng = torch.Generator().manual_seed(3)
    got = kid(x, y, subsets, size, torch.Generator().manual_seed(3))
    for _ in range(subsets):
        a, b = (s[torch.randperm(40, generator=rng)[:size]] for s in (x, y))
        want.append(float(image.poly_mmd(a, b)))
    assert (got.value == pytest.approx(np.mean(want), rel=1e-6)
            and got.spread == pytest.approx(np.std(want), rel=1e-6, abs=1e-12))
    drawn = np.std(want, ddof=1)/subsets**.5 if subsets > 1 else 0
    assert (got.se == pytest.approx(np.hypot(mmd2(x, y, 'polynomial').se, drawn), rel=1e-6)
            and got[3:] == ('polynomial[3]', subsets, size))


def test_kid_of_all_images_is_the_full_distance():
    x, y = data(30, 30)
    full = mmd2(x, y, 'polynomial')
    assert kid(x, y) == (full.value, full.se, None, 'polynomial[3]', None, None)
    assert kid(x, y, 3, 1000)[:2] == pytest.approx(full[:2])
    assert (kid(x, y, 3, 10) == kid(x.float(), y.numpy(), 3, 10)._replace(value=kid(x, y, 3, 10).value,
                                                                          se=kid(x, y, 3, 10).se,
                                                                          spread=kid(x, y, 3, 10).spread))


@pytest.mark.parametrize('call,words', [
    (lambda x: mmd2(x.numpy(), x[:,:2].numpy()), 'mmd2: sets of 4 and of 2 dimensions'),
    (lambda x: mmd2(x, x[:0]), 'at least 3 vectors on either side, got 40 and 0'),
    (lambda x: mmd2(x, x*np.nan), 'hold NaN or infinity'),
    (lambda x: mmd2(x[0].numpy(), x), 'expected features (n d)'),
    (lambda x: mmd2_linear(x, x[:3]), 'at least 4 vectors'),
    (lambda x: mmd2(x*0, x*0), 'the median distance of the data is 0'),
    (lambda x: kid(x, x, subsets=0), 'at least 1 subset of at least 3 vectors, got 0 of 1000'),
    (lambda x: kid(x, x, 2, 2), 'at least 1 subset of at least 3 vectors, got 2 of 2'),
    (lambda x: kid(x, x[:9], paired=True), 'expected pairs, as many vectors on either side, got 40 and 9'),
    (lambda x: get_kernel('gaussian')(x, x), 'has no bandwidth yet'),
])
def test_errors(call, words):
    with pytest.raises(ValueError) as e: call(data()[0])
    assert words in str(e.value) and '\n' not in str(e.value)

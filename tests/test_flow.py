"""Properties of the flow generator: paths and predictions agree,
samplers converge and find the right distribution, what is kept is kept"""
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from tokkit.core import load_model, make_rng, save_model
from tokkit.generators import (METHODS, PATHS, PREDICTIONS, TIMES, FlowCfg, FlowGenerator, convert,
                               draw_times, path_at, sample_euler, sample_heun, sample_sde)
from tokkit.generators import Guidance, sample_batches

MEANS = torch.tensor([[-2., 0], [1, 1.5], [1.5, -1]]).double()
SHARE = torch.tensor([.5, .3, .2]).double()
WIDTH = .3


def grid(steps): return torch.linspace(0, 1, steps+1, dtype=torch.float64)

def mixture(path):
    "The exact velocity of a mixture of three Gaussians"
    def velocity(z, t):
        a, s, da, ds = path_at(torch.tensor(t, dtype=z.dtype), path)
        d = z[:,None]-a*MEANS
        var = a**2*WIDTH**2+s**2
        whose = (SHARE.log()-d.square().sum(-1)/(2*var)).softmax(-1)[...,None]
        return (whose*(da*MEANS+(da*a*WIDTH**2+ds*s)/var*d)).sum(1)
    return velocity

def make(seed=0, **cfg):
    "A generator whose zero layers are not zero, so that everything matters"
    cfg = dict(n=6, dim=4, classes=5, width=32, depth=2, heads=4, mean=-.4, std=1.7)|cfg
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gen = FlowGenerator(FlowCfg(**cfg))
        for p in gen.parameters():
            if not p.any(): torch.nn.init.normal_(p, std=.1)
    return gen.eval()

def latents(b, seed=0, n=6, dim=4): return -.4+1.7*torch.randn(b, n, dim, generator=make_rng(seed, 'z'))


# --- path and predictions ---

@pytest.mark.parametrize('path', PATHS)
def test_path(path):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    a, s, da, ds = path_at(t, path)
    assert (a[0] == 0 and s[0] == 1 and abs(a[-1]-1) < 1e-12 and abs(s[-1]) < 1e-12 and (a.diff() > 0).all()
            and (s.diff() < 0).all())
    (slope,) = torch.autograd.grad(path_at(u := t.clone().requires_grad_(), path).signal.sum(), u)
    (slope2,) = torch.autograd.grad(path_at(u := t.clone().requires_grad_(), path).noise.sum(), u)
    assert (slope-da).abs().max() < 1e-12 and (slope2-ds).abs().max() < 1e-12
    if path == 'cosine': assert (a**2+s**2-1).abs().max() < 1e-12

@given(t=st.floats(.1, .95), seed=st.integers(0, 10**6), path=st.sampled_from(PATHS))
@settings(max_examples=30)
def test_predictions_convert(t, seed, path):
    z, noise = (torch.randn(3, 5, 2, generator=make_rng(seed, k), dtype=torch.float64)
                for k in ('z', 'noise'))
    at = torch.full((3, 1, 1), t, dtype=torch.float64)
    a, s, da, ds = path_at(at, path)
    truth = dict(velocity=da*z+ds*noise, noise=noise, clean=z)
    zt = a*z+s*noise
    for given_ in PREDICTIONS:
        for wanted in PREDICTIONS:
            assert (convert(truth[given_], given_, wanted, zt, at, path)-truth[wanted]).abs().max() < 1e-9

@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('given_', PREDICTIONS)
def test_conversions_are_finite_at_the_ends(path, given_):
    x = torch.ones(2, 3, 1)
    for wanted in PREDICTIONS:
        assert convert(x, given_, wanted, x, torch.tensor([0., 1.])[:,None,None], path).isfinite().all()

@pytest.mark.parametrize('times', TIMES)
def test_times(times):
    t = draw_times(20000, times, make_rng(0))
    assert 0 <= t.min() and t.max() < 1 and abs(t.mean()-.5) < .01
    assert torch.equal(draw_times(5, times, make_rng(1)), draw_times(5, times, make_rng(1)))


# --- samplers ---

@pytest.mark.parametrize('path', PATHS)
def test_order_of_convergence(path):
    "Against many steps of Heun: Euler's error falls with the step, Heun's with its square"
    e = torch.randn(100, 2, generator=make_rng(0), dtype=torch.float64)
    v = mixture(path)
    exact = sample_heun(v, e, grid(1500))
    def error(sampler, steps): return (sampler(v, e, grid(steps))-exact).norm(dim=1).median()
    orders = [math.log2(error(f, 100)/error(f, 200)) for f in (sample_euler, sample_heun)]
    assert abs(orders[0]-1) < .15 and abs(orders[1]-2) < .25, orders

@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('method', METHODS)
def test_moments_of_a_mixture(path, method):
    b = 6000
    steps = 100 if method == 'heun' else 250
    e = torch.randn(b, 2, generator=make_rng(0), dtype=torch.float64)
    times = grid(steps)
    v = mixture(path)
    fresh = torch.randn(b, steps, 2, generator=make_rng(1), dtype=torch.float64)
    z = dict(euler=lambda: sample_euler(v, e, times), heun=lambda: sample_heun(v, e, times),
             sde=lambda: sample_sde(v, e, times, fresh, path))[method]()
    mean = SHARE@MEANS
    cov = (SHARE[:,None]*MEANS).T@MEANS-torch.outer(mean, mean)+WIDTH**2*torch.eye(2)
    assert (z.mean(0)-mean).abs().max() < .08 and (z.T.cov()-cov).abs().max() < .15
    whose = torch.cdist(z, MEANS).argmin(1)
    count = whose.bincount(minlength=3)
    expected = SHARE*b
    # chi-square with two degrees of freedom, p = .001
    assert ((count-expected)**2/expected).sum() < 13.8
    for k in range(3): assert abs(z[whose == k].std(0).mean()-WIDTH) < .03

def test_without_churn_it_is_euler_on_the_line():
    e = torch.randn(50, 2, generator=make_rng(0), dtype=torch.float64)
    fresh = torch.randn(50, 20, 2, generator=make_rng(1), dtype=torch.float64)
    sde = sample_sde(mixture('linear'), e, grid(20), fresh, churn=0.)
    euler = sample_euler(mixture('linear'), e, grid(20))
    assert (sde-euler).abs().max() < 1e-9

def test_samplers_report_every_step():
    for sampler in (sample_euler, sample_heun):
        seen = []
        out = sampler(mixture('linear'), torch.zeros(3, 2).double(), grid(7), seen.append)
        assert ([s['i'] for s in seen] == list(range(7)) and seen[-1]['t'] == 1
                and torch.equal(seen[-1]['z'], out))


# --- the generator ---

@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('predict', PREDICTIONS)
def test_a_small_network_learns_a_mixture(path, predict):
    rng = make_rng(0, path, predict)
    gen = make(0, n=1, dim=2, classes=3, width=32, depth=2, heads=2, mean=.3, std=1.7, path=path,
               predict=predict)
    def blobs(b):
        y = torch.multinomial(SHARE, b, True, generator=rng)
        return (MEANS[y].float()+WIDTH*torch.randn(b, 2, generator=rng))[:,None], y
    optimiser = torch.optim.AdamW(gen.parameters(), lr=4e-3, weight_decay=0.)
    for i in range(300):
        for group in optimiser.param_groups: group['lr'] = 4e-3*(1-i/300)
        loss = gen.losses(*blobs(256), rng)['loss']
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    y = torch.arange(3).repeat(200)
    for method in METHODS:
        z = gen.sample(y, rng=make_rng(1), steps=24, method=method)[:,0]
        for k in range(3):
            assert (z[y == k].mean(0)-MEANS[k]).abs().max() < .3, (method, k, z[y == k].mean(0))
            # predicted data is late to learn its spread
            narrowest = 0 if predict == 'clean' else .1
            assert narrowest < z[y == k].std(0).min() and z[y == k].std(0).max() < .5, (method, k,
                                                                                        z[y == k].std(0))

def test_losses():
    gen = make()
    z = latents(8)
    y = torch.arange(8)%5
    out = gen.losses(z, y, make_rng(0))
    assert out['loss'].requires_grad and not out['clean_error'].requires_grad
    assert (torch.equal(out['loss'], gen.loss(z, y, make_rng(0)))
            and not torch.equal(out['loss'], gen.loss(z, y, make_rng(1))))
    out['loss'].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gen.parameters())

@pytest.mark.parametrize('path', PATHS)
def test_an_untrained_network_is_the_best_line(path):
    """Its output is zero, and what is left of the loss is what no line can say:
    the variance times det^2/q^2, s^2/q^2, a^2/q^2"""
    t = draw_times(5000, 'uniform', make_rng(1))
    y = torch.arange(5000)%5
    a, s, da, ds = path_at(t, path)
    left = dict(velocity=(a*ds-s*da)**2, noise=a**2, clean=s**2)
    for predict, share in left.items():
        torch.manual_seed(0)
        gen = FlowGenerator(FlowCfg(n=6, dim=4, classes=5, width=32, depth=1, mean=-.4, std=1.7, path=path,
                                    predict=predict, times='uniform'))
        assert abs(gen.loss(latents(5000), y, make_rng(0)).item()/(share/(a**2+s**2)).mean().item()-1) < .03

def test_positions_start_on_a_grid_or_a_line():
    for n, width in ((6, 32), (9, 32), (9, 34)):
        pos = FlowGenerator(FlowCfg(n=n, width=width, heads=2)).pos
        assert pos.shape == (n, width) and (torch.cdist(pos, pos)+torch.eye(n)*9).min() > .1

@pytest.mark.parametrize('method', METHODS)
def test_batch_size_changes_nothing(method):
    gen = make()
    how = dict(steps=6, method=method, guidance=Guidance(3., kind='linear'))
    whole, _ = sample_batches(gen, 64, batch=64, seed=3, **how)
    for batch in (1, 7):
        some, _ = sample_batches(gen, 64, batch=batch, seed=3, **how)
        assert (some-whole).abs().max() < 1e-4

@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('path', PATHS)
def test_sigma(method, path):
    gen = make(path=path)
    real = latents(6)
    y = torch.arange(6)%5
    def draw(sigma): return gen.sample(y, keep=(real, sigma), rng=make_rng(1), method=method, steps=8)
    assert torch.equal(draw(1.), real) and torch.equal(draw(1), real)
    assert torch.equal(draw(0.), gen.sample(y, rng=make_rng(1), method=method, steps=8))
    far = [(draw(sigma)-real).abs().mean().item() for sigma in (0., .25, .5, .75, .9, .99, 1.)]
    assert far == sorted(far, reverse=True), far
    assert draw(.999).isfinite().all()

def test_kept_samples_take_the_steps_that_remain():
    gen = make()
    real = latents(2)
    y = torch.tensor([0, 1])
    for sigma, left in ((0., 10), (.05, 10), (.1, 9), (.5, 5), (.95, 1)):
        seen = []
        gen.sample(y, keep=(real, sigma), rng=make_rng(1), steps=10, callback=seen.append)
        assert [s['i'] for s in seen] == list(range(left)) and {s['steps'] for s in seen} == {left}

def test_guidance_goes_by_time(monkeypatch):
    "A doubled batch exactly where guidance pulls, in a kept sample at the same times as in a free one"
    gen = make()
    real = latents(3)
    y = torch.tensor([0, 1, 2])
    sizes = []
    forward = gen.forward
    monkeypatch.setattr(gen, 'forward', lambda x, t, labels: (sizes.append(len(x)), forward(x, t, labels))[1])
    how = dict(guidance=Guidance(2., interval=(.5, .75)), rng=make_rng(0), steps=8, method='euler')
    gen.sample(y, **how)
    assert sizes == [3]*4+[6]*2+[3]*2
    sizes.clear()
    gen.sample(y, keep=(real, .5), **how)
    assert sizes == [6]*2+[3]*2
    sizes.clear()
    gen.sample(y, **how|dict(guidance=1.))
    assert sizes == [3]*8
    sizes.clear()
    gen.sample(y, **how|dict(guidance=0.))
    assert sizes == [3]*8
    sizes.clear()
    gen.sample(y, **how|dict(guidance=1., method='heun'))
    assert len(sizes) == 15

def test_guidance_extrapolates():
    gen = make()
    y = torch.arange(5)
    def step(g): return gen.sample(y, g, rng=make_rng(0), steps=1, method='euler')
    free = step(1.)
    null = step(Guidance(1e-9))
    assert (step(3.)-(null+3*(free-null))).abs().max() < 1e-4

def test_scale_belongs_to_the_tokenizer():
    "The same weights with another mean and std give the same latents, moved and stretched"
    gen = make(mean=0., std=1.)
    other = FlowGenerator(FlowCfg(**vars(gen.cfg)|dict(mean=2., std=3.))).eval()
    other.load_state_dict(gen.state_dict())
    y = torch.arange(4)
    a, b = (g.sample(y, rng=make_rng(0), steps=4) for g in (gen, other))
    assert (b-(a*3+2)).abs().max() < 1e-4
    z = torch.randn(4, 6, 4, generator=make_rng(1))
    assert abs(gen.loss(z, y, make_rng(0))-other.loss(z*3+2, y, make_rng(0))) < 1e-5

def test_callback_sees_latents_at_the_tokenizers_scale():
    gen = make()
    seen = []
    out = gen.sample(torch.tensor([1, 2]), rng=make_rng(0), steps=5, callback=seen.append)
    assert torch.equal(seen[-1]['latents'], out) and (seen[-1]['clean']-out).abs().max() < 1e-4
    assert {s['latents'].shape for s in seen} == {s['clean'].shape for s in seen} == {out.shape}
    assert [s['t'] for s in seen] == pytest.approx([.2, .4, .6, .8, 1.])
    assert torch.equal(out, gen.sample(torch.tensor([1, 2]), rng=make_rng(0), steps=5))

def test_temperature_scales_the_noise():
    gen = make()
    y = torch.zeros(64, dtype=torch.long)
    for method in METHODS:
        spread = [gen.sample(y, temperature=t, rng=make_rng(0), steps=8, method=method).std(0).mean()
                  for t in (.1, .5, 1.)]
        assert spread[0] < spread[1] < spread[2]

def test_round_trip(tmp_path):
    gen = make()
    save_model(gen, tmp_path)
    back = load_model(tmp_path, 'FlowGenerator', lambda config: FlowGenerator(FlowCfg(**config['cfg'])))
    y = torch.arange(3)
    assert (back.fingerprint == gen.fingerprint and back.cfg == gen.cfg
            and torch.equal(back.sample(y, rng=make_rng(0)), gen.sample(y, rng=make_rng(0))))


# --- bad input ---

@pytest.mark.parametrize('bad,line', [
    (dict(steps=0), 'steps must be a whole number at least 1, got 0'),
                                      (dict(method='rk4'),
                                       "method must be one of euler, heun, sde, got 'rk4'"),
    (dict(top_k=3), 'top_k and top_p choose among codes'), (dict(top_p=.5), 'top_k and top_p choose among '
                                                                            'codes'),
    (dict(temperature=0.), 'temperature must be > 0'), (dict(guidance=-1.), 'guidance must be in'),
    (dict(method='sde', churn=2.), 'churn must be in [0, 1], got 2'),
    (dict(keep=(torch.zeros(2, 6, 4), 1.5)), 'sigma must be in [0, 1], got 1.5'),
    (dict(keep=(torch.zeros(2, 5, 4), .5)), 'keep must be continuous latents of shape (2, 6, 4)'),
    (dict(keep=(torch.zeros(2, 6, 4).long(), .5)), 'keep must be continuous latents'),
    (dict(rng=torch.arange(3)), 'one seed a row')])
def test_bad_sampling(bad, line):
    with pytest.raises(ValueError) as e: make().sample(torch.tensor([0, 1]), **bad)
    assert line in str(e.value) and '\n' not in str(e.value)

def test_bad_labels_and_latents():
    gen = make()
    y = torch.tensor([0, 1])
    for labels in (torch.tensor([0, 5]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match='labels must be in 0..4'): gen.sample(labels)
    with pytest.raises(ValueError, match='continuous latents of shape'): gen.losses(latents(2)[:,:3], y)
    with pytest.raises(ValueError, match='labels must be in 0..4'): gen.losses(latents(2), y+5)

@pytest.mark.parametrize('bad,line',
                         [(dict(path='bent'), 'path must be one of'),
                          (dict(predict='score'), 'predict must be one of'),
                                      (dict(times='normal'), 'times must be one of'),
                          (dict(std=0.), 'std must be > 0'),
                                      (dict(std=math.nan), 'std must be > 0'),
                          (dict(label_dropout=1.5), 'label_dropout must be in'),
                                      (dict(n=0), 'n must be a whole number in 1..65536, got 0'),
                          (dict(heads=3), 'heads must divide')])
def test_bad_cfg(bad, line):
    with pytest.raises(ValueError, match=line): FlowGenerator(FlowCfg(**bad))

def test_damaged_weights_name_the_step():
    gen = make()
    y = torch.tensor([0, 1])
    gen.head.bias.data[0] = math.nan
    with pytest.raises(FloatingPointError, match='not finite at step 0 of 4'): gen.sample(y, steps=4)

def test_a_late_nan_names_its_step(monkeypatch):
    gen = make()
    forward = FlowGenerator.forward
    def late(self, x, t, labels): return forward(self, x, t, labels)/(t < .5).float()[:,None,None]
    monkeypatch.setattr(FlowGenerator, 'forward', late)
    with pytest.raises(FloatingPointError, match='not finite at step 5 of 10'):
        gen.sample(torch.tensor([0, 1]), steps=10, method='euler')

def test_guidance_without_label_dropout_warns():
    with pytest.warns(UserWarning, match='label_dropout 0'):
        make(label_dropout=0.).sample(torch.tensor([0]), 2., steps=2)

def test_no_rows():
    for method in METHODS:
        assert make().sample(torch.zeros(0, dtype=torch.long), 2., steps=3, method=method).shape == (0, 6, 4)

def test_no_step_waits_for_the_device(monkeypatch):
    "Nothing of the loop is brought to Python: it would make a GPU wait"
    gen = make()
    def forbidden(self, *args): raise AssertionError('a value was read while sampling')
    draws = gen.sample(torch.tensor([0, 1]), 2., rng=torch.tensor([5, 6]), steps=4)
    seen = []
    def watch(at):
        if at['i'] == 0:
            monkeypatch.setattr(torch.Tensor, 'item', forbidden)
            monkeypatch.setattr(torch.Tensor, '__bool__', forbidden)
        if at['i'] == 3: monkeypatch.undo()
        seen.append(at['i'])
    assert (torch.equal(gen.sample(torch.tensor([0, 1]), 2., rng=torch.tensor([5, 6]), steps=4,
                                   callback=watch), draws) and len(seen) == 4)

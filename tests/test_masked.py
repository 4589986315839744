"""The masked generator: every entry once, the right frequencies,
the same sample in any batch, and what it refuses"""
import math

import pytest, torch
from scipy.stats import chisquare

from tokkit.core import load_model, make_rng, save_model
from tokkit.generators import Guidance, LatentGenerator, guide, row_noise, row_seeds, sample_batches
from tokkit.generators import (MASK_SCHEDULES, MaskedCfg, MaskedGenerator, mask_schedule, random_mask,
                               unmask_plan)


def generator(levels=1, sharp=4., **changes):
    "An untrained generator whose scores are nevertheless far from flat"
    torch.manual_seed(0)
    gen = MaskedGenerator(MaskedCfg(**dict(n=12, codebook_size=7, classes=3, width=16, depth=2, heads=2,
                                           levels=levels) | changes)).eval()
    with torch.no_grad():
        gen.head.weight.mul_(sharp)
        for w in (gen.token, gen.label): w.weight.mul_(20)
    return gen

@pytest.fixture(scope='module', params=[1, 2], ids=['one level', 'two levels'])
def gen(request): return generator(request.param)

def labels(b): return torch.arange(b)%3

def real(gen, b): return torch.randint(7, (b, *gen.shape), generator=make_rng(5))


@pytest.mark.parametrize('kind,steps,sigma',
                         [('cosine', 1, None), ('cosine', 12, 0.), ('arccos', 5, .4), ('linear', 12, .4),
                          ('arccos', 12, None), ('cosine', 5, 1.)])
def test_every_entry_is_set_exactly_once(gen, kind, steps, sigma):
    gen = generator(gen.cfg.levels, schedule=kind)
    seen = []
    keep = None if sigma is None else (real(gen, 9), sigma)
    out = gen.sample(labels(9), 2., keep=keep, rng=make_rng(1), steps=steps, callback=seen.append)
    held = (torch.zeros(9, *gen.shape, dtype=torch.bool) if keep is None
            else row_noise(row_seeds(make_rng(1), 9), gen.shape, 'keep') < sigma)
    assert (len(seen) == steps and [s['i'] for s in seen] == list(range(steps))
            and all(s['steps'] == steps for s in seen))
    assert torch.equal(sum(s['new'].int() for s in seen), (~held).int())
    known = held
    for s in seen:
        assert not (s['new'] & known).any()
        known = known | s['new']
        assert torch.equal(s['known'], known) and torch.equal(s['latents'][known], out[known])
        assert 0 <= s['latents'].min() and s['latents'].max() < 7
    assert known.all() and 0 <= out.min() and out.max() < 7
    if keep: assert torch.equal(out[held], keep[0][held])


def test_plan_leaves_something_for_each_step():
    for kind in MASK_SCHEDULES:
        for steps in (1, 2, 8, 30):
            hidden = torch.arange(61)
            plan = unmask_plan(hidden, steps, kind)
            new = -plan.diff(dim=1, prepend=hidden[:, None])
            assert (plan[:, -1] == 0).all() and (new >= 0).all() and torch.equal(new.sum(1), hidden)
            assert (new[steps:] >= 1).all()


def test_schedules():
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert (torch.allclose(mask_schedule(u), torch.cos(math.pi*u/2))
            and torch.allclose(mask_schedule(u, 'linear'), 1-u))
    assert torch.allclose(torch.cos(mask_schedule(u, 'arccos')*math.pi/2), u)


@pytest.mark.parametrize('kind', MASK_SCHEDULES)
def test_training_masks_follow_the_schedule(kind):
    b = 6000
    m = 20
    count = random_mask(b, m, kind, make_rng(0)).sum(1)
    edge = mask_schedule(torch.linspace(0, 1, 100_001, dtype=torch.float64), kind)
    p = torch.bincount((edge*m).ceil().clamp(1, m).long(), minlength=m+1)[1:].double()
    p /= p.sum()
    assert count.min() >= 1
    assert chisquare(torch.bincount(count, minlength=m+1)[1:], (p*b).numpy()).pvalue > 1e-3


class Known(MaskedGenerator):
    """Exact conditionals of a known distribution: pairs of entries that are equal,
    code k of a pair with probability p[label, k]"""
    p = torch.tensor([[.5, .3, .2], [.1, .1, .8]])
    def __init__(self, **changes): super().__init__(MaskedCfg(4, 3, 2, 8, 1, 1, **changes))
    def logits(self, ids, labels):
        prior = torch.cat([self.p, self.p.mean(0, keepdim=True)]).log()[labels]                        # (b k)
        out = prior[:, None].expand(-1, 4, -1).clone()
        partner = ids[:, [1, 0, 3, 2]]
        sure = torch.full((*ids.shape, 4), -30.).scatter(-1, partner[..., None], 30.)[..., :3]
        return torch.where((partner < 3)[..., None], sure, out)

def frequencies(ids): return torch.bincount(3*ids[:, 0]+ids[:, 2], minlength=9)

@pytest.mark.parametrize('how',
                         [dict(), dict(temperature=.5), dict(top_k=2), dict(top_p=.75),
                          dict(guidance=Guidance(2.))], ids=str)
def test_frequencies(how):
    """In any order, one entry a step, the samples have the distribution:
    both pairs agree within, and are independent of each other"""
    n = 6000
    known = Known()
    for label in (0, 1):
        ids = known.sample(torch.full((n,), label), rng=make_rng(3+label), steps=4, choice_temperature=1e6,
                           **how)
        assert torch.equal(ids[:, 0], ids[:, 1]) and torch.equal(ids[:, 2], ids[:, 3])
        p = Known.p[label].double()
        if 'temperature' in how: p = p**2
        if how.keys() & {'top_k', 'top_p'}:
            p = torch.where(p > (.25 if label == 0 else (.05 if 'top_k' in how else .7)), p, 0.)
        if 'guidance' in how: p = guide(p.log(), Known.p.double().mean(0).log(), 2.).softmax(0)
        p = p/p.sum()
        joint = (p[:, None]*p).flatten()
        there = joint > 0
        assert frequencies(ids)[~there].sum() == 0
        if there.sum() > 1:
            assert (chisquare(frequencies(ids)[there],
                              (joint[there]/joint[there].sum()*n).numpy()).pvalue > 1e-3)

def test_one_step_cannot_agree():
    ids = Known().sample(torch.zeros(4000).long(), rng=make_rng(0), steps=1)
    assert ((ids[:, 0] == ids[:, 1]).float().mean().item() == pytest.approx((Known.p[0]**2).sum().item(),
                                                                            abs=.03))


@pytest.mark.parametrize('how',
                         [dict(steps=3),
                          dict(guidance=Guidance(4., interval=(.2, .7)), temperature=.8, top_k=5, top_p=.9,
                               steps=6)], ids=['plain', 'all'])
def test_a_sample_does_not_depend_on_the_batch(gen, how):
    made = [sample_batches(gen, 64, batch=b, seed=2, keep=(real(gen, 64), .3), **how)[0] for b in (1, 7, 64)]
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
    assert len(made[0].flatten(1).unique(dim=0)) > 40


def test_keep(gen):
    x = real(gen, 20)
    y = labels(20)
    free = gen.sample(y, 2., rng=make_rng(1))
    assert torch.equal(gen.sample(y, 2., keep=(x, 1.), rng=make_rng(1)), x)
    assert torch.equal(gen.sample(y, 2., keep=(x, 0.), rng=make_rng(1)), free)
    assert not torch.equal(gen.sample(y, 2., rng=make_rng(2)), free)
    shares = [(gen.sample(y, keep=(x, s), rng=make_rng(1)) == x).float().mean().item()
              for s in (0., .3, .6, 1.)]
    assert shares == sorted(shares) and shares[-1] == 1


def test_guidance_is_fused_and_left_out_where_it_does_nothing(gen):
    rows = []
    class Watched(MaskedGenerator):
        def logits(self, ids, labels):
            rows.append((len(labels), labels.max().item()))
            return super().logits(ids, labels)
    watched = Watched(gen.cfg).eval()
    watched.load_state_dict(gen.state_dict())
    y = labels(5)
    for scale in (0, 1):
        assert torch.equal(watched.sample(y, scale, rng=make_rng(0), steps=4),
                           gen.sample(y, rng=make_rng(0), steps=4))
    assert rows == [(5, 2)]*8
    rows.clear()
    watched.sample(y, Guidance(3, interval=(.5, 1)), steps=4)
    assert rows == [(5, 2)]*2+[(10, 3)]*2


def test_the_logits_of_the_callback_are_guided(gen):
    seen = []
    y = labels(4)
    gen.sample(y, 3., rng=make_rng(0), steps=3, callback=seen.append)
    k = gen.codebook_size
    for before, now in zip([None, *seen], seen):
        ids = (torch.full((4, *gen.shape), k) if before is None
               else before['latents'].where(before['known'], torch.tensor(k)))
        with torch.no_grad(): want = guide(gen.logits(ids, y), gen.logits(ids, torch.full_like(y, 3)), 3.)
        assert torch.allclose(now['logits'], want, atol=1e-4) and now['logits'].shape == (4, *gen.shape, k)


def test_levels_of_a_token_see_each_other():
    gen = generator(2)
    ids = torch.full((1, 12, 2), 7)
    ids[0, 3, 0] = 2
    other = ids.clone()
    other[0, 3, 0] = 4
    with torch.no_grad():
        a = gen.logits(ids, labels(1))
        b = gen.logits(other, labels(1))
    assert (a[0, 3, 1]-b[0, 3, 1]).abs().max() > 1e-3
    swapped = ids.flip(2)
    # code 2 of level 1 is not code 2 of level 0
    with torch.no_grad(): assert (gen.logits(swapped, labels(1))-a).abs().max() > 1e-3


def test_learns_and_only_from_what_is_hidden(gen):
    gen = generator(gen.cfg.levels, label_dropout=0.).train()
    y = labels(16)
    x = real(gen, 3)[y]
    first = gen.losses(x, y, make_rng(0))
    assert (set(first) == {'loss', 'accuracy'} and first['loss'].requires_grad
            and not first['accuracy'].requires_grad)
    hidden = random_mask(16, x[0].numel(), rng=make_rng(0)).view(x.shape)
    scores = gen.logits(x.masked_fill(hidden, 7), y)
    # an image's hidden entries, then images
    def mean(x): return ((x*hidden).flatten(1).sum(1)/hidden.flatten(1).sum(1)).mean().item()
    assert (first['loss'].item() == pytest.approx(mean(-scores.log_softmax(-1).gather(-1, x[..., None])[...,
                                                                                                        0]),
                                                  rel=1e-5))
    assert first['accuracy'].item() == pytest.approx(mean((scores.argmax(-1) == x).float()))
    optimiser = torch.optim.AdamW(gen.parameters(), 1e-2)
    for i in range(30):
        optimiser.zero_grad()
        gen.loss(x, y, make_rng(i)).backward()
        optimiser.step()
    assert gen.loss(x, y, make_rng(0)) < .8*first['loss']
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gen.parameters())


def test_uniform_masks_give_the_loss_of_a_random_order():
    "With exact conditionals the mean loss is the entropy of an image over its entries"
    n = 4000
    known = Known(label_dropout=0.)
    p = Known.p[0]
    x = known.sample(torch.zeros(n).long(), rng=make_rng(8), steps=4, choice_temperature=1e6)
    assert (known.loss(x, torch.zeros(n).long(),
                       make_rng(9)).item() == pytest.approx(-2*(p*p.log()).sum().item()/4, abs=.02))


@pytest.mark.parametrize('n,grid', [(12, (1, 12)), (12, (3, 4)), (16, (4, 4))])
def test_neighbours_are_seen_without_attention(n, grid):
    gen = generator(n=n, depth=1, grid=grid)
    with torch.no_grad(): gen.blocks[0].attn.proj.weight.zero_()
    ids = torch.full((1, n), 7)
    other = ids.clone()
    other[0, 5] = 2
    with torch.no_grad():
        moved = (gen.logits(ids, labels(1))-gen.logits(other, labels(1))).abs().amax(-1)[0] > 1e-5
    row = torch.arange(n)//grid[1]
    column = torch.arange(n)%grid[1]
    assert torch.equal(moved, ((row-5//grid[1]).abs() <= 1) & ((column-5%grid[1]).abs() <= 1))
    alone = generator(n=n, depth=1, near=0)
    with torch.no_grad(): alone.blocks[0].attn.proj.weight.zero_()
    with torch.no_grad():
        moved = (alone.logits(ids, labels(1))-alone.logits(other, labels(1))).abs().amax(-1)[0] > 1e-5
    assert moved.nonzero().flatten().tolist() == [5]


def test_label_smoothing_and_dropout_count():
    x = real(generator(), 8)
    y = labels(8)
    plain, smooth, dropped = (generator(**c).loss(x, y, make_rng(0)).item()
                              for c in (dict(), dict(label_smoothing=.2), dict(label_dropout=1.)))
    assert len({plain, smooth, dropped}) == 3
    a, b = (generator(label_dropout=1.).loss(x, l, make_rng(0)).item() for l in (y, (y+1)%3))
    # no label is seen
    assert a == b


def test_nobody_at_all(gen):
    out = gen.sample(labels(0), 2.)
    assert out.shape == (0, *gen.shape) and out.dtype == torch.int64


def test_saved_and_read(gen, tmp_path):
    save_model(gen, tmp_path/'g')
    again = load_model(tmp_path/'g', 'MaskedGenerator',
                       lambda config: MaskedGenerator(MaskedCfg(**config['cfg'])))
    assert (again.cfg == gen.cfg and again.fingerprint == gen.fingerprint
            and isinstance(again, LatentGenerator))
    assert torch.equal(again.sample(labels(4), rng=make_rng(0)), gen.sample(labels(4), rng=make_rng(0)))


@pytest.mark.parametrize('bad,says', [
    (dict(steps=0), r'steps must be a whole number in 1..12, got 0'),
                                      (dict(steps=13), r'steps must be a whole number in 1..12, got 13'),
    (dict(choice_temperature=-1.), 'choice_temperature must be in'),
                                      (dict(temperature=0.), 'temperature must be > 0'),
    (dict(temperature=-1.), 'temperature must be > 0'), (dict(top_p=0.), r'top_p must be in \(0, 1\]'),
                                      (dict(top_k=0), 'top_k must be a whole number at least 1'),
    (dict(keep=(torch.zeros(2, 12).long(), 1.1)), 'sigma must be in'),
                                      (dict(keep=(torch.zeros(2, 11).long(), .5)), 'keep must be ids'),
    (dict(keep=(torch.full((2, 12), 7), .5)), 'another tokenizer'),
                                      (dict(keep=(torch.zeros(2, 12), .5)), 'keep must be ids')], ids=str)
def test_refuses(bad, says):
    with pytest.raises(ValueError, match=says) as e: generator().sample(labels(2), **bad)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('y,says',
                         [(torch.tensor([3]), 'labels must be in 0..2'),
                          (torch.tensor([0.]), 'whole numbers'), (torch.tensor([[0]]), 'vector')])
def test_refuses_labels(y, says):
    gen = generator()
    with pytest.raises(ValueError, match=says): gen.sample(y)
    with pytest.raises(ValueError, match=says): gen.losses(real(gen, 1), y)


def test_guidance_without_label_dropout_warns():
    gen = generator(label_dropout=0.)
    with pytest.warns(UserWarning, match='MaskedGenerator was trained with label_dropout 0'):
        gen.sample(labels(2), 3.)


def test_a_broken_prediction_names_its_step():
    class Breaks(MaskedGenerator):
        calls = 0
        def logits(self, ids, labels):
            self.calls += 1
            return super().logits(ids, labels)*(torch.nan if self.calls == 3 else 1)
    with pytest.raises(FloatingPointError, match='not finite at step 2 of 5'):
        Breaks(generator().cfg).sample(labels(2), steps=5)


@pytest.mark.parametrize('bad,says',
                         [(dict(schedule='sine'), 'one of cosine, arccos, linear'),
                          (dict(label_dropout=1.5), 'label_dropout must be in'),
                                      (dict(levels=0), 'levels must be a whole number'),
                          (dict(near=4), 'near must be odd'), (dict(masks='x'), 'one of cosine'),
                          (dict(heads=3), 'heads must divide')])
def test_refuses_shapes(bad, says):
    with pytest.raises(ValueError, match=says): generator(**bad)


def test_memory_estimate_holds():
    "What a sample takes is measured on a CPU profile: the estimate is not below it, and not ten times above"
    gen = generator(n=49, codebook_size=512, width=96, depth=3, heads=4)
    with torch.profiler.profile(profile_memory=True) as p:
        gen.sample(labels(16), 2., rng=make_rng(0), steps=2)
    now = peak = 0
    for e in sorted((e for e in p.profiler.kineto_results.events() if e.name() == '[memory]'),
                    key=lambda e: e.start_ns()):
        now += e.nbytes()
        peak = max(peak, now)
    assert peak <= 16*gen.sample_bytes <= 10*peak

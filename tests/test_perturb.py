"Properties of the perturbation that hold for every kind, dose, quantizer and seed"
import pytest
import torch
from hypothesis import given, settings, strategies as st

import tokkit.quantizers.quantizer
from tokkit.core import make_rng, tensors_hash
from tokkit.quantizers import NeighbourTable, code_neighbours, nearest_codes
from tokkit.perturbation import (ANNEALINGS, OFFICIAL, PERTURBATIONS, Annealing, LatentPerturbation,
                                 annealing, choose_blocks, choose_images, choose_tokens, drop_tokens,
                                 effective_rate, multi_scale, nth_nearest, perturb_codes, perturb_latents,
                                 perturbation, split_levels)
from tokkit.quantizers import Quantized, make_quantizer

K = 40
D = 5
N = 30
CODE_KINDS = ['nearest', 'uniform', 'frequency', 'adversarial']


def setting(seed):
    codebook = torch.randn(K, D, generator=make_rng(seed, 'codes'))
    return torch.randint(K, (12, N), generator=make_rng(seed, 'ids')), codebook

doses = dict(alpha=st.floats(0, 1), beta=st.floats(0, 1), delta=st.integers(1, K-1),
             include_self=st.booleans(), seed=st.integers(0, 10**6),
             rate=st.sampled_from(['exact', 'bernoulli']))


# --- the draws of version 0.1, which published results depend on

RECORDED = dict(paper='7c4d8fc0db', beta='58d5cc9162', coin='cab26f63b2', others='5a01aab6c3',
                first='c58c702d6b', table='7c4d8fc0db', latent='ce426685ee',
                latent_others='cae4384441', official='c35f8ce5a5')
CASES = dict(paper={}, beta=dict(beta=.3), coin=dict(rate='bernoulli'), others=dict(include_self=False),
             first=dict(beta=.5, select='first'), table={},
             latent=dict(neighbours='latent'),
             latent_others=dict(neighbours='latent', include_self=False, beta=.6),
             official=dict(OFFICIAL, beta=.5))

def recorded_inputs():
    codebook = torch.randn(40, 5, generator=make_rng(7, 'codes'))
    ids = torch.randint(40, (12, 30), generator=make_rng(7, 'ids'))
    return ids, codebook, codebook[ids]+.3*torch.randn(12, 30, 5, generator=make_rng(7, 'z'))

@pytest.mark.parametrize('case', RECORDED)
def test_recorded_draws_of_codes(case):
    ids, codebook, z = recorded_inputs()
    out = perturb_codes(ids, codebook, .6, 6, **(dict(beta=1.)|CASES[case]), z=z, table=NeighbourTable()
                        if case == 'table' else None, rng=make_rng(3))
    assert tensors_hash({'ids': out}) == RECORDED[case]

@pytest.mark.parametrize('kind,beta,recorded', [
    ('gaussian', 1., [-.1835, -.6697, -.9744, -2.8202, 1.3256, -1.1408, -2.5882, .9884]),
    ('gaussian', .4, [-.3591, -.6697, -.9744, -1.6393, .5627, -2.1667, -1.6609, .9884]),
    ('interpolate', 1., [-.0399, -.7529, -.7567, -2.1644, 1.1005, -.2741, -1.9239, .7895]),
    ('interpolate', .4, [-.3591, -.7529, -.7567, -1.6393, .5627, -2.1667, -1.6609, .7895])])
def test_recorded_draws_of_noise(kind, beta, recorded):
    *_, z = recorded_inputs()
    out = perturb_latents(z, .4, kind, beta, std=2., rng=make_rng(3))
    assert out.flatten()[:1200:150].tolist() == pytest.approx(recorded, abs=1e-4)

@pytest.mark.parametrize('epoch,recorded', [(0, 'b44eb960da'), (5, '0643bc1273'), (9, 'e1a6579c52')])
def test_recorded_draws_of_training(epoch, recorded):
    ids, codebook, z = recorded_inputs()
    q = Quantized(codebook[ids], ids, torch.zeros(()), torch.zeros(()))
    p = LatentPerturbation(.8, .5, 10, Annealing(2, 6))(z, q, codebook, epoch=epoch, rng=make_rng(3, epoch))
    assert tensors_hash({'ids': p.ids}) == recorded

def test_recorded_draws_of_training_on_latents():
    *_, z = recorded_inputs()
    p = LatentPerturbation(.8, .5, 10, Annealing(2, 6))(z,
                                                        Quantized(z, None, torch.zeros(()), torch.zeros(())),
                                                        None, epoch=5, rng=make_rng(3))
    assert (p.zq.flatten()[:1800:225].tolist() == pytest.approx([-.3591, -.7415, -1.6393, 1.9825, -1.6609,
                                                                 -.4873, -.1797, 1.2089], abs=1e-4))


# --- codes

@given(**doses)
@settings(max_examples=25)
def test_members_rate_and_proportion(alpha, beta, delta, include_self, seed, rate):
    ids,codebook = setting(seed)
    out = perturb_codes(ids, codebook, alpha, delta, beta, rate=rate, include_self=include_self,
                        rng=make_rng(seed))
    again = perturb_codes(ids, codebook, alpha, delta, beta, rate=rate, include_self=include_self,
                          rng=make_rng(seed), table=NeighbourTable())
    # same seed, same draw, with a table or without
    assert torch.equal(out, again)
    moved = out != ids
    brute = torch.cdist(codebook, codebook).fill_diagonal_(-1).argsort(1)[:, int(not include_self):][:,
                                                                                                     :delta]
    assert (brute[ids] == out[...,None]).any(-1)[moved].all()                   # only among the nearest
    assert abs(int(moved.any(1).sum()) - 12*beta) <= 1 or moved.any(1).sum() < 12*beta
    if rate == 'exact': assert (moved.sum(1) <= round(alpha*N)).all()
    if not include_self and rate == 'exact' and beta == 1: assert (moved.sum(1) == round(alpha*N)).all()
    if alpha == 0 or beta == 0: assert torch.equal(out, ids)


@given(kind=st.sampled_from(CODE_KINDS), where=st.sampled_from(['tokens', 'blocks']),
       world=st.sampled_from([1, 2, 3, 4]),
       neighbours=st.sampled_from(['code', 'latent']), **doses)
@settings(max_examples=50)
def test_every_kind_of_code(kind, where, world, neighbours, alpha, beta, delta, include_self, seed, rate):
    "Identity at no dose, exact counts, members, seeds, shards"
    ids,codebook = setting(seed)
    z = codebook[ids]+.2*torch.randn(12, N, D, generator=make_rng(seed, 'z'))
    g = torch.randn(12, N, D, generator=make_rng(seed, 'g'))
    how = dict(kind=kind, where=where, rate=rate, neighbours=neighbours, include_self=include_self)
    draw = lambda rows=slice(None), shard=(0, 1), alpha=alpha, beta=beta, s=seed: perturb_codes(
        ids[rows], codebook, alpha, delta, beta, **how, z=z[rows], gradient=g[rows], rng=make_rng(s),
                                                                                                shard=shard)
    out = draw()
    assert torch.equal(out, draw())
    assert torch.equal(draw(alpha=0), ids) and torch.equal(draw(beta=0), ids)
    b = 12//world
    assert torch.equal(torch.cat([draw(slice(r*b, (r+1)*b), (r, world)) for r in range(world)]), out)
    moved = (out != ids)
    full = round(alpha*N)
    if rate == 'exact' or where == 'blocks':
        assert (moved.sum(1) <= full).all() and moved.any(1).sum() in range(int(12*beta)+2)
        # every redraw changes something, so counts are exact
        if not include_self and neighbours == 'code':
            assert set(moved.sum(1).tolist()) <= {0, full}
            if full: assert int(12*beta) <= moved.any(1).sum() <= int(12*beta)+1
    if kind in ('nearest', 'adversarial'):
        near = (code_neighbours(ids, codebook, delta, include_self) if neighbours == 'code'
                else nearest_codes(z, codebook, min(delta+1, K)))
        assert (near == out[...,None]).any(-1)[moved].all()


@pytest.mark.parametrize('kind', ['nearest', 'uniform', 'frequency'])
@pytest.mark.parametrize('where', ['tokens', 'blocks'])
def test_seeds_move_everything(kind, where):
    ids,codebook = setting(0)
    a,b = (perturb_codes(ids, codebook, .5, 20, .5, kind=kind, where=where, rng=make_rng(s)) for s in (1, 2))
    assert not torch.equal(a, b)
    assert not torch.equal((a != ids).any(1), (b != ids).any(1))            # other images
    both = (a != ids)&(b != ids)
    assert not torch.equal(a[both], b[both])                                # other codes


def test_uniform_and_frequency_draw_what_they_say():
    vq = make_quantizer('vq', 8, 4)
    vq.usage.copy_(torch.tensor([0., 1, 2, 3, 4, 5, 0, 0]))
    ids = torch.randint(8, (400, 50), generator=make_rng(0))
    for kind,weight in (('uniform', torch.ones(8)), ('frequency', vq.usage)):
        out = perturb_codes(ids, vq, 1., 1, kind=kind, rng=make_rng(1))
        assert torch.allclose(out.flatten().bincount(minlength=8)/20000, weight/weight.sum(), atol=.015)
        others = perturb_codes(ids, vq, 1., 1, kind=kind, include_self=False, rng=make_rng(1))
        assert (others != ids).all() and (weight[others] > 0).all()
    vq.usage.zero_()                                                        # nothing counted: all alike
    assert perturb_codes(ids, vq, 1., 1, kind='frequency', rng=make_rng(1)).unique().numel() == 8


@given(delta=st.integers(2, K), seed=st.integers(0, 10**6))
@settings(max_examples=15)
def test_adversarial_is_the_worst_of_its_neighbours(delta, seed):
    ids,codebook = setting(seed)
    g = torch.randn(12, N, D, generator=make_rng(seed, 'g'))
    out = perturb_codes(ids, codebook, 1., delta, kind='adversarial', gradient=g, rng=make_rng(seed))
    gains = torch.einsum('bnd,bnmd->bnm', g, codebook[code_neighbours(ids, codebook, delta)])
    assert torch.allclose((g*codebook[out]).sum(-1), gains.max(-1).values, atol=1e-5)


@given(m=st.integers(1, 60), k=st.integers(1, 50), copies=st.booleans(),
       chunk=st.sampled_from([1, 100, 2**20]), seed=st.integers(0, 10**6))
@settings(max_examples=25)
def test_rank_without_sorting(m, k, copies, chunk, seed):
    "The partition finds what sorting finds, also among equal codes"
    rng = make_rng(seed)
    codebook = torch.randn(k, 3, generator=rng)
    if copies: codebook = codebook.round()
    v = torch.randn(m, 3, generator=rng)
    rank = torch.randint(k, (m,), generator=rng)
    if copies: v = v.round()
    assert torch.equal(nth_nearest(v, codebook, rank, chunk),
                       nearest_codes(v, codebook, k).gather(1, rank[:,None])[:,0])


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), alpha=st.floats(0, 1), seed=st.integers(0, 10**6))
@settings(max_examples=25)
def test_blocks(rows, columns, alpha, seed):
    "An exact number of tokens, in one connected piece"
    from scipy.ndimage import label
    hit = choose_blocks(8, [(rows, columns)], alpha, make_rng(seed))
    assert (hit.sum(1) == round(alpha*rows*columns)).all()
    assert all(label(h.view(rows, columns).numpy())[1] <= 1 for h in hit)


def test_blocks_of_every_size():
    "Exact counts do not hang on rounding"
    for rows,columns in ((1, 9), (3, 7), (7, 3), (8, 8), (13, 5)):
        for count in range(rows*columns+1):
            assert (choose_blocks(4, [(rows, columns)], count/(rows*columns),
                                  make_rng(count)).sum(1) == count).all(), (rows, columns, count)


@pytest.mark.parametrize('include_self,expected', [(True, .75*.8), (False, .8)])
def test_measured_rate(include_self, expected):
    ids = torch.randint(K, (4000, 10), generator=make_rng(1))
    _,codebook = setting(2)
    for rate in ('exact', 'bernoulli'):
        out = perturb_codes(ids, codebook, .8, 4, include_self=include_self, rate=rate, rng=make_rng(3))
        assert effective_rate(ids, out) == pytest.approx(expected, abs=.01)


def test_proportion_is_right_on_average_even_below_one_image():
    share = torch.stack([choose_images(5, .1, rng=make_rng(0, i)) for i in range(3000)]).double().mean()
    assert share == pytest.approx(.1, abs=.012)


def test_images_are_not_always_the_first():
    assert (torch.stack([choose_images(8, .25, rng=make_rng(0, i))
                         for i in range(200)]).double().mean(0).min() > .1)


def test_rate_of_an_image_is_exact():
    assert choose_tokens((50, N), .5, rng=make_rng(0)).sum(1).eq(15).all()


# --- latents

@given(strength=st.floats(0, 1), beta=st.floats(0, 1),
       kind=st.sampled_from(['gaussian', 'interpolate', 'adversarial']),
       draw=st.sampled_from(['fixed', 'uniform']), world=st.sampled_from([1, 2, 5]),
       seed=st.integers(0, 10**6))
@settings(max_examples=25)
def test_latent_noise(strength, beta, kind, draw, world, seed):
    z,g = (torch.randn(10, 6, 4, generator=make_rng(seed, name)) for name in 'zg')
    noise = lambda rows=slice(None), strength=strength, **kw: perturb_latents(z[rows], strength, kind, beta,
                                                                              draw=draw, gradient=g[rows],
                                                                              rng=make_rng(seed), **kw)
    out = noise()
    assert torch.equal(out, noise()) and torch.equal(noise(strength=0.), z)
    assert int((out != z).any(2).any(1).sum()) <= int(10*beta)+1
    if beta == 0: assert torch.equal(out, z)
    b = 10//world
    assert torch.equal(torch.cat([noise(slice(r*b, (r+1)*b), shard=(r, world)) for r in range(world)]), out)


def test_forms_of_the_two_papers():
    "DeTok: (1-t) z + t gamma noise, t uniform for each image. RAE: z + s noise, s uniform in 0..0.8"
    z = torch.randn(3000, 40, 2, generator=make_rng(0))
    q = Quantized(z, None, torch.zeros(()), torch.zeros(()))
    mixed,added = (perturbation(n, std=1.)(z, q, None, rng=make_rng(1)).zq for n in ('interpolate', 'rae'))
    kept = (mixed*z).mean((1, 2))/z.square().mean((1, 2))                   # 1-t, noisily
    assert kept.mean() == pytest.approx(.5, abs=.02) and mixed.var() == pytest.approx((1+9)/3, rel=.02)
    spread = (added-z).std((1, 2))
    assert spread.mean() == pytest.approx(.4, abs=.01) and spread.max() < .8*1.3 and spread.min() < .05


@given(alpha=st.floats(0, 1), beta=st.floats(0, 1), where=st.sampled_from(['tokens', 'blocks']),
       seed=st.integers(0, 10**6))
@settings(max_examples=20)
def test_dropped_tokens(alpha, beta, where, seed):
    z = torch.randn(6, 16, 4, generator=make_rng(seed, 'z'), requires_grad=True)
    out = drop_tokens(z, alpha, 7., beta, where=where, rng=make_rng(seed))
    gone = (out-7).abs().amax(2) < 1e-5
    assert set(gone.sum(1).tolist()) <= {0, round(alpha*16)} and torch.equal(out[~gone], z[~gone])
    if round(alpha*16): assert int(6*beta) <= gone.any(1).sum() <= int(6*beta)+1
    parts = [drop_tokens(z[2*r:2*r+2], alpha, 7., beta, where=where, rng=make_rng(seed), shard=(r, 3))
             for r in range(3)]
    assert torch.equal(torch.cat(parts), out)
    out.sum().backward()
    assert z.grad.eq(1).all()


# --- every kind with every quantizer

def quantizers():
    small = dict(vq={}, pq={}, rq=dict(levels=3), msrq=dict(scales=(1, 2, 4)), lfq={}, bsq={}, fsq={}, kl={},
                 none={})
    return {name: small.get(name, {}) for name in tokkit.quantizers.registry.QUANTIZERS}

def quantized(name, seed=0):
    torch.manual_seed(seed)
    dim = dict(lfq=6, bsq=6, fsq=None).get(name, 8)
    quantizer = make_quantizer(name, 64, dim, **quantizers()[name])
    z = torch.randn(6, 16, quantizer.in_dim or dim, generator=make_rng(seed), requires_grad=True)
    return quantizer, z, quantizer(z)

def nothing_as_zero(gradient, like):
    "A gradient that was not asked for is one of zeros"
    return torch.zeros_like(like) if gradient is None else gradient


@pytest.mark.parametrize('kind', PERTURBATIONS)
@pytest.mark.parametrize('name', quantizers())
def test_every_kind_with_every_quantizer(name, kind):
    """It works, or says why not in one line; z gets the gradient of the clean path, and so does what
    the quantizer learns, which is nothing but for IBQ and mixtures; two halves draw what the whole does"""
    quantizer,z,q = quantized(name)
    damage = perturbation(kind, alpha=.5, beta=.5, delta=6, strength=.7, std=1., select='random')
    weight = torch.randn(q.zq.shape, generator=make_rng(1))
    g = weight if damage.needs_gradient else None
    why = damage.why_not(quantizer)
    if why:
        assert '\n' not in why and (quantizer.codebook_size is None or name == 'msrq')
        with pytest.raises(ValueError, match='continuous latents|one scale'):
            damage(z, q, quantizer, rng=make_rng(2), gradient=g)
        return
    p = damage(z, q, quantizer, rng=make_rng(2), gradient=g)
    assert p.zq.shape == q.zq.shape and torch.isfinite(p.zq).all() and 0 < p.rate <= 1
    hurt = ((p.zq != q.zq).flatten(1).any(1) if q.ids is None or torch.equal(p.ids, q.ids)
            else (p.ids != q.ids).flatten(1).any(1))
    assert 1 <= hurt.sum() <= 3 and torch.allclose(p.zq[~hurt], q.zq[~hurt], atol=1e-6)
    if q.ids is not None:
        assert p.ids.shape == q.ids.shape
        if kind not in ('drop', 'gaussian', 'interpolate', 'rae'):
            assert torch.allclose(p.zq, quantizer.codes(p.ids), atol=1e-5)
    learned = [w for w in quantizer.parameters() if w.requires_grad]
    mine,*theirs = torch.autograd.grad((p.zq*weight).sum(), [z, *learned], allow_unused=True,
                                       retain_graph=True)
    clean,*taught = torch.autograd.grad((q.zq*weight).sum(), [z, *learned], allow_unused=True,
                                        retain_graph=True)
    assert mine.abs().sum() > 0
    if kind not in ('interpolate',):
        assert torch.allclose(mine, clean, atol=1e-5)
        assert all(torch.allclose(nothing_as_zero(t, w), nothing_as_zero(c, w), atol=1e-5)
                   for t, c, w in zip(theirs, taught, learned))
    assert name in ('ibq', 'soft') or all(t is None or not t.any() for t in theirs)
    halves = [damage(z[s], q._replace(zq=q.zq[s], ids=None if q.ids is None else q.ids[s]), quantizer,
                     rng=make_rng(2), gradient=None if g is None else g[s],
                     shard=(r, 2)).zq for r,s in enumerate((slice(3), slice(3, 6)))]
    assert torch.allclose(torch.cat(halves), p.zq, atol=1e-6)
    nothing = perturbation(kind, alpha=0., beta=0., delta=6)(z, q, quantizer, rng=make_rng(2), gradient=g)
    assert torch.equal(nothing.zq, q.zq) and nothing.rate == 0


@pytest.mark.parametrize('name', [n for n in quantizers() if n not in ('kl', 'none', 'soft')])
def test_neighbours_of_every_quantizer(name):
    "What a level draws from is what its quantizer calls its neighbours, with a table and without"
    quantizer,z,q = quantized(name)
    out = perturb_codes(q.ids, quantizer, 1., 5, include_self=False, rng=make_rng(0))
    assert ((quantizer.neighbours(q.ids, 5, False) == out[...,None]).any(-1)).all()
    assert torch.equal(out,
                       perturb_codes(q.ids, quantizer, 1., 5, include_self=False, rng=make_rng(0),
                                     table=NeighbourTable()))
    for level,ids in split_levels(quantizer, q.ids): assert level.vectors.shape[0] == 64 and ids.max() < 64
    assert multi_scale(quantizer) == (name == 'msrq')


@pytest.mark.parametrize('name', ['vq', 'pq', 'rq', 'lfq', 'bsq', 'fsq'])
def test_around_latents_rank_0_is_the_code_itself(name):
    quantizer,z,q = quantized(name)
    assert torch.equal(perturb_codes(q.ids, quantizer, 1., 1, neighbours='latent', z=z, rng=make_rng(0)),
                       q.ids)


# --- annealing

@given(epoch=st.floats(0, 300), name=st.sampled_from([*ANNEALINGS]), epochs=st.floats(1, 300))
def test_annealing_stays_in_bounds(epoch, name, epochs):
    assert ANNEALINGS[name] <= annealing(name, epochs)(epoch) <= 1

def test_any_curve():
    p = LatentPerturbation(1., 1., 10, annealing=lambda e: .5**e, strength=.8)
    assert ([(p.at(e).alpha, p.at(e).delta, p.at(e).strength) for e in (0, 1, 4)] == [(1, 10, .8),
                                                                                      (.5, 5, .4),
                                                                                      (.0625, 1, .05)])
    with pytest.raises(ValueError, match=r'annealing must be in \[0, 1\], got 2'):
        LatentPerturbation(annealing=lambda e: 2.).at(3)


# --- bad input

@pytest.mark.parametrize('bad', [0, K+1, -1, True])
def test_strength_out_of_range(bad):
    ids,codebook = setting(0)
    with pytest.raises(ValueError, match=f'delta must be a whole number in 1..{K} for {K} codes, got'):
        perturb_codes(ids, codebook, .5, bad)


def test_strength_beyond_a_level():
    quantizer,z,q = quantized('rq')
    with pytest.raises(ValueError, match='delta must be a whole number in 1..64 for 64 codes, got 65'):
        LatentPerturbation(delta=65)(z, q, quantizer)


def test_whole_codebook_needs_self():
    ids,codebook = setting(0)
    assert code_neighbours(ids[0], codebook, K).shape == (N, K)
    with pytest.raises(ValueError, match=f'1..{K-1} .without the code itself.'):
        perturb_codes(ids, codebook, .5, K, include_self=False)


@pytest.mark.parametrize('name,value',
                         [('alpha', 1.01), ('alpha', -.1), ('beta', 2.), ('alpha', float('nan'))])
def test_fractions_out_of_range(name, value):
    ids,codebook = setting(0)
    with pytest.raises(ValueError, match=rf'{name} must be in \[0, 1\], got'):
        perturb_codes(ids, codebook, **(dict(alpha=.5, delta=4)|{name:value}))


@pytest.mark.parametrize('wrong,says',
                         [(dict(kind='far'), 'kind must be one of nearest, uniform, frequency, adversarial'),
                          (dict(where='edges'), "where must be 'tokens' or 'blocks'"),
    (dict(rate='poisson'), "rate must be 'exact' or 'bernoulli'"),
                          (dict(select='last'), "select must be 'random' or 'first'"),
    (dict(neighbours='image'), "neighbours must be 'code' or 'latent'"),
                          (dict(neighbours='latent'), 'pass them as z'),
    (dict(kind='adversarial'), 'pass its gradient by zq')])
def test_unknown_choices(wrong, says):
    ids,codebook = setting(0)
    with pytest.raises(ValueError, match=says): perturb_codes(ids, codebook, .5, 4, **wrong)


def test_unknown_rows_and_settings():
    with pytest.raises(ValueError, match="no perturbation 'none'; there are nearest, official, uniform"):
        perturbation('none')
    with pytest.raises(ValueError, match="no setting 'dose'"): perturbation('drop', dose=1)
    with pytest.raises(ValueError, match='kind must be one of'): LatentPerturbation(kind='noise')
    with pytest.raises(ValueError, match=r'strength must be in \[0, 1\]'):
        LatentPerturbation(kind='interpolate', strength=2.)


def test_equal_codes_still_count_themselves_first():
    codebook = torch.ones(6, 3)
    near = code_neighbours(torch.arange(6), codebook, 3)
    assert torch.equal(near[:,0], torch.arange(6)) and all(len(set(row)) == 3 for row in near.tolist())
    alone = code_neighbours(torch.arange(6), codebook, 5, include_self=False)
    assert not (alone == torch.arange(6)[:,None]).any() and all(len(set(row)) == 5 for row in alone.tolist())

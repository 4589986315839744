"""Properties of the quantizers: codes name themselves, neighbours are the nearest,
gradients reach what they should"""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from tokkit.core import make_rng
from tokkit.quantizers import (NeighbourTable, code_neighbours, codebook_usage, from_digits, kmeans_centres,
                               lattice_levels, lattice_neighbours, nearest_codes, to_digits)
from tokkit.quantizers import (QUANTIZERS, DiagonalGaussian, FiniteScalarQuantizer, LookupFreeQuantizer,
                               MultiScaleResidualQuantizer, NoQuantizer, ProductQuantizer, ResidualQuantizer,
                               VectorQuantizer, make_quantizer, quantizer_options, revive)

KINDS = dict(vq={}, plain=dict(l2_norm=False), ema=dict(update='ema'), pq={}, rq={}, shared=dict(shared=True),
             msrq={}, lfq={}, bsq={}, fsq={}, kl={}, none={}, soft=dict(segments=7))
DISCRETE = [k for k in KINDS if k not in ('kl', 'none', 'soft')]
KIND = dict(plain='vq', ema='vq', shared='rq')


def make(name, seed=0, k=64, dim=6):
    torch.manual_seed(seed)
    q = make_quantizer(KIND.get(name, name), k, dim, **KINDS[name])
    for book in q.books: book.embedding.weight.data.normal_()
    return q

def latents(q, seed=0, b=3, n=49): return torch.randn(b, n, q.in_dim or 6, generator=make_rng(seed, 'z'))


# --- codes ---

@pytest.mark.parametrize('name', KINDS)
def test_one_contract(name):
    q = make(name).eval()
    z = latents(q)
    out = q(z)
    assert out.zq.shape == (3, 49, q.dim) and out.loss.isfinite() and q.project(z).shape == out.zq.shape
    if name in DISCRETE:
        assert out.ids.shape == (3,)+q.ids_shape(49) and sum(h*w for h,w in q.grids(49)) == out.ids.shape[1]
        assert (0 <= out.ids.min() and out.ids.max() < q.codebook_size
                and q.codebook.shape[-2] == q.codebook_size)
        assert (q.codes(out.ids)-out.zq).abs().max() < 1e-5
        assert torch.equal(q.join_levels(q.split_levels(out.ids)), out.ids)
    else: assert out.ids is None and q.codebook is None and q.codebook_size is None


@given(seed=st.integers(0, 10**6), name=st.sampled_from(['vq', 'plain', 'pq', 'lfq', 'bsq']))
@settings(max_examples=25)
def test_a_code_is_named_by_its_own_id(seed, name):
    q = make(name, seed).eval()
    ids = torch.randint(64, (2,)+q.ids_shape(9), generator=make_rng(seed))
    assert torch.equal(q(q.codes(ids)).ids, ids)


@given(levels=st.lists(st.integers(2, 9), min_size=1, max_size=4).map(tuple), seed=st.integers(0, 10**6))
@settings(max_examples=25)
def test_a_latent_falls_on_the_nearest_cell(levels, seed):
    q = FiniteScalarQuantizer(levels)
    ids = torch.arange(q.codebook_size)
    assert torch.equal(from_digits((q.codes(ids)*(q.count_levels//2)).round().long()+q.count_levels//2,
                                   q.lattice), ids)
    z = 3*torch.randn(2, 30, len(levels), generator=make_rng(seed))
    step = 1/(q.count_levels//2)
    assert ((q(z).zq-q.project(z)).abs() <= step*.5+1e-5).all()
    reach = (q.count_levels-1)*(1+1e-3)/2
    offset = .5*(q.count_levels%2 == 0)
    # the latent that gives each code
    back = torch.atanh((q.codes(ids)/step+offset)/reach)-torch.atanh(offset/reach)
    assert torch.equal(q(back[None]).ids[0], ids)


def test_signs_and_levels_as_in_another_package():
    other = pytest.importorskip('vector_quantize_pytorch', reason="vector_quantize_pytorch is not installed: "
                                                                  "pip install 'tokkit-lab[dev]'")
    z = 2*torch.randn(4, 100, 4, generator=make_rng(0))
    fsq = FiniteScalarQuantizer((8,5,5,4))
    theirs = other.FSQ([8,5,5,4])
    zq,ids = theirs(z)
    assert torch.equal(fsq(z).ids, ids) and (fsq(z).zq-zq).abs().max() < 1e-6
    assert (fsq.codebook-theirs.implicit_codebook).abs().max() < 1e-6
    for spherical in (False, True):
        lfq = LookupFreeQuantizer(16, spherical=spherical, temperature=.5, joint=4, entropy=1.,
                                  commitment=.25)
        theirs = other.LFQ(codebook_size=16, dim=4, entropy_loss_weight=1., commitment_loss_weight=.25,
                           spherical=spherical).train()
        zq,_,loss = theirs(z, inv_temperature=1/.5)
        mine = lfq(z)
        assert (mine.zq-zq).abs().max() < 1e-6
        assert abs(mine.loss-loss) < 1e-5*abs(loss)


# --- neighbours ---

def brute(codebook):
    d = (codebook[:,None]-codebook[None]).square().sum(-1)
    return d.fill_diagonal_(-1).argsort(dim=1, stable=True)

@given(seed=st.integers(0, 10**6), delta=st.integers(1, 23), include_self=st.booleans(),
       most=st.integers(1, 4))
@settings(max_examples=40)
def test_neighbours_in_a_codebook_with_equals(seed, delta, include_self, most):
    # whole numbers: many exact ties, some equal codes
    codebook = torch.randint(-most, most+1, (24, 3), generator=make_rng(seed)).float()
    ids = torch.randint(24, (2, 5), generator=make_rng(seed, 'ids'))
    near = code_neighbours(ids, codebook, delta, include_self)
    assert torch.equal(near, brute(codebook)[:, int(not include_self):][:, :delta][ids])
    assert torch.equal(code_neighbours(torch.arange(24), codebook, 24).sort(1).values,
                       torch.arange(24).expand(24, 24))


@given(levels=st.lists(st.integers(2, 6), min_size=1, max_size=4).map(tuple), seed=st.integers(0, 10**6),
       include_self=st.booleans(), data=st.data())
@settings(max_examples=40)
def test_neighbours_on_a_lattice(levels, seed, include_self, data):
    k = math.prod(levels)
    delta = data.draw(st.integers(1, k if include_self else k-1))
    ids = torch.randint(k, (7,), generator=make_rng(seed))
    want = brute_steps(levels)[:, int(not include_self):][:, :delta]
    for chunk in (2**22, 50):
        assert torch.equal(lattice_neighbours(ids, levels, delta, include_self, chunk), want[ids])
    assert torch.equal(lattice_neighbours(torch.arange(k), levels, k).sort(1).values,
                       torch.arange(k).expand(k, k))

def brute_steps(levels):
    d = to_digits(torch.arange(math.prod(levels)), levels)
    return (d[:,None]-d[None]).abs().sum(-1).argsort(dim=1, stable=True)


def test_a_quarter_million_bit_patterns():
    ids = torch.randint(2**18, (2, 196), generator=make_rng(0))
    near = make_quantizer('lfq', 2**18).neighbours(ids, 172)
    flips = (to_digits(near, (2,)*18) != to_digits(ids, (2,)*18)[:,:,None]).sum(-1)
    assert torch.equal(flips, torch.tensor([0]+[1]*18+[2]*153).expand_as(flips))
    assert near.sort(-1).values.diff(dim=-1).min() > 0


@pytest.mark.parametrize('name', DISCRETE)
def test_neighbours_of_every_kind(name):
    q = make(name).eval()
    ids = q(latents(q)).ids
    near = q.neighbours(ids, 64)
    assert (torch.equal(near[...,0], ids)
            and torch.equal(near.sort(-1).values, torch.arange(64).expand_as(near)))
    assert torch.equal(q.neighbours(ids, 7, include_self=False), near[...,1:8])
    table = NeighbourTable()(q, 7)
    got = torch.stack([table[l][ids[...,l]] for l in range(q.levels)], -2) if q.levels > 1 else table[ids]
    assert torch.equal(got, near[...,:7])
    for delta in (0, 65):
        with pytest.raises(ValueError, match='delta must be a whole number in 1..64 for 64 codes'):
            q.neighbours(ids, delta)


@pytest.mark.parametrize('name', ['kl', 'none'])
def test_continuous_latents_have_no_neighbours(name):
    with pytest.raises(ValueError, match='continuous latents, no codes and no neighbours; damage them with '
                                         'noise'):
        make(name).neighbours(torch.zeros(1, dtype=torch.long), 3)


# --- gradients and losses ---

@pytest.mark.parametrize('name', DISCRETE)
def test_gradients_reach_what_they_should(name):
    q = make(name).train()
    z = latents(q).requires_grad_()
    out = q(z)
    zh = q.project(z)
    w = torch.randn(out.zq.shape, generator=make_rng(1))
    rows = [b.embedding.weight for b in q.books]
    got = torch.autograd.grad((out.zq*w).sum(), [z, *[r for r in rows if r.requires_grad]], retain_graph=True,
                              allow_unused=True)
    # straight through to z, as projected
    assert (got[0]-torch.autograd.grad((zh*w).sum(), z)[0]).abs().max() < 1e-5
    assert all(g is None for g in got[1:])                                              # and to no code
    if out.commitment_loss.requires_grad:
        to_z,*to_codes = torch.autograd.grad(out.commitment_loss, [z, *[r for r in rows if r.requires_grad]],
                                             retain_graph=True, allow_unused=True)
        assert to_z.abs().sum() > 0 and all(g is None for g in to_codes)
    if rows and name != 'ema':
        to_z,*to_codes = torch.autograd.grad(out.codebook_loss, [z, *rows], allow_unused=True)
        assert to_z is None and all(g.abs().sum() > 0 for g in to_codes)
    if name == 'ema': assert not rows[0].requires_grad and not out.codebook_loss.requires_grad


def test_running_means():
    q = VectorQuantizer(4, 2, l2_norm=False, update='ema', decay=.5).train()
    q.embedding.weight.data = torch.tensor([[0.,0], [4,0], [0,4], [90,90]])
    q.ema_sum.copy_(q.embedding.weight)
    z = torch.tensor([[[1.,0], [0,1], [5,1]]])
    out = q(z)
    # named by the rows as they were
    assert out.ids.tolist() == [[0, 0, 1]] and torch.equal(out.zq, torch.tensor([[[0.,0], [0,0], [4,0]]]))
    # (0+1+0)/(1+2) a coordinate, (4+5)/2 and (0+1)/2, nobody, nobody
    want = torch.tensor([[1/3,1/3], [4.5,.5], [0,4], [90,90]])
    assert (q.embedding.weight-want).abs().max() < 1e-6
    for _ in range(40): q(z)
    assert torch.equal(q.embedding.weight[3], torch.tensor([90.,90])) and q.embedding.weight.isfinite().all()
    q.eval()
    before = q.embedding.weight.clone()
    q(z+9)
    assert torch.equal(q.embedding.weight, before)


@pytest.mark.parametrize('name', ['vq', 'pq', 'rq'])
def test_kmeans_start_happens_once_and_helps(name):
    z = torch.randn(8, 60, 6, generator=make_rng(0))
    torch.manual_seed(0)
    plain = make_quantizer(name, 32, 6).train()(z).commitment_loss
    q = make_quantizer(name, 32, 6, kmeans=True).eval()
    q(z)
    assert not any(b.started for b in q.books)                         # not in use, only in training
    q.train()
    started = q(z)
    assert started.commitment_loss < plain and all(b.started for b in q.books)
    rows = [b.embedding.weight.clone() for b in q.books]
    q(z+1)
    assert all(torch.equal(b.embedding.weight, r) for b,r in zip(q.books, rows))
    again = make_quantizer(name, 32, 6, kmeans=True)
    again.load_state_dict(q.state_dict())
    again.train()(z)
    # a resumed run does not start anew
    assert all(torch.equal(b.embedding.weight, r) for b,r in zip(again.books, rows))


@given(bits=st.integers(1, 6), seed=st.integers(0, 10**6), spherical=st.booleans(),
       temperature=st.floats(.2, 3), split=st.integers(1, 6))
@settings(max_examples=25)
def test_entropies_against_all_codes(bits, seed, spherical, temperature, split):
    q = LookupFreeQuantizer(2**bits, spherical=spherical, temperature=temperature, joint=split)
    zh = q.project(torch.randn(40, bits, generator=make_rng(seed), dtype=torch.double))
    p = (-torch.cdist(zh, q.codebook.double()).square()/temperature).softmax(1)
    digits = to_digits(torch.arange(2**bits), q.lattice)
    groups = [range(i, min(i+split, bits)) for i in range(0, bits, split)]
    spread = 0.
    for g in groups:            # distribution of the bits of a group
        spelled = sum(digits[:,j]*2**i for i,j in enumerate(g))
        spread += torch.special.entr(torch.zeros(2**len(g), dtype=torch.double).index_add_(0, spelled,
                                                                                           p.mean(0))).sum()
    got = q.entropies(zh)
    assert abs(got[0]-torch.special.entr(p).sum(1).mean()) < 1e-6 and abs(got[1]-spread) < 1e-6


@pytest.mark.parametrize('name', ['lfq', 'bsq'])
def test_entropy_loss_spreads_the_codes(name):
    q = make_quantizer(name, 64, entropy=1.).train()
    # nearly all bits are 1
    z = (torch.randn(1, 400, 6, generator=make_rng(0))*.5+1).requires_grad_()
    before = codebook_usage(torch.bincount(q(z).ids.flatten(), minlength=64).float())[1]
    optimiser = torch.optim.Adam([z], .05)
    for _ in range(60):
        optimiser.zero_grad()
        q(z).prior_loss.backward()
        optimiser.step()
    assert (z.isfinite().all()
            and codebook_usage(torch.bincount(q(z).ids.flatten(), minlength=64).float())[1] > 2*before)


@given(seed=st.integers(0, 10**6), weight=st.floats(0, 2))
@settings(max_examples=15)
def test_divergence_from_the_normal(seed, weight):
    q = DiagonalGaussian(5, kl=weight)
    z = torch.randn(2, 7, 10, generator=make_rng(seed))
    mean,spread = z.chunk(2, -1)
    want = (weight*torch.distributions.kl_divergence(torch.distributions.Normal(mean, (spread/2).exp()),
                                                     torch.distributions.Normal(0., 1.)).mean())
    assert abs(q(z).prior_loss-want) < 1e-5*(1+want)


def test_draws_of_the_gaussian():
    q = DiagonalGaussian(4)
    z = torch.tensor([1., 2, 3, 4, 0, 0, -2, -60]).expand(2, 5000, 8)
    zq = q.train()(z).zq
    assert (zq.mean((0, 1))-torch.tensor([1., 2, 3, 4])).abs().max() < .05
    assert (zq.std((0, 1))-torch.tensor([1., 1, math.exp(-1), 0])).abs().max() < .05


# --- in training ---

@pytest.mark.parametrize('name', KINDS)
def test_the_global_seed_decides(name):
    def run():
        q = make(name).train()
        z = latents(q)
        return [q(z).zq for _ in range(2)], q.state_dict()
    (a,b),first = run()
    (c,d),second = run()
    assert torch.equal(a, c) and torch.equal(b, d) and all(torch.equal(v, second[k]) for k,v in first.items())


@pytest.mark.parametrize('name', DISCRETE)
def test_half_precision_chooses_the_same_codes(name):
    q = make(name).eval()
    z = latents(q).bfloat16()
    with torch.autocast('cpu', torch.bfloat16): half = q(z)
    full = q(z.float())
    assert (torch.equal(half.ids, full.ids) and half.zq.dtype == torch.bfloat16
            and (half.loss-full.loss).abs() < 1e-6)


@pytest.mark.parametrize('name', DISCRETE)
def test_hits_are_counted_in_training_only(name):
    q = make(name).eval()
    z = latents(q)
    ids = q(z).ids
    assert q.usage.sum() == 0 and q.steps == 0
    ids = q.train()(z).ids
    rows = q.usage.view(-1, 64)
    assert len(rows) == len(q.split_levels(ids)) and q.steps == 1
    for row,i in zip(rows, q.split_levels(ids)):
        assert torch.equal(row, i.flatten().bincount(minlength=64).float())
    assert 'usage' in q.state_dict() and sum('usage' in k for k in q.state_dict()) == 1


@pytest.mark.parametrize('name', [k for k in DISCRETE if k not in ('lfq', 'bsq', 'fsq')])
def test_dead_codes_come_to_life(name):
    q = make(name).train()
    z = latents(q, b=8)
    for book in q.books: book.embedding.weight.data[2:] = 40       # all in one place: three codes take all
    q(z)
    assert codebook_usage(q.usage)[0] <= 3/64
    assert 0 < revive(q, z, rng=make_rng(0)) <= 63*len(q.books)
    q.usage.zero_()
    q.steps.zero_()
    q(z)
    assert codebook_usage(q.usage)[0] > .25


def test_nothing_to_revive():
    for name in ('lfq', 'bsq', 'fsq', 'kl', 'none'): assert revive(make(name), latents(make(name))) == 0


def one_step(rank, size, file, out):
    "What a process does with its part of a batch; alone, with all of it"
    if size > 1:
        torch.distributed.init_process_group('gloo', init_method=f'file://{file}', rank=rank, world_size=size)
    result = {}
    z = torch.randn(2, 8, 12, 6, generator=make_rng(0)).chunk(size, 1)[rank]
    for name,options in dict(vq=dict(update='ema', kmeans=True),
                             rq=dict(update='ema', kmeans=True, levels=2)).items():
        torch.manual_seed(0)
        q = make_quantizer(name, 16, 6, **options).train()
        for step in z: q(step)
        result |= {f'{name}.{k}': v.clone() for k,v in q.state_dict().items()}
        if size > 1:
            revive(q, z[0], threshold=5., rng=make_rng(rank))
            result[f'{name}.revived'] = torch.cat([b.embedding.weight for b in q.books])
    mine = z[0].clone().requires_grad_()
    loss = make_quantizer('lfq', 64, diversity=2., commitment=0.).train()(mine).prior_loss
    loss.backward()
    torch.save(result | dict(spread=loss.detach(), grad=mine.grad/size), f'{out}{rank}')
    if size > 1: torch.distributed.destroy_process_group()


def test_two_processes_keep_one_codebook(tmp_path, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    one_step(0, 1, None, tmp_path/'alone')
    torch.multiprocessing.spawn(one_step, (2, tmp_path/'store', tmp_path/'rank'), nprocs=2)
    alone,*ranks = (torch.load(tmp_path/n) for n in ('alone0', 'rank0', 'rank1'))
    for k in ranks[0]:
        if k not in ('spread', 'grad'): assert torch.equal(ranks[0][k], ranks[1][k]), k
    for k,v in alone.items():
        if k not in ('spread', 'grad'): assert (ranks[0][k].double()-v.double()).abs().max() < 1e-4, k
    assert abs(sum(r['spread'] for r in ranks)/2-alone['spread']) < 1e-6
    assert (torch.cat([r['grad'] for r in ranks])-alone['grad']).abs().max() < 1e-7


# --- bad input ---

@pytest.mark.parametrize('call,message', [
    (lambda: make_quantizer('vqq', 64, 8),
     r"quantizer must be one of vq, pq, rq, msrq, lfq, bsq, fsq, kl, none.* got 'vqq'"),
    (lambda: quantizer_options('gauss'), "quantizer must be one of"),
    (lambda: make_quantizer('fsq', 1000, 4, l2_norm=True), "fsq has no option 'l2_norm'; it has levels"),
    (lambda: make_quantizer('vq', None, 8), "vq needs a codebook_size, got None"),
    (lambda: make_quantizer('pq', 64, 9, groups=2),
     "dim must be divisible by groups, and groups be >= 2, got 9 and 2"),
    (lambda: make_quantizer('rq', 64, 8, levels=1), "a residual quantizer needs >= 2 levels, got 1"),
    (lambda: make_quantizer('msrq', 64, 8, scales=(1, 1, 2)), "scales must grow"),
    (lambda: make_quantizer('msrq', 64, 8)(torch.zeros(1, 64, 8)),
     r"scales \(1, 2, 4, 7\) end with 49 latents, got \(64,\)"),
    (lambda: make_quantizer('msrq', 64, 8, signs=True), "the signs of 8 channels make 256 codes, got 64"),
    (lambda: make_quantizer('lfq', 500), "signs make a power of 2 of codes, got 500; 256 or 512"),
    (lambda: LookupFreeQuantizer(64, 8), "64 codes are the signs of 6 channels, got dim 8"),
    (lambda: FiniteScalarQuantizer((8, 1)), r"every channel needs >= 2 levels, got \(8, 1\)"),
    (lambda: FiniteScalarQuantizer(()), r"every channel needs >= 2 levels, got \(\)"),
    (lambda: make_quantizer('fsq', 11), "no lattice of 2..8 levels a channel has 11 cells; 10 and 12"),
    (lambda: make_quantizer('fsq', 512, levels=(8, 5)),
     r"levels \(8, 5\) make 40 codes, got codebook_size 512"),
    (lambda: make_quantizer('kl', None, 8, kl=-1), r"kl must be in \[0, inf\], got -1"),
    (lambda: VectorQuantizer(64, 8, update='adam'), "update must be 'gradient' or 'ema', got 'adam'"),
    (lambda: VectorQuantizer(64, 8)(torch.zeros(1, 4, 6)),
     "VectorQuantizer takes latents of 8 channels, got 6"),
    (lambda: VectorQuantizer(1, 8), "a codebook needs >= 2 codes and >= 1 channel, got 1 x 8"),
    (lambda: VectorQuantizer(64, 8).neighbours(torch.arange(2), 65), "delta must be a whole number in 1..64"),
    (lambda: VectorQuantizer(64, 8, decay=2.), r"decay must be in \[0, 1\], got 2.0"),
    (lambda: NoQuantizer(4)(torch.zeros(1, 2, 8)), "NoQuantizer takes latents of 4 channels, got 8"),
    (lambda: ProductQuantizer(64, 8, groups=3), "dim must be divisible by groups"),
    (lambda: ResidualQuantizer(64, 8, levels=1), "needs >= 2 levels, got 1"),
    (lambda: MultiScaleResidualQuantizer(256, 8, scales=(4,2)), "scales must grow"),
    (lambda: MultiScaleResidualQuantizer(256, 8, drop=2.), r"drop must be in \[0, 1\], got 2.0"),
    (lambda: MultiScaleResidualQuantizer(256, 8, drop_start=5), r"drop_start must be in \[1, 4\], got 5"),
    (lambda: make_quantizer('pq', 64, 8, group=2),
     "pq has no option 'group'; it has groups, l2_norm, commitment, update, decay, kmeans"),
    (lambda: make_quantizer('vq', 0, 8), "vq needs a codebook_size, got 0"),
    (lambda: make_quantizer('fsq', 1021),
     "no lattice of 2..8 levels a channel has 1021 cells; 1008 and 1024"),
    (lambda: make_quantizer('kl', None, 8)(torch.zeros(1, 2, 8)),
     "DiagonalGaussian takes latents of 16 channels, got 8"),
    (lambda: nearest_codes(torch.zeros(2, 4), torch.zeros(32, 4), 33),
     r"m must be in \[1, 32\], got 33; the codebook has 32 codes"),
    (lambda: code_neighbours(torch.arange(4), torch.randn(64, 8), 65),
     "delta must be a whole number in 1..64 for 64 codes, got 65"),
    (lambda: code_neighbours(torch.arange(4), torch.randn(64, 8), 0), "got 0"),
    (lambda: lattice_neighbours(torch.arange(4), (2,)*3, 9),
     "delta must be a whole number in 1..8 for 8 codes"),
    (lambda: lattice_neighbours(torch.arange(4), (5,1), 2),
     r"every channel needs >= 2 levels, got \(5, 1\)"),
    (lambda: NeighbourTable()(torch.randn(64, 8), 65), "delta must be a whole number in 1..64"),
])
def test_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as e: call()
    assert '\n' not in str(e.value)


def test_lattices_of_the_paper():
    for k,levels in {240: (8,6,5), 1000: (8,5,5,5), 4375: (7,5,5,5,5), 15360: (8,8,8,6,5),
                     64000: (8,8,8,5,5,5)}.items():
        assert lattice_levels(k) == levels
    for k in range(2, 130):
        try: assert math.prod(lattice_levels(k)) == k
        except ValueError as e: assert 'are the nearest numbers' in str(e)


def test_every_option_of_every_kind_is_known():
    for kind in QUANTIZERS:
        assert 'dim' not in quantizer_options(kind) and 'options' not in quantizer_options(kind)
    shared = set(quantizer_options('vq')) & set(quantizer_options('pq')) & set(quantizer_options('rq'))
    assert {'l2_norm', 'commitment', 'update', 'decay', 'kmeans'} <= shared


def test_centres_of_few_vectors():
    assert (len(kmeans_centres(torch.randn(5, 3, generator=make_rng(0)), 8)) == 5
            and F.mse_loss(kmeans_centres(torch.ones(9, 2), 3), torch.ones(1, 2)) == 0)
    assert nearest_codes(torch.zeros(3, 2), kmeans_centres(torch.ones(9, 2), 3)).tolist() == [[0]]*3


@pytest.mark.parametrize('scales, convolutions', [
    ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
    ((1, 2, 4, 7, 9), [0, 1, 2, 2, 3]),
    ((1, 2, 4, 7), [0, 1, 2, 3])])
def test_shared_convolutions_of_many_scales(scales, convolutions):
    """The convolution of each scale as VAR's authors choose it: ticks in float64,
    where the ties of ten scales are decided by rounding"""
    assert make_quantizer('msrq', 16, 4, scales=scales).which == convolutions

"Properties of the perturbation that hold for every dose, codebook and seed"
import pytest
import torch
from hypothesis import given, settings, strategies as st

from tokkit.core import make_rng
from tokkit.perturb import (NeighbourTable, choose_images, choose_tokens, code_neighbours, effective_rate, perturb_codes, perturb_latents)

K,D,N = 40,5,30


def setting(seed):
    codebook = torch.randn(K, D, generator=make_rng(seed, 'codes'))
    return torch.randint(K, (12, N), generator=make_rng(seed, 'ids')), codebook

doses = dict(alpha=st.floats(0, 1), beta=st.floats(0, 1), delta=st.integers(1, K-1), include_self=st.booleans(), seed=st.integers(0, 10**6),
             rate=st.sampled_from(['exact', 'bernoulli']))


@given(**doses)
@settings(max_examples=60)
def test_members_rate_and_proportion(alpha, beta, delta, include_self, seed, rate):
    ids,codebook = setting(seed)
    out = perturb_codes(ids, codebook, alpha, delta, beta, rate=rate, include_self=include_self, rng=make_rng(seed))
    again = perturb_codes(ids, codebook, alpha, delta, beta, rate=rate, include_self=include_self, rng=make_rng(seed), table=NeighbourTable())
    assert torch.equal(out, again)                                              # same seed, same draw, with a table or without
    moved = out != ids
    brute = torch.cdist(codebook, codebook).fill_diagonal_(-1).argsort(1)[:, int(not include_self):][:, :delta]
    assert (brute[ids] == out[...,None]).any(-1)[moved].all()                   # only among the nearest
    assert abs(int(moved.any(1).sum()) - 12*beta) <= 1 or moved.any(1).sum() < 12*beta
    if rate == 'exact': assert (moved.sum(1) <= round(alpha*N)).all()
    if not include_self and rate == 'exact' and beta == 1: assert (moved.sum(1) == round(alpha*N)).all()
    if alpha == 0 or beta == 0: assert torch.equal(out, ids)


@pytest.mark.parametrize('include_self,expected', [(True, .75*.8), (False, .8)])
def test_measured_rate(include_self, expected):
    ids = torch.randint(K, (4000, 10), generator=make_rng(1)); _,codebook = setting(2)
    for rate in ('exact', 'bernoulli'):
        out = perturb_codes(ids, codebook, .8, 4, include_self=include_self, rate=rate, rng=make_rng(3))
        assert effective_rate(ids, out) == pytest.approx(expected, abs=.01)


def test_proportion_is_right_on_average_even_below_one_image():
    share = torch.stack([choose_images(5, .1, rng=make_rng(0, i)) for i in range(3000)]).double().mean()
    assert share == pytest.approx(.1, abs=.012)


def test_images_are_not_always_the_first():
    assert torch.stack([choose_images(8, .25, rng=make_rng(0, i)) for i in range(200)]).double().mean(0).min() > .1


@pytest.mark.parametrize('bad', [0, K+1, -1, True])
def test_strength_out_of_range(bad):
    ids,codebook = setting(0)
    with pytest.raises(ValueError, match=f'delta must be a whole number in 1..{K} for {K} codes, got'): perturb_codes(ids, codebook, .5, bad)


def test_whole_codebook_needs_self():
    ids,codebook = setting(0)
    assert code_neighbours(ids[0], codebook, K).shape == (N, K)
    with pytest.raises(ValueError, match=f'1..{K-1} .without the code itself.'): perturb_codes(ids, codebook, .5, K, include_self=False)


@pytest.mark.parametrize('name,value', [('alpha', 1.01), ('alpha', -.1), ('beta', 2.), ('alpha', float('nan'))])
def test_fractions_out_of_range(name, value):
    ids,codebook = setting(0)
    with pytest.raises(ValueError, match=rf'{name} must be in \[0, 1\], got'):
        perturb_codes(ids, codebook, **(dict(alpha=.5, delta=4)|{name:value}))


def test_equal_codes_still_count_themselves_first():
    codebook = torch.ones(6, 3)
    near = code_neighbours(torch.arange(6), codebook, 3)
    assert torch.equal(near[:,0], torch.arange(6)) and all(len(set(row)) == 3 for row in near.tolist())
    alone = code_neighbours(torch.arange(6), codebook, 5, include_self=False)
    assert not (alone == torch.arange(6)[:,None]).any() and all(len(set(row)) == 5 for row in alone.tolist())


@given(strength=st.floats(0, 1), beta=st.floats(0, 1), kind=st.sampled_from(['gaussian', 'interpolate']), seed=st.integers(0, 10**6))
@settings(max_examples=30)
def test_latent_noise(strength, beta, kind, seed):
    z = torch.randn(10, 6, 4, generator=make_rng(seed, 'z'))
    out = perturb_latents(z, strength, kind, beta, rng=make_rng(seed))
    assert torch.equal(out, perturb_latents(z, strength, kind, beta, rng=make_rng(seed)))
    assert int((out != z).any(2).any(1).sum()) <= int(10*beta)+1
    if strength == 0: assert torch.equal(out, z)


def test_rate_of_an_image_is_exact():
    assert choose_tokens((50, N), .5, rng=make_rng(0)).sum(1).eq(15).all()

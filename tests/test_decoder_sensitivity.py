"Errors of one kind: exact ranks for every quantizer, the same errors for every decoder, harm as defined"
import numpy as np, pytest, torch

from tokkit.analysis import decoder_sensitivity, noise_at, rank_bands, replace_at_ranks, share_by_band
from tokkit.core import make_rng
from tokkit.data import fashion_mnist
from tokkit.posttraining import clean_pairs
from tokkit.tokenizers import decode_all, encode_all
from tokkit.perturbation import split_levels
from tokkit.posttraining import posttrain_decoder
from tokkit.tokenizers import make_tokenizer
from tokkit.training import ImageTraining

DISCRETE = 'tiny', 'tiny-pq', 'tiny-rq', 'tiny-fsq', 'tiny-bsq', 'tiny-lfq', 'tiny-msrq'


@pytest.fixture(scope='module')
def images(): return fashion_mnist('test', n=60)


@pytest.mark.parametrize('preset', DISCRETE)
def test_ranks_are_those_asked_for(preset, images):
    tok = make_tokenizer(preset).eval()
    ids = encode_all(tok, images)
    band = (2, 4)
    wrong = replace_at_ranks(ids, tok.quantizer, band, .5, make_rng(0))
    assert wrong.dtype == ids.dtype and wrong.shape == ids.shape
    entries = torch.arange(ids[0].numel()).view(1, *ids.shape[1:])
    for level, at in split_levels(tok.quantizer, entries):
        at = at.flatten()
        a = ids.flatten(1)[:, at].flatten()
        b = wrong.flatten(1)[:, at].flatten()
        far = torch.cdist(level.vectors[a].double(), level.vectors.double())
        mine = far.gather(1, b[:, None])
        nearer = (far < mine-1e-9).sum(1)
        as_near = (far <= mine+1e-9).sum(1)-1  # equally near codes share ranks
        hit = a != b
        assert .4 < hit.double().mean() < .6
        assert (as_near[hit] >= band[0]).all() and (nearer[hit] <= band[1]).all()
    with pytest.raises(ValueError, match="a band of ranks must lie in 1.."):
        replace_at_ranks(ids, tok.quantizer, (1, 10**6))


def test_noise(images):
    z = 2*torch.randn(40, 49, 8, generator=make_rng(1))
    noisy = noise_at(z, .5, .25, make_rng(0))
    hit = (noisy != z).any(-1)
    assert (.2 < hit.double().mean() < .3
            and (noisy-z)[hit].std().item() == pytest.approx(.5*z.std().item(), rel=.05))
    assert torch.equal(noise_at(z, .5, .25, make_rng(0)), noisy) and torch.equal(noise_at(z, 0., 1.), z)
    for says, kw in (("share must be", dict(strength=1., share=2.)),
                     ("strength must be", dict(strength=-1.))):
        with pytest.raises(ValueError, match=says): noise_at(z, **kw)


def test_damage_is_error_beyond_clean(images):
    tok = make_tokenizer('tiny').eval()
    train = fashion_mnist('train', 256)
    def trained(tok, epochs):
        return posttrain_decoder(tok, clean_pairs(tok, train),
                                 ImageTraining(epochs=epochs, batch=32, lr=5e-3, perceptual=0.),
                                 device='cpu')[0].eval()
    tok = trained(tok, 4)
    healed = trained(tok, 1)
    ids = encode_all(tok, images)
    x = images[:][0]
    table = decoder_sensitivity(dict(before=tok, after=healed), ids, x, [(1, 3), (100, 200)], .3, seed=5)
    for i, (dose, band) in enumerate({'1–3': (1, 3), '100–200': (100, 200)}.items()):
        wrong = replace_at_ranks(ids, tok.quantizer, band, .3, make_rng(5, 'damage', i))
        harm = {}
        for name, t in dict(before=tok, after=healed).items():
            d = harm[name] = sum(s*((decode_all(t, q).clamp(-1, 1)-x).double()**2).flatten(1).mean(1) for s,
                                 q in ((1, wrong), (-1, ids)))
            row = table[(table.of == name) & (table.dose == dose)].iloc[0]
            assert (row.damage == pytest.approx(d.mean().item(), rel=1e-4, abs=1e-7)
                    and row.se == pytest.approx((d.std()/len(d)**.5).item(), rel=1e-4))
        if harm['before'].mean() < 2*harm['before'].std()/60**.5:  # no harm, no ratio
            assert np.isnan(row.ratio) and i == 0
            continue
        assert row.ratio == pytest.approx((harm['after'].mean()/harm['before'].mean()).item(), rel=1e-3)
        rows = torch.randint(60, (4000, 60), generator=make_rng(0))
        ratios = harm['after'][rows].mean(1)/harm['before'][rows].mean(1)
        assert row.ratio_se == pytest.approx(ratios.std().item(), rel=.15), "not the bootstrap's"
    assert ((table[table.of == 'before'].ratio == 1).all()
            and (table[table.of == 'before'].ratio_se == 0).all())


def test_bands():
    for codes in (2, 3, 17, 512, 1000):
        bands = rank_bands(codes)
        assert [r for a, b in bands for r in range(a, b+1)] == list(range(1, codes))
    with pytest.raises(ValueError, match="with one code there are no neighbours"): rank_bands(1)
    ranks = np.where(np.random.default_rng(0).random((50, 49)) < .3,
                     np.random.default_rng(1).integers(1, 64, (50, 49)), np.nan)
    table = share_by_band(ranks, rank_bands(64))
    assert table.share.sum() == pytest.approx(1)
    again = [share_by_band(ranks[rows], rank_bands(64)).share
             for rows in np.random.default_rng(2).integers(50, size=(600, 50))]
    assert table.se.tolist() == pytest.approx(np.std(again, axis=0).tolist(), rel=.15), "not the bootstrap's"

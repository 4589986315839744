"The race for sigma: who goes, who wins and what it costs, against decoders whose worth is known beforehand"
import pytest, torch

from tokkit.posttraining import sigma as module
from tokkit.generators import ARCfg, ARGenerator
from tokkit.data import fashion_mnist
from tokkit.metrics import Card
from tokkit.posttraining import Probe
from tokkit.posttraining import choose_sigma, race_plan
from tokkit.tokenizers import make_tokenizer
from tokkit.training import ImageTraining


@pytest.fixture
def known(monkeypatch):
    """Training replaced by its outcome: a decoder trained on n pairs of sigma is the pair (sigma,
    n), and pairs likewise"""
    trained = []
    monkeypatch.setattr(module, 'latent_pairs', lambda gen, tok, some, how: (how.sigma, len(some)))
    monkeypatch.setattr(module, 'clean_pairs', lambda tok, some: (1., len(some)))
    monkeypatch.setattr(module, 'posttrain_decoder', lambda tok, pairs, *a,
                        **k: (trained.append(pairs) or pairs, None))
    return trained

class Known(Probe):
    "A judge that knows what a decoder is worth"
    def __call__(self, decoder):
        value = self.worth(*decoder)
        return Card('gFID', value, 1., 100, 'known', 'test', 0, {}, [value-1, value+1])

TOK = make_tokenizer('tiny')
GEN = ARGenerator(ARCfg(classes=10, width=16, depth=1, heads=2))

def race(worth, sigmas=(.5, .6, .7, .8, .9, .95), n=1000, **kw):
    "A race judged by `worth` of (sigma, pairs)"
    probe = Known(torch.zeros(1, 49, dtype=torch.long), None)
    probe.worth = worth
    return choose_sigma(TOK, GEN, fashion_mnist('train', n), probe, sigmas, ImageTraining(), **kw)


@pytest.mark.parametrize('best', [.5, .6, .7, .8, .9, .95])
def test_the_best_wins(known, best):
    found = race(lambda s, n: 1000 if s == 1 else 500+abs(s-best)*100)
    assert found.sigma == best
    rounds = [{s for s, n in known if n == m} for m in sorted({n for _, n in known})]
    assert [len(r) for r in rounds] == [7, 4, 3] and all(best in r and 1. in r
                                                         for r in rounds), ("half stay, the control races "
                                                                            "along")
    assert rounds[2] < rounds[1] < rounds[0]


def test_the_control_may_win(known):
    found = race(lambda s, n: 500-10*s)
    assert found.sigma == 1 and 'clean tokens win' in repr(found)


def test_a_winner_tells_its_lead(known):
    said = repr(race(lambda s, n: 519 if s == 1 else 500+(s != .9)))
    assert 'sigma 0.9' in said and '19 ± ' in said and 'ahead of clean tokens' in said


def test_the_last_round_decides(known):
    "A sigma that is second when trained shortly and best when trained longer"
    early = {.5: 3, .6: 4, .7: 5, .8: 6, .9: 2, .95: 1, 1.: 9}
    late = {.9: 0, .95: 1, .5: 5, 1.: 9}
    most = max(n for _, n in race_plan(6, 1000))
    found = race(lambda s, n: (late if n == most else early)[s]+100)
    assert found.sigma == .9
    assert found.table[found.table['round'] == 1].sort_values('value').sigma.iloc[0] == .95


@pytest.mark.parametrize('share', [.1, .25, .5])
@pytest.mark.parametrize('racers', [1, 2, 3, 6, 11])
def test_cost_is_what_was_trained(known, share, racers):
    sigmas = [.3+.6*i/racers for i in range(racers)]
    found = race(lambda s, n: s, sigmas, share=share)
    spent = sum(n for _, n in known)
    assert found.cost == pytest.approx(spent/(racers*1000)) and found.cost <= share
    assert spent > .75*share*racers*1000 or racers == 1, "what may be spent is spent"


def test_faults(known):
    for says, sigmas in (("at least one, got \\[\\]", ()), ("sigmas must be fractions", (.5, 1.)),
                         ("sigmas must be fractions", (0., .5))):
        with pytest.raises(ValueError, match=says): race(lambda s, n: s, sigmas)
    with pytest.raises(ValueError, match="too few for a race of 6 at 0.25"): race(lambda s, n: s, n=5)
    with pytest.raises(ValueError, match="share must be in"): race(lambda s, n: s, share=2.)

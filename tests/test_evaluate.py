"Cards, and the field's numbers on tokenizers whose answers are known"
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tokkit.core import make_rng
from tokkit.data import fashion_mnist
from tokkit.evaluate import Card, FeatureBank, pfid, pfid_deltas, rfid
from tokkit.features import FeatureExtractor
from tokkit.metrics import FeatureStats, frechet_distance
from tokkit.perturb import perturb_codes


class Pool(nn.Module):
    "16 mean brightnesses: a judge that costs nothing"
    passes = 0                                                          # of all judges: one that counted for itself would be another network each time
    def forward(self, x): Pool.passes += 1; return nn.functional.avg_pool2d(x, 7).flatten(1)

def judge(): return FeatureExtractor('pool', Pool(), mean=(0.,), std=(1.,))


class Grey(nn.Module):
    "A code is the brightness of a 4x4 patch, in 300 levels"
    def __init__(self, k=300, offset=0.):
        super().__init__()
        jitter = torch.rand(k, generator=make_rng(0, 'jitter'))/k      # no two codes are equally far from a third
        self.register_buffer('codebook', (torch.linspace(-1, 1, k)+jitter)[:,None]); self.offset, self.encoded = offset, 0
        self.fingerprint = f'grey{k}{offset}'; self.norm = nn.BatchNorm1d(1)
    def tokenize(self, x):
        self.encoded += len(x)
        return (nn.functional.avg_pool2d(x, 4).flatten(1)/2+.5).mul(len(self.codebook)-1).round().long()
    def detokenize(self, ids):
        assert not self.training and not torch.is_grad_enabled()
        return (self.codebook[ids][...,0]+self.offset).view(-1, 1, 7, 7).repeat_interleave(4, 2).repeat_interleave(4, 3)
    def reconstruct(self, x): return self.detokenize(self.tokenize(x))


@pytest.fixture(scope='module')
def images(): return fashion_mnist('test', n=150)

def card(**kwargs):
    return Card(**(dict(metric='rFID', value=10., se=1., n=100, extractor='e', reference='r', replicates=(9., 10., 12.)) | kwargs))


def test_card_survives_json():
    c = card(settings=dict(sizes=(1, 2)), cells={'a': dict(alpha=.5)}, value=1/3)
    back = Card.from_dict(json.loads(json.dumps(c.to_dict())))
    assert back == c and back.value == 1/3 and back.settings == dict(sizes=[1, 2]) and back.version


@pytest.mark.parametrize('value,se,text', [(62.13, 1.94, '62.1 ± 1.9'), (336.4, 12.3, '336 ± 12'), (.01234, .00056, '0.01234 ± 0.00056'), (5., None, '5'), (5., 0., '5.000 ± 0.000')])
def test_card_rounds_by_its_error(value, se, text):
    assert card(value=value, se=se).number == text and text in str(card(value=value, se=se)) and text in card(value=value, se=se)._repr_html_()


def test_row_has_the_tables_columns():
    assert list(card().row()) == ['metric', 'value', 'se', 'n', 'extractor', 'seed']


def test_difference_is_paired_only_on_the_same_draws():
    a, b = card(), card(value=8., replicates=(7., 8., 10.))
    assert (a-b).metric == 'ΔrFID' and (a-b).value == 2 and (a-b).se == 0
    for other in (card(n=99), card(seed=1), card(replicates=(1., 2.))): assert (a-other).se == pytest.approx(2**.5)
    assert (a-card(metric='gFID')).metric == 'rFID-gFID' and (a-card(se=None, replicates=())).se is None
    with pytest.raises(ValueError, match='different extractors'): a-card(extractor='f')
    with pytest.raises(ValueError, match='different reference images'): a-card(settings=dict(reference_hash='other'))


def test_escapes_html(): assert '<b>x' not in card(reference='<b>x')._repr_html_()


def test_rfid_is_the_distance(images):
    tok, e = Grey(offset=.1), judge()
    c, x = rfid(tok, images, e, bootstrap=3, device='cpu'), images[:][0]
    tok.eval()
    with torch.no_grad(): want = frechet_distance(*(FeatureStats.from_features(e(v)) for v in (tok.reconstruct(x), x)))
    assert c.value == pytest.approx(want, rel=1e-6) and len(c.replicates) == 3 and c.se == pytest.approx(np.std(c.replicates, ddof=1))
    assert (c.n, c.extractor, c.reference, c.settings['tokenizer'], c.settings['rounding']) == (150, 'pool', images.name, tok.fingerprint, 'uint8')


def test_measuring_leaves_the_tokenizer_as_it_was(images):
    tok = Grey().train(); tok.norm.eval()
    rfid(tok, images, judge(), bootstrap=0)
    assert tok.training and not tok.norm.training and torch.is_grad_enabled()
    class Broken(Grey):
        def reconstruct(self, x): raise OSError('decoder gone')
    broken = Broken().train()
    with pytest.raises(OSError, match='decoder gone'): rfid(broken, images, judge())
    assert broken.training and torch.is_grad_enabled()


@pytest.mark.parametrize('k,want', [(16384, (200, 280, 360)), (8192, (100, 140, 180)), (4096, (50, 70, 90)), (1024, (10, 15, 20)), (512, (6, 9, 11)), (256, (3, 4, 6))])
def test_deltas(k, want): assert pfid_deltas(k) == want


def test_pfid_is_the_mean_of_fifteen_independent_passes(images):
    tok, e, x = Grey(512), judge(), images[:][0]
    c = pfid(tok, images, extractor=e, bootstrap=4, seed=5, device='cpu')
    assert len(c.cells) == 15 and tok.encoded == len(images)            # encoded once
    tok.eval(); p, each = FeatureStats.from_features(e(x)), []
    for cell in c.cells.values():
        ids = perturb_codes(tok.tokenize(x), tok.codebook, cell['alpha'], cell['delta'], rng=make_rng(5, 'pfid', str(cell['alpha']), str(cell['delta'])))
        with torch.no_grad(): each.append(frechet_distance(FeatureStats.from_features(e(tok.detokenize(ids))), p))
        assert cell['value'] == pytest.approx(each[-1], rel=.01)               # near ties among neighbours may fall otherwise
        assert cell['rate'] == pytest.approx((ids != tok.tokenize(x)).double().mean().item(), abs=.001)
    assert c.value == pytest.approx(np.mean(each), rel=.01) and c.settings['beta'] == 1 and c.settings['rate'] == 'exact' and c.settings['include_self'] is True
    assert c.settings['neighbours'] == 'code' and 0 < c.settings['rate_measured'] < .9


def test_pfid_without_perturbation_is_rfid(images):
    a, b = pfid(Grey(), images, (0.,), (3,), extractor=judge(), bootstrap=3), rfid(Grey(), images, judge(), bootstrap=3)
    assert a.value == pytest.approx(b.value) and a.replicates == pytest.approx(b.replicates)


def test_same_seed_same_number(images):
    a, b, c = (pfid(Grey(), images, (.5,), (9,), extractor=judge(), bootstrap=3, seed=s) for s in (0, 0, 1))
    assert a == b and a.value != c.value


def test_reference_is_extracted_once(images):
    e, bank = judge(), FeatureBank()
    start = Pool.passes
    rfid(Grey(), images, e, bootstrap=0, bank=bank); first = Pool.passes-start
    rfid(Grey(offset=.1), fashion_mnist('test', n=150), e, bootstrap=0, bank=bank)
    assert Pool.passes-start-first == first/2 == 3                      # 150 images are three chunks


@pytest.mark.parametrize('call,words', [
    (lambda x: pfid(Grey(64), x), 'at least 256 codes, got 64'),
    (lambda x: pfid(Grey(), x, (1.5,)), 'alpha must be in'),
    (lambda x: pfid(Grey(), x, (.5,), (301,)), 'delta must be a whole number in 1..300'),
    (lambda x: pfid(Grey(), x, ()), 'at least one alpha'),
    (lambda x: pfid(Grey(), x, kind='gaussian', strengths=(.1,)), 'for continuous latents'),
    (lambda x: pfid(SimpleNamespace(codebook=None), x), "kind='gaussian' and strengths"),
    (lambda x: rfid(Grey(), [1, 2]), 'expected images as a tensor'),
    (lambda x: rfid(Grey(), x, 'vgg'), 'extractor must be'),
    (lambda x: Card.from_dict(dict(metric='rFID')), 'not a card: it lacks'),
    (lambda x: Card.from_dict(card().to_dict() | dict(colour=1)), 'colour'),
])
def test_errors(images, call, words):
    with pytest.raises(ValueError) as e: call(images)
    assert words in str(e.value) and '\n' not in str(e.value)


def test_images_of_a_broken_decoder_are_refused(images):
    class Broken(Grey):
        def reconstruct(self, x): return x*float('nan')
    with pytest.raises(ValueError, match='NaN'): rfid(Broken(), images, judge())

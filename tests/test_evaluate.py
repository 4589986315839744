"Cards, and the field's numbers on tokenizers whose answers are known"
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tokkit.core import make_rng
from tokkit.data import fashion_mnist
from tokkit.metrics import Card, FeatureBank, Reference, pfid, pfid_deltas, rfid
from tokkit.metrics.evaluator import on_device
from tokkit.features import extract, FeatureExtractor, FeatureStats
from tokkit.metrics import frechet_distance, load_stats, save_stats
from tokkit.perturbation import perturb_codes


class Pool(nn.Module):
    "16 mean brightnesses: a judge that costs nothing"
    # of all judges: one that counted for itself would be another network each time
    passes = 0
    def forward(self, x):
        Pool.passes += 1
        return nn.functional.avg_pool2d(x, 7).flatten(1)

def judge(): return FeatureExtractor('pool', Pool(), mean=(0.,), std=(1.,))


def no_codes():
    "The verbs of a tokenizer, and no codebook"
    return SimpleNamespace(codebook=None, encode=torch.flatten, quantize=torch.clone, decode=torch.clone)


class Grey(nn.Module):
    "A code is the brightness of a 4x4 patch, in 300 levels"
    def __init__(self, k=300, offset=0.):
        super().__init__()
        # no two codes are equally far from a third
        jitter = torch.rand(k, generator=make_rng(0, 'jitter'))/k
        self.register_buffer('codebook', (torch.linspace(-1, 1, k)+jitter)[:,None])
        self.offset = offset
        self.encoded = 0
        self.fingerprint = f'grey{k}{offset}'
        self.norm = nn.BatchNorm1d(1)
    def tokenize(self, x):
        self.encoded += len(x)
        return (nn.functional.avg_pool2d(x, 4).flatten(1)/2+.5).mul(len(self.codebook)-1).round().long()
    def detokenize(self, ids):
        assert not self.training and not torch.is_grad_enabled()
        grey = (self.codebook[ids][...,0]+self.offset).view(-1, 1, 7, 7)
        return grey.repeat_interleave(4, 2).repeat_interleave(4, 3)
    def reconstruct(self, x): return self.detokenize(self.tokenize(x))


@pytest.fixture(scope='module')
def images(): return fashion_mnist('test', n=150)

def card(**kwargs):
    return Card(**(dict(metric='rFID', value=10., se=1., n=100, extractor='e', reference='r',
                        replicates=(9., 10., 12.)) | kwargs))


def test_card_survives_json():
    c = card(settings=dict(sizes=(1, 2)), cells={'a': dict(alpha=.5)}, value=1/3)
    back = Card.from_dict(json.loads(json.dumps(c.to_dict())))
    assert back == c and back.value == 1/3 and back.settings == dict(sizes=[1, 2]) and back.version


@pytest.mark.parametrize('value,se,text',
                         [(62.13, 1.94, '62.1 ± 1.9'), (336.4, 12.3, '336 ± 12'),
                          (.01234, .00056, '0.01234 ± 0.00056'), (5., None, '5'), (5., 0., '5.000 ± 0.000')])
def test_card_rounds_by_its_error(value, se, text):
    assert (card(value=value, se=se).number == text and text in str(card(value=value, se=se))
            and text in card(value=value, se=se)._repr_html_())


def test_row_has_the_tables_columns():
    assert list(card().row()) == ['metric', 'value', 'se', 'n', 'extractor', 'seed']


def test_difference_is_paired_only_on_the_same_draws():
    a = card()
    b = card(value=8., replicates=(7., 8., 10.))
    assert (a-b).metric == 'ΔrFID' and (a-b).value == 2 and (a-b).se == 0
    for other in (card(n=99), card(seed=1), card(replicates=(1., 2.))):
        assert (a-other).se == pytest.approx(2**.5)
    assert (a-card(metric='gFID')).metric == 'rFID-gFID' and (a-card(se=None, replicates=())).se is None
    with pytest.raises(ValueError, match='different extractors'): a-card(extractor='f')
    with pytest.raises(ValueError, match='different reference images'):
        a-card(settings=dict(reference_hash='other'))
    one, two = (card(settings=dict(extractor_hash=h)) for h in ('11aa', '22bb'))
    with pytest.raises(ValueError, match="although both are called 'e': fingerprints 11aa and 22bb"): one-two
    # a card of before fingerprints is compared by name
    assert (one-one).value == (one-a).value == 0


def test_escapes_html(): assert '<b>x' not in card(reference='<b>x')._repr_html_()


def test_rfid_is_the_distance(images):
    tok = Grey(offset=.1)
    e = judge()
    c = rfid(tok, images, e, bootstrap=3, device='cpu')
    x = images[:][0]
    tok.eval()
    with torch.no_grad():
        want = frechet_distance(*(FeatureStats.from_features(e(v)) for v in (tok.reconstruct(x), x)))
    assert (c.value == pytest.approx(want, rel=1e-6) and len(c.replicates) == 3
            and c.se == pytest.approx(np.std(c.replicates, ddof=1)))
    assert (c.n, c.extractor, c.reference) == (150, 'pool', images.name)
    assert (c.settings['tokenizer'], c.settings['rounding']) == (tok.fingerprint, 'uint8')


def test_measuring_leaves_the_tokenizer_as_it_was(images):
    tok = Grey().train()
    tok.norm.eval()
    rfid(tok, images, judge(), bootstrap=0)
    assert tok.training and not tok.norm.training and torch.is_grad_enabled()
    class Broken(Grey):
        def reconstruct(self, x): raise OSError('decoder gone')
    broken = Broken().train()
    with pytest.raises(OSError, match='decoder gone'): rfid(broken, images, judge())
    assert broken.training and torch.is_grad_enabled()


@pytest.mark.parametrize('k,want',
                         [(16384, (200, 280, 360)), (8192, (100, 140, 180)), (4096, (50, 70, 90)),
                          (1024, (10, 15, 20)), (512, (6, 9, 11)), (256, (3, 4, 6))])
def test_deltas(k, want): assert pfid_deltas(k) == want


def test_pfid_is_the_mean_of_fifteen_independent_passes(images):
    tok = Grey(512)
    e = judge()
    x = images[:][0]
    c = pfid(tok, images, extractor=e, bootstrap=4, seed=5, device='cpu')
    assert len(c.cells) == 15 and tok.encoded == len(images)            # encoded once
    tok.eval()
    p = FeatureStats.from_features(e(x))
    each = []
    for cell in c.cells.values():
        ids = perturb_codes(tok.tokenize(x), tok.codebook, cell['alpha'], cell['delta'],
                            rng=make_rng(5, 'pfid', str(cell['alpha']), str(cell['delta'])))
        with torch.no_grad():
            each.append(frechet_distance(FeatureStats.from_features(e(tok.detokenize(ids))), p))
        # near ties among neighbours may fall otherwise
        assert cell['value'] == pytest.approx(each[-1], rel=.01)
        assert cell['rate'] == pytest.approx((ids != tok.tokenize(x)).double().mean().item(), abs=.001)
    assert (c.value == pytest.approx(np.mean(each), rel=.01) and c.settings['beta'] == 1
            and c.settings['rate'] == 'exact' and c.settings['include_self'] is True)
    assert c.settings['neighbours'] == 'code' and 0 < c.settings['rate_measured'] < .9


def test_pfid_without_perturbation_is_rfid(images):
    a = pfid(Grey(), images, alphas=(0.,), deltas=(3,), extractor=judge(), bootstrap=3)
    b = rfid(Grey(), images, judge(), bootstrap=3)
    assert a.value == pytest.approx(b.value) and a.replicates == pytest.approx(b.replicates)


def test_same_seed_same_number(images):
    def one(seed):
        return pfid(Grey(), images, alphas=(.5,), deltas=(9,), extractor=judge(), bootstrap=3, seed=seed)
    a, b, c = one(0), one(0), one(1)
    assert a == b and a.value != c.value


def test_prediction_interval_covers_an_independent_seed():
    """A seed draws other images and other tokens; with all fifteen cells and a trained tokenizer:
    nbs/benchmarks/bench_interval"""
    whole = fashion_mnist('test')
    e = judge()
    tok = Grey()
    def measure(seed, replicates):
        return pfid(tok, whole, alphas=(.9, .5), deltas=(9,), extractor=e, n=200, seed=seed,
                    bootstrap=replicates,
                    bank=FeatureBank(), device='cpu')
    cards = [measure(s, 30) for s in range(20)]
    inside = [lo <= measure(100+s, 0).value <= hi for s,
              (lo, hi) in enumerate(c.interval(kind='prediction') for c in cards)]
    assert sum(inside) >= 18 and len({c.settings['images_hash'] for c in cards}) == 20


def test_interval():
    c = card(value=10., se=1.)
    assert (c.interval(.9) == pytest.approx((10-1.6449, 10+1.6449), abs=1e-4)
            and c.interval(kind='prediction')[1] == pytest.approx(10+1.96*2**.5, abs=1e-3))
    for wrong in (dict(level=1.), dict(kind='posterior')):
        with pytest.raises(ValueError): c.interval(**wrong)
    with pytest.raises(ValueError, match='measure it with bootstrap=50'): card(se=None).interval()


def test_small_samples_are_warned_of(images):
    c = rfid(Grey(), images, judge(), n=31, bootstrap=0)
    assert (c.warnings == ('31 images for 16 dimensions: take 32 or more, or fd_infinity',
                           '31 reference images for 16 dimensions: take 32 or more, or fd_infinity'))
    assert ('fd_infinity' in str(c) and 'fd_infinity' in c._repr_html_()
            and not rfid(Grey(), images, judge(), n=32, bootstrap=0).warnings)


def test_features_come_back_from_disk(images, tmp_path):
    e = judge()
    def get(device='cpu'): return FeatureBank(disk=tmp_path)(images, e, device).features
    first = get()
    start = Pool.passes
    assert torch.equal(get(), first) and Pool.passes == start                      # not looked at again
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for broken in (whole[:-300], b'', whole[:200]+b'\1\2\3'+whole[203:]):
        path.write_bytes(broken)
        with pytest.warns(UserWarning, match='were damaged; they are made again'):
            assert torch.equal(get(), first)
        assert path.read_bytes() == whole and len([*tmp_path.iterdir()]) == 1
    FeatureBank(disk=tmp_path)(images[:][0], e, 'cpu')
    assert len([*tmp_path.iterdir()]) == 1  # a tensor is not kept
    FeatureBank(disk=tmp_path)(images,
                               FeatureExtractor('pool', nn.Sequential(Pool(), nn.ReLU()), mean=(0.,), std=(1.,
                                                )), 'cpu')
    # the same name, another network
    assert len([*tmp_path.iterdir()]) == 2


def test_without_a_place_to_keep_them_features_are_made(images, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.warns(UserWarning, match='cannot be kept'):
        assert len(FeatureBank(disk=tmp_path/'file'/'sub')(images, judge(), 'cpu')) == 150


def test_what_the_paper_leaves_open_is_on_the_card(images):
    c = pfid(Grey(1024), images, extractor=judge(), n=100, seed=3, bootstrap=0)
    assert (c.n, c.seed, c.extractor, c.settings['images']) == (100, 3, 'pool', f'{images.name}[100 chosen]')
    wanted = dict(rate='exact', include_self=True, neighbours='code', beta=1., deltas=[10, 15, 20],
                  deltas_from='published', rounding='uint8', resize='none', covariance='n-1')
    assert ({k: c.settings[k] for k in wanted} == wanted
            and c.settings['neighbour'].startswith('nearest in the codebook'))
    assert (pfid(Grey(300), images, alphas=(.5,), extractor=judge(),
                 bootstrap=0).settings['deltas_from'] == '{200,280,360}*K/16384, rounded')
    assert (pfid(Grey(300), images, alphas=(.5,), deltas=(4,), extractor=judge(),
                 bootstrap=0).settings['deltas_from'] == 'given')


def test_sets_of_other_shapes_are_refused(images):
    class Half(Grey):
        def reconstruct(self, x): return x[..., ::2, ::2]
    for call, words in ((lambda: rfid(Half(), images, judge()),
                         'made images (1, 14, 14) of images (1, 28, 28)'),
                        (lambda: rfid(Grey(), images, judge(), reference=fashion_mnist('test', n=9, size=32)),
                         'those of the reference'),
                        (lambda: rfid(Grey(), images[:0][0], judge()), 'at least one image')):
        with pytest.raises(ValueError) as e: call()
        assert words in str(e.value) and '\n' not in str(e.value)


def linear(size=None):
    torch.manual_seed(0)
    return FeatureExtractor('linear', nn.Sequential(nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(49, 5)),
                            size, mean=(0.,), std=(1.,))


def test_other_weights_get_no_old_features(images):
    "In memory too, and however the weights were changed"
    e = linear()
    bank = FeatureBank()
    first = bank(images, e, 'cpu')
    e.module[2].weight.data.mul_(2)                                     # torch counts no change here
    changed = bank(images, e, 'cpu').features
    assert not torch.equal(changed, first.features) and torch.equal(changed, extract(e, images, 'cpu'))
    e.module[2].weight.data.div_(2)
    # the network counts, not the object
    assert bank(images, e, 'cpu') is first is bank(images, linear(), 'cpu')


def test_a_reference_by_another_network_of_the_same_name_is_refused(images, tmp_path):
    small = linear(14)
    large = linear(20)
    tok = Grey(offset=.1)
    made = FeatureBank()(images, large, 'cpu')
    assert made.fingerprint == made.stats.fingerprint == large.fingerprint
    save_stats(tmp_path/'s.npz', made.stats)
    for reference in (made, made.stats, load_stats(tmp_path/'s.npz'),
                      Reference(made.features, 'linear', fingerprint=large.fingerprint)):
        with pytest.raises(ValueError, match=f'of the name linear.*{large.fingerprint} and '
                                             f'{small.fingerprint}') as e:
            rfid(tok, images, small, reference=reference)
        assert ('\n' not in str(e.value)
                and rfid(tok, images, large, reference=reference, bootstrap=0).value > 0)
    a = rfid(tok, images, small, bootstrap=0)
    b = rfid(tok, images, large, bootstrap=0)
    with pytest.raises(ValueError, match="although both are called 'linear'"): a-b
    unknown = load_stats(tmp_path/'s.npz', fingerprint='')              # whoever knows better may say so
    assert rfid(tok, images, small, reference=unknown, bootstrap=0).value > 0


@pytest.mark.parametrize('change,words',
                         [(lambda x: x*255, 'got numbers from -255 to 255'), (lambda x: x/0, 'NaN'),
                          (lambda x: x.byte(), 'torch.uint8; see from_uint8')])
def test_images_that_are_none_are_refused_before_the_tokenizer(images, change, words):
    "With a fixed reference nobody else would look at them"
    e = judge()
    stats = FeatureBank()(images, e, 'cpu').stats
    for measure in (rfid, lambda *a, **k: pfid(*a[:2], alphas=(.5,), deltas=(3,), extractor=a[2], **k)):
        with pytest.raises(ValueError) as caught: measure(Grey(), change(images[:9][0]), e, reference=stats)
        assert words in str(caught.value) and '\n' not in str(caught.value)


def test_a_module_is_measured_where_its_buffers_are():
    tok = nn.Module()
    tok.register_buffer('codebook', torch.zeros(4, 2, device='meta'))
    with on_device(tok, None) as where: assert where.type == 'meta'
    with on_device(nn.Module(), None) as where: assert where.type == 'cpu'


def test_reference_is_extracted_once(images):
    e = judge()
    bank = FeatureBank()
    start = Pool.passes
    rfid(Grey(), images, e, bootstrap=0, bank=bank)
    first = Pool.passes-start
    rfid(Grey(offset=.1), fashion_mnist('test', n=150), e, bootstrap=0, bank=bank)
    assert Pool.passes-start-first == first/2 == 3                      # 150 images are three chunks


@pytest.mark.parametrize('call,words', [
    (lambda x: pfid(Grey(64), x), 'at least 256 codes, got 64'),
    (lambda x: pfid(Grey(), x, alphas=(1.5,)), 'alpha must be in'),
    (lambda x: pfid(Grey(), x, alphas=(.5,), deltas=(301,)), 'delta must be a whole number in 1..300'),
    (lambda x: pfid(Grey(), x, alphas=()), 'at least one alpha'),
    (lambda x: pfid(Grey(), x, kind='gaussian', strengths=(.1,)), 'for continuous latents'),
    (lambda x: pfid(no_codes(), x), "kind='gaussian' and strengths"),
    (lambda x: pfid(SimpleNamespace(codebook=None), x), 'lacks encode, quantize, decode'),
    (lambda x: rfid(Grey(), [1, 2]), 'expected images as a tensor'),
    (lambda x: rfid(Grey(), x, 'vgg'), 'extractor must be'),
    (lambda x: rfid(Grey(), x, n=151), 'n must be in 2..150'),
    (lambda x: pfid(Grey(), x, alphas=(50,)), 'alpha must be in [0, 1], got 50'),
    (lambda x: FeatureBank(keep=0), 'keep must be at least 1 set, got 0'),
    (lambda x: FeatureBank()([1, 2], judge()), 'expected images as a tensor'),
    (lambda x: FeatureBank()(x[:0][0], judge()), 'expected at least one image'),
    (lambda x: FeatureBank()(x[:9][0]*255, judge()),
     'expected images in [-1,1], got numbers from -255 to 255'),
    (lambda x: rfid(Grey(), x.subset(slice(0)), judge()), 'expected at least one image'),
    (lambda x: Reference(FeatureStats(9, np.zeros(2), np.eye(2))), 'do not say whose features they are of'),
    (lambda x: Reference(FeatureStats(9, np.zeros(2), np.eye(2), 'theirs'), 'ours'),
     'the reference features are by theirs, not by ours'),
    (lambda x: Card.from_dict(dict(metric='rFID')), 'not a card: it lacks extractor, n, reference'),
    (lambda x: card()-card(reference='train'),
     "different references cannot be subtracted: 'r' and 'train'"),
    (lambda x: card().interval(kind='credible'), "kind must be 'confidence' or 'prediction', got 'credible'"),
    (lambda x: card(se=None).interval(), 'has no error to make an interval of; measure it with bootstrap=50'),
    (lambda x: Card.from_dict(card().to_dict() | dict(colour=1)), 'colour'),
])
def test_errors(images, call, words):
    with pytest.raises(ValueError) as e: call(images)
    assert words in str(e.value) and '\n' not in str(e.value)


def test_references_by_other_extractors_are_refused(images):
    e = judge()
    f = extract(e, images, 'cpu')
    other = FeatureExtractor('pool', Pool(), size=48, mean=(0.,), std=(1.,))
    cases = [(Reference(f, 'inception'), 'the reference features are by inception, the card is by pool'),
             (FeatureStats.from_features(f, 'pool@64'), 'are by pool@64, the card is by'),
             (FeatureStats.from_features(f, 'pool', other.fingerprint),
              f'fingerprints {other.fingerprint} and {e.fingerprint} (weights, layers, resizing)'),
             (fashion_mnist('test', n=9, size=32),
              'images are (1, 28, 28), those of the reference fashion_mnist/test[:9]@32 are (1, 32, 32)')]
    for reference, words in cases:
        with pytest.raises(ValueError) as caught: rfid(Grey(), images, e, reference=reference)
        assert words in str(caught.value) and '\n' not in str(caught.value)


def test_images_of_a_broken_decoder_are_refused(images):
    class Broken(Grey):
        def reconstruct(self, x): return x*float('nan')
    with pytest.raises(ValueError, match='NaN'): rfid(Broken(), images, judge())

"Tables of cards, of a tokenizer and of a generator whose answers are known"
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from test_evaluate import Grey, judge
from tokkit.core import make_rng
from tokkit.data import fashion_mnist, from_uint8, to_uint8
from tokkit.metrics import FeatureBank, Reference, draw_images, rfid
from tokkit.features import extract, FeatureExtractor, FeatureStats
from tokkit.metrics import density_coverage, inception_score, precision_recall
from tokkit.generators import sample_batches
from tokkit.generators import make_generator
from tokkit.metrics import kid
from tokkit.metrics import load_stats, psnr, save_stats, ssim
from tokkit.metrics import (FeatureDistance, Sampler, generator_metrics, tokenizer_metrics,
                            evaluate_generator, evaluate_tokenizer, gfid)
from tokkit.tokenizers import make_tokenizer


@pytest.fixture(scope='module')
def images(): return fashion_mnist('test', n=150)

@pytest.fixture(scope='module')
def others(): return fashion_mnist('test').subset(slice(150, 300))


class Three(nn.Module):
    "Probabilities of three classes"
    def forward(self, x):
        return torch.stack([x[..., i::3].mean((1, 2, 3)) for i in range(3)], 1).mul(9).softmax(1)

def classifier(): return FeatureExtractor('three', Three(), mean=(0.,), std=(1.,))


def test_gfid_of_a_sampler_a_tensor_and_a_set(images):
    asked = []
    e = judge()
    real = fashion_mnist('test').subset(slice(150, 300))
    def sampler(n):
        asked.append(n)
        i = sum(asked)
        return real[i-n:i][0]
    a = gfid(sampler, images, e, bootstrap=3)
    b = gfid(real[:][0], images, e, bootstrap=3)
    c = gfid(real, images, e, bootstrap=3, settings=dict(guidance=2.))
    assert (a.value == b.value == c.value > 0 and a.replicates == c.replicates and sum(asked) == a.n == 150
            and c.settings['guidance'] == 2)


def test_samples_are_not_kept(images):
    """Of a thousand drawn in four batches one or two are there at a time;
    with a classifier beside the judge, too"""
    held = []
    alive = []
    def sampler(n):
        a = np.random.default_rng(len(held)).uniform(-1, 1, (n, 1, 28, 28)).astype(np.float32)
        held.append(weakref.ref(a))
        alive.append(sum(r() is not None for r in held))
        return torch.from_numpy(a)
    cards = evaluate_generator(sampler, images, judge(), classifier=classifier(), n=1000, bootstrap=2)
    assert len(alive) == 4 and max(alive) <= 2 and {c.n for c in cards} == {1000}
    x = torch.cat([torch.from_numpy(np.random.default_rng(i).uniform(-1, 1,
                                                                     (n, 1, 28, 28)).astype(np.float32))
                   for i,n in enumerate((256, 256, 256, 232))])
    for a, b in zip(cards, evaluate_generator(x, images, judge(), classifier=classifier(), bootstrap=2)):
        assert (a.value, a.se, a.replicates) == (b.value, b.se, b.replicates)


def test_drawn_samples_have_a_hash_that_no_batch_changes(images):
    x = fashion_mnist('train', n=150)[:][0]
    def sampler(step):
        at = iter(range(0, 999, step))
        return lambda n: x[(i := next(at)):i+step]
    a, b, c = (gfid(s, images, judge(), n=n, bootstrap=0).settings for s,
               n in ((sampler(7), 150), (sampler(100), 150), (sampler(100), 140)))
    assert (a['images_hash'] == b['images_hash'] != c['images_hash']
            and a['images'] == f"samples {a['images_hash'][:6]}" and a['shape'] == [1, 28, 28])


def test_n_samples_are_drawn_by_the_seed(images, others):
    e = judge()
    for samples in (others, others[:][0]):
        some = gfid(samples, images, e, n=50, seed=4, bootstrap=0)
        assert (some.n == 50
                and some.value == gfid(draw_images(samples, 50, 4), images, e,
                                       bootstrap=0).value != gfid(samples, images, e, n=50, seed=5,
                                                                  bootstrap=0).value)
        with pytest.raises(ValueError, match='n must be in 2..150'): gfid(samples, images, e, n=151)
    for n in (0, 1):
        with pytest.raises(ValueError, match=f'n must be at least 2 samples, got {n}'):
            gfid(lambda n: others[:n][0], images, e, n=n)


def test_a_sampler_must_give_images(images):
    with pytest.raises(ValueError, match='a sampler must return images'): gfid(lambda n: None, images)


@pytest.mark.parametrize('metrics,words', [
    ('IS', 'IS needs a classifier whose features are class probabilities'),
    (('FID',), "no metric 'FID'; there are gFID, KID, precision")])
def test_metrics_of_generators_that_there_are_not(images, others, metrics, words):
    with pytest.raises(ValueError) as e: evaluate_generator(others, images, judge(), metrics=metrics)
    assert words in str(e.value) and '\n' not in str(e.value)


def test_labels_that_there_are_not(images):
    with pytest.raises(ValueError, match='there are labels for 150 images, 151 are wanted'):
        Sampler(nn.Module(), None, images).draw_labels(151)
    with pytest.raises(ValueError, match="labels must be 'balanced', .*, or labels; got 'dataset'"):
        Sampler(nn.Module(), None, 'dataset').draw_labels(3)


def test_generator_cards_are_the_metrics(images, others):
    e = judge()
    p = classifier()
    got = {c.metric: c for c in evaluate_generator(others, images, e, classifier=p, bootstrap=0, seed=2)}
    assert list(got) == generator_metrics()
    real, fake = (extract(e, s, 'cpu') for s in (images, others))
    assert (got['precision'].value, got['recall'].value) == tuple(precision_recall(real, fake))
    assert (got['density'].value, got['coverage'].value) == pytest.approx(tuple(density_coverage(real, fake)))
    want = kid(real, fake)
    assert ((got['KID'].value, got['KID'].se) == pytest.approx((want.value, want.se))
            and got['KID'].settings['pairs'] == 'all')
    want = inception_score(extract(p, others, 'cpu'), rng=make_rng(2, 'is'))
    assert ((got['IS'].value, got['IS'].se) == pytest.approx(tuple(want)[:2])
            and got['IS'].extractor == 'three' and got['KID'].extractor == 'pool')
    assert 'dimension' not in got['recall'].settings and got['gFID'].settings['dimension'] == 16


def test_the_same_images_are_perfect(images):
    got = {c.metric: c.value for c in evaluate_generator(images, images, judge(), bootstrap=0)}
    assert ((got['gFID'], got['precision'], got['recall'], got['coverage']) == pytest.approx((0, 1, 1, 1),
                                                                                             abs=1e-9)
            and got['KID'] < 0)


def test_statistics_of_a_file_are_a_reference(images, others, tmp_path):
    e = judge()
    whole = gfid(others, images, e, bootstrap=3)
    save_stats(tmp_path/'reference.npz', FeatureStats.from_features(extract(e, images, 'cpu'), 'pool'))
    stats = load_stats(tmp_path/'reference.npz')
    for reference in (stats, Reference(stats, name='published')):
        a = gfid(others, reference, e, bootstrap=3)
        assert (a.value == whole.value and a.replicates != whole.replicates
                and 'reference fixed' in a.settings['error'])
    with pytest.raises(ValueError, match='by pool, the card is by other'):
        gfid(others, stats, FeatureExtractor('other', e.module, mean=(0.,), std=(1.,)))
    with pytest.raises(ValueError, match='coverage needs features of the reference'):
        evaluate_generator(others, stats, e, metrics='coverage')


def test_sampler_is_sample_batches_and_says_what_it_did(images):
    tok = make_tokenizer('tiny-16', width=16, depth=1, codebook_size=32)
    gen = make_generator('ar', tok.spec, classes=10, width=16, depth=1, heads=2)
    s = Sampler(gen.train(), tok, asked=dict(guidance=2., temperature=.9), seed=3, batch=7)
    gen.eval()
    ids, labels = sample_batches(gen, 20, seed=3, guidance=2., temperature=.9)
    gen.train()
    with torch.no_grad(): want = tok.eval().from_latents(ids)
    tok.train()
    assert (torch.allclose(s(20), want, atol=1e-5) and gen.training and tok.training
            and torch.equal(s.draw_labels(20), labels))
    c = gfid(s, images, judge(), n=20, bootstrap=0)
    assert ({k: c.settings[k]
             for k in ('labels', 'guidance', 'temperature', 'sampling_seed')} == dict(labels='balanced',
                                                                                      guidance='2.0',
                                                                                      temperature='0.9',
                                                                                      sampling_seed=3))
    dataset = Sampler(gen, tok, images)
    assert torch.equal(dataset.draw_labels(150), images.labels) and dataset.settings['labels'] == images.name
    some = dataset.draw_labels(50).bincount(minlength=10)
    assert (some <= images.labels.bincount(minlength=10)).all() and some.sum() == 50


def test_tokenizer_cards(images):
    got = {c.metric: c
           for c in evaluate_tokenizer(Grey(), images, judge(), bootstrap=3, alphas=(.5,), deltas=(4,))}
    assert list(got) == [m for m in tokenizer_metrics() if m not in ('iFID', 'IS')]
    used = Grey().tokenize(images[:][0]).unique().numel()
    assert (got['usage'].value == pytest.approx(used/300) and 1 < got['perplexity'].value <= used
            and got['PSNR'].se > 0)
    tok = Grey().eval()
    x = images[:][0]
    with torch.no_grad(): xh = from_uint8(to_uint8(tok.reconstruct(x)))
    for m, f in dict(PSNR=psnr, SSIM=ssim).items():
        assert (got[m].value == pytest.approx(f(xh, x).double().mean().item())
                and got[m].settings['rounding'] == 'uint8')
    assert got['PSNR'].settings['most'] == '100 dB an image' and 'most' not in got['SSIM'].settings
    assert (got['LPIPS-style'].value == pytest.approx(FeatureDistance()(x, xh).mean().item(), rel=1e-4)
            and got['LPIPS-style'].extractor.startswith('efficientnet_lite0'))
    alone = rfid(Grey(), images, judge(), bootstrap=3)
    assert (got['rFID'].value, got['rFID'].replicates) == (alone.value, alone.replicates)


class Perfect(Grey):
    def reconstruct(self, x): return x


def test_a_perfect_tokenizer_has_a_kid_of_zero(images, others):
    "Reconstructions and the very images they are of are no independent sets; against other images they are"
    e = judge()
    def measured(tok, **kw): return evaluate_tokenizer(tok, images, e, metrics='KID', **kw)[0]
    perfect = measured(Perfect())
    assert (abs(perfect.value) < 1e-9 and perfect.se < 1e-9
            and perfect.settings['pairs'] == 'all but those of an image and its reconstruction')
    x = images[:][0]
    tok = Grey(offset=.1).eval()
    with torch.no_grad(): real, fake = (extract(e, s, 'cpu') for s in (x, tok.reconstruct(x)))
    got = measured(tok)
    same = measured(tok, reference=fashion_mnist('test', n=150))
    assert (got.value, got.se) == pytest.approx(kid(real, fake, paired=True)[:2]) == (same.value, same.se)
    far = measured(tok, reference=others)
    assert ((far.value, far.se) == pytest.approx(kid(extract(e, others, 'cpu'), fake)[:2])
            and far.settings['pairs'] == 'all')


def test_every_number_sees_rounded_images(images):
    "Less than half a level is nothing, in a reconstruction and in the images; only decibels have a limit"
    class Near(Grey):
        def reconstruct(self, x): return x+.003
    got = {c.metric: c.value
           for c in evaluate_tokenizer(Near(), images[:][0]-.002, judge(), bootstrap=0, alphas=(.5,),
                                       deltas=(4,))}
    assert ((got['rFID'], got['PSNR'], got['SSIM'], got['LPIPS-style']) == pytest.approx((0, 100, 1, 0),
                                                                                         abs=1e-6))
    large = evaluate_tokenizer(Grey(), images, judge(), metrics='LPIPS-style', perceptual=lambda x,
                               xh: torch.full((len(x),), 500.), bootstrap=0)[0]
    assert large.value == 500


def test_reconstructed_once(images):
    tok = Grey()
    evaluate_tokenizer(tok, images, judge(), metrics=('rFID', 'KID', 'coverage', 'PSNR', 'SSIM'), bootstrap=0)
    assert tok.encoded == len(images)


def test_some_metrics_of_some_images(images):
    a = evaluate_tokenizer(Grey(), images, judge(), metrics=('PSNR', 'rFID'), n=60, seed=1, bootstrap=2,
                           bank=FeatureBank())
    b = rfid(Grey(), images, judge(), n=60, seed=1, bootstrap=2)
    assert [c.metric for c in a] == ['rFID', 'PSNR'] and a[0].value == b.value and {c.n for c in a} == {60}


@pytest.mark.parametrize('more,words', [
    (dict(metrics='FID'), "no metric 'FID'; there are rFID, pFID"),
    (dict(metrics='IS'), 'IS needs a classifier'),
    (dict(metrics=('iFID',)), 'iFID needs images for the neighbours: train='),
    (dict(n=151), 'n must be in 2..150')])
def test_refusals(images, more, words):
    with pytest.raises(ValueError) as e: evaluate_tokenizer(Grey(), images, judge(), **more)
    assert words in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('metric,words', [('usage', 'usage is of codes, and this tokenizer has none'),
                                          ('pFID', 'pFID is defined for codes')])
def test_what_latents_without_codes_have_not(images, metric, words):
    class Latents(nn.Module):
        codebook = None
    with pytest.raises(ValueError) as e: evaluate_tokenizer(Latents(), images, judge(), metrics=metric)
    assert words in str(e.value) and '\n' not in str(e.value)

"Tables of cards, of a tokenizer and of a generator whose answers are known"
import pytest

from test_evaluate import Grey, judge
from tokkit.data import fashion_mnist
from tokkit.scorecard import evaluate_generator, evaluate_tokenizer, gfid


@pytest.fixture(scope='module')
def images(): return fashion_mnist('test', n=150)


def test_gfid_of_a_sampler_a_tensor_and_a_set(images):
    asked, e, real = [], judge(), fashion_mnist('test').subset(slice(150, 300))
    def sampler(n): asked.append(n); i = sum(asked); return real[i-n:i][0]
    a, b, c = gfid(sampler, images, e, bootstrap=3), gfid(real[:][0], images, e, bootstrap=3), gfid(real, images, e, bootstrap=3, settings=dict(guidance=2.))
    assert a.value == b.value == c.value > 0 and a.replicates == c.replicates and sum(asked) == a.n == 150 and c.settings['guidance'] == 2


def test_generator_cards(images):
    assert [c.metric for c in evaluate_generator(images, images, judge(), bootstrap=0)] == ['gFID', 'precision', 'recall']
    assert [c.value for c in evaluate_generator(images, images, judge(), bootstrap=0)] == pytest.approx([0., 1., 1.], abs=1e-9)


def test_tokenizer_cards(images):
    got = {c.metric: c for c in evaluate_tokenizer(Grey(), images, judge(), bootstrap=3, alphas=(.5,), deltas=(4,))}
    assert list(got) == ['rFID', 'pFID', 'PSNR', 'usage', 'perplexity']
    used = Grey().tokenize(images[:][0]).unique().numel()
    assert got['usage'].value == pytest.approx(used/300) and 1 < got['perplexity'].value <= used and got['PSNR'].se > 0


def test_a_sampler_must_give_images(images):
    with pytest.raises(ValueError, match='a sampler must return images'): gfid(lambda n: None, images)

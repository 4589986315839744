"One contract for every kind of generator: what is the same for all of them is tested once, here"
import warnings

import pytest
import torch

from tokkit.core import make_rng
from tokkit.generators import Guidance, fit_batch, sample_batches
from tokkit.generators import load_generator, make_generator, save_generator
from tokkit.training import WarmupCosine
from tokkit.tokenizers import make_tokenizer
from tokkit.training import RELEASED_TRAINING, GeneratorTraining, TensorPairs, train_generator

# preset -> a tokenizer whose latents it makes
FITS = dict(ar='tiny-16', rar='tiny-16', masked='tiny-16', flow='tiny-kl')
LEVELS = ('ar', 'tiny-pq'), ('rar', 'tiny-rq'), ('masked', 'tiny-pq')


def generator(name, tok=None, **changes):
    gen = make_generator(name, make_tokenizer(tok or FITS[name], width=16, depth=1, heads=2).spec, 3,
                         width=32, depth=1, heads=2, **changes).eval()
    # zero-initialised gates would hide what is behind them
    for i,p in enumerate(gen.parameters()):
        with torch.no_grad(): p.add_(.05*torch.randn(p.shape, generator=make_rng(0, i)))
    return gen

def real(gen, b, seed=7):
    if gen.codebook_size: return torch.randint(gen.codebook_size, (b, *gen.shape), generator=make_rng(seed))
    return torch.randn(b, *gen.shape, generator=make_rng(seed))

def same(gen, a, b): return torch.equal(a, b) if gen.codebook_size else (a-b).abs().max() <= 1e-4

EVERY = ([pytest.param(name, None, id=name) for name in FITS]
         +[pytest.param(name, tok, id=f'{name}-{tok}') for name,tok in LEVELS])


@pytest.mark.parametrize('name,tok', EVERY)
@pytest.mark.parametrize('guidance',
                         [1., 0., Guidance(3., 1.15), Guidance(2., kind='linear', interval=(.2, .8))],
                         ids=str)
def test_a_sample_does_not_depend_on_its_neighbours(name, tok, guidance):
    gen = generator(name, tok)
    labels = torch.arange(64)%3
    whole = sample_batches(gen, labels, 64, seed=3, guidance=guidance)[0]
    assert whole.shape == (64, *gen.shape)
    for batch in (1, 7):
        assert same(gen, sample_batches(gen, labels[:14], batch, seed=3, guidance=guidance)[0], whole[:14])
    assert not same(gen, sample_batches(gen, labels, 64, seed=4, guidance=guidance)[0], whole)


@pytest.mark.parametrize('name,tok', EVERY)
def test_keeping(name, tok):
    gen = generator(name, tok)
    labels = torch.arange(6)%3
    given = real(gen, 6)
    free = gen.sample(labels, 2., rng=make_rng(1))
    assert torch.equal(gen.sample(labels, 2., keep=(given, 1.), rng=make_rng(1)), given)
    assert torch.equal(gen.sample(labels, 2., keep=(given, 0.), rng=make_rng(1)), free)
    def distance(s):
        made = gen.sample(labels, 2., keep=(given, s), rng=make_rng(1))
        return (made != given).double().mean() if gen.codebook_size else (made-given).square().mean()
    far = [distance(s) for s in (0., .5, .9, 1.)]
    assert far == sorted(far, reverse=True) and far[0] > far[-1] == 0


@pytest.mark.parametrize('name', FITS)
def test_no_samples_are_a_sample_too(name):
    gen = generator(name)
    assert gen.sample(torch.empty(0, dtype=torch.long)).shape == (0, *gen.shape)


@pytest.mark.parametrize('name', FITS)
@pytest.mark.parametrize('bad,line', [
    (dict(temperature=0.), 'temperature must be > 0, got 0'),
                                      (dict(temperature=float('nan')), 'temperature must be > 0'),
    (dict(guidance=-1.), 'guidance must be in [0'),
                                      (dict(labels=torch.tensor([3])), 'labels must be in 0..2, got 3..3'),
    (dict(labels=torch.tensor([.5])), 'whole numbers'),
                                      (dict(labels=torch.zeros(1, 1).long()), 'whole numbers'),
    (dict(sigma=1.5), 'sigma must be in [0, 1], got 1.5'),
                                      (dict(sigma=float('nan')), 'sigma must be in [0, 1]'),
    (dict(short=True, sigma=.5), 'keep must be'), (dict(rows=2, sigma=.5), 'keep must be'),
                                      (dict(top_p=0.), 'top_p'), (dict(top_k=0), 'top_k')], ids=str)
def test_bad_input_gets_one_line(name, bad, line):
    gen = generator(name)
    bad = dict(bad)
    labels = bad.pop('labels', torch.tensor([1]))
    sigma = bad.pop('sigma', None)
    if sigma is not None:
        given = real(gen, bad.pop('rows', 1))
        bad['keep'] = given[:,:-1] if bad.pop('short', False) else given, sigma
    with pytest.raises(ValueError) as e: gen.sample(labels, **bad)
    assert line in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('name', ['masked', 'flow'])
def test_no_steps(name):
    with pytest.raises(ValueError, match='steps must be .*got 0'):
        generator(name).sample(torch.tensor([1]), steps=0)


@pytest.mark.parametrize('name', FITS)
def test_damaged_weights_name_the_step(name):
    gen = generator(name)
    with torch.no_grad():
        next(p for n,p in gen.named_parameters() if 'blocks' in n
             and n.endswith('weight')).fill_(float('nan'))
    with pytest.raises(FloatingPointError, match=r'not finite at step \d+ of \d+'):
        gen.sample(torch.tensor([1]))


@pytest.mark.parametrize('name', FITS)
def test_guidance_without_label_dropout_warns(name):
    gen = generator(name, label_dropout=0.)
    with pytest.warns(UserWarning, match='label_dropout 0'): gen.sample(torch.tensor([1]), 2.)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        gen.sample(torch.tensor([1]))


@pytest.mark.parametrize('name', FITS)
def test_latents_of_another_tokenizer_are_refused(name):
    gen = generator(name)
    with pytest.raises(ValueError, match='latents must be'): gen.loss(real(gen, 2)[:,1:], torch.tensor([0,1]))
    if gen.codebook_size:
        with pytest.raises(ValueError, match='of another tokenizer'):
            gen.loss(real(gen, 2)+gen.codebook_size, torch.tensor([0,1]))


@pytest.mark.parametrize('name', FITS)
def test_the_callback_sees_every_step_and_disturbs_none(name):
    gen = generator(name)
    seen = []
    made = gen.sample(torch.tensor([0,1]), 2., rng=make_rng(0), callback=seen.append)
    assert torch.equal(made, gen.sample(torch.tensor([0,1]), 2., rng=make_rng(0)))
    assert [s['i'] for s in seen] == list(range(seen[0]['steps'])) and torch.equal(seen[-1]['latents'], made)
    if gen.codebook_size:
        known = torch.stack([s['known'] for s in seen])
        assert known[-1].all() and (known[1:] >= known[:-1]).all() and known[0].sum() < known[-1].sum()


@pytest.mark.parametrize('name,tok', EVERY)
def test_learns_resumes_and_comes_back(name, tok, tmp_path):
    gen = generator(name, tok)
    data = real(gen, 4).repeat(16, *[1]*len(gen.shape))
    labels = torch.arange(64)%2
    how = GeneratorTraining(epochs=6, batch=16, lr=3e-3)
    def train(gen, work=None, die=None):
        return train_generator(gen, TensorPairs(data, labels), how, work=work, preview=die, device='cpu')
    history = train(gen)
    assert history.loss.iloc[-1] < history.loss.iloc[0]
    def kill(learner):
        if learner.epoch == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train(generator(name, tok), tmp_path/'work', kill)
    again = generator(name, tok)
    train(again, tmp_path/'work')
    assert again.fingerprint == gen.fingerprint
    assert load_generator(save_generator(gen, tmp_path/'saved')).fingerprint == gen.fingerprint


def test_memory_chooses_the_batch(monkeypatch):
    gen = generator('ar')
    monkeypatch.setattr('tokkit.generators.base.free_memory', lambda device: 10*gen.sample_bytes)
    assert fit_batch(gen, 1000, torch.device('cpu')) == 5 and fit_batch(gen, 3, torch.device('cpu')) == 3
    assert fit_batch(gen, 1000, torch.device('cpu'), share=.01) == 1


def test_learning_rate_of_the_released_generators(fixtures):
    import json
    recorded = json.loads((fixtures/'schedules.json').read_text())
    schedule = WarmupCosine(RELEASED_TRAINING.warmup, RELEASED_TRAINING.final, least=0.)
    for step,lr in zip(recorded['rar.lr_steps'], recorded['rar.lr']):
        assert abs(RELEASED_TRAINING.lr*schedule(step/250_000)-lr) <= 1e-5*RELEASED_TRAINING.lr


def test_progress_reaches_the_generator():
    gen = generator('rar')
    seen = []
    losses = gen.losses
    gen.losses = lambda *a: (seen.append(a[3]), losses(*a))[1]
    train_generator(gen, TensorPairs(real(gen, 8), torch.zeros(8, dtype=torch.long)),
                    GeneratorTraining(epochs=2, batch=4), device='cpu')
    assert seen == [0., .25, .5, .75]

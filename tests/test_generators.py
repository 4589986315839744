"One contract for every kind of generator: what is the same for all of them is tested once, here"
import warnings
from dataclasses import asdict, dataclass

import pytest
import torch

from tokkit.analysis import error_profile
from tokkit.core import make_rng
from tokkit.generators import (GENERATORS, check_sampling, fit_batch, GeneratorCfg, Guidance, ids_sizes,
                               IdsCfg, LatentGenerator, load_generator, make_generator, row_noise, row_seeds,
                               sample_batches, sample_categorical, Sampling, save_generator)
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


@pytest.mark.alike
@pytest.mark.parametrize('name,tok', EVERY)
@pytest.mark.parametrize('guidance',
                         [1., 0., Guidance(3., 1.15), Guidance(2., kind='linear', interval=(.2, .8))],
                         ids=str)
def test_a_sample_does_not_depend_on_its_neighbours(name, tok, guidance):
    gen = generator(name, tok)
    labels = torch.arange(64)%3
    whole = sample_batches(gen, labels, guidance, batch=64, seed=3)[0]
    assert whole.shape == (64, *gen.shape)
    for batch in (1, 7):
        assert same(gen, sample_batches(gen, labels[:14], guidance, batch=batch, seed=3)[0], whole[:14])
    assert not same(gen, sample_batches(gen, labels, guidance, batch=64, seed=4)[0], whole)


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


@pytest.mark.parametrize('name', FITS)
def test_sampling_comes_whole_or_in_parts(name):
    gen = generator(name)
    y = torch.tensor([0, 1])
    def draw(*given, **how): return gen.sample(y, *given, rng=make_rng(0), **how)
    whole = draw(Sampling(2., .8))
    ways = (draw(2., temperature=.8), draw(guidance=2., temperature=.8), draw(Guidance(2.), temperature=.8),
            draw(Sampling(temperature=.8), guidance=2.), draw(sampling=Sampling(2., .8)),
            draw(Sampling(2., .8), steps=None, top_k=None, churn=None))
    for other in ways: assert torch.equal(whole, other)
    with pytest.raises(TypeError, match='guidance'): draw(2., guidance=3.)


@pytest.mark.parametrize('name,asked,takes', [
    ('ar', dict(steps=8), "ARGenerator takes no 'steps'; it takes guidance, temperature, top_k, top_p"),
    ('ar', dict(sharpness=2.), "ARGenerator takes no 'sharpness'; it takes guidance, temperature"),
    ('masked', dict(churn=.5), "MaskedGenerator takes no 'churn'; it takes guidance, .*choice_temperature"),
    ('flow', dict(choice_temperature=1.), "FlowGenerator takes no 'choice_temperature'; it takes guidance, "
                                          "temperature, steps, method, churn")])
def test_what_a_generator_does_not_know_is_refused(name, asked, takes):
    gen = generator(name)
    with pytest.raises(TypeError, match=takes): gen.sample(torch.tensor([1]), **asked)
    with pytest.raises(TypeError, match=takes): sample_batches(gen, 3, **asked)


COMMON = ['classes', 'width', 'depth', 'heads', 'ratio', 'dropout', 'label_dropout']

@pytest.mark.parametrize('name,fields', [
    ('ar', ['n', 'codebook_size', *COMMON, 'levels', 'order', 'modulated', 'qk_norm', 'target_aware']),
    ('masked', ['n', 'codebook_size', *COMMON, 'levels', 'schedule', 'masks', 'grid', 'near',
                'label_smoothing']),
    ('flow', ['n', 'dim', *COMMON, 'grid', 'mean', 'std', 'path', 'predict', 'times'])])
def test_saved_configurations_keep_their_order(name, fields):
    gen = generator(name)
    assert list(asdict(gen.cfg)) == fields and gen.kind == name and isinstance(gen.cfg, gen.Cfg)


@dataclass(frozen=True)
class HistogramCfg(GeneratorCfg, IdsCfg):
    "A table of scores needs no more"

class Histogram(LatentGenerator):
    "A kind of another package: how often each code occurs in images of a class"
    kind = 'histogram'
    Cfg = HistogramCfg
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.shape = (cfg.n,)
        self.classes = cfg.classes
        self.label_dropout = cfg.label_dropout
        self.codebook_size = cfg.codebook_size
        self.scores = torch.nn.Embedding(cfg.classes, cfg.codebook_size)
    @classmethod
    def sizes(cls, spec): return ids_sizes(cls.kind, spec)
    def losses(self, latents, labels, rng=None, done=1.):
        return dict(loss=-self.scores(labels).log_softmax(-1).gather(1, latents.long()).mean())
    def sample(self, labels, sampling=None, *, keep=None, rng=None, callback=None, **how):
        sampling = check_sampling(self, labels, sampling, keep, **how)
        seeds = row_seeds(rng, len(labels))
        logits = self.scores(labels).detach()[:,None].expand(-1, *self.shape, -1)
        known = torch.zeros(len(labels), *self.shape, dtype=torch.bool)
        if keep is not None: known = row_noise(seeds, self.shape, 'keep') < keep[1]
        ids = sample_categorical(logits, row_noise(seeds, self.shape, 'draw'), **sampling.of_codes)
        if keep is not None: ids = torch.where(known, keep[0], ids)
        if callback: callback(dict(i=0, steps=1, latents=ids, known=known | True, new=~known, logits=logits))
        return ids


class Offered:
    "An entry point of another package"
    name = 'histogram'
    value = 'elsewhere:Histogram'
    def load(self): return Histogram


@pytest.mark.parametrize('offered', [False, True], ids=['registered', 'entry point'])
def test_a_kind_of_another_package(offered, monkeypatch, tmp_path):
    "One registration, and it is made, trained, saved, read back, sampled and looked into"
    monkeypatch.setattr(GENERATORS, '_things', dict(GENERATORS._things))
    monkeypatch.setattr(GENERATORS, '_looked', not offered)
    if offered: monkeypatch.setattr('tokkit.core.registry.entry_points', lambda group: [Offered()])
    else: GENERATORS.register('histogram', Histogram)
    assert list(GENERATORS)[:4] == ['ar', 'rar', 'masked', 'flow'] and list(GENERATORS)[-1] == 'histogram'
    tok = make_tokenizer('tiny-16', width=16, depth=1, heads=2)
    gen = make_generator('histogram', tok.spec, 3)
    ids = torch.full((32, *gen.shape), 7)
    labels = torch.arange(32)%3
    train_generator(gen, TensorPairs(ids, labels), GeneratorTraining(epochs=40, batch=16, lr=.3),
                    device='cpu')
    gen = load_generator(save_generator(gen, tmp_path/'g'))
    drawn, _ = sample_batches(gen, 12, temperature=.1, seed=1)
    assert (drawn == 7).float().mean() > .9
    with pytest.raises(TypeError, match="Histogram takes no 'steps'"): sample_batches(gen, 3, steps=4)
    taught = error_profile(gen, tok, (ids, labels), sigma=.25)
    free = error_profile(gen, tok, (ids, labels), 'free', .25, temperature=.5)
    assert taught.mean('p')[0] > .5 and free.mean('p')[0] > taught.mean('p')[0]
    assert taught.settings['temperature'] == 1. and 'steps' not in taught.settings


def test_a_kind_needs_a_name():
    class Nameless(Histogram): kind = LatentGenerator.kind
    with pytest.raises(TypeError, match='kind'): Nameless(HistogramCfg())

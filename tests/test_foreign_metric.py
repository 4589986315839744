"A metric and a generator of another package: one registration each, then `tokkit metric` and `tokkit run`"
import json, os, subprocess, sys
from pathlib import Path

import pytest
import torch

from tokkit.cli import metric
from tokkit.data import fashion_mnist
from tokkit.metrics import (FEATURE_METRICS, IMAGE_METRICS, METRICS, Card, Evaluator, Row, evaluate_generator,
                            evaluate_tokenizer, feature_metric, generator_metrics, tokenizer_metrics)
from tokkit.tokenizers import make_tokenizer

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = Path(__file__).parent/'notebooks'/'generator.ipynb'
PACKAGE = '''
import torch
from dataclasses import dataclass
from tokkit.generators import GeneratorCfg, IdsCfg, LatentGenerator, check_sampling, ids_sizes
from tokkit.metrics import Card, Evaluator

def roughness(tok, images, evaluator=None, **settings):
    "How much neighbouring pixels of reconstructions differ"
    evaluator = Evaluator.of(evaluator, **settings)
    images = evaluator.draw(images)
    with torch.no_grad(): x = tok.reconstruct(images[:][0])
    value = (x[..., 1:]-x[..., :-1]).abs().mean().item()
    return Card('roughness', value, se=None, n=len(images), extractor='', reference=images.name,
                seed=evaluator.seed)

@dataclass(frozen=True)
class AlwaysCfg(GeneratorCfg, IdsCfg): pass

class Always(LatentGenerator):
    "The class itself, as every token"
    kind = 'always'
    Cfg = AlwaysCfg
    sampling_fields = ()
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.shape = (cfg.n,)
        self.classes = cfg.classes
        self.label_dropout = cfg.label_dropout
        self.codebook_size = cfg.codebook_size
        self.weight = torch.nn.Parameter(torch.zeros(()))
    @classmethod
    def sizes(cls, spec): return ids_sizes(cls.kind, spec)
    def losses(self, latents, labels, rng=None, done=1.): return dict(loss=self.weight**2)
    def sample(self, labels, sampling=None, *, keep=None, rng=None, callback=None, **how):
        check_sampling(self, labels, sampling, keep, **how)
        return labels[:, None].expand(-1, *self.shape).clone()
'''


@pytest.fixture(scope='module')
def package(tmp_path_factory):
    "Environment in which a package offers the metric `roughness` and the generator `always`"
    folder = tmp_path_factory.mktemp('package')
    (folder/'elsewhere.py').write_text(PACKAGE)
    about = folder/'elsewhere-0.dist-info'
    about.mkdir()
    (about/'METADATA').write_text('Metadata-Version: 2.1\nName: elsewhere\nVersion: 0\n')
    (about/'entry_points.txt').write_text('[tokkit.metrics]\nroughness = elsewhere:roughness\n'
                                          '[tokkit.generators]\nalways = elsewhere:Always\n')
    return os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), str(folder)]))

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    return make_tokenizer('tiny', width=16, depth=1).eval().save(tmp_path_factory.mktemp('tok')/'tiny')

def tokkit(env, *words):
    command = 'import sys; from tokkit.cli import main; sys.exit(main())'
    return subprocess.run([sys.executable, '-c', command, *map(str, words)], capture_output=True, text=True,
                          timeout=300, env=env)

@pytest.fixture
def without_traces(monkeypatch):
    "What a test registers is gone after it"
    for registry in (METRICS, FEATURE_METRICS, IMAGE_METRICS):
        monkeypatch.setattr(registry, '_things', dict(registry._things))


# --- by a package

def test_metric_of_a_package(package, saved, tmp_path):
    done = tokkit(package, 'metric', 'roughness', '--tokenizer', saved, '-n', 20, '--seed', 3, '--json',
                  tmp_path/'card.json')
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path/'card.json').read_text())
    assert card['metric'] == 'roughness' and card['n'] == 20 and card['seed'] == 3 and card['value'] > 0
    assert done.stdout.startswith('roughness ')
    without = tokkit(dict(package, PYTHONPATH=str(ROOT)), 'metric', 'roughness', '--tokenizer', saved)
    assert without.returncode == 2 and "invalid choice: 'roughness'" in without.stderr

def test_whole_table_with_the_metric_of_a_package(package, saved):
    done = tokkit(package, 'metric', 'all', '--tokenizer', saved, '-n', 12, '--bootstrap', 0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith('roughness ')

def test_generator_of_a_package(package, tmp_path):
    done = tokkit(package, 'run', NOTEBOOK, '-p', 'generator', 'always', '--out', tmp_path/'runs')
    assert done.returncode == 0, done.stderr
    found, = (tmp_path/'runs').rglob('metrics.json')
    row, = json.loads(found.read_text())['rows']
    assert row['generator'] == 'Always' and row['value'] == 1.


# --- by a registration

def test_metrics_registered_here(without_traces):
    @METRICS.register('size')
    def size(tok, images, evaluator=None, **settings):
        evaluator = Evaluator.of(evaluator, **settings)
        return Card('size', float(len(evaluator.draw(images))), se=None, n=len(images), extractor='',
                    reference=images.name)
    @feature_metric('norm', 'spread')
    def norm(of):
        return [Row('norm', of.features.norm(dim=1).mean().item(), None, {}),
                Row('spread', of.features.std().item(), None, dict(error='none'))]
    IMAGE_METRICS.register('gap', lambda xh, x: (xh-x).abs().mean((1, 2, 3)))
    assert generator_metrics()[-2:] == ['norm', 'spread'] and tokenizer_metrics()[-1] == 'size'
    images = fashion_mnist('test', n=30)
    tok = make_tokenizer('tiny', width=16, depth=1).eval()
    wanted = ('size', 'spread', 'norm', 'gap')
    cards = evaluate_tokenizer(tok, images, metrics=wanted, n=20, bootstrap=3, device='cpu')
    assert [c.metric for c in cards] == ['norm', 'spread', 'gap', 'size']
    assert cards[3].value == 20 and cards[2].se > 0 and cards[1].settings['error'] == 'none'
    real = fashion_mnist('train', n=30)
    cards = evaluate_generator(images, real, metrics='spread', bootstrap=0)
    assert [c.metric for c in cards] == ['spread'] and cards[0].extractor

def test_names_are_taken():
    with pytest.raises(ValueError, match="there is a metric 'rfid' already"):
        METRICS.register('rfid', torch.sum)

def test_unknown_metric(saved):
    with pytest.raises(ValueError, match="metric must be one of rfid, pfid, ifid.*, got 'fid'"):
        metric('fid', tokenizer=str(saved))

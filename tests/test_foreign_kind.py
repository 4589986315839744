"Kinds of perturbation from outside: registered by a test, offered by a package, written in a cell"
import json, os, subprocess, sys
from pathlib import Path

import pytest
import torch

from tokkit.core import make_rng
from tokkit.perturbation import (PERTURBATIONS, CodeKind, DropKind, LatentPerturbation, NoiseKind, Preset,
                                 perturb_codes, perturb_latents, perturbation)
from tokkit.quantizers import Quantized, make_quantizer

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = Path(__file__).parent/'notebooks'/'kind.ipynb'
PACKAGE = """
from tokkit.perturbation import CodeKind

class Opposite(CodeKind):
    "The code at the other end of the list"
    meaning = 'a token becomes the code at the other end of the list'
    source = 'a test'
    settings = dict(beta=1.)
    def redraw(self, tokens): return tokens.level.size-1-tokens.ids
"""


@pytest.fixture
def register():
    "Adds kinds that are gone after the test"
    names = []
    def add(name, thing):
        PERTURBATIONS.register(name, thing)
        names.append(name)
    yield add
    for name in names: del PERTURBATIONS._things[name]

@pytest.fixture
def package(tmp_path):
    "Environment in which a package offers the kind `opposite`, and a broken one offers `odd`"
    for name, kind, text in (('my_kinds', 'opposite = my_kinds:Opposite', PACKAGE),
                             ('broken', 'odd = broken:Odd', 'import no_such_module')):
        (tmp_path/f'{name}.py').write_text(text)
        about = tmp_path/f'{name}-0.dist-info'
        about.mkdir()
        (about/'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 0\n')
        (about/'entry_points.txt').write_text(f'[tokkit.perturbations]\n{kind}\n')
    return os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]))

def quantized(name='vq'):
    torch.manual_seed(0)
    quantizer = make_quantizer(name, 16, 4, **(dict(levels=2) if name == 'rq' else {}))
    z = torch.randn(6, 9, 4, generator=make_rng(0))
    return quantizer, z, quantizer(z)


# --- registered here

class Opposite(CodeKind):
    meaning = 'a token becomes the code at the other end of the list'
    settings = dict(beta=1.)
    def redraw(self, tokens): return tokens.level.size-1-tokens.ids

@pytest.mark.parametrize('name', ['vq', 'rq'])
def test_codes(register, name):
    register('opposite', Opposite)
    quantizer,z,q = quantized(name)
    damage = perturbation('opposite', alpha=1.)
    assert damage == LatentPerturbation(1., 1., kind='opposite') and not damage.needs_gradient
    p = damage(z, q, quantizer, rng=make_rng(1))
    assert torch.equal(p.ids, 15-q.ids) and p.rate == 1
    assert torch.allclose(p.zq, quantizer.codes(p.ids), atol=1e-6)
    assert torch.equal(perturb_codes(q.ids, quantizer, 1., 1, kind='opposite'), p.ids)
    half = perturb_codes(q.ids, quantizer, 1., 1, .5, kind='opposite', rng=make_rng(1))
    assert (half != q.ids).flatten(1).any(1).sum() == 3
    assert damage.why_not(quantizer) is None
    assert "'opposite' redraws codes, and continuous latents have none" in damage.why_not(None)
    with damage.attach(quantizer) as handle: quantizer(z)
    assert handle.rate == 1

def test_codes_by_gradient_and_neighbours(register):
    class Best(CodeKind):
        "The neighbour that lowers the loss most"
        needs_gradient = by_neighbours = needs_vectors = True
        def redraw(self, tokens):
            near = tokens.neighbours()
            gain = (tokens.gradient[:,None]*tokens.level.vectors[near]).sum(-1)
            return near.gather(1, gain.argmin(1, keepdim=True))[:,0]
    register('best', Best)
    quantizer,z,q = quantized()
    g = torch.randn(z.shape, generator=make_rng(2))
    best = perturb_codes(q.ids, quantizer, 1., 5, kind='best', gradient=g)
    worst = perturb_codes(q.ids, quantizer, 1., 5, kind='adversarial', gradient=g)
    def gain(ids): return ((quantizer.codebook[ids]-quantizer.codebook[q.ids])*g).sum(-1)
    assert (gain(best) <= 0).all() and (gain(worst) >= 0).all()
    assert LatentPerturbation(kind='best').needs_gradient
    with pytest.raises(ValueError, match="kind='best' follows the loss: pass its gradient by zq"):
        perturb_codes(q.ids, quantizer, 1., 5, kind='best')
    with pytest.raises(ValueError, match='delta must be a whole number in 1..16'):
        perturb_codes(q.ids, quantizer, 1., 17, kind='best', gradient=g)

def test_latents(register):
    class Shrink(NoiseKind):
        "Latents that become smaller"
        most = 1
        def mix(self, z, strength, noise): return (1-strength)*z
    register('shrink', Shrink)
    quantizer,z,q = quantized('none')
    assert torch.allclose(perturb_latents(z, .25, 'shrink'), .75*z)
    damage = LatentPerturbation(beta=1., kind='shrink', strength=.25)
    p = damage(z, Quantized(z, None, torch.zeros(()), torch.zeros(())), None, rng=make_rng(0))
    assert damage.why_not(None) is None and torch.allclose(p.zq, .75*z) and p.rate == 1
    with pytest.raises(ValueError, match=r'strength must be in \[0, 1\]'):
        LatentPerturbation(kind='shrink', strength=2.)
    assert 'shrink' in LatentPerturbation(kind='nearest').why_not(None)

def test_replaced_tokens(register):
    class Ones(DropKind):
        def value(self, codes): return 1.
    register('ones', Ones)
    quantizer,z,q = quantized()
    p = LatentPerturbation(1/3, 1., kind='ones')(z, q, quantizer, rng=make_rng(0))
    gone = p.ids == -1
    assert gone.sum(1).eq(3).all() and torch.allclose(p.zq[gone], torch.ones(()))

def test_presets(register):
    register('few', Preset('uniform', 'any code, to few tokens', 'a test', dict(alpha=.1)))
    assert perturbation('few', beta=1.) == LatentPerturbation(.1, 1., kind='uniform')
    with pytest.raises(ValueError, match="kind must be one of nearest, .*, got 'few'"):
        LatentPerturbation(kind='few')


# --- what is wrong with it is said in one line

def test_mistakes(register):
    class Lazy(CodeKind): pass
    class Short(CodeKind):
        def redraw(self, tokens): return tokens.ids[:1]
    register('lazy', Lazy)
    register('short', Short)
    quantizer,z,q = quantized()
    with pytest.raises(NotImplementedError, match='Lazy must say in redraw'):
        perturb_codes(q.ids, quantizer, 1., 1, kind='lazy')
    with pytest.raises(ValueError, match='Short.redraw must give one code for each of 54 tokens, got .1,.'):
        perturb_codes(q.ids, quantizer, 1., 1, kind='short')
    with pytest.raises(ValueError, match="there is a perturbation 'nearest' already"):
        PERTURBATIONS.register('nearest', Lazy)
    with pytest.raises(ValueError, match="kind must be one of nearest, .*lazy, short, got 'busy'"):
        perturb_codes(q.ids, quantizer, 1., 1, kind='busy')


# --- offered by a package

def test_package(package):
    code = """
import torch, warnings
from tokkit.perturbation import LatentPerturbation, PERTURBATIONS, perturb_codes, perturbation
ids = torch.arange(12).view(2, 6)
assert torch.equal(perturb_codes(ids, torch.randn(12, 3), 1., 1, kind='opposite'), 11-ids)
assert LatentPerturbation(kind='opposite').kind == perturbation('opposite').kind
assert perturbation('opposite').beta == 1 and 'odd' not in PERTURBATIONS
print(*PERTURBATIONS)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=package)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == 'opposite'
    assert 'odd of broken:Odd cannot be used: ModuleNotFoundError' in done.stderr

def run(env, out, kind, notebook=NOTEBOOK, **params):
    "`tokkit run` of a notebook with this kind, and its rows"
    command = 'import sys; from tokkit.cli import main; sys.exit(main())'
    words = [word for name, value in params.items() for word in ('-p', name, str(value))]
    done = subprocess.run([sys.executable, '-c', command, 'run', str(notebook), '-p', 'kind', kind, *words,
                           '--out', str(out)], capture_output=True, text=True, timeout=300, env=env)
    found = list(out.rglob('metrics.json'))
    return done, json.loads(found[0].read_text())['rows'] if found else None

@pytest.mark.parametrize('kind,told', [('opposite', 'opposite'), ('cell', 'zero')])
def test_notebook(package, tmp_path, kind, told):
    done,metrics = run(package, tmp_path/'runs', kind)
    assert done.returncode == 0, done.stderr
    row, = metrics
    assert row[told] is True and row['value'] > .5

def test_experiment(package, tmp_path):
    "e09 trains under a foreign kind as under ours"
    done,metrics = run(package, tmp_path/'runs', 'opposite', ROOT/'nbs/experiments/e09_every_quantizer.ipynb',
                       images=64, epochs=1, n=16)
    assert done.returncode == 0, done.stderr
    plain,ours = metrics
    assert (plain['perturbation'], ours['perturbation']) == ('no perturbation', 'opposite')
    assert ours['replaced'] > 0

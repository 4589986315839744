"""Files that somebody wrote, or a disk changed: whatever is in them, they are read as they were meant or
refused in one line

Shapes of JSON and YAML are generated; artifacts of every kind get bits flipped at random places, drawn by
`$TOKKIT_FAULT_SEED`.
"""
import json, os, random, shutil, warnings
from pathlib import Path

import nbformat, pytest, yaml
from conftest_faults import TINY
from hypothesis import HealthCheck, given, settings, strategies as st

from tokkit.core import read_json, write_json
from tokkit.tokenizers import Tokenizer

SEED = int(os.environ.get('TOKKIT_FAULT_SEED', '0'))
few = settings(max_examples=25, deadline=None,
               suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

words = st.sampled_from(['cfg', 'spec', 'weights', 'kind', 'rows', 'cards', 'params', 'sha256', 'key', 'n',
                         'part', 'grid', 'notebook', 'cells', 'source', 'metadata', 'tags', '', 'a'])
plain = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=5),
                     lambda inner: st.lists(inner, max_size=3)
                     | st.dictionaries(words | st.text(max_size=3), inner, max_size=4), max_leaves=12)

def refused(call, *more):
    "`call` succeeds, or raises one line of an error that the command line expects"
    try: call()
    except (ValueError, OSError, *more) as e: assert '\n' not in str(e), e

def places(o, at=()):
    "Where values stand in nested plain data"
    yield at
    for k,v in (o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, list) else ()):
        yield from places(v, (*at, k))

def mutated(draw, o):
    "The same data with one value replaced, removed, or put in twice"
    o = json.loads(json.dumps(o))
    *path, last = draw(st.sampled_from([p for p in places(o) if p] or [('a',)]))
    inner = o
    for k in path: inner = inner[k]
    if draw(st.booleans()): inner[last] = draw(plain)
    elif isinstance(inner, dict): inner.pop(last)
    else: inner.insert(last, draw(plain))
    return o


# a value of another type in each kind of file
@pytest.fixture(scope='module')
def made(own, tmp_path_factory) -> dict[str,tuple]:
    "Of each kind of file of tokkit one, and what reads it"
    from tokkit.data import ImageFolder, fashion_mnist, to_uint8
    from tokkit.metrics import Card, rfid
    from tokkit.generators import load_generator
    from tokkit.posttraining import open_pairs, write_pairs
    from tokkit.runs import Run, collect, run_experiment
    from tokkit.data import TokenCache
    home = tmp_path_factory.mktemp('made')
    tok = shutil.copytree(own/'tokenizer', home/'tokenizer')
    images = ImageFolder(own/'images', 28).load(8)
    gen = shutil.copytree(own/'generator', home/'generator')
    write_pairs(home/'pairs', load_generator(gen), Tokenizer.load(tok), images, part=4)
    run = run_experiment(TINY, {}, home/'runs')
    cache = TokenCache.build(home/'cache', fashion_mnist('test', 8),
                             lambda x: to_uint8(x).flatten(1)[:,::49].long()).folder
    write_json(home/'cards.json', [rfid(Tokenizer.load(tok), images, bootstrap=0).to_dict()])
    def cards(): return [Card.from_dict(d) for d in read_json(home/'cards.json', list[dict])]
    return {'tokenizer': (tok/'config.json', lambda: Tokenizer.load(tok)),
            'generator': (gen/'config.json', lambda: load_generator(gen)),
            'pairs': (home/'pairs'/'pairs.json', lambda: open_pairs(home/'pairs', images)),
            'cards': (home/'cards.json', cards),
            'metrics': (run/'metrics.json', lambda: (Run(run, 'tiny').frame(), Run(run, 'tiny').cards)),
            'params': (run/'params.json', lambda: Run(run, 'tiny').params),
            'table': (run/'metrics.json', lambda: collect(home/'runs')),
            'seal': (run/'.tokkit', lambda: collect(home/'runs')),
            'cache': (cache/'cache.json', lambda: TokenCache.open(cache, verify=False)),
            'sealed cache': (cache/'cache.json', lambda: TokenCache.open(cache))}

KINDS = ['tokenizer', 'generator', 'pairs', 'cards', 'metrics', 'params', 'table', 'seal', 'cache',
         'sealed cache']

def read_instead(made, kind, content):
    "Read a file of a kind with other content, which is made from its own, and put its own back"
    path, read = made[kind]
    before = path.read_bytes()
    try:
        path.write_bytes(content(before))
        refused(read)
    finally: path.write_bytes(before)

@pytest.mark.parametrize('kind', KINDS)
@few
@given(data=st.data())
def test_any_json(made, kind, data):
    read_instead(made, kind, lambda before: json.dumps(data.draw(plain)).encode())

@pytest.mark.parametrize('kind', KINDS)
@few
@given(data=st.data())
def test_one_value_changed(made, kind, data):
    read_instead(made, kind, lambda before: json.dumps(mutated(data.draw, json.loads(before))).encode())

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('text',
                         [b'', b'\0', b'{', b'[]', b'null', b'5', b'"x"', b'\xff\xfe', b'{"a": 1e999}',
                          b'{"a": NaN}', b'['*100_000, b'{"a":'*50_000, b'9'*5000], ids=range(13))
def test_no_json(made, kind, text):
    read_instead(made, kind, lambda before: text)


# sweeps and notebooks
@few
@given(spec=plain)
def test_any_sweep(tmp_path, tokkit, spec):
    (tmp_path/'s.yaml').write_text(yaml.safe_dump(spec))
    code, _, err = tokkit('sweep', tmp_path/'s.yaml', '--out', tmp_path/'runs')
    assert code == 2 and err.startswith('tokkit: ') and 'Traceback' not in err, err

@few
@given(data=st.data())
def test_a_sweep_with_one_value_changed(tmp_path, data):
    from tokkit.cli import read_sweep
    from tokkit.runs import grid_runs
    good = dict(notebook=str(TINY), grid=[dict(seed=[1,2], alpha=.5), dict(seed=3)], params=dict(mode='ok'),
                workers=2, devices=['cpu'], threads=1, minutes=1.)
    (tmp_path/'s.yaml').write_text(yaml.safe_dump(mutated(data.draw, good)))
    def read():
        spec = read_sweep(tmp_path/'s.yaml')
        if spec['grid']: grid_runs(spec['notebook'], spec['grid'], spec.get('params'))
    refused(read)

@pytest.mark.parametrize('text, says', [
    ('a: &a ['+'x,'*99+']\nb: &b ['+'*a,'*99+']\nc: &c ['+'*b,'*99+']\nnotebook: x\ngrid: {a: *c}',
     'unfold to more than'),
    ('notebook: x\nnotebook: y\ngrid: {}', 'the key notebook twice'),
    ('notebook: x\ngrid: {a: [1], a: [2]}', 'the key a twice'),
    ('notebook: x\ngrid: 5', 'Expected object | array, got int'),
    ('notebook: x\ngrid: {1: [2]}', 'Expected str'),
    ('notebook: x\ngrid: [5]', 'Expected object, got int'),
    ('notebook: x\ngrid: {a: 1}\nworkers: two', 'got str'),
    ('notebook: 5\ngrid: {a: 1}', 'got int'),
    ('notebook: x\ngrid: {a: 1}\nparams: [1]', 'got array'),
    ('notebook: x\ngrid: {a: 1}\nminutes: soon', 'got str'),
    ('!!python/object/apply:os.system [ls]', 'not valid YAML'),
    ('['*5000, 'not valid YAML'),
    ('notebook: x\ngrid: {a: '+'['*500+']'*500+'}', 'YAML'),
    ('- a', 'must have notebook and grid'),
    ('', 'must have notebook and grid'),
    ('a: b: c', 'not valid YAML'),
    ('\0', 'not valid YAML'),
], ids=range(17))
def test_sweeps_that_are_none(tmp_path, tokkit, text, says):
    (tmp_path/'s.yaml').write_text(text)
    code, _, err = tokkit('sweep', tmp_path/'s.yaml', '--out', tmp_path/'runs')
    assert code == 2 and says in err and err.count('\n') == 1, err

def test_a_sweep_without_end(tmp_path, tokkit):
    (tmp_path/'s.yaml').write_text(yaml.safe_dump(dict(notebook=str(TINY),
                                                       grid={k: list(range(100))
                                                             for k in ('seed', 'alpha', 'name', 'mode')})))
    code, _, err = tokkit('sweep', tmp_path/'s.yaml')
    assert code == 2 and '100,000,000 points' in err
    (tmp_path/'s.yaml').write_text('#'*2**21)
    assert 'larger than a megabyte' in tokkit('sweep', tmp_path/'s.yaml')[2]

@few
@given(data=st.data())
def test_a_notebook_with_one_value_changed(tmp_path, data):
    from tokkit.runs import notebook_params, run_id
    (tmp_path/'x.ipynb').write_text(json.dumps(mutated(data.draw, json.loads(TINY.read_text()))))
    refused(lambda: (notebook_params(tmp_path/'x.ipynb'), run_id(tmp_path/'x.ipynb')))

@pytest.mark.parametrize('source',
                         ['alpha = (', 'alpha = {[1]: 2}', 'alpha = f()', 'alpha = '+'-'*10_000+'1',
                          'alpha = '+'('*500+'1'+')'*500, 'alpha = 1\0', 'alpha =', 'def f(:',
                          'alpha = [1]*10**9', 'x'*100_000+' = y'], ids=range(10))
def test_a_parameters_cell_that_is_none(tmp_path, tokkit, source):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source,
                                                                   metadata=dict(tags=['parameters']))])
    nbformat.write(nb, tmp_path/'x.ipynb')
    code, _, err = tokkit('run', tmp_path/'x.ipynb', '--out', tmp_path/'runs')
    assert code == 2 and err.count('\n') == 1 and 'x.ipynb' in err, err

@few
@given(text=st.text(max_size=12), kind=st.sampled_from(['seed', 'alpha', 'deltas', 'name']))
def test_any_value_of_a_parameter(text, kind):
    from tokkit.runs import fit_params
    refused(lambda: fit_params(TINY, {kind: text}))


# bits flipped in artifacts of every kind: found, or of no consequence
@pytest.fixture(scope='module')
def demo_root(tmp_path_factory):
    "All stages of a very small demo, and what they say"
    from tokkit.demo import Demo, demo_cfg, stages
    root = tmp_path_factory.mktemp('flips')
    def values():
        d = Demo(demo_cfg('smoke', train_images=128, n=64, n_pfid=64, pairs=64, bootstrap=2, width=32,
                          depth=1, base_epochs=0), root, 'cpu')
        wanted = [f for name,f in stages(d).items() if 'perturbed' not in name and 'decoder' not in name
                  and 'cards' not in name]
        return ([f() for f in wanted] and d.pairs('plain') and len(d.redrawn('plain'))
                and [c.to_dict() for c in d.cards('plain', 'before')])
    return root, values, values()

def flip_one(rng:random.Random, root:Path) -> tuple[Path,bytes]:
    """Flip one random bit of one random file below `root`, each kind of artifact equally likely;
    the file, and what was in it"""
    kind = rng.choice(sorted(p for p in root.iterdir() if p.is_dir()))
    path = rng.choice(sorted(p for p in kind.rglob('*') if p.is_file() and '.damaged' not in str(p)))
    before = path.read_bytes()
    bits = bytearray(before)
    bits[rng.randrange(len(bits))] ^= 1 << rng.randrange(8)
    path.write_bytes(bits)
    return path, before

@pytest.mark.slow
def test_flipped_bits_change_no_number(demo_root):
    root, values, before = demo_root
    rng = random.Random(SEED)
    for i in range(8):
        path, content = flip_one(rng, root)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            now = values()
        said = [str(w.message) for w in told if 'is damaged' in str(w.message)]
        assert now == before, f'seed {SEED}, flip {i}: {path.relative_to(root)} changed a number'
        assert said, f'seed {SEED}, flip {i}: nobody noticed the bit in {path.relative_to(root)}'

"Runs are whole or absent: wrong parameters, failures, kills, full disks, two at once"
import json, os, resource, signal, subprocess, sys
from pathlib import Path

import pytest

import torch

from tokkit.core import folders
from waiting import wait_for
from tokkit.core import read_json
from tokkit.runs import sweep_experiment
from tokkit.core import InUse
from tokkit.runs import find_notebook, fit_params, notebook_params, run_id
from tokkit.runs import RunError, artifact, collect, run_experiment

TINY = Path(__file__).parent/'notebooks'/'tiny.ipynb'


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv('TOKKIT_QUIET', '1')
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.delenv('TOKKIT_RUN_DIR', raising=False)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)

@pytest.fixture
def two_gpus(monkeypatch):
    "A machine that says it has two; what runs on it asks for none"
    from tokkit.runs import execute as runs
    environment = runs._environment
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(runs, '_environment', lambda *args: environment(*args) | dict(TOKKIT_DEVICE='cpu'))

def python(code:str, *args) -> subprocess.Popen:
    "Another process that executes `code`"
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)

def alive(pid:int) -> bool:
    "The process exists and is no zombie"
    try:
        return (Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
                if sys.platform == 'linux' else not os.kill(pid, 0))
    except (OSError, ProcessLookupError): return False

RUN = ("import sys, json; from tokkit.runs import run_experiment; print(run_experiment(sys.argv[1], "
       "json.loads(sys.argv[3]), sys.argv[2]))")


# parameters
def test_help_survives_an_equals_sign():
    assert notebook_params(TINY)['alpha'] == (.5, 'fraction of tokens replaced; alpha=0 is the identity')

@pytest.mark.parametrize('given, value',
                         [('alpha:1', 1.), ('seed:3', 3), ('deltas:4,8', [4,8]), ('deltas:[4]', [4]),
                          ('deltas:4', [4]), ('name:7', '7'), ('alpha:1e-3', .001)])
def test_words_become_values(given, value):
    name, text = given.split(':')
    assert (fit_params(TINY, {name:text})[name] == value
            and type(fit_params(TINY, {name:text})[name]) is type(value))

@pytest.mark.parametrize('params',
                         [dict(seed=1.5), dict(seed='one'), dict(seed=True), dict(alpha=None),
                          dict(deltas='a,b'), dict(name=3), dict(alpha=[1.])])
def test_wrong_types_are_refused(params):
    with pytest.raises(ValueError, match='must be') as e: fit_params(TINY, params)
    assert next(iter(params)) in str(e.value) and '\n' not in str(e.value)

def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r'tiny has no parameter sed; it has: alpha=0.5 \(fraction') as e:
        run_experiment(TINY, dict(sed=1), tmp_path)
    assert '\n' not in str(e.value) and not list(tmp_path.iterdir())

def test_unknown_notebook_lists_the_known_ones():
    with pytest.raises(FileNotFoundError, match='e02_dose_response'): find_notebook('e99')

def test_run_id_depends_on_source_and_parameters_alone(tmp_path, monkeypatch):
    before = run_id(TINY, dict(seed=2))
    monkeypatch.setenv('OMP_NUM_THREADS', '7')
    monkeypatch.chdir(tmp_path)
    assert run_id(TINY, dict(seed='2', alpha=.5)) == before
    nb = json.loads(TINY.read_text())
    nb['metadata']['x'] = 1
    nb['cells'][2]['outputs'] = [dict(output_type='stream', name='stdout', text='x')]
    (tmp_path/'tiny.ipynb').write_text(json.dumps(nb))
    assert run_id(tmp_path/'tiny.ipynb', dict(seed=2)) == before
    nb['cells'][2]['source'] = 'x = 1'
    (tmp_path/'tiny.ipynb').write_text(json.dumps(nb))
    assert run_id(tmp_path/'tiny.ipynb', dict(seed=2)) != before

def test_damaged_notebook(tmp_path):
    (tmp_path/'torn.ipynb').write_text(TINY.read_text()[:300])
    with pytest.raises(ValueError, match='not valid JSON'):
        run_experiment(tmp_path/'torn.ipynb', root=tmp_path/'runs')


# one run
def test_a_run_is_whole_and_reused(tmp_path, two_gpus):
    folder = run_experiment(TINY, dict(seed=2), tmp_path, device='1', threads=3)
    assert (sorted(p.name for p in folder.iterdir()) == ['.tokkit', 'figures', 'metrics.json',
                                                         'notebook.ipynb', 'params.json', 'timing.json'])
    row = read_json(folder/'metrics.json')['rows'][0]
    about = read_json(folder/'params.json')
    assert (row['value'], row['gpu'], row['threads']) == (1., '1', '3')
    assert (about['params']['alpha'] == .5 and about['device'] == 'cuda:1' and about['seed'] == 2
            and about['threads'] == 3 and about['run_id'] == folder.name)
    stamp = (folder/'metrics.json').stat().st_mtime_ns
    assert (run_experiment(TINY, dict(seed=2), tmp_path) == folder
            and (folder/'metrics.json').stat().st_mtime_ns == stamp)
    assert not [p for p in folder.parent.iterdir() if p.name.startswith('.')]
    (folder/'metrics.json').unlink()  # somebody deleted the proof
    with pytest.warns(UserWarning, match='is damaged: metrics.json is missing; it is made again'):
        assert (run_experiment(TINY, dict(seed=2), tmp_path, 'cpu') == folder
                and (folder/'metrics.json').exists())

@pytest.mark.parametrize('mode, says',
                         [('fail', r'ValueError: delta must be in \[1, 64\], got 99 \(see'),
                          ('forget', 'it wrote no metrics.json'), ('die', 'failed: ')])
def test_a_failed_run_is_no_run(tmp_path, mode, says):
    with pytest.raises(RunError, match=says) as e: run_experiment(TINY, dict(mode=mode), tmp_path)
    assert '\n' not in str(e.value)
    left = [p.name for p in (tmp_path/'tiny').iterdir()]
    assert (len(left) == 1 and left[0].endswith('.failed')
            and (tmp_path/'tiny'/left[0]/'notebook.ipynb').exists())
    assert collect(tmp_path).empty and 'failed' in collect(tmp_path).attrs['skipped'][0]

def test_two_at_once_then_kill(tmp_path):
    """The second gets one line; kill -9 of the first takes its kernel with it and frees the lock;
    the run can then be made"""
    gate = tmp_path/'gate'
    params = dict(mode='wait', gate=str(tmp_path/'gate'))
    first = python(RUN, TINY, tmp_path/'runs', json.dumps(params))
    pids = [int(p)
            for p in wait_for(lambda: gate.with_suffix('.pids').exists()
                              and gate.with_suffix('.pids').read_text()).split()]
    with pytest.raises(InUse, match=f'is being made by process {first.pid}') as e:
        run_experiment(TINY, params, tmp_path/'runs')
    assert '\n' not in str(e.value)
    first.kill()
    first.wait()
    wait_for(lambda: not any(map(alive, pids)), 10)
    assert 'not finished' in collect(tmp_path/'runs').attrs['skipped'][0]
    gate.with_suffix('.open').write_text('')
    folder = run_experiment(TINY, params, tmp_path/'runs')
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert not collect(tmp_path/'runs').attrs['skipped']


# folders that cannot be written
@pytest.mark.parametrize('what', ['run', 'artifact'])
def test_a_file_in_the_way(tmp_path, what):
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='cannot write below .*choose another folder') as e:
        if what == 'run': run_experiment(TINY, {}, tmp_path/'file'/'runs')
        else: artifact('tokenizer', {}, lambda tmp: None, tmp_path/'file')
    assert '\n' not in str(e.value)

def test_a_file_too_large_for_the_disk(tmp_path):
    "The operating system itself refuses to write on, in the middle of a file"
    def make(tmp): (tmp/'model').write_bytes(b'0'*100_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match='cannot write below'): artifact('tokenizer', {}, make, tmp_path)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path/'tokenizer').iterdir())
    assert (artifact('tokenizer', {}, make, tmp_path)/'model').stat().st_size == 100_000

def test_full_disk(tmp_path, monkeypatch):
    def full(path): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(folders, 'flush', full)
    with pytest.raises(OSError, match='No space left on device; make room'):
        artifact('tokenizer', {}, lambda tmp: (tmp/'x').write_text('x'), tmp_path)
    assert not list((tmp_path/'tokenizer').iterdir())


# artifacts
MAKE = """import sys, time; from pathlib import Path; from tokkit.runs import artifact
def make(tmp): open(sys.argv[2], 'a').write('made '); time.sleep(1); (tmp/'x').write_text('whole')
print(artifact('tokenizer', dict(a=1), make, sys.argv[1]))"""

def test_two_processes_make_it_once(tmp_path):
    both = [python(MAKE, tmp_path/'runs', tmp_path/'log') for _ in range(2)]
    said = {p.communicate(timeout=60)[0] for p in both}
    assert (len(said) == 1 and (tmp_path/'log').read_text() == 'made '
            and (Path(said.pop().strip())/'x').read_text() == 'whole')

WORK = """import sys, time; from pathlib import Path; from tokkit.runs import artifact
def make(tmp, work):
    n = int((work/'epoch').read_text()) if (work/'epoch').exists() else 0
    for epoch in range(n, 3):
        (work/'epoch').write_text(str(epoch+1))
        open(sys.argv[2], 'a').write(f'{epoch} ')
        (tmp/'half').write_text('half')
        if epoch == 1 and n == 0: time.sleep(60)
    (tmp/'x').write_text('whole')
print(artifact('generator', dict(a=1), make, sys.argv[1], slug='small'))"""

def test_a_killed_stage_goes_on_at_its_checkpoint(tmp_path):
    log = tmp_path/'log'
    first = python(WORK, tmp_path/'runs', log)
    wait_for(lambda: log.exists() and log.read_text() == '0 1 ')
    first.kill()
    first.wait()
    left = sorted(p.name for p in (tmp_path/'runs'/'generator').iterdir())
    assert not any(p.startswith('small') for p in left) and any(p.startswith('.work-') for p in left)
    folder = Path(python(WORK, tmp_path/'runs', log).communicate(timeout=60)[0].strip())
    assert (log.read_text() == '0 1 2 ' and (folder/'x').read_text() == 'whole'
            and not (folder/'half').read_text() == '')
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


# sweeps
def test_sweep_reports_and_goes_on(tmp_path, capfd, two_gpus):
    grid = dict(seed=['1','2','3'])
    report = sweep_experiment(TINY, grid, workers=2, devices=['0','1'], params=dict(mode='fail2'),
                              root=tmp_path)
    assert report.status.tolist() == ['done', 'failed', 'done']
    assert (report.error.dropna().str.contains('ValueError: delta must be').all()
            and 'ValueError: delta must be' in capfd.readouterr().err)
    again = sweep_experiment(TINY, grid, workers=2, params=dict(mode='fail2'), root=tmp_path)
    assert again.status.tolist() == ['reused', 'failed', 'reused']
    table = collect(tmp_path)
    assert len(table) == 2 and set(table.gpu) <= {'0','1'} and set(table.threads) == {table.threads.iloc[0]}
    assert (list(table)[:5] == ['experiment', 'run_id', 'metric', 'value', 'seed']
            and len(table.attrs['skipped']) == 1)

@pytest.mark.parametrize('deaths, status', [(1, 'done'), (3, 'failed')])
def test_a_kernel_that_dies_at_its_start_is_started_anew(tmp_path, monkeypatch, deaths, status):
    log = tmp_path/'starts'
    spec = tmp_path/'jupyter'/'kernels'/'python3'/'kernel.json'
    log.write_text('')
    spec.parent.mkdir(parents=True)
    start = f"""import sys; f = open({str(log)!r}, 'r+'); n = len(f.read()); f.write('.'); f.close()
if n < {deaths}: sys.exit('Address already in use')
from ipykernel.kernelapp import launch_new_instance; launch_new_instance()"""
    spec.write_text(json.dumps(dict(argv=[sys.executable, '-c', start, '-f', '{connection_file}'],
                                    display_name='python3', language='python')))
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path/'jupyter'))
    report = sweep_experiment(TINY, dict(seed=['1']), root=tmp_path/'runs')
    assert report.status.tolist() == [status] and len(log.read_text()) == min(deaths+1, 3)

def test_collect_survives_damage(tmp_path):
    folder = run_experiment(TINY, {}, tmp_path)
    (folder.parent/'torn-1').mkdir()
    (folder.parent/'torn-1'/'params.json').write_text('{}')
    (folder.parent/'torn-1'/'metrics.json').write_text('{"rows": [')
    table = collect(tmp_path)
    assert len(table) == 1 and any('torn-1' in line for line in table.attrs['skipped'])

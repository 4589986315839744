"Sweeps on other machines: an interrupt, a killed worker, another version, no scheduler, jobs of Slurm"
import os, signal, stat, sys, threading
from pathlib import Path

import nbformat, pytest
from nbformat.v4 import new_code_cell, new_notebook

import tokkit
from test_runs import alive
from waiting import wait_for
from tokkit.cli import main
from tokkit.runs import cluster, grid_runs, sweep_on_cluster

pytest.importorskip('dask_jobqueue', reason="the extra cluster is not installed: pip install "
                                            "'tokkit-lab[cluster]'")
TINY = Path(__file__).parent/'notebooks'/'tiny.ipynb'
SECONDS = 300           # of patience with a busy machine


@pytest.fixture(scope='module')
def address():
    "A scheduler and two workers with nannies, each a process, on this machine alone"
    from distributed import LocalCluster
    with LocalCluster(2, threads_per_worker=1, host='127.0.0.1', dashboard_address=None) as local:
        yield local.scheduler_address

WORK = """import json, os, time
from pathlib import Path
if mode == 'fail': raise ValueError('delta must be in [1, 64], got 99')
Path(gate+'.pids').write_text(f'{os.getpid()} {os.getppid()}')
while not Path(gate+'.open').exists(): time.sleep(.1)
done = dict(experiment='tiny', rows=[dict(metric='rFID', value=seed)])
(Path(os.environ['TOKKIT_RUN_DIR'])/'metrics.json').write_text(json.dumps(done))"""

@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    "A folder that all workers see, and in it a notebook that imports no torch, so that its runs cost little"
    folder = tmp_path_factory.mktemp('shared')
    cells = [new_code_cell("seed = 1\nmode = 'wait'\ngate = ''", metadata=dict(tags=['parameters'])),
             new_code_cell(WORK)]
    kernel = dict(name='python3', display_name='python3', language='python')
    nbformat.write(new_notebook(cells=cells, metadata=dict(kernelspec=kernel)), folder/'tiny.ipynb')
    return folder

def kernel_at(gate:Path) -> list[int]:
    "The kernel that waits at a gate, and papermill's process; nothing before one is there"
    pids = gate.with_suffix('.pids')
    return [int(p) for p in pids.read_text().split()] if pids.exists() else []

def parent_of(pid:int) -> int: return int(Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[1])


def test_workers_of_another_version_are_named_before_anything_starts(address, shared, monkeypatch, capsys):
    monkeypatch.setattr(tokkit, '__version__', '9.9')
    words = ['sweep', str(shared/'tiny.ipynb'), '-g', 'seed=1', '--scheduler', address]
    assert main([*words, '--out', str(shared/'runs')]) == 2
    said = capsys.readouterr().err
    assert said.startswith('tokkit: 2 of 2 workers cannot be used, so nothing was started: worker tcp://')
    assert said.count('and tokkit 9.9; install the same on it') == 2 and said.count('\n') == 1
    assert not list((shared/'runs').iterdir())

def test_an_interrupt_ends_the_run_at_work(address, shared, monkeypatch, capsys):
    gate = shared/'a'
    wait = cluster._wait
    def interrupted(seconds, until):
        if seconds == 1 and kernel_at(gate): raise KeyboardInterrupt
        wait(seconds, until)
    monkeypatch.setattr(cluster, '_wait', interrupted)
    words = ['sweep', shared/'tiny.ipynb', '-g', 'seed=1', '-p', 'gate', gate, '--scheduler', address]
    assert main([*map(str, words), '--threads', '1', '--out', str(shared/'runs')]) == 130
    assert 'interrupted; the same command goes on from here' in capsys.readouterr().err
    wait_for(lambda: not alive(kernel_at(gate)[0]), SECONDS)
    wait_for(lambda: not list((shared/'runs'/'tiny').iterdir()), SECONDS)
    gate.with_suffix('.pids').unlink()

@pytest.mark.skipif(sys.platform != 'linux', reason='asks /proc for the worker of a run')
def test_a_sweep_survives_a_killed_worker(address, shared, capfd):
    "kill -9 of a worker in mid-run: the run is made again, no run is lost, and none is made twice"
    notebook = shared/'tiny.ipynb'
    gates = [shared/name for name in 'ab']
    grid = [dict(seed=[i+1], gate=[str(gate)]) for i,gate in enumerate(gates)]
    grid.append(dict(mode=['fail']))
    report = []
    def sweep():
        report.append(sweep_on_cluster(notebook, grid, root=shared/'runs', scheduler=address, threads=1))
    going = threading.Thread(target=sweep)
    going.start()
    kernel, papermill = wait_for(lambda: kernel_at(gates[0]), SECONDS)
    wait_for(lambda: kernel_at(gates[1]), SECONDS)
    os.kill(parent_of(papermill), signal.SIGKILL)
    wait_for(lambda: not alive(kernel), SECONDS)
    wait_for(lambda: kernel_at(gates[0])[:1] not in ([], [kernel]), SECONDS)
    for gate in gates: gate.with_suffix('.open').write_text('')
    going.join(SECONDS)
    said = capfd.readouterr().err
    assert report[0].status.tolist() == ['done', 'done', 'failed'], said
    assert said.count('was lost while it made tiny/') == 1 and '(loss 1, 2 are borne)' in said
    assert said.count('failed: ValueError: delta must be in [1, 64], got 99') == 1
    made = {p.name for p in (shared/'runs'/'tiny').iterdir()}
    specs = [spec.folder.name for spec in grid_runs(notebook, grid, root=shared/'runs')]
    assert made == {*specs[:2], specs[2]+'.failed'}


@pytest.mark.parametrize('words, says', [
    (['--scheduler', 'node1'], "scheduler must be an address such as tcp://HOST:8786, or slurm; got 'node1'"),
    (['--scheduler', 'tcp://127.0.0.1:9'], 'no scheduler answers at tcp://127.0.0.1:9 within 0.5 s'),
    (['--scheduler', 'slurm', '--slurm', 'partition=gpu'], "slurm has no setting 'partition'; it has"),
    (['--scheduler', 'slurm', '--slurm', 'gpus=some'], "slurm gpus must be int, like its default 0"),
    (['--scheduler', 'slurm'], 'no sbatch on this machine'),
    (['--slurm', 'gpus=1'], 'give --scheduler slurm with it')])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.setenv('PATH', '')
    monkeypatch.setattr(cluster, 'ANSWER_SECONDS', .5)
    assert main(['sweep', str(TINY), '-g', 'seed=1', '--out', str(tmp_path), *words]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count('\n') == 1

def test_without_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'distributed', None)
    words = ['sweep', str(TINY), '-g', 'seed=1', '--scheduler', 'tcp://127.0.0.1:9', '--out', str(tmp_path)]
    assert main(words) == 2
    assert "pip install 'tokkit-lab[cluster]'" in capsys.readouterr().err

def test_sbatch_gets_what_was_asked_for_and_its_refusal_is_told(tmp_path, monkeypatch, capsys):
    "An sbatch that keeps the script it was given, and takes no job"
    sbatch = tmp_path/'bin'/'sbatch'
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/sh\n/bin/cp "$1" {tmp_path}/script\n'
                      'echo "sbatch: error: invalid partition" >&2\nexit 1\n')
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv('PATH', str(sbatch.parent))
    (tmp_path/'s.yaml').write_text(
        f"notebook: {TINY}\ngrid: {{seed: [1, 2]}}\nscheduler: slurm\nworkers: 2\n"
        "slurm: {walltime: '24:00:00', gpus: 2, interface: lo, prologue: [module load x]}\n")
    words = ['sweep', str(tmp_path/'s.yaml'), '--slurm', 'gpus=1', '--slurm', 'queue=big']
    assert main([*words, '--out', str(tmp_path/'runs')]) == 2
    said = capsys.readouterr().err.splitlines()
    refusal = 'tokkit: sbatch refused the job of a worker: sbatch: error: invalid partition; change'
    assert said[-1].startswith(refusal) and len(said) == 2
    script = (tmp_path/'script').read_text().splitlines()
    asked = ['#SBATCH -p big', '#SBATCH -t 24:00:00', '#SBATCH --gres=gpu:1', 'module load x']
    assert set(asked) <= set(script) and '--nthreads 1' in script[-1]
    assert f'{sys.executable} -m distributed.cli.dask_worker tcp://127.0.0.1:' in script[-1]
    assert not [p for p in (tmp_path/'runs').iterdir() if p.name != '.slurm']

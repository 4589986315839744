"""Commands that are killed, raced or run out of room: a kill of each,
drawn by `$TOKKIT_FAULT_SEED`; a small full disk; two at once"""
import os, subprocess, sys

import pytest
from kill_at_random import check

SEED = int(os.environ.get('TOKKIT_FAULT_SEED', '0'))


@pytest.mark.parametrize('command', ['sweep', 'posttrain'])
def test_killed_at_a_random_moment(command, tmp_path, monkeypatch, capsys):
    "The demo has tests/test_kill_demo.py"
    monkeypatch.delenv('TOKKIT_RUNS')
    told = []
    wrong = check(tmp_path, [command], 1, SEED, told.append)
    with capsys.disabled(): print(f'\nseed {SEED}, {told}')
    assert not wrong and told


@pytest.fixture
def small_disk(tmp_path):
    "A disk of 300 kB"
    (tmp_path/'disk').mkdir()
    if os.geteuid() or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=300k', 'tmpfs', tmp_path/'disk'],
                                      capture_output=True).returncode:
        pytest.skip('a small disk can only be mounted by root, where the machine allows it')
    yield tmp_path/'disk'
    subprocess.run(['umount', '-l', tmp_path/'disk'], check=True)

def test_a_disk_that_is_full(own, small_disk, tokkit, tmp_path):
    words = ('posttrain', '--tokenizer', own/'tokenizer', '--generator', own/'generator', '--data',
             own/'images', '--epochs', '1')
    code, out, err = tokkit(*words, '--out', small_disk/'healed')
    assert code == 2 and 'Traceback' not in err, err
    assert 'No space left' in err or 'make room' in err, err
    assert not (small_disk/'healed').exists(), err
    assert tokkit(*words, '--out', tmp_path/'healed')[0] == 0

def test_two_demos_at_once_make_it_once(tmp_path):
    "Two processes that want the same artifacts: one makes, one waits, both have the same"
    code = ("import sys; from tokkit.demo import Demo, demo_cfg\n"
            "d = Demo(demo_cfg('smoke', train_images=64, n=64, n_pfid=64, batch=32, pairs=64, width=32, "
            "depth=1, base_epochs=0), sys.argv[1], 'cpu')\n"
            "print(d.tokenizer('plain').fingerprint, d.generator('plain').fingerprint)")
    both = [subprocess.Popen([sys.executable, '-c', code, tmp_path], stdout=subprocess.PIPE, text=True,
                             env=os.environ | dict(TOKKIT_QUIET='1', OMP_NUM_THREADS='1')) for _ in range(2)]
    said = {p.communicate(timeout=120)[0] for p in both}
    assert len(said) == 1 and said.pop().strip()
    assert ({k: len(list((tmp_path/k).iterdir()))
             for k in ('tokenizer', 'tokens', 'generator')} == dict(tokenizer=1, tokens=1, generator=1))

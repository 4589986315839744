"Measuring in two processes: the numbers of one to the last digit, told once, written once"
import json, os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokkit.core import make_rng
from tokkit.generators import make_generator, save_generator
from tokkit.metrics import save_samples
from tokkit.tokenizers import make_tokenizer

HERE = Path(__file__).resolve().parent
TWO = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
COMMANDS = ('rfid', 'pfid', 'ifid', 'gfid', 'all', 'generator', 'generator-quick', 'file', 'file-quick',
            'folder')


def environment(home:Path) -> dict:
    "One thread, as torchrun has it, and features in a folder of this test"
    return os.environ|dict(OMP_NUM_THREADS='1', TOKKIT_DATA=str(home/'data'), TOKKIT_QUIET='1')


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    "A small tokenizer, a generator of its tokens, and pictures in files, real ones and others"
    home = tmp_path_factory.mktemp('models')
    torch.manual_seed(0)
    tok = make_tokenizer('tiny-16', width=16, depth=1, codebook_size=256).eval()
    tok.save(home/'tok')
    save_generator(make_generator('ar', tok.spec, classes=10, width=16, depth=1, heads=2).eval(), home/'gen')
    def pictures(n, seed):
        coarse = torch.rand(n, 3, 5, 5, generator=make_rng(seed, 'pictures'))
        return (torch.nn.functional.interpolate(coarse, 24, mode='bilinear')*255).to(torch.uint8)
    save_samples(home/'made.npz', pictures(150, 0), torch.arange(150)%10)
    save_samples(home/'real.npz', pictures(100, 1))
    for i,x in enumerate(pictures(90, 2).permute(0, 2, 3, 1).numpy()):
        (home/'real'/f'{i%3}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(home/'real'/f'{i%3}'/f'{i}.png')
    return home


def commands(models:Path) -> dict[str,list[str]]:
    tok = '--tokenizer', models/'tok'
    gen = *tok, '--generator', models/'gen'
    file = 'evaluate', models/'made.npz', '--reference', models/'real.npz'
    words = dict(
        rfid=('metric', 'rfid', *tok, '-n', 100),
        pfid=('metric', 'pfid', *tok, '-n', 100, '--alphas', '.5'),
        ifid=('metric', 'ifid', *tok, '-n', 100, '--train', 'fashion_mnist'),
        gfid=('metric', 'gfid', *gen, '-n', 300),
        all=('metric', 'all', *tok, '-n', 100, '--alphas', '.5', '--format', 'csv'),
        file=file, folder=(*file[:2], '--reference', models/'real', '-n', 80))
    words |= {'generator': ('evaluate', *gen, '-n', 300), 'file-quick': (*file, '--protocol', 'quick'),
              'generator-quick': ('evaluate', *gen, '-n', 300, '--protocol', 'quick')}
    return {name: [*map(str, words[name]), '--bootstrap', '3', '--device', 'cpu'] for name in COMMANDS}


@pytest.fixture(scope='module')
def both(models, tmp_path_factory):
    "Folders with what one process and two processes measured"
    homes = [tmp_path_factory.mktemp(name) for name in ('one', 'two')]
    script = str(HERE/'metrics_in_processes.py')
    for home,start in zip(homes, ([sys.executable], TWO)):
        words = [*start, script, str(models), str(home), json.dumps(commands(models))]
        subprocess.run(words, check=True, capture_output=True, timeout=280, env=environment(home))
    return homes


@pytest.mark.parametrize('name', COMMANDS)
def test_two_processes_tell_what_one_tells(both, name):
    for kind in ('json', 'txt'):
        one, two = ((home/f'{name}.{kind}').read_bytes() for home in both)
        assert two == one and one


def test_features_are_kept_by_the_main_process(both):
    one, two = ({p.name for p in (home/'data'/'features').iterdir()} for home in both)
    assert one == two and len(one) > 5


def test_by_hand(both):
    """Functions, samplers whose batches fill no chunk, tensors, protocols, neighbours of the own class,
    what posttrain measures at its end"""
    one, two = (json.loads((home/'by_hand.json').read_text()) for home in both)
    names = {'function', 'sampler', 'tensor', 'protocol', 'neighbours', 'posttrained'}
    assert one['hand'].keys() == one['file'].keys() == names
    for where in one: assert two[where] == one[where]


def test_features_in_files_give_the_same_numbers(both):
    "But for the last digits of the replicates"
    found = json.loads((both[0]/'by_hand.json').read_text())
    for name,cards in found['hand'].items():
        for card,other in zip(cards, found['file'][name], strict=True):
            assert card['value'] == other['value'] and card['settings'] == other['settings']
            assert np.allclose(card['replicates'], other['replicates'], rtol=1e-9)


def test_the_command_under_torchrun(models, both, tmp_path):
    "Printed once, written once"
    words = [*TWO, '-m', 'tokkit', *commands(models)['file'], '--json', str(tmp_path/'cards.json')]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == (both[0]/'file.txt').read_text()
    assert (tmp_path/'cards.json').read_bytes() == (both[0]/'file.json').read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {'cards.json', 'data'}


def test_results_are_compared_once(both, tmp_path):
    files = [str(both[0]/f'{name}.json') for name in ('generator', 'gfid')]
    words = [*TWO, '-m', 'tokkit', 'compare', *files, '--figure', str(tmp_path/'changes.png')]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('gFID') == 1 and done.stderr.count('half a 95% interval') == 1
    assert [p.name for p in tmp_path.iterdir()] == ['changes.png']


def test_what_one_cannot_read_ends_both(models, tmp_path):
    "A picture of the second process's chunk"
    place = tmp_path/'pictures'
    place.mkdir()
    for i in range(150): Image.fromarray(np.full((24, 24, 3), i, np.uint8)).save(place/f'{i:03d}.png')
    (place/'100.png').write_bytes(b'no picture')
    words = [*TWO, '-m', 'tokkit', 'evaluate', str(models/'made.npz'), '--reference', str(place), '--json',
             str(tmp_path/'cards.json'), '--device', 'cpu']
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment(tmp_path))
    told = [line for line in done.stderr.splitlines() if line.startswith(('tokkit:', 'tokkit,'))]
    assert done.returncode != 0 and len(told) == 1 and '100.png' in told[0], done.stderr
    assert not done.stdout and not (tmp_path/'cards.json').exists()


@pytest.mark.slow
def test_killed_and_called_again(models, both, tmp_path):
    words = [*TWO, '-m', 'tokkit', *commands(models)['generator'], '--json', str(tmp_path/'cards.json')]
    env = environment(tmp_path)
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = subprocess.Popen(words, start_new_session=True, env=env, **quiet)
    end = time.time()+60
    # in the middle: the reference is kept, the samples are being drawn
    while not any((tmp_path/'data').glob('features/*.npz')):
        assert time.time() < end and run.poll() is None
        time.sleep(.01)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert not (tmp_path/'cards.json').exists(), "too quick to be a test"
    subprocess.run(words, check=True, capture_output=True, timeout=120, env=env)
    assert (tmp_path/'cards.json').read_bytes() == (both[0]/'generator.json').read_bytes()

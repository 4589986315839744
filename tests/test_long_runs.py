"""Trainings of days: put down in the middle of an epoch and taken up again to the last bit, damaged and
unwritable checkpoints, and requests to stop, in one process and in two"""
import os, re, resource, signal, subprocess, sys, time
from pathlib import Path
from unittest import mock

import pandas as pd, pytest, torch

from tokkit.cli import main
from tokkit.core import make_rng
from tokkit.data import fashion_mnist
from tokkit.generators import ARCfg, ARGenerator
from tokkit.perturbation import Annealing, LatentPerturbation
from tokkit.processes import Stopped, stopping
from tokkit.tokenizers import load_tokenizer, make_tokenizer
from tokkit.training import (checkpoints, GeneratorTraining, ImageTraining, Learner, TensorPairs,
                             train_generator, train_tokenizer)

ALWAYS = 1e-9       # minutes: a checkpoint after every step


GAME = dict(adversarial=.1, adversarial_start=.2, discriminator_augment=1., discriminator_blur=.5)
SET = dict(distribution=.1, distribution_kind='frechet', distribution_options=dict(layers=(1, 4), size=28))

def tokenizer(work, changes=GAME, **how):
    "A tokenizer after three epochs of six steps, and its losses"
    tok = make_tokenizer('tiny-16', width=16, depth=1)
    cfg = ImageTraining(epochs=3, batch=16, perceptual=.1, perceptual_every=2, revive=2, **changes)
    damage = LatentPerturbation(1., .5, 11, Annealing(1, 2))
    history = train_tokenizer(tok, fashion_mnist('train', 96), cfg, damage, work=work,
                              validation=fashion_mnist('test', 20), device='cpu', **how)
    return tok, history

def generator(work, **how):
    pairs = TensorPairs(torch.randint(8, (96,4), generator=make_rng(0)), torch.arange(96)%2)
    torch.manual_seed(0)
    gen = ARGenerator(ARCfg(n=4, codebook_size=8, classes=2, width=16, depth=1, heads=2, dropout=.1))
    cfg = GeneratorTraining(epochs=3, batch=16)
    return gen, train_generator(gen, pairs, cfg, work=work, device='cpu', **how)

TRAININGS = dict(game=tokenizer, set=lambda *a, **how: tokenizer(*a, changes=SET, **how), generator=generator)

def same(one, other) -> bool:
    "Two trainings ended with the same weights and reported the same losses, to the last bit"
    a,b = (model.state_dict() for model,_ in (one, other))
    return all(torch.equal(a[k], b[k]) for k in a) and one[1].equals(other[1])

def asked(at:int):
    "A training is asked to stop while it takes this step"
    step = Learner._batch
    def taken(learner):
        if learner.step+1 == at: os.kill(os.getpid(), signal.SIGTERM)
        step(learner)
    return mock.patch.object(Learner, '_batch', taken)

def put_down(train, work, at, **how):
    "Train until the training is asked to stop"
    with stopping(), asked(at), pytest.raises(Stopped) as stopped: train(work, **how)
    return stopped.value

def places(work) -> list[tuple]:
    "Step, epoch and place in the epoch of every checkpoint"
    saved = [torch.load(p, weights_only=True) for p in checkpoints(work) if p.name != 'best.pt']
    return [(s['step'], s['epoch'], s['place']) for s in saved]


@pytest.mark.parametrize('name', TRAININGS)
def test_taken_up_in_the_middle_of_an_epoch(name, tmp_path):
    "Put down twice, after 8 and after 13 steps: the same bits, and the means of the epochs, too"
    train = TRAININGS[name]
    whole = train(tmp_path/'whole')
    told = put_down(train, tmp_path/'broken', 8)
    assert told.code == 75 and 'step 8 of 18 is saved in' in str(told)
    assert places(tmp_path/'broken') == [(8, 1, 2), (6, 1, 0)]
    put_down(train, tmp_path/'broken', 13)
    assert places(tmp_path/'broken')[0] == (13, 2, 1)
    assert same(train(tmp_path/'broken'), whole)


def test_asked_at_the_last_step_of_an_epoch(tmp_path):
    "What follows an epoch, such as the loss of held-out images, is done when it is taken up"
    whole = tokenizer(tmp_path/'whole')
    put_down(tokenizer, tmp_path/'broken', 12)
    assert places(tmp_path/'broken') == [(12, 1, 6), (6, 1, 0)]
    assert same(tokenizer(tmp_path/'broken'), whole)


def flip(path:Path):
    bits = bytearray(path.read_bytes())
    bits[len(bits)//2] ^= 4
    path.unlink()               # best.pt may be the same file
    path.write_bytes(bits)

def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    whole = tokenizer(tmp_path/'whole')
    put_down(tokenizer, tmp_path/'broken', 8, minutes=ALWAYS)
    assert places(tmp_path/'broken') == [(8, 1, 2), (7, 1, 1)]
    newest = checkpoints(tmp_path/'broken')[0]
    flip(newest)
    with pytest.warns(UserWarning, match='checkpoint-8.pt is damaged.*checkpoint-7.pt before it is taken up.*'
                                         'kept as checkpoint-8.pt.damaged'):
        assert same(tokenizer(tmp_path/'broken'), whole)

def test_only_where_none_is_whole_training_begins_anew(tmp_path):
    whole = generator(tmp_path/'whole')
    put_down(generator, tmp_path/'broken', 8)
    for path in checkpoints(tmp_path/'broken'): flip(path)
    with pytest.warns(UserWarning, match='checkpoint-6.pt is damaged.*training begins anew'):
        assert same(generator(tmp_path/'broken'), whole)
    assert len([*(tmp_path/'broken').glob('*.damaged')]) == 2


@pytest.mark.parametrize('keep', [1, 3])
def test_so_many_are_kept(keep, tmp_path):
    "The newest ones, and the best by the loss of held-out images"
    history = tokenizer(tmp_path, keep=keep, minutes=ALWAYS)[1]
    assert places(tmp_path) == [(18, 3, 0), (17, 2, 5), (16, 2, 4)][:keep]
    best = torch.load(tmp_path/'best.pt', weights_only=True)
    assert best['history'][-1]['validation'] == history.validation.min()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith('.')]


def test_a_disk_that_is_full_in_mid_checkpoint(tmp_path):
    "The one before survives, one line says so, and nothing half is left"
    whole = generator(tmp_path/'whole')
    put_down(generator, tmp_path/'broken', 8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError) as full: generator(tmp_path/'broken')
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    told = str(full.value)
    assert re.search(r'checkpoint-12\.pt cannot be written: File too large; checkpoint-8\.pt before it is '
                     'whole: make room', told) and '\n' not in told
    assert [p.name for p in checkpoints(tmp_path/'broken')] == ['checkpoint-8.pt', 'checkpoint-6.pt']
    assert not [p for p in (tmp_path/'broken').iterdir() if p.name.startswith('.')]
    assert same(generator(tmp_path/'broken'), whole)

def test_what_a_kill_left_half_written_goes(tmp_path):
    put_down(generator, tmp_path, 8)
    (tmp_path/'.checkpoint-9.pt.99999999-170000000000.tokkit-tmp').write_text('half')
    (tmp_path/'.checkpoint-9.pt.mine').write_text('mine')
    generator(tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith('.')] == ['.checkpoint-9.pt.mine']


def test_a_caller_keeps_its_own_signals(tmp_path):
    "Without a command around it a training takes no signal from whoever calls it"
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with asked(9): generator(tmp_path)
    finally: signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM] and places(tmp_path)[0] == (18, 3, 0)


# The command

SMALL = ['epochs=24', 'tokenizer.width=16', 'tokenizer.depth=1', 'batch=16', 'distribution=0',
         'perceptual=0']
TRAIN = ['train', 'tokenizer', '-n', '128', *[word for s in SMALL for word in ('--set', s)],
         '--device', 'cpu', '--out']
SAVED = r'interrupted; the same command goes on from here: step \d+ of 192 is saved in \S+'
QUIET = dict(TOKKIT_QUIET='1', OMP_NUM_THREADS='1')

def begin(folder, processes=1) -> subprocess.Popen:
    "The command in processes of its own, after its next checkpoint"
    launcher = ['torch.distributed.run', '--standalone', '--nproc-per-node', str(processes), '-m']
    if processes == 1: launcher = []
    command = [sys.executable, '-m', *launcher, 'tokkit', *TRAIN, str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ|QUIET)
    before = work(folder)[:1]
    until = time.time()+120
    while work(folder)[:1] == before and process.poll() is None and time.time() < until: time.sleep(.02)
    assert work(folder)[:1] != before, process.communicate()[1]
    return process

def work(folder) -> list[Path]:
    "The checkpoints of a training that is under way"
    return [p for place in folder.parent.glob(f'.work-{folder.name}-*') for p in checkpoints(place)]

def weights(folder) -> str: return load_tokenizer(folder).fingerprint

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "What the command makes undisturbed"
    folder = tmp_path_factory.mktemp('whole')/'tok'
    assert main([*TRAIN, str(folder)]) == 0
    return folder

@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_the_command_is_asked_to_stop(number, code, whole, tmp_path):
    process = begin(tmp_path/'tok')
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code, said
    assert re.search(SAVED, said)
    assert 'Traceback' not in said and not (tmp_path/'tok').exists()
    if number != signal.SIGTERM: return
    assert main([*TRAIN, str(tmp_path/'tok'), '--keep', '1', '--minutes', '0']) == 0
    assert weights(tmp_path/'tok') == weights(whole)
    a,b = (pd.read_csv(folder/'history.csv') for folder in (tmp_path/'tok', whole))
    assert a.equals(b) and not [*tmp_path.glob('.work-*')]

@pytest.mark.parametrize('words, told', [(['--keep', '0'], 'keep must be a whole number at least 1'),
                                         (['--minutes', '-1'], 'minutes must be in [0, inf]')])
def test_what_no_training_can_keep(words, told, tmp_path, capsys):
    assert main([*TRAIN, str(tmp_path/'tok'), *words]) == 2
    said = capsys.readouterr().err
    assert told in said and len(said.strip().splitlines()) == 1


def children(process:subprocess.Popen) -> list[int]:
    "The processes that a launcher started"
    found = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(process.pid)], capture_output=True, text=True)
    return sorted(map(int, found.stdout.split()))

@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='looks for processes as Linux shows them')
def test_a_launcher_is_asked_to_stop(tmp_path):
    "The signal reaches one of two processes, then the launcher, which hands it on: one line, 75 from each"
    for signalled in ('child', 'launcher'):
        process = begin(tmp_path/'tok', 2)
        if signalled == 'child': os.kill(children(process)[1], signal.SIGUSR1)
        else: process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
        assert len(re.findall(SAVED, said)) == 1, said
        assert 'this is a fault of tokkit' not in said and process.returncode, said
        assert signalled == 'launcher' or 'exitcode  : 75' in said, said


def test_two_processes_stop_at_the_same_step(tmp_path):
    "The signal reaches one of them; the trainings end as they would have undisturbed"
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    done = subprocess.run([*command, str(Path(__file__).with_name('stop_in_processes.py')), str(tmp_path),
                           'game', 'generator'], capture_output=True, text=True, timeout=120,
                          env=os.environ|QUIET)
    assert (tmp_path/'done').exists(), done.stderr[-3000:]

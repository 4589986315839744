"""Trainings of days: put down in the middle of an epoch and taken up again to the last bit, damaged and
unwritable checkpoints, and requests to stop, in one process and in two"""
import importlib.util, io, os, re, resource, signal, subprocess, sys, tarfile, time
from pathlib import Path
from unittest import mock

import pandas as pd, pytest, torch
from PIL import Image

from tokkit.cli import main
from tokkit.core import make_rng
from tokkit.data import fashion_mnist, StreamedImages, TableStream, TarStream
from tokkit.generators import ARCfg, ARGenerator
from tokkit.perturbation import Annealing, LatentPerturbation
from tokkit.processes import on_main, Stopped, stopping
from tokkit.recipes import GeneratorRecipe, Images
from tokkit.tokenizers import load_tokenizer, make_tokenizer
from tokkit.training import (checkpoints, GeneratorTraining, ImageTraining, Learner, TensorPairs,
                             train_generator, train_tokenizer)
from tokkit.training.checkpoint import _take_place

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

def shards(folder:Path, kind:str = 'tar') -> list[Path]:
    "96 garments in four shards of 40, 30, 20 and 6"
    def write():
        images = fashion_mnist('train', 96).images
        at = 0
        folder.mkdir(parents=True)
        for k,count in enumerate((40, 30, 20, 6)):
            files = {f'{i:03}.png': png(images[i]) for i in range(at, at+count)}
            at += count
            if kind == 'tar': write_tar(folder/f'{k}.tar', files)
            else: pytest.importorskip('datasets').Dataset.from_dict(dict(
                img=[*files.values()], label=[name[0] for name in files])).to_parquet(folder/f'{k}.parquet')
    if not on_main(folder.exists): on_main(write)
    return sorted(folder.iterdir())

def png(pixels) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels[0].numpy()).save(data, 'png')
    return data.getvalue()

def write_tar(path:Path, files:dict[str,bytes]):
    with tarfile.open(path, 'w') as tar:
        for name,data in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))

def streamed(work, kind='tar', **how):
    "A tokenizer that learns from a stream, read by two workers; its buffer is smaller than a shard"
    files = shards(work.parent/kind, kind)
    source = TarStream(files) if kind == 'tar' else TableStream(files)
    images = StreamedImages(source, 28, channels=1, buffer=24, augment=kind != 'tar')
    tok = make_tokenizer('tiny-16', width=16, depth=1)
    with mock.patch.dict(os.environ, TOKKIT_WORKERS='2'):
        return tok, train_tokenizer(tok, images, ImageTraining(epochs=3, batch=16, perceptual=0), work=work,
                                    device='cpu', **how)

def tables(work, **how): return streamed(work, 'parquet', **how)
def of_a_set(work, **how): return tokenizer(work, SET, **how)

TRAININGS = dict(game=tokenizer, set=of_a_set, generator=generator, stream=streamed, tables=tables)

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


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch):
    monkeypatch.setenv('TOKKIT_DATA', str(tmp_path_factory.mktemp('caches')))

@pytest.mark.parametrize('name', TRAININGS)
def test_taken_up_in_the_middle_of_an_epoch(name, tmp_path):
    "Put down twice, after 8 and after 13 steps: the same bits, and the means of the epochs, too"
    if name in ('stream', 'tables'): pytest.importorskip('datasets', reason='the extra data is not there')
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

SMALL = {'epochs': 24, 'tokenizer.width': 16, 'tokenizer.depth': 1, 'batch': 16, 'distribution': 0,
         'perceptual': 0}

def train_words(**changes) -> list[str]:
    "The command, but for its folder; other settings as words"
    settings = [word for k,v in (SMALL|changes).items() for word in ('--set', f'{k}={v}')]
    return ['train', 'tokenizer', '-n', '128', *settings, '--device', 'cpu', '--out']

TRAIN = train_words()
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


# Streams by the command


@pytest.fixture
def tars(tmp_path, monkeypatch):
    pytest.importorskip('datasets', reason="the extra `data` is not installed")
    monkeypatch.setenv('TOKKIT_WORKERS', '0')
    return shards(tmp_path/'tars')

def stream_words(folder, out, stream=24, **changes) -> list[str]:
    words = train_words(**dict(channels=1, size=28, epochs=3)|changes)
    return [*words, str(out), '--data', f'shards:{folder}', '--stream', str(stream)]

def train_on(folder, out, *more, **changes): return main([*stream_words(folder, out, **changes), *more])

def test_a_tokenizer_from_a_stream(tars, tmp_path, capsys):
    "As many steps as with random access, other weights, and the recipe beside it makes the same again"
    assert train_on(tars[0].parent, tmp_path/'stream') == 0
    assert train_on(tars[0].parent, tmp_path/'random', stream=0) == 0
    a,b = (pd.read_csv(tmp_path/name/'history.csv') for name in ('stream', 'random'))
    assert a.step.tolist() == b.step.tolist() == [6, 12, 18]
    assert weights(tmp_path/'stream') != weights(tmp_path/'random')
    assert main(['train', 'tokenizer', '--config', str(tmp_path/'stream'/'recipe.yaml'), '--out',
                 str(tmp_path/'again'), '--device', 'cpu']) == 0
    assert weights(tmp_path/'again') == weights(tmp_path/'stream')
    capsys.readouterr()
    assert train_on(tars[0].parent, 'nowhere', '--estimate') == 0
    assert ' 18 steps of ' in capsys.readouterr().out

@pytest.mark.slow
def test_workers_of_a_stream_do_not_die_of_the_signal(tars, tmp_path):
    "The whole group of processes is asked to stop, as schedulers do it"
    command = [sys.executable, '-m', 'tokkit', *stream_words(tars[0].parent, tmp_path/'tok', epochs=60)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               env=os.environ|QUIET|dict(TOKKIT_WORKERS='2'))
    until = time.time()+60
    while not work(tmp_path/'tok') and process.poll() is None and time.time() < until: time.sleep(.02)
    os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and 'is saved in' in said and len(said.strip().splitlines()) == 1, said

def test_broken_images_and_shards_of_a_stream(tars, tmp_path, capsys):
    "Named, or left out and counted at the end of each epoch"
    with tarfile.open(tars[1], 'a') as tar:
        about = tarfile.TarInfo('torn.png')
        about.size = 4
        tar.addfile(about, io.BytesIO(b'torn'))
    whole = tars[2].read_bytes()
    tars[2].write_bytes(whole[:len(whole)//2])
    assert train_on(tars[0].parent, tmp_path/'tok') == 2
    said = capsys.readouterr().err
    assert '1 of 4 shards cannot be read: 2.tar (truncated' in said and len(said.strip().splitlines()) == 1
    tars[2].write_bytes(whole)
    assert train_on(tars[0].parent, tmp_path/'tok', batch=97) == 2
    said = capsys.readouterr().err
    assert '1.tar/torn.png' in said and '--skip-broken' in said and len(said.strip().splitlines()) == 1
    tars[2].unlink()
    pattern = f'{tars[0].parent}/{{0..3}}.tar'
    assert train_on(pattern, tmp_path/'tok') == 2
    assert '1 of 4 shards cannot be read: 2.tar (missing)' in capsys.readouterr().err
    assert train_on(pattern, tmp_path/'tok', '--skip-broken') == 0
    said = capsys.readouterr().err
    assert 'left out: ' in said and '2.tar (missing)' in said
    counts = [int(n) for n in re.findall(r'(\d+) images could not be read in epoch', said)]
    assert len(counts) <= 3 and set(counts) <= {1}

@pytest.mark.parametrize('words, told', [
    (['--stream', '24'], 'fashion_mnist has no shards to stream'),
    (['--stream', '-1'], 'stream must be a whole number at least 0'),
    (['--stream', 'many'], 'invalid int value'),
])
def test_what_does_not_stream(words, told, tmp_path, capsys):
    try: code = main([*TRAIN, str(tmp_path/'tok'), *words])
    except SystemExit as e: code = e.code
    assert code == 2 and told in capsys.readouterr().err

def test_only_tokenizers_stream(capsys):
    assert main(['train', 'generator', '--tokenizer', 'x', '--stream', '9', '--out', 'y']) == 2
    assert '--stream belongs to tokkit train tokenizer' in capsys.readouterr().err
    with pytest.raises(ValueError, match='images.stream belongs to the training of a tokenizer'):
        GeneratorRecipe(Images(stream=9))

def test_a_stream_is_gone_on_with_by_as_many_processes(tmp_path):
    "In the middle of an epoch each process has a place of its own"
    pytest.importorskip('datasets', reason="the extra `data` is not installed")
    put_down(streamed, tmp_path/'work', 8)
    saved = torch.load(checkpoints(tmp_path/'work')[0], weights_only=True)
    with pytest.raises(ValueError, match='put down in the middle of an epoch by 2 processes.*here: 1'):
        _take_place(None, 2*saved['stream'])


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
    "The signal reaches one of them; the trainings end as they would have undisturbed, on uneven shards, too"
    streams = ['stream'] if importlib.util.find_spec('datasets') else []
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    done = subprocess.run([*command, str(Path(__file__).with_name('stop_in_processes.py')), str(tmp_path),
                           'game', 'generator', *streams], capture_output=True, text=True, timeout=120,
                          env=os.environ|QUIET)
    assert (tmp_path/'done').exists(), done.stderr[-3000:]


def test_a_command_that_fails_does_not_wait_for_those_who_read_ahead():
    "They ignore SIGTERM, by which Python asks them to end; one that is left would be waited for for ever"
    script = """
import torch
from torch.utils.data import DataLoader, dataloader
from tokkit.processes import begin_worker, stopping
dataloader._BaseDataLoaderIter.__del__ = lambda self: None
dataloader._MultiProcessingDataLoaderIter.__del__ = lambda self: None
with stopping():
    batches = iter(DataLoader(list(range(100)), 2, num_workers=2, worker_init_fn=begin_worker()))
    next(batches)
    raise SystemExit(3)"""
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (3, '')

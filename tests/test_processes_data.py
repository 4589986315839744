"Token caches, samples and pairs of two processes: the bytes of one, also after a kill"
import json, subprocess, sys, time
from pathlib import Path

import numpy as np
import psutil, pytest, torch
from PIL import Image
from safetensors.torch import load_file
from tokkit.cli import main
from tokkit.data import TokenCache
from tokkit.generators import ARCfg, ARGenerator, save_generator
from tokkit.metrics import SampleFile
from tokkit.tokenizers import make_tokenizer

HERE = Path(__file__).resolve().parent
TWO = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
CPU = ['--device', 'cpu']
FORMS = '.npz', '.safetensors', ''


def files(place:Path) -> dict[str, bytes]:
    "Everything in a file or a folder, by its name there"
    every = [place] if place.is_file() else [p for p in place.rglob('*') if p.is_file()]
    return {p.relative_to(place).as_posix(): p.read_bytes() for p in every}


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    "A small tokenizer and a generator of its tokens, as good as they are made"
    home = tmp_path_factory.mktemp('models')
    make_tokenizer('tiny', width=16, depth=1, codebook_size=32).eval().save(home/'tok')
    torch.manual_seed(0)
    save_generator(ARGenerator(ARCfg(codebook_size=32, width=16, depth=1)).eval(), home/'gen')
    return home


def encode(models, out, *more) -> list[str]:
    return ['encode', '--tokenizer', str(models/'tok'), '--split', 'train', '--out', str(out), *more, *CPU]

def sample(models, out, n) -> list[str]:
    return ['sample', '--tokenizer', str(models/'tok'), '--generator', str(models/'gen'), '-n', str(n),
            '--seed', '3', '--out', str(out), *CPU]

def commands(models, out) -> list[list[str]]:
    "What both do: three parts of tokens and two pieces of samples, the last of them short"
    return [encode(models, out/'one', '-n', '5000'),
            encode(models, out/'ten', '-n', '450', '--views', 'ten-crop'),
            *(sample(models, out/f's{form}', 520) for form in FORMS)]


@pytest.fixture(scope='module')
def both(models, tmp_path_factory):
    "Folders that one process and two processes filled by the same commands"
    homes = [tmp_path_factory.mktemp(name) for name in ('one', 'two')]
    script = str(HERE/'commands_in_processes.py')
    for home,start in zip(homes, ([sys.executable], TWO)):
        words = [*start, script, str(models), str(home), json.dumps(commands(models, home))]
        subprocess.run(words, check=True, capture_output=True, timeout=280)
    return homes


@pytest.mark.parametrize('name', ['one', 'ten', *(f's{form}' for form in FORMS), 'pairs', 'got.safetensors'])
def test_two_processes_make_the_bytes_of_one(both, name):
    one, two = (files(home/name) for home in both)
    assert one.keys() == two.keys() and all(two[k] == one[k] for k in one)


def test_what_was_made(both):
    one = both[1]
    assert TokenCache.open(one/'one').array.shape == (5000, 49)
    assert TokenCache.open(one/'ten').array.shape == (450, 10, 49)
    with np.load(one/'s.npz') as arrays: assert arrays['arr_0'].shape == (520, 28, 28, 3)
    pictures = SampleFile(one/'s.npz')
    assert len(pictures) == 520 and torch.equal(pictures.labels, load_file(one/'s.safetensors')['labels'])
    assert len([*(one/'s').glob('*/*.png')]) == 520
    got = load_file(one/'got.safetensors')
    assert torch.equal(got['memory'], got['kept'])
    assert [p.name for p in one.iterdir() if p.name.startswith('.')] == []


# killed
def killed(words:list[str], home:Path, sight:str, all_of_them:bool = True):
    "Start two processes, and kill them, or the second one, as soon as there is a file of this pattern"
    run = subprocess.Popen([*TWO, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        end = time.time()+280
        while not any(home.glob(sight)):
            assert time.time() < end and run.poll() is None, run.communicate()[1]
            time.sleep(.002)
        workers = psutil.Process(run.pid).children()
        for one in sorted(workers, key=lambda p: p.pid)[0 if all_of_them else 1:]: one.kill()
        run.communicate(timeout=60)
        assert run.returncode != 0
    finally:
        run.kill()
        run.wait()

def finished(words:list[str]):
    done = subprocess.run([*TWO, *words], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


def test_encode_is_killed_and_gone_on_with_by_one(models, both, tmp_path, capsys):
    words = encode(models, tmp_path/'one', '-n', '5000')
    killed(['-m', 'tokkit', *words], tmp_path, '.work-one-*/part-*.safetensors')
    kept = sorted(tmp_path.glob('.work-one-*/part-*.safetensors'))
    assert 0 < len(kept) and not (tmp_path/'one').exists(), "too quick to be a test"
    # and a bit of what was kept changes
    data = bytearray(kept[0].read_bytes())
    data[-1] ^= 1
    kept[0].write_bytes(data)
    assert main(words) == 0
    said = capsys.readouterr().err
    assert f'{kept[0].name} is damaged: its checksum changed; this part is made again' in said
    assert files(tmp_path/'one') == files(both[0]/'one')
    assert [p.name for p in tmp_path.iterdir()] == ['one']


@pytest.mark.parametrize('form', [form if form == '.npz' else pytest.param(form, marks=pytest.mark.slow)
                                  for form in FORMS])
def test_sample_is_killed_and_gone_on_with_by_two(models, both, tmp_path, form):
    "The second of the processes, which ends them both"
    words = ['-m', 'tokkit', *sample(models, tmp_path/f's{form}', 520)]
    killed(words, tmp_path, f'.work-s{form}-*/part-*.safetensors', all_of_them=False)
    kept = any(tmp_path.glob('.work-s*/part-*'))
    assert kept and not (tmp_path/f's{form}').exists(), "too quick to be a test"
    finished(words)
    assert files(tmp_path/f's{form}') == files(both[0]/f's{form}')
    assert [p.name for p in tmp_path.iterdir()] == [f's{form}']


@pytest.mark.slow
def test_a_generator_encodes_its_images_first(models, both, tmp_path):
    words = ['-m', 'tokkit', 'train', 'generator', '--tokenizer', str(models/'tok'), '-n', '5000', '--out',
             str(tmp_path/'gen'), *CPU]
    changes = 'generator.width=16', 'generator.depth=1', 'batch=500', 'epochs=2'
    for change in changes: words += ['--set', change]
    killed(words, tmp_path, '.work-gen-*/tokens')
    tokens = next(tmp_path.glob('.work-gen-*/tokens'))
    assert (tokens/'tokens.npy').read_bytes() == (both[0]/'one'/'tokens.npy').read_bytes()
    finished(words)
    assert (tmp_path/'gen'/'model.safetensors').is_file() and [p.name for p in tmp_path.iterdir()] == ['gen']


@pytest.mark.slow
def test_pairs_are_killed_and_gone_on_with_by_two(models, both, tmp_path):
    words = [str(HERE/'commands_in_processes.py'), str(models), str(tmp_path), '[]']
    killed(words, tmp_path, 'pairs/part-*.safetensors')
    assert not (tmp_path/'pairs'/'part-00004.safetensors').exists(), "too quick to be a test"
    finished(words)
    assert files(tmp_path) == {k: v for k,v in files(both[0]).items() if k.startswith(('pairs/', 'got'))}


def test_one_that_fails_stops_the_other(models, tmp_path):
    "An image of the second process cannot be read: both end, and one says which"
    for i in range(2100): Image.fromarray(np.full((2, 2), i%256, np.uint8)).save(tmp_path/f'{i:04d}.png')
    (tmp_path/'1500.png').write_bytes(b'no image')
    words = encode(models, tmp_path/'tokens', '--data', str(tmp_path), '--views', 'mirror')
    done = subprocess.run([*TWO, '-m', 'tokkit', *words], capture_output=True, text=True, timeout=280)
    told = [line for line in done.stderr.splitlines() if line.startswith(('tokkit:', 'tokkit,'))]
    assert done.returncode != 0 and len(told) == 1 and '1500.png' in told[0], done.stderr
    assert not (tmp_path/'tokens').exists()

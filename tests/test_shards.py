"""Images in shards: the tensors of the folder, bad input by its name, memory, streams, and the commands"""
import io, os, pickle, shutil, subprocess, sys, tarfile
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image

from tokkit.cli import main
from tokkit.data import (absolute_source, Augmented, has_parts, ImageStream, load_images, loader,
                         ShardImages, StreamLoader, StreamPlan, TableStream, TarStream, TokenCache, Views)
from tokkit.tokenizers import make_tokenizer

# an image of each colour mode and kind, in two classes
MODES = {'RGB': 'jpg', 'RGBA': 'png', 'L': 'png', 'P': 'png', 'CMYK': 'jpg', 'I;16': 'png'}
N = 24


def says(error, call, *words):
    "`call` raises `error` with a message of one line that has all the words"
    with pytest.raises(error) as e: call()
    told = str(e.value)
    assert '\n' not in told and all(w in told for w in words), told

def add(tar, name, data):
    about = tarfile.TarInfo(name)
    about.size = len(data)
    tar.addfile(about, io.BytesIO(data))

def write_tars(folder:Path, files:dict[str,bytes], shards:int, name:str = 'train'):
    "The files in so many tars, one after the other"
    folder.mkdir(parents=True, exist_ok=True)
    for k, part in enumerate(np.array_split(list(files), shards)):
        with tarfile.open(folder/f'{name}-{k:05}-of-{shards:05}.tar', 'w') as tar:
            for member in part: add(tar, str(member), files[str(member)])

@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch):
    monkeypatch.setenv('TOKKIT_DATA', str(tmp_path_factory.mktemp('caches')))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('TOKKIT_WORKERS', '0')

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "The same images as a folder, as tars, as Parquet and as Arrow"
    datasets = pytest.importorskip('datasets', reason="the extra `data` is not installed")
    home = tmp_path_factory.mktemp('shards')
    rng = np.random.default_rng(0)
    files = {}
    for i in range(N):
        mode, suffix = [*MODES.items()][i%len(MODES)]
        pixels = Image.fromarray(rng.integers(0, 256, (20+i%3, 24, 3), dtype=np.uint8))
        data = io.BytesIO()
        wide = np.asarray(pixels)[...,0].astype(np.uint16)*257
        image = Image.fromarray(wide) if mode == 'I;16' else pixels.convert(mode)
        image.save(data, dict(jpg='jpeg').get(suffix, suffix))
        files[f'{"cat" if i < 10 else "dog"}/{i:02}.{suffix}'] = data.getvalue()
    for name, data in files.items():
        (home/'folder'/name).parent.mkdir(parents=True, exist_ok=True)
        (home/'folder'/name).write_bytes(data)
    write_tars(home/'tars', files, 3)
    table = datasets.Dataset.from_dict(dict(
        picture=[dict(bytes=data, path=name) for name,data in files.items()],
        kind=[int(name.startswith('dog')) for name in files]))
    table = table.cast_column('picture', datasets.Image(decode=False))
    table = table.cast_column('kind', datasets.ClassLabel(names=['cat', 'dog']))
    (home/'parquet').mkdir()
    for k in range(2): table.shard(2, k, contiguous=True).to_parquet(home/'parquet'/f'{k}.parquet')
    table.save_to_disk(home/'arrow')
    return home

@pytest.fixture
def copy(home, tmp_path):
    "A copy of the tars, to be damaged"
    return Path(shutil.copytree(home/'tars', tmp_path/'tars'))


# The same images

@pytest.mark.parametrize('kind', ['tars', 'parquet', 'arrow'])
def test_the_tensors_of_the_folder(home, kind):
    folder = load_images(home/'folder', size=16, memory=0.)
    shards = load_images(home/kind, 'train', size=16, memory=0.)
    assert shards.on_disk and isinstance(shards, ShardImages)
    assert torch.equal(shards[:][0], folder[:][0]) and torch.equal(shards.labels, folder.labels)
    assert shards.classes == folder.classes == ['cat', 'dog']
    grey = [load_images(home/k, 'train', size=16, channels=1) for k in ('folder', kind)]
    assert torch.equal(*(g.images for g in grey))
    few = [load_images(home/k, 'train', size=16, n=7) for k in ('folder', kind)]
    assert torch.equal(*(f.images for f in few)) and torch.equal(*(f.labels for f in few))

@pytest.mark.parametrize('kind', ['tars', 'arrow'])
def test_everything_that_a_folder_can(home, kind):
    folder = load_images(home/'folder', size=16, memory=0.)
    shards = load_images(home/kind, 'train', size=16, memory=0.)
    for change in (Augmented, Views): assert torch.equal(change(shards)[:9][0], change(folder)[:9][0])
    assert torch.equal(pickle.loads(pickle.dumps(shards))[3][0], folder[3][0])
    a, b = (next(iter(loader(ds, 8, workers=1))) for ds in (shards, folder))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    hashes = {shards.hash, shards.subset(5).hash, load_images(home/kind, 'train', size=15, memory=0.).hash}
    assert len(hashes) == 3 and shards.hash == load_images(home/kind, 'train', size=16, memory=0.).hash

def test_large_sets_stay_in_their_shards_in_the_order_of_memory(home, monkeypatch):
    monkeypatch.setattr('tokkit.data.sources.SHARDS_AT_ONCE', 10)
    folder = load_images(home/'folder', size=16)
    shards = load_images(home/'tars', 'train', size=16)
    assert shards.on_disk and torch.equal(shards[:][0], folder[:][0])

def test_patterns_options_and_parts(home, tmp_path):
    pattern = f'shards:{home}/tars/train-{{00000..00001}}-of-00003.tar'
    assert len(load_images(pattern, size=16)) == 16
    assert len(load_images(f'shards:{home}/tars/*.tar,image=jpg', size=16)) == N//3
    by_kind = load_images(f'shards:{home}/parquet,image=picture,label=kind', size=16)
    assert by_kind.classes == ['cat', 'dog']
    hub = load_images(f'hub:{home}/parquet', 'train', size=16)
    assert torch.equal(hub.images, by_kind.images) and torch.equal(hub.labels, by_kind.labels)
    assert absolute_source('shards:a/*.tar,image=jpg') == f'shards:{Path.cwd()}/a/*.tar,image=jpg'
    for part in ('train', 'val'):
        for shard in (home/'tars').iterdir():
            (tmp_path/'parts'/part).mkdir(parents=True, exist_ok=True)
            shutil.copy(shard, tmp_path/'parts'/part/shard.name.removeprefix('train-'))
    assert has_parts(tmp_path/'parts') and not has_parts(home/'tars')
    assert len(load_images(tmp_path/'parts', 'test', size=16)) == N

def test_numbers_of_cls_are_labels(tmp_path):
    png = io.BytesIO()
    Image.new('RGB', (8,8)).save(png, 'png')
    files = {f'{i:03}.{kind}': png.getvalue() if kind == 'png' else b'%d\n' % (i%3*2) for i in range(6)
             for kind in ('cls', 'png', 'json')}
    write_tars(tmp_path, files, 1)
    ds = load_images(tmp_path, 'train', size=8, memory=0.)
    assert ds.labels.tolist() == [0,2,4]*2 and ds.classes == ['0','1','2','3','4']


# Bad input

def test_missing_and_truncated_shards(copy):
    whole = (copy/'train-00001-of-00003.tar').read_bytes()
    (copy/'train-00001-of-00003.tar').write_bytes(whole[:len(whole)//2])
    (copy/'train-00002-of-00003.tar').unlink()
    says(OSError, lambda: load_images(copy, 'train', size=16), '2 of 3 shards cannot be read',
         'train-00001-of-00003.tar (truncated', 'train-00002-of-00003.tar (missing)', '--skip-broken')
    with pytest.warns(UserWarning, match='2 of 3 shards'):
        assert len(load_images(copy, 'train', size=16, skip_broken=True)) == 8

def test_truncated_parquet(home, tmp_path):
    (tmp_path/'0.parquet').write_bytes((home/'parquet'/'0.parquet').read_bytes()[:-100])
    says(OSError, lambda: load_images(tmp_path, 'train'), '0.parquet (truncated')

def test_broken_image_is_named_with_its_shard(copy):
    with tarfile.open(copy/'train-00000-of-00003.tar', 'a') as tar: add(tar, 'dog/torn.jpg', b'no picture')
    ds = load_images(copy, 'train', size=16, memory=0.)
    told = '1 of 25 images cannot be read: train-00000-of-00003.tar/dog/torn.jpg'
    says(OSError, lambda: ds[:], told, 'cannot identify')
    with pytest.warns(UserWarning, match=told):
        assert len(load_images(copy, 'train', size=16, skip_broken=True)) == N
    says(OSError, lambda: Views(ds, 'mirror', upscale=True)[:], 'train-00000-of-00003.tar/dog/torn.jpg')

def test_damage_in_the_middle_of_a_tar(copy):
    file = copy/'train-00000-of-00003.tar'
    data = bytearray(file.read_bytes())
    data[:2000] = bytes(range(1, 251))*8
    file.write_bytes(data)
    says(OSError, lambda: load_images(copy, 'train'), 'train-00000-of-00003.tar is damaged')

def test_a_shard_that_vanishes(copy):
    ds = load_images(copy, 'train', size=16, memory=0.)
    (copy/'train-00000-of-00003.tar').unlink()
    says(OSError, lambda: ds[0], 'train-00000-of-00003.tar')

@pytest.mark.parametrize('place, words', [
    ('shards:{home}/none/*.tar', ['no shards in', '.tar .parquet .arrow']),
    ('shards:{home}/parquet,image=pictures', ["no column 'pictures' for the image", "nearest is 'picture'"]),
    ('shards:{home}/parquet,label=kinds', ["no column 'kinds' for the label", "nearest is 'kind'"]),
    ('shards:{home}/parquet,labels=kind', ["unknown option 'labels'"]),
    ('shards:{home}/tars,label=kind', ['names a column, and tars have none']),
    ('shards:{home}/*/*.??r*', ['several kinds', '.parquet, .tar']),
])
def test_questions_that_have_no_answer(home, place, words):
    says((ValueError, FileNotFoundError), lambda: load_images(place.format(home=home), 'train'), *words)

def test_part_that_is_not_there(home):
    says(FileNotFoundError, lambda: load_images(home/'tars', 'test'), 'has shards of train', "none of 'test'")

def test_no_images_and_compressed(tmp_path):
    write_tars(tmp_path/'a', {'readme.txt': b'nothing'}, 1)
    says(ValueError, lambda: load_images(f'shards:{tmp_path}/a', 'train'), 'no images in the 1 shards')
    (tmp_path/'b').mkdir()
    (tmp_path/'b'/'x.tar.gz').write_bytes(b'')
    says(ValueError, lambda: load_images(f'shards:{tmp_path}/b', 'train'), 'x.tar.gz is compressed')

def test_without_the_extra(home, monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    assert len(load_images(home/'tars', 'train', size=16)) == N        # tars need nothing
    says(ImportError, lambda: load_images(home/'parquet', 'train'), "pip install 'tokkit-lab[data]'")


# Streams

def stream(source, workers=0, **plan) -> StreamLoader:
    return StreamLoader(ImageStream(source, 4, size=16, plan=StreamPlan(**dict(buffer=8)|plan)), workers)

def seen(batches) -> list[tuple]:
    "Batches that can be compared"
    return [(x.numpy().tobytes(), y.tolist()) for x,y in batches]

def images_of(batches) -> list[bytes]:
    return sorted(image.numpy().tobytes() for x,_ in batches for image in x)

@pytest.fixture(scope='module')
def sources(home):
    "Each kind of stream, by the kind of shards"
    tables = {kind: TableStream(sorted((home/kind).glob(f'*.{kind}'))) for kind in ('parquet', 'arrow')}
    return dict(tars=TarStream(sorted((home/'tars').iterdir())), **tables)

@pytest.mark.parametrize('kind', ['tars', 'parquet', 'arrow'])
def test_a_stream_hands_out_the_folder(home, sources, kind):
    folder = load_images(home/'folder', size=16, memory=0.)[:][0]
    every = [*stream(sources[kind])]
    assert images_of(every) == sorted(x.numpy().tobytes() for x in folder)
    assert sum(int(y.sum()) for _,y in every) == 14 and sources[kind].classes == ['cat', 'dog']

@pytest.mark.parametrize('kind, workers, stop',
                         [('tars', 0, 1), ('tars', 2, 3), ('parquet', 0, 3), ('parquet', 2, 3)])
def test_a_stream_goes_on_where_it_was(sources, kind, workers, stop, tmp_path):
    "The place goes through a file, as a checkpoint does"
    whole = stream(sources[kind], workers)
    whole.set_epoch(2)
    every = seen(whole)
    broken_off = stream(sources[kind], workers)
    broken_off.set_epoch(2)
    batches = iter(broken_off)
    begin = seen([next(batches) for _ in range(stop)])
    torch.save(broken_off.state_dict(), tmp_path/'place.pt')
    del batches
    again = stream(sources[kind], workers)
    again.load_state_dict(torch.load(tmp_path/'place.pt', weights_only=True))
    again.set_epoch(2)
    assert begin+seen(again) == every
    again.set_epoch(3)
    assert seen(again) != every

@pytest.mark.parametrize('processes', [2, 3])
def test_processes_share_a_stream(sources, processes):
    parts = [[*stream(sources['tars'], rank=rank, processes=processes)] for rank in range(processes)]
    assert images_of(sum(parts, [])) == images_of(stream(sources['tars']))
    assert max(map(len, map(images_of, parts))) <= N/processes+1

def test_broken_images_of_a_stream(copy):
    with tarfile.open(copy/'train-00000-of-00003.tar', 'a') as tar: add(tar, 'dog/torn.jpg', b'no picture')
    source = TarStream(sorted(copy.iterdir()))
    says(OSError, lambda: [*stream(source)], 'train-00000-of-00003.tar/dog/torn.jpg', 'skip_broken=True')
    batches = stream(source, skip_broken=True)
    assert sum(len(x) for x,_ in batches) == N and batches.broken == 1

def test_a_stream_is_asked_for_what_it_can(sources):
    says(ValueError, lambda: stream(sources['tars'], buffer=10), 'a multiple of the batch, 4, got 10')
    place = stream(sources['tars']).state_dict()
    says(ValueError, lambda: stream(sources['tars'], 2).load_state_dict(place), 'kept with workers=0')


# Memory and commands

PEAK = """
import sys, torch
from tokkit.data import load_images, TokenCache
images = load_images(sys.argv[1], 'train', size=64, memory=0.)
TokenCache.build(sys.argv[2], images, lambda x: x[:, 0, ::16, ::16].flatten(1), dtype='float16',
                 batch_size=50)
print(len(images), next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))
"""

@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='reads /proc, as Linux has it')
def test_memory_does_not_grow(tmp_path):
    "500 and 5,000 images: within 5%; as pixels the 5,000 would take 61 MB"
    png = io.BytesIO()
    Image.new('RGB', (64,64), (9,99,199)).save(png, 'png')
    peak = {}
    for n in (500, 5000):
        write_tars(tmp_path/f'{n}', {f'{i:05}.png': png.getvalue() for i in range(n)}, 2)
        words = [sys.executable, '-c', PEAK, tmp_path/f'{n}', tmp_path/f'tokens-{n}']
        done = subprocess.run(words, check=True, capture_output=True, text=True,
                              env=os.environ|dict(OMP_NUM_THREADS='1'))
        count, peak[n] = map(int, done.stdout.split())
        assert count == n
    assert peak[5000] < 1.05*peak[500], peak

def test_encode_gives_the_tokens_of_the_folder(home, tmp_path, monkeypatch):
    monkeypatch.setattr('tokkit.data.sources.SHARDS_AT_ONCE', 10)
    tok = make_tokenizer('tiny', size=16, channels=3, codebook_size=16)
    tok.save(tmp_path/'tok')
    kept = {}
    for kind in ('folder', 'tars'):
        words = ['encode', '--tokenizer', tmp_path/'tok', '--data', home/kind, '--split', 'train']
        assert main([*map(str, words), '--out', str(tmp_path/kind)]) in (None, 0)
        kept[kind] = TokenCache.open(tmp_path/kind)
    assert np.array_equal(kept['tars'].ids, kept['folder'].ids)
    assert torch.equal(kept['tars'].labels, kept['folder'].labels)

"Images, loaders and token caches: recorded values, properties, and files as people have them"
import os, pickle
from pathlib import Path

import numpy as np, pytest, torch
from accelerate import Accelerator
from hypothesis import given, strategies as st
from PIL import Image

from tokkit.core import make_rng
from tokkit.data import (EpochSampler, ImageFolder, ImageSet, center_crop, check_labels, fashion_mnist,
                         from_uint8, load_images, loader, read_image, to_uint8)
from tokkit.data import TokenCache

GOLDEN = Path(__file__).parent/'golden'


# Bytes, floats and crops

def test_to_uint8_as_recorded():
    with np.load(GOLDEN/'to_uint8.npz') as g:
        assert np.array_equal(to_uint8(torch.from_numpy(g['x'])).numpy(), g['y'])
        levels = torch.from_numpy(g['roundtrip_in'])
        assert np.array_equal(to_uint8(from_uint8(levels)).numpy(), g['roundtrip_out'])

@pytest.mark.parametrize('i', range(4))
def test_center_crop_as_recorded(i):
    with np.load(GOLDEN/'center_crop.npz') as g:
        assert np.array_equal(np.asarray(center_crop(Image.fromarray(g[f'center{i}.in']),
                                                     int(g['sizes'][i]))), g[f'center{i}.out'])

@pytest.mark.parametrize('name', ['to_uint8.npz', 'crops.npz'])
def test_golden_is_the_fixture(fixtures, name):
    with np.load(fixtures/name) as full, np.load(GOLDEN/name.replace('crops', 'center_crop')) as g:
        assert g.files and all(np.array_equal(full[k], g[k]) for k in g.files)

@given(st.floats(-3, 3, width=32))
def test_to_uint8_is_nearest_level(x):
    u = int(to_uint8(torch.tensor([x])))
    best = min(abs(v/127.5-1-max(-1, min(1, x))) for v in range(256))
    assert abs(u/127.5-1-max(-1, min(1, x))) <= best+1e-6

@given(st.lists(st.integers(0, 255), min_size=1, max_size=50),
       st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_round_trip(levels, dtype):
    u = torch.tensor(levels, dtype=torch.uint8)
    x = from_uint8(u)
    assert x.min() >= -1 and x.max() <= 1
    # bfloat16 has 8 bits of precision in all
    if dtype != torch.bfloat16: assert torch.equal(to_uint8(x.to(dtype)), u)
    assert to_uint8(x.to(dtype)).dtype == torch.uint8

@given(st.integers(8, 90), st.integers(8, 90), st.integers(1, 8))
def test_crop_has_its_size(w, h, size):
    assert center_crop(Image.new('L', (w,h)), size).size == (size,size)


# Fashion-MNIST

def test_fashion_mnist_counts():
    train = fashion_mnist('train')
    test = fashion_mnist('test')
    assert (len(train), len(test)) == (60_000, 10_000)
    assert train.labels.bincount().tolist() == [6000]*10 and test.labels.bincount().tolist() == [1000]*10
    assert test.images.shape[1:] == (1,28,28) and test.classes[int(test.labels[0])] == 'Ankle boot'

def test_fashion_mnist_sizes():
    odd = fashion_mnist('test', n=3, size=33)
    assert odd.size == 33 and odd.channels == 1 and odd.name == 'fashion_mnist/test[:3]@33'
    assert (torch.equal(odd.images[:,:,2:30,2:30], fashion_mnist('test', 3).images)
            and odd.images[:,:,30:].max() == 0)

def test_hash_names_the_pixels():
    a = fashion_mnist('test', 50)
    other = ImageSet(a.images.clone(), a.labels, a.classes, 'another name')
    assert a.hash == other.hash
    other = ImageSet(a.images.clone(), a.labels, a.classes)
    other.images[7,0,3,3] += 1
    assert a.hash != other.hash and a.hash != fashion_mnist('test', 49).hash


# Indexing and order

@pytest.mark.parametrize('i',
                         [slice(2, 9, 3), [2,5,8], torch.tensor([2,5,8]), np.array([2,5,8]), range(2, 9, 3),
                          [-8,-5,-2],
                               torch.arange(10)%3 == 2])
def test_batches_by_any_index(i):
    ds = fashion_mnist('test', 10)
    x, y = ds[i]
    assert torch.equal(to_uint8(x), ds.images[[2,5,8]]) and torch.equal(y, ds.labels[[2,5,8]])
    assert torch.equal(ds.subset(i).images, ds.images[[2,5,8]])

def test_one_by_number_and_in_a_loop():
    ds = fashion_mnist('test', 4)
    x, y = ds[-1]
    assert x.shape == (1,28,28) and x.dtype == torch.float32 and isinstance(y, int) and y == int(ds.labels[3])
    assert [y for x,y in ds] == ds.labels.tolist()
    assert ds[[]][0].shape == (0,1,28,28)

@given(n=st.integers(1, 200), batch=st.integers(1, 40), seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_loader_covers_every_index_once(n, batch, seed, epoch):
    ds = ImageSet(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.arange(n), list(map(str, range(n))))
    dl = loader(ds, batch, seed, drop_last=False)
    dl.set_epoch(epoch)
    seen = torch.cat([y for x,y in dl])
    assert sorted(seen.tolist()) == list(range(n))
    assert seen.tolist() == torch.randperm(n, generator=make_rng(seed, 'order', epoch)).tolist()

def test_loader_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    list(loader(fashion_mnist('test', 100), 10))
    assert torch.equal(state, torch.random.get_rng_state())

def test_loader_with_workers_gives_the_same(folder):
    ds = ImageFolder(folder, size=8)
    alone = loader(ds, 3, seed=1)
    helped = loader(ds, 3, seed=1, workers=1)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a,b in zip(alone, helped, strict=True))

def test_loader_takes_a_foreign_data_set():
    class Squares(torch.utils.data.Dataset):
        def __len__(self): return 6
        def __getitem__(self, i): return torch.tensor(i), i*i
    i, squares = next(iter(loader(Squares(), 6)))
    assert torch.equal(squares, i*i)

def test_accelerate_keeps_the_order():
    ds = fashion_mnist('test', 300)
    ours = loader(ds, 32, seed=4)
    prepared = Accelerator(cpu=True).prepare(loader(ds, 32, seed=4))
    for epoch in (0, 1, 5):
        ours.set_epoch(epoch)
        prepared.set_epoch(epoch)
        assert torch.equal(torch.cat([y for x,y in ours]), torch.cat([y.cpu() for x,y in prepared]))

def test_two_processes_share_an_epoch():
    from accelerate.data_loader import prepare_data_loader
    ds = ImageSet(torch.zeros(64, 1, 1, 1, dtype=torch.uint8), torch.arange(64), list(map(str, range(64))))
    seen = []
    for rank in range(2):
        dl = prepare_data_loader(loader(ds, 8, seed=2), num_processes=2, process_index=rank,
                                 put_on_device=False, rng_types=[])
        dl.set_epoch(3)
        seen += torch.cat([y for x,y in dl]).tolist()
    order = list(EpochSampler(64, 2))
    assert sorted(seen) == list(range(64)) and seen[:8] != order[:8]         # epoch 3 reached the sampler


# Folders as people have them

@pytest.fixture
def folder(tmp_path):
    "Two classes, ten images of 10x12"
    rng = np.random.default_rng(0)
    for c, name in enumerate(('bird', 'ant')):
        (tmp_path/'mine'/name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(rng.integers(0, 256, (12,10,3),
                                         dtype=np.uint8)).save(tmp_path/'mine'/name/f'{i}.png')
    return tmp_path/'mine'

def test_folder_is_sorted_and_labelled(folder):
    ds = ImageFolder(folder, size=8)
    assert ds.classes == ['ant','bird'] and ds.labels.tolist() == [0]*5+[1]*5
    assert ([f'{p.parent.name}/{p.stem}' for p in ds.files] == [f'{c}/{i}' for c in ('ant','bird')
                                                                for i in range(5)])
    x, y = ds[3]
    assert x.shape == (3,8,8) and y == 0 and torch.equal(ds[[3]][0][0], x)

def test_folder_of_images_only_is_one_class(folder):
    ds = ImageFolder(folder/'ant', size=8, channels=1)
    assert ds.classes == ['ant'] and ds[:][0].shape == (5,1,8,8)

def test_hidden_files_and_loops_are_harmless(folder):
    (folder/'.thumbs').mkdir()
    (folder/'ant'/'.x.png').write_bytes(b'')
    (folder/'ant'/'up').symlink_to(folder)
    (folder/'again').symlink_to(folder)
    (folder/'ant'/'notes.txt').write_text('no image')
    assert len(ImageFolder(folder, size=8)) == 10

def test_linked_class_folders_are_followed(folder, tmp_path):
    (tmp_path/'linked').mkdir()
    (tmp_path/'linked'/'bee').symlink_to(folder/'ant')
    assert ImageFolder(tmp_path/'linked', size=8).classes == ['bee']

def test_subset_and_load_are_one_fixed_draw(folder):
    ds = ImageFolder(folder, size=8)
    few = ds.subset(4)
    many = ds.load(7)
    assert torch.equal(to_uint8(few[:][0]), many.images[:4]) and many.name.endswith('mine[:7]')
    assert torch.equal(ds.load().images[:7], many.images)
    assert torch.equal(to_uint8(ds.subset([9])[:][0]), to_uint8(ds[[9]][0]))

def test_folder_hash_follows_names_contents_and_crop(folder):
    first = ImageFolder(folder, size=8)
    assert ImageFolder(folder, size=8).hash == first.hash != ImageFolder(folder, size=9).hash
    assert first.subset(5).hash != first.hash
    p = first.files[0]
    when = first.files[0].stat()
    raw = bytearray(p.read_bytes())
    raw[-20] ^= 1
    p.write_bytes(raw)
    os.utime(p, ns=(when.st_atime_ns, when.st_mtime_ns))             # same name, size and date
    assert ImageFolder(folder, size=8).hash != first.hash

def test_load_images_by_name(folder, tmp_path):
    assert load_images('fashion_mnist', n=5).name == 'fashion_mnist/test[:5]'
    assert isinstance(load_images(folder, size=8), ImageSet)
    assert isinstance(load_images(folder, size=8, memory=0.), ImageFolder)
    folder.rename(tmp_path/'train')
    assert len(load_images(tmp_path, 'train', size=8)) == 10
    with pytest.raises(FileNotFoundError, match="has train and no 'test'"):
        load_images(tmp_path, 'test', size=8)


def save(tmp_path, name, image, **kwargs):
    image.save(tmp_path/name, **kwargs)
    return tmp_path/name

def test_sixteen_bits_are_scaled(tmp_path):
    wide = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    p = save(tmp_path, 'a.png', Image.fromarray(wide))
    assert np.asarray(read_image(p, 1)).tolist() == [[0, 1, 1, 128, 255]]
    assert read_image(p, 3).mode == 'RGB'
    p = save(tmp_path, 'a.tiff', Image.fromarray(wide))
    assert np.asarray(read_image(p, 1)).tolist() == [[0, 1, 1, 128, 255]]

def test_transparency_lies_over_white(tmp_path):
    half = Image.new('RGBA', (1,1), (0,0,0,128))
    assert read_image(save(tmp_path, 'a.png', half)).getpixel((0,0)) == (127,)*3
    grey = Image.new('LA', (1,1), (0,0))
    assert read_image(save(tmp_path, 'b.png', grey), 1).getpixel((0,0)) == 255
    palette = Image.new('P', (1,1), 3)
    palette.putpalette([0,0,0]*3+[9,8,7])
    assert read_image(save(tmp_path, 'c.png', palette)).getpixel((0,0)) == (9,8,7)
    assert read_image(save(tmp_path, 'd.png', palette, transparency=3)).getpixel((0,0)) == (255,255,255)
    assert (read_image(save(tmp_path, 'e.webp', Image.new('RGBA', (8,8), (255,0,0,0)),
                            lossless=True)).getpixel((4,4)) == (255,255,255))

def test_cmyk_and_bilevel(tmp_path):
    red = read_image(save(tmp_path, 'a.jpg', Image.new('CMYK', (16,16), (0,255,255,0)),
                          quality=95)).getpixel((8,8))
    assert red[0] > 240 and max(red[1:]) < 15
    assert read_image(save(tmp_path, 'b.png', Image.new('1', (2,2), 1))).getpixel((0,0)) == (255,255,255)

@pytest.mark.parametrize('suffix', ['png', 'jpg', 'webp'])
def test_exif_turns_the_picture_upright(tmp_path, suffix):
    image = Image.new('RGB', (40,20), 'black')
    image.paste('white', (0,0,20,20))  # white on the left
    exif = Image.Exif()
    exif[274] = 6  # turn a quarter clockwise
    up = read_image(save(tmp_path, f'a.{suffix}', image, exif=exif))
    assert up.size == (20,40) and min(up.getpixel((10,5))) > 200 and max(up.getpixel((10,35))) < 50

def test_upscale_is_asked_for(folder):
    assert ImageFolder(folder, size=20, upscale=True)[0][0].shape == (3,20,20)


# Token caches

def levels(x): return to_uint8(x).flatten(1)[:,::49].long()

def test_cache_types(tmp_path):
    ds = fashion_mnist('test', 30)
    small = TokenCache.build(tmp_path/'a', ds, levels, codebook_size=256)
    large = TokenCache.build(tmp_path/'b', ds, lambda x: levels(x)*1000, codebook_size=256_000)
    floats = TokenCache.build(tmp_path/'c', ds, lambda x: x.reshape(len(x), 49, 16).bfloat16())
    exact = TokenCache.build(tmp_path/'d', ds, lambda x: x.reshape(len(x), 49, 16), dtype='float32',
                             batch_size=7)
    assert ([c.array.dtype.name for c in (small, large, floats, exact)] == ['uint16','int32','float16',
                                                                            'float32'])
    assert isinstance(small.ids, np.memmap) and small.ids.shape == (30,16)
    assert torch.equal(exact[3:5][0], ds[3:5][0].reshape(2, 49, 16)) and floats[0][0].dtype == torch.float32
    ids, y = large[[29,0]]
    assert torch.equal(ids, levels(ds[[29,0]][0])*1000) and torch.equal(y, ds.labels[[29,0]])

def test_cache_is_opened_not_rebuilt(tmp_path):
    ds = fashion_mnist('test', 20)
    first = TokenCache.build(tmp_path/'a', ds, levels, key='k')
    def never(x): raise AssertionError('encoded again')
    again = TokenCache.build(tmp_path/'a', ds, never, key='k')
    assert np.array_equal(first.ids, again.ids) and first.hash == again.hash and again.classes == ds.classes

def test_cache_travels_to_workers(tmp_path):
    cache = TokenCache.build(tmp_path/'a', fashion_mnist('test', 20), levels, key='k')
    copy = pickle.loads(pickle.dumps(cache))
    assert isinstance(copy.ids, np.memmap) and torch.equal(copy[:][0], cache[:][0])

def test_labels():
    assert (check_labels(3, 10).tolist() == 3
            and check_labels(torch.tensor([1,2], dtype=torch.int32), 3).dtype == torch.int64)


# many files
def test_a_training_on_many_files_begins_at_once(folder, monkeypatch):
    "Nothing is hashed and only the first batch is read before the first step; later epochs read nothing"
    import tokkit.data.files as files
    import tokkit.data.image_folder as module
    read, hashed = [], []
    real = module.read_image
    monkeypatch.setattr(module, 'read_image', lambda *a: read.append(a) or real(*a))
    monkeypatch.setattr(files, 'file_sha256', lambda p: hashed.append(p) or 'sum')
    monkeypatch.setattr(files, 'READ_UP_TO', 0)
    monkeypatch.setattr('tokkit.data.sources.READ_AT_ONCE', 5)
    ds = load_images(folder, size=8)
    assert isinstance(ds, ImageFolder) and ds.hash and not hashed and not read
    batches = iter(loader(ds, 2))
    next(batches)
    assert len(read) == 2
    list(batches)
    assert len(read) == len(ds)
    list(loader(ds, 2))
    assert len(read) == len(ds), "what was read stays in memory"
    assert torch.equal(ds[:][0], ImageFolder(folder, size=8).load()[:][0])

@pytest.mark.parametrize('how', ['', 'contents', 'times'])
def test_what_tells_files_apart(folder, monkeypatch, how):
    monkeypatch.setenv('TOKKIT_FINGERPRINT', how)
    before = ImageFolder(folder, size=8).hash
    p = ImageFolder(folder, size=8).files[0]
    when = p.stat()
    raw = bytearray(p.read_bytes())
    raw[-20] ^= 1
    p.write_bytes(raw)
    os.utime(p, ns=(when.st_atime_ns, when.st_mtime_ns))
    assert (ImageFolder(folder, size=8).hash == before) == (how == 'times')
    os.utime(p, ns=(when.st_atime_ns, when.st_mtime_ns+1))
    assert ImageFolder(folder, size=8).hash != before
    monkeypatch.setenv('TOKKIT_FINGERPRINT', 'dates')
    with pytest.raises(ValueError, match='must be contents or times'): ImageFolder(folder, size=8).hash

def test_processes_read_ahead_and_change_nothing(folder):
    from tokkit.data import Augmented
    for ds in (ImageFolder(folder, size=8), Augmented(ImageFolder(folder, size=8))):
        assert ds.on_disk
        ahead, here = (loader(ds, 3, seed=1, workers=workers) for workers in (None, 0))
        assert ahead.num_workers >= 1
        for epoch in range(2):
            for part in (ahead, here, ds):
                if hasattr(part, 'set_epoch'): part.set_epoch(epoch)
            for one, other in zip(ahead, here, strict=True): assert all(map(torch.equal, one, other))

def test_labels_of_loose_images(folder, tmp_path):
    "ImageNet's validation images lie in one folder, and a file names their classes"
    home = tmp_path/'imagenet'
    (home/'val').mkdir(parents=True)
    folder.rename(home/'train')
    files = ImageFolder(home/'train', size=8).files
    for i,p in enumerate(files[::-1]): (home/'val'/f'ILSVRC2012_val_{i:08}.png').write_bytes(p.read_bytes())
    rows = [f'ILSVRC2012_val_{i:08},{p.parent.name} 1 2 3 4' for i,p in enumerate(files[::-1])]
    (home/'LOC_val_solution.csv').write_text('ImageId,PredictionString\n'+'\n'.join(rows))
    train, val = (load_images(home, split, size=8) for split in ('train', 'test'))
    assert val.classes == train.classes and len(val) == len(train)
    by_name = ImageFolder(home/'val', size=8)
    told = {p.stem: train.classes[y] for p,y in zip(by_name.files, by_name.labels.tolist())}
    assert told == {f'ILSVRC2012_val_{i:08}': p.parent.name for i,p in enumerate(files[::-1])}
    before = by_name.hash
    first, last = train.classes[0], train.classes[-1]
    assert first != last
    swapped = [row.replace(f',{first} ', ',x ').replace(f',{last} ', f',{first} ').replace(',x ', f',{last} ')
               for row in rows]
    (home/'LOC_val_solution.csv').write_text('ImageId,PredictionString\n'+'\n'.join(swapped))
    assert ImageFolder(home/'val', size=8).hash != before, "other labels are other data"
    (home/'val'/'stranger.png').write_bytes(files[0].read_bytes())
    with pytest.raises(ValueError, match='names no class for 1 images, first stranger.png'):
        load_images(home, 'test', size=8)

def test_class_names_may_hold_spaces(folder, tmp_path):
    files = [p for p in ImageFolder(folder, size=8).files][:3]
    (tmp_path/'dogs').mkdir()
    names = 'golden retriever', 'golden eagle', 'cat'
    for i,p in enumerate(files): (tmp_path/'dogs'/f'my pic {i}.png').write_bytes(p.read_bytes())
    rows = [f'my pic {i}.png,{name}' for i,name in enumerate(names)]
    (tmp_path/'dogs'/'labels.csv').write_text('\ufefffile,class\n'+'\n'.join(rows), encoding='utf-8')
    ds = ImageFolder(tmp_path/'dogs', size=8)
    assert [ds.classes[y] for y in ds.labels] == list(names)
    # a file beside the folder that is about something else is let alone
    (tmp_path/'dogs'/'labels.csv').unlink()
    (tmp_path/'val.txt').write_text('000001\n000002\n')
    assert ImageFolder(tmp_path/'dogs', size=8).classes == ['dogs']

def test_a_broken_image_is_told_alike_from_a_process(folder, monkeypatch):
    from torch import nn
    from tokkit.data import Augmented
    from tokkit.training import Learner, Phase
    victim = ImageFolder(folder, size=8).files[0]
    victim.write_bytes(victim.read_bytes()[:60])
    told = []
    for workers in ('0', '2'):
        monkeypatch.setenv('TOKKIT_WORKERS', workers)
        batches = loader(Augmented(ImageFolder(folder, size=8)), 2)
        assert batches.num_workers == int(workers)
        net = nn.Linear(1, 1)
        phase = Phase(lambda *a: dict(loss=net.weight.sum()), torch.optim.SGD(net.parameters(), .1))
        with pytest.raises(OSError) as e: Learner(net, batches, phase, 1, device='cpu').fit()
        told.append(str(e.value))
    assert told[0] == told[1] and 'cannot be read' in told[0] and 'Traceback' not in told[0]

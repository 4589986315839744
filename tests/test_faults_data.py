"Bad input for data: each ends in one line that says what was expected, what came, and what to do"
import errno, shutil

import numpy as np, pytest, torch
from PIL import Image

from tokkit.data import images as data
from tokkit.data import token_cache
from tokkit.data import (ImageFolder, ImageSet, center_crop, check_labels, fashion_mnist, load_images, loader,
                         to_uint8)
from tokkit.data import TokenCache


def says(error, call, *words):
    "`call` raises `error` with a message of one line that has all the words"
    with pytest.raises(error) as e: call()
    told = str(e.value)
    assert '\n' not in told and all(w in told for w in words), told


# IDX files

@pytest.fixture
def idx(root, tmp_path):
    "A copy of the test split"
    data._idx.cache_clear()
    for p in (root/'data'/'fashion_mnist').glob('t10k*.gz'): shutil.copy(p, tmp_path)
    return tmp_path

def test_intact_copy_loads(idx): assert len(fashion_mnist('test', root=idx)) == 10_000

def test_missing_file(idx):
    (idx/'t10k-labels-idx1-ubyte.gz').unlink()
    says(FileNotFoundError, lambda: fashion_mnist('test', root=idx), 't10k-labels-idx1-ubyte.gz',
         'four .gz files')

@pytest.mark.parametrize('damage',
                         [lambda b: b[:-50], lambda b: b[:2000]+bytes([b[2000]^1])+b[2001:], lambda b: b'',
                          lambda b: b'<html>'])
def test_damaged_file(idx, damage):
    p = idx/'t10k-labels-idx1-ubyte.gz'
    p.write_bytes(damage(p.read_bytes()))
    says(ValueError, lambda: fashion_mnist('test', root=idx), str(p), 'is damaged', 'SHA-256', 'fetched anew')

def test_failed_download_leaves_nothing(monkeypatch, tmp_path):
    def fetch(url, timeout): raise OSError('no route to host')
    monkeypatch.setattr(data.urllib.request, 'urlopen', fetch)
    monkeypatch.setattr(data, '_CHECKOUT', tmp_path/'none')           # no checkout here
    monkeypatch.setenv('TOKKIT_DATA', str(tmp_path/'home'))
    says(OSError, lambda: fashion_mnist('test'), 'cannot fetch', 'no route to host', 'by hand')
    assert not list((tmp_path/'home').rglob('*.*'))

def test_download_with_a_wrong_checksum_is_not_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(data.urllib.request, 'urlopen', lambda url, timeout: open(__file__, 'rb'))
    monkeypatch.setattr(data, '_CHECKOUT', tmp_path/'none')
    monkeypatch.setenv('TOKKIT_DATA', str(tmp_path/'home'))
    says(ValueError, lambda: fashion_mnist('test'), 'is damaged')
    assert not list((tmp_path/'home').rglob('*.*'))

def test_download_is_kept(monkeypatch, tmp_path, root):
    monkeypatch.setattr(data.urllib.request, 'urlopen', lambda url,
                        timeout: open(root/'data'/'fashion_mnist'/url.split('/')[-1], 'rb'))
    monkeypatch.setattr(data, '_CHECKOUT', tmp_path/'none')
    monkeypatch.setenv('TOKKIT_DATA', str(tmp_path/'home'))
    assert len(fashion_mnist('test')) == 10_000
    assert len(list((tmp_path/'home'/'fashion_mnist').iterdir())) == 2

@pytest.mark.parametrize('arguments, words', [
    (dict(split='validation'), ["'train' or 'test'", "'validation'"]), (dict(n=0), ['1..60000', 'got 0']),
    (dict(n=60_001), ['got 60001']), (dict(size=27), ['at least 28', 'got 27'])])
def test_arguments(arguments, words): says(ValueError, lambda: fashion_mnist(**arguments), *words)


# Folders

@pytest.fixture
def folder(tmp_path):
    for name in ('ant', 'bee'):
        (tmp_path/name).mkdir()
        for i in range(3):
            Image.effect_noise((32,32), 50).convert('RGB').save(tmp_path/name/f'{i}.{"jpg" if i else "png"}')
    return tmp_path

def cut(p): p.write_bytes(p.read_bytes()[:len(p.read_bytes())//2])

def test_nothing_there(tmp_path):
    says(FileNotFoundError, lambda: ImageFolder(tmp_path/'no'), 'no folder')
    says(ValueError, lambda: ImageFolder(tmp_path), 'no images in', '.png')
    (tmp_path/'a.txt').write_text('')
    says(NotADirectoryError, lambda: ImageFolder(tmp_path/'a.txt'), 'a.txt')

def test_empty_class_and_stray_image(folder):
    (folder/'cow').mkdir()
    says(ValueError, lambda: ImageFolder(folder), 'cow holds no images')
    (folder/'cow').rmdir()
    shutil.copy(folder/'ant'/'0.png', folder/'x.png')
    says(ValueError, lambda: ImageFolder(folder), '1 images (x.png', 'beside its class folders')

def test_broken_images_are_named_and_counted(folder):
    cut(folder/'ant'/'0.png')
    cut(folder/'bee'/'2.jpg')
    (folder/'bee'/'1.jpg').write_bytes(b'not an image')
    ds = ImageFolder(folder, size=16)
    says(OSError, lambda: ds[:], '3 of 6 images cannot be read', 'ant/0.png', 'bee/1.jpg', 'bee/2.jpg',
         'skip_broken=True')
    says(OSError, lambda: ds.load(), '3 of 6')
    says(OSError, lambda: ds[0], '1 of 1', 'ant/0.png')
    assert sorted(ds.check()) == [0,4,5]
    with pytest.warns(UserWarning, match='3 of 6 images cannot be read: ant/0.png'):
        good = ImageFolder(folder, size=16, skip_broken=True)
    assert good.labels.tolist() == [0,0,1] and good[:][0].shape == (3,3,16,16)

def test_dangling_link_is_unreadable(folder):
    (folder/'ant'/'3.png').symlink_to(folder/'gone.png')
    says(OSError, lambda: ImageFolder(folder, size=16)[:], '1 of 7', 'ant/3.png')

def test_all_broken(folder):
    for p in folder.rglob('*.*'): cut(p)
    says(ValueError, lambda: ImageFolder(folder, size=16, skip_broken=True), '6 of 6', 'nothing is left')

def test_too_small(folder):
    says(ValueError, lambda: ImageFolder(folder, size=64)[0], 'ant/0.png', '32x32', 'size=64', 'upscale=True')
    says(ValueError, lambda: center_crop(Image.new('L', (9,9)), 0), 'got 0')

def test_pixels_without_a_range(tmp_path):
    Image.fromarray(np.ones((8,8), np.float32)).save(tmp_path/'a.tiff')
    says(OSError, lambda: ImageFolder(tmp_path, size=8)[0], 'a.tiff', 'floating point')

def test_unknown_name(tmp_path):
    says(FileNotFoundError, lambda: load_images('mnist'), "'mnist'", "'fashion_mnist'", 'or a folder')
    says(ValueError, lambda: load_images('fashion_mnist', split='dev'), "'dev'")
    says(ValueError, lambda: ImageFolder(tmp_path, channels=4), '3 (RGB) or 1 (grey), got 4')


# Sets, labels, loaders

def test_image_set():
    images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    assert ImageSet(images[:,:,:1]).shape == (1, 1, 2)
    says(ValueError, lambda: ImageSet(images, torch.tensor([0,1,2,3]), ['a','b']), '0..1 (2 classes)',
         '2 outside, first 2')
    says(IndexError, lambda: ImageSet(images)[4], '0..3')
    says(IndexError, lambda: ImageSet(images)[torch.tensor([True,False])], 'one entry for each of the 4')
    says(IndexError, lambda: ImageSet(images)[[.5]], 'whole numbers')

@pytest.mark.parametrize('labels', [[10], [-1], [0,99], [1.5], [True]])
def test_labels(labels): says(ValueError, lambda: check_labels(labels, 10), '0..9')

def test_loader_without_a_batch():
    says(ValueError, lambda: loader(fashion_mnist('test', 5), 6), 'batch_size=6 leaves no batch of 5',
         'drop_last=False')

def test_nan_is_no_pixel(): says(ValueError, lambda: to_uint8(torch.full((2,), torch.nan)), 'NaN')


# Token caches

def levels(x): return to_uint8(x).flatten(1)[:,::49].long()

@pytest.fixture
def cache(tmp_path):
    return TokenCache.build(tmp_path/'cache', fashion_mnist('test', 20), levels, key='made by A').folder

def test_another_key(cache):
    says(ValueError, lambda: TokenCache.open(cache, 'made by B'), "'made by A'", "expected 'made by B'",
         'delete the folder')
    says(ValueError, lambda: TokenCache.build(cache, fashion_mnist('test', 20), levels, key='made by B'),
         "'made by A'")

@pytest.mark.parametrize('file', ['tokens.npy', 'labels.npy'])
@pytest.mark.parametrize('damage', [lambda b: b[:-3], lambda b: b[:-1]+bytes([b[-1]^1]), lambda b: b''])
def test_damaged_cache(cache, file, damage):
    (cache/file).write_bytes(damage((cache/file).read_bytes()))
    says(ValueError, lambda: TokenCache.open(cache), file, 'damaged', 'build it again')

def test_truncated_cache_without_checksums(cache):
    (cache/'tokens.npy').write_bytes((cache/'tokens.npy').read_bytes()[:-3])
    says(ValueError, lambda: TokenCache.open(cache, verify=False), 'damaged', 'build it again')

def test_incomplete_cache(cache, tmp_path):
    (cache/'cache.json').write_text('{"key": ')
    says(ValueError, lambda: TokenCache.open(cache), 'cache.json', 'damaged')
    (cache/'cache.json').unlink()
    says(FileNotFoundError, lambda: TokenCache.open(cache), 'cache.json missing', 'build it again')
    says(FileNotFoundError, lambda: TokenCache.open(tmp_path/'none'), 'no token cache')

@pytest.mark.parametrize('encode, arguments, words', [
    (lambda x: levels(x)-1, {}, ['0..65535', 'got -1']),
    (levels, dict(codebook_size=100), ['0..99', '..255']),
    (lambda x: levels(x)*1000, dict(dtype='uint16', codebook_size=10**6), ['0..65535']),
    (lambda x: levels(x)/0., {}, ['float16', 'nan']),
    (levels, dict(dtype='float32'), ['int64', 'float32']),
    (lambda x: levels(x)[:-1], {}, ['19 rows for 20 images']),
    (levels, dict(dtype='int8'), ["got 'int8'"])])
def test_bad_codes_leave_nothing(tmp_path, encode, arguments, words):
    says(ValueError, lambda: TokenCache.build(tmp_path/'c', fashion_mnist('test', 20), encode, **arguments),
         *words)
    assert not list(tmp_path.iterdir())

def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(path, o): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(token_cache, 'write_json', full)
    says(OSError, lambda: TokenCache.build(tmp_path/'c', fashion_mnist('test', 20), levels),
         'No space left on device')
    assert not list(tmp_path.iterdir())

def test_latents_are_not_ids(cache, tmp_path):
    says(ValueError, lambda: TokenCache.open(cache).latents, 'holds ids, not latents', '.ids')
    floats = TokenCache.build(tmp_path/'f', fashion_mnist('test', 5), lambda x: x.flatten(2))
    says(ValueError, lambda: floats.ids, 'holds latents, not ids')

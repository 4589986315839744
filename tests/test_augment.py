"Random crops and mirrors: recorded values, properties, and that (seed, epoch, position) decides everything"
import hashlib, pickle, random
from pathlib import Path

import numpy as np, pytest, torch
from accelerate import Accelerator
from hypothesis import given, strategies as st
from PIL import Image

from tokkit.data import Augmented, crop_at, mirror, random_crop, resize_shorter
from tokkit.core import make_rng
from tokkit.data import ImageFolder, ImageSet, fashion_mnist, loader
from tokkit.training import Learner, Phase


def noise(h:int, w:int, channels:int = 1) -> Image.Image:
    pixels = torch.randint(256, (h,w,channels), generator=make_rng(0, 'noise', h, w), dtype=torch.uint8)
    return Image.fromarray(pixels.squeeze(2).numpy())


# Crops

RECORDED = [(10, 20, 'e5c601b2064c574e'), (11, 19, '21e5811ccc0c6b77'), (12, 39, '6b4792bab7b62540'),
            (13, 36, '5fce8fe8f269c32d')]

def as_there(image:Image.Image, size:int, seed:int) -> tuple[int, np.ndarray]:
    "With Python's generator, as the reference implementation draws: the side, then top, then left"
    draw = random.Random(seed)
    side = draw.randrange(size, int(1.25*size)+1)
    resized = resize_shorter(image, side)
    top = draw.randrange(resized.height-size+1)
    left = draw.randrange(resized.width-size+1)
    return side, np.asarray(crop_at(image, size, side, top, left))

@pytest.mark.parametrize('i', range(4))
def test_crop_as_recorded(fixtures, i):
    with np.load(fixtures/'crops.npz') as r:
        side, crop = as_there(Image.fromarray(r[f'center{i}.in']), int(r['sizes'][i]), int(r['seeds'][i]))
        assert side == r[f'random{i}.smaller_dim'] and np.array_equal(crop, r[f'random{i}.out'])

@pytest.mark.parametrize('i', range(4))
def test_crop_has_the_recorded_digest(i):
    "The same where the recorded values are not at hand: seed, side and SHA-256 of the crop"
    seed, expected, digest = RECORDED[i]
    with np.load(Path(__file__).parent/'golden'/'center_crop.npz') as g:
        side, crop = as_there(Image.fromarray(g[f'center{i}.in']), int(g['sizes'][i]), seed)
    assert (side, hashlib.sha256(crop.tobytes()).hexdigest()[:16]) == (expected, digest)

@given(st.integers(8, 90), st.integers(8, 90), st.integers(1, 8), st.floats(1, 3), st.integers(0, 99))
def test_crop_is_one_of_the_crops(h, w, size, larger, seed):
    image = noise(h, w)
    rng = make_rng(seed)
    side = size+int(torch.randint(int(larger*size)-size+1, (), generator=rng))
    corner = []
    for length in (resize_shorter(image, side).height, resize_shorter(image, side).width):
        corner.append(int(torch.randint(length-size+1, (), generator=rng)))
    got = random_crop(image, size, make_rng(seed), larger)
    assert (got.size == (size,size)
            and np.array_equal(np.asarray(got), np.asarray(crop_at(image, size, side, *corner))))

def test_every_side_is_drawn(monkeypatch):
    sides = []
    monkeypatch.setattr('tokkit.data.augment.resize_shorter', lambda image, side: sides.append(side)
                        or resize_shorter(image, side))
    for i in range(900): random_crop(noise(20, 20), 16, make_rng(i))
    assert sorted(set(sides)) == [16,17,18,19,20]
    assert min(map(sides.count, set(sides))) > 130                                   # 180 each are expected

@pytest.mark.parametrize('size, larger, told',
                         [(0, 1.25, 'size must be at least 1'), (8, .9, 'larger must be at least 1'),
    (8, float('nan'), 'larger must be'), (8, float('inf'), 'larger must be'),
                          (21, 1.25, 'image is 30x20, smaller than size=21')])
def test_crop_refuses_in_one_line(size, larger, told):
    with pytest.raises(ValueError, match=told) as e: random_crop(noise(20, 30), size, make_rng(0), larger)
    assert '\n' not in str(e.value)

def test_upscale_only_when_asked():
    assert random_crop(noise(20, 30), 21, make_rng(0), upscale=True).size == (21,21)

@pytest.mark.parametrize('top, left', [(-1,0), (0,-1), (5,0), (0,15)])
def test_crop_stays_inside(top, left):
    with pytest.raises(ValueError, match='top must be' if left == 0 else 'left must be'):
        crop_at(noise(20, 30), 16, 20, top, left)

@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_mirror_is_the_image_or_its_mirror(h, w, seed):
    image = noise(h, w)
    a = np.asarray(image)
    b = np.asarray(mirror(image, make_rng(seed)))
    assert np.array_equal(b, a) or np.array_equal(b, a[:,::-1])
    assert np.array_equal(np.asarray(mirror(mirror(image, make_rng(seed), 1.), make_rng(seed), 1.)), a)


# Data sets

@pytest.fixture(scope='module')
def clothes() -> ImageSet: return fashion_mnist('test', n=60)

def epochs(ds:Augmented, n:int = 3) -> list[torch.Tensor]:
    out = []
    for e in range(n):
        ds.set_epoch(e)
        out.append(ds[:][0])
    return out

def test_indexed_like_its_images(clothes):
    ds = Augmented(clothes)
    x, y = ds[:5]
    assert (x.shape == (5,1,28,28) and x.dtype == torch.float32 and x.is_contiguous()
            and -1 <= x.min() < x.max() <= 1)
    assert torch.equal(y, clothes.labels[:5]) and ds[3][1] == int(y[3]) and isinstance(ds[3][1], int)
    for got in (ds[[3,1]][0], ds.__getitems__([3,1])[0], ds[torch.tensor([3,1])][0],
                torch.stack([ds[3][0], ds[-59][0]])):
        assert torch.equal(got, x[[3,1]])
    assert ds[:0][0].shape == (0,1,28,28) and len(ds) == 60
    assert ((ds.classes, ds.channels, ds.size, ds.name) == (clothes.classes, 1, 28, clothes.name)
            and torch.equal(ds.labels, clothes.labels))
    with pytest.raises(IndexError, match='index must be in 0..59'): ds[60]

def test_seed_epoch_and_position_decide(clothes):
    a = epochs(Augmented(clothes))
    b = epochs(Augmented(clothes))
    assert all(torch.equal(p, q) for p, q in zip(a, b))
    assert all((p != q).flatten(1).any(1).float().mean() > .9 for p,
               q in [(a[0],a[1]), (a[1],a[2]), (a[0],a[2])])
    assert not torch.equal(a[0], epochs(Augmented(clothes, seed=1), 1)[0])
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # nobody's global generator plays a part
    assert torch.equal(epochs(Augmented(clothes), 1)[0], a[0])
    # the same image at two positions
    twice = ImageSet(clothes.images[[0,0]])
    assert not torch.equal(*Augmented(twice)[:][0])

def test_nothing_to_draw_changes_nothing(clothes):
    assert torch.equal(Augmented(clothes, larger=1, mirror=False)[:][0], clothes[:][0])
    # int(28.28) is 28
    assert torch.equal(Augmented(clothes, larger=1.01, mirror=False)[:][0], clothes[:][0])

def test_mirror_alone(clothes):
    x = clothes[:][0]
    got = Augmented(clothes, larger=1)[:][0]
    same, turned = ((got == t).flatten(1).all(1) for t in (x, x.flip(3)))
    assert (same|turned).all() and 15 < int(turned.sum()) < 45

def test_hash_names_every_setting(clothes):
    changes = [{}, dict(size=20), dict(larger=1.5), dict(mirror=False), dict(seed=1), dict(upscale=True)]
    assert (len({Augmented(clothes, **c).hash for c in changes}
                | {clothes.hash, Augmented(clothes.subset(50)).hash}) == len(changes)+2)
    ds = Augmented(clothes)
    before = ds.hash
    ds.set_epoch(4)
    assert ds.hash == before == Augmented(clothes).hash

def test_smaller_squares_and_colour():
    ds = Augmented(ImageSet(torch.randint(256, (4,3,40,40), dtype=torch.uint8)), size=16)
    assert ds[:][0].shape == (4,3,16,16) and ds.size == 16 and '3x16x16' in repr(ds) and '16..20' in repr(ds)

@pytest.mark.parametrize('settings, told',
                         [(dict(size=29), 'is 28x28, smaller than size=29'), (dict(size=0), 'size must be'),
                                            (dict(larger=.99), 'larger must be')])
def test_refuses_in_one_line(clothes, settings, told):
    with pytest.raises(ValueError, match=told) as e: Augmented(clothes, **settings)
    assert '\n' not in str(e.value)

def test_refuses_what_is_no_set_of_images(clothes):
    with pytest.raises(ValueError, match='expected an ImageSet or ImageFolder, got Augmented'):
        Augmented(Augmented(clothes))
    with pytest.raises(ValueError, match='1 or 3 channels, got 2'):
        Augmented(ImageSet(torch.zeros(1,2,8,8, dtype=torch.uint8)))
    assert Augmented(clothes, 32, upscale=True)[0][0].shape == (1,32,32)

def test_folder_is_cut_from_whole_pictures(tmp_path):
    image = noise(40, 60, 3)
    image.save(tmp_path/'a.png')
    noise(40, 60).save(tmp_path/'b.png')
    ds = Augmented(ImageFolder(tmp_path, size=16), larger=1.5, mirror=False)
    ds.set_epoch(2)
    expected = np.asarray(random_crop(image, 16, make_rng(0, 'augment', 2, 0), 1.5)).transpose(2,0,1)
    assert torch.equal(ds[0][0], torch.from_numpy(expected.copy())/127.5-1)
    assert ds[:][0].shape == (2,3,16,16)

def test_folder_names_the_file(tmp_path):
    noise(20, 20).save(tmp_path/'a.png')
    noise(9, 20).save(tmp_path/'b.png')
    (tmp_path/'c.png').write_bytes((tmp_path/'a.png').read_bytes()[:80])
    ds = Augmented(ImageFolder(tmp_path, size=16))
    with pytest.raises(ValueError, match='b.png: image is 20x9, smaller than size=16'): ds[:2]
    with pytest.raises(OSError, match='c.png cannot be read'): ds[2]
    assert Augmented(ImageFolder(tmp_path, size=16, upscale=True))[1][0].shape == (3,16,16)

def test_workers_hear_of_the_epoch(clothes):
    "Worker processes live through the epochs with a copy of the data set; the epoch must reach them"
    ds = Augmented(clothes)
    dl = loader(ds, 20, shuffle=False, workers=1)
    for e, expected in enumerate(epochs(Augmented(clothes), 2)):
        ds.set_epoch(e)
        assert torch.equal(torch.cat([x for x, _ in dl]), expected)

def test_reaches_the_images_through_a_prepared_loader(clothes):
    ds = Augmented(clothes)
    dl = Accelerator(cpu=True).prepare(loader(ds, 20))
    dl.set_epoch(3)
    dl.dataset.set_epoch(3)
    assert ds.epoch == 3 and sum(len(y) for _, y in dl) == 60

def test_survives_pickling(clothes):
    ds = Augmented(clothes)
    ds.set_epoch(2)
    again = pickle.loads(pickle.dumps(ds))
    assert again.epoch == 2 and torch.equal(again[:4][0], ds[:4][0])

def test_learner_says_the_epoch(clothes):
    "Each epoch of a training, also of one that goes on at epoch 1, meets the crops of that epoch"
    def met(start:int) -> list[torch.Tensor]:
        seen = []
        model = torch.nn.Linear(1, 1)
        def step(learner, batch):
            seen.append(batch[0].cpu())
            return dict(loss=model(torch.ones(1, 1)).sum())
        phase = Phase(step, torch.optim.SGD(model.parameters(), lr=0.))
        learner = Learner(model, loader(Augmented(clothes), 60, shuffle=False), phase, 3, device='cpu')
        learner.epoch = start
        learner.fit()
        return seen
    expected = epochs(Augmented(clothes))
    assert all(torch.equal(a, b) for a, b in zip(met(0), expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(met(1), expected[1:], strict=True))

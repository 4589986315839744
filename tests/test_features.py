"Extractors: what they refuse, whose weights they take, what their fingerprint sees"
import json, os, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from tokkit.data import from_uint8
from tokkit.features import (check_images, chunks, clip, CLIP_MEAN, CLIP_STD, dinov2, extract,
                             FeatureExtractor, FeatureFile, fingerprint, get_extractor, HeldFeatures)
from tokkit.features.extractor import _Prepare

GOLDEN = Path(__file__).parent/'golden'/'timm_vit.npz'


def ruled(names:dict) -> dict:
    "Weights that follow the rule by which `golden/timm_vit.npz` was made"
    out = {}
    for i,(k,shape) in enumerate(sorted(names.items())):
        v = (.15*np.sin(np.arange(int(np.prod(shape)), dtype=np.float64)**1.1*1.3+i)
             +('norm' in k and k.endswith('weight')))
        out[k] = torch.from_numpy(v.reshape(shape)).float()
    return out


def recorded(what:str) -> tuple[dict, torch.Tensor]:
    "Weights in timm's names, and timm's answer for two images"
    with np.load(GOLDEN) as g: return ruled(json.loads(str(g[f'{what}.names']))), torch.from_numpy(g[what])


IMAGES = torch.from_numpy(np.sin(np.arange(2*3*42*42, dtype=np.float64)*.37).reshape(2, 3, 42, 42)).float()
MAKE = {'dinov2': dinov2, 'resized': dinov2, 'clip': clip, 'clip-gelu': lambda w,
        size: clip(w, size, quick_gelu=False)}


@pytest.mark.parametrize('what', MAKE)
def test_the_features_are_timms(what):
    weights, theirs = recorded(what)
    eye = MAKE[what](weights, 42)
    with torch.no_grad(): ours = eye.module(IMAGES)
    assert torch.allclose(ours, theirs, atol=2e-5*theirs.abs().max()), (ours-theirs).abs().max()
    assert (eye.name == {'dinov2': 'dinov2', 'resized': 'dinov2', 'clip': 'clip', 'clip-gelu': 'clip'}[what]
            +'.w128d2p14'+'-gelu'*(what == 'clip-gelu')+'@42')


def test_the_two_activations_of_clip_differ():
    weights, theirs = recorded('clip')
    with torch.no_grad():
        assert not torch.allclose(clip(weights, 42, quick_gelu=False).module(IMAGES), theirs, atol=1e-3)


def test_a_file_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv('TOKKIT_DATA', str(tmp_path))
    weights, theirs = recorded('clip')
    save_file(weights, tmp_path/'clip_w128d2p14.safetensors')
    assert get_extractor('clip.w128d2p14@42').fingerprint == clip(weights, 42).fingerprint
    assert get_extractor('clip.w128d2p14@42').prepare.mean.flatten().tolist() == pytest.approx(CLIP_MEAN)
    assert get_extractor('clip.w128d2p14@42').prepare.std.flatten().tolist() == pytest.approx(CLIP_STD)
    save_file(recorded('dinov2')[0], tmp_path/'dinov2_vitb14.safetensors')
    with pytest.raises(ValueError, match=r'holds dinov2.w128d2p14@224, not dinov2.vitb14@224'):
        get_extractor('dinov2')


@pytest.mark.parametrize('name', ['dinov2', 'dinov2.vitl14@224', 'clip', 'clip.vitb16-gelu@224'])
def test_absent_weights_are_named(name, tmp_path, monkeypatch):
    monkeypatch.setenv('TOKKIT_DATA', str(tmp_path))
    with pytest.raises(FileNotFoundError,
                       match=r"wants its weights there as safetensors in timm's names") as e:
        get_extractor(name)
    assert '\n' not in str(e.value) and str(tmp_path) in str(e.value) and name.split('.')[0] in str(e.value)


def without(weights, *keys): return {k: v for k,v in weights.items() if k not in keys}

@pytest.mark.parametrize('make,change,words', [
    (dinov2, lambda w: without(w, 'blocks.1.ls1.gamma'), r'1 missing \(blocks.1.gamma.0\)'),
    (dinov2, lambda w: w|{'reg_token': torch.zeros(1, 4, 128)}, r'1 unknown \(reg_token\)'),
    (dinov2, lambda w: w|{'norm.weight': torch.zeros(3)}, 'of another shape'),
    (dinov2, lambda w: without(w, 'cls_token'), 'with cls_token and patch_embed.proj.weight'),
    (dinov2, lambda w: {}, 'with cls_token and patch_embed.proj.weight'),
    (dinov2, lambda w: recorded('clip')[0], 'unknown'),
    (clip, lambda w: w, r'missing \(norm_pre.weight'),
    (clip, lambda w: without(recorded('clip')[0], 'head.weight'), 'missing'),
    (clip, lambda w: without(recorded('clip')[0], 'norm.bias'), 'missing'),
])
def test_wrong_weights_in_one_line(make, change, words):
    with pytest.raises(ValueError, match=words) as e: make(change(recorded('dinov2')[0]), 42)
    assert '\n' not in str(e.value)


def test_a_damaged_file(tmp_path):
    (tmp_path/'w.safetensors').write_bytes(b'not tensors')
    with pytest.raises(ValueError, match='damaged or no safetensors file'): dinov2(tmp_path/'w.safetensors')


@pytest.mark.parametrize('mode,pil',
                         [('bilinear', Image.Resampling.BILINEAR), ('bicubic', Image.Resampling.BICUBIC)])
@pytest.mark.parametrize('side,size', [(28, 42), (64, 42)])
def test_resizing_is_pillows(mode, pil, side, size):
    # no clipping between Pillow's two passes
    u = np.random.default_rng(0).integers(80, 176, (side, side, 3), dtype=np.uint8)
    theirs = torch.from_numpy(np.array(Image.fromarray(u).resize((size, size), pil))).permute(2, 0, 1)/255
    ours = _Prepare(size, (0., 0., 0.), (1., 1., 1.), mode)(torch.from_numpy(u).permute(2, 0, 1)[None]/255)[0]
    off = (ours-theirs).abs()
    assert off.mean() < .6/255 and off.max() < 2.5/255      # Pillow rounds to bytes, twice


def seen(name='seen', **kw):
    return FeatureExtractor(name, nn.AdaptiveAvgPool2d(2), mean=(0.,)*3, std=(1.,)*3, **kw)

GOOD = torch.zeros(3, 1, 4, 4)
@pytest.mark.parametrize('x,words', [
    (GOOD+255, r'expected images in \[-1,1\], got numbers from 255 to 255'),
    (from_uint8(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))*100, 'got numbers from -100 to -100'),
    (GOOD/0, 'NaN'), (GOOD+float('inf'), 'NaN or infinity'), (GOOD.byte(), 'torch.uint8'),
    (GOOD[0], r'\(b c h w\) in \[-1,1\], got \(1, 4, 4\)'),
                                     (GOOD.expand(-1, 2, -1, -1), 'with 1 or 3 channels'),
    (GOOD[:0], 'at least one image'), ([GOOD, torch.zeros(1, 3, 4, 4)], r'of one shape \(c h w\), got \(1, '
                                                                        r'4, 4\) and then \(3, 4, 4\)'),
                                     ([], 'at least one image'),
    ([GOOD, torch.zeros(1, 1, 5, 5)], r'of one shape'),
])
def test_images_that_are_none(x, words):
    with pytest.raises(ValueError, match=words) as e: extract(seen(), x, 'cpu')
    assert '\n' not in str(e.value)


def test_one_bad_pixel_is_enough():
    x = torch.zeros(100, 1, 4, 4)
    x[99, 0, 3, 3] = float('nan')
    with pytest.raises(ValueError, match='NaN'): extract(seen(), x, 'cpu')


def test_overshoot_is_clamped_as_a_saved_image():
    assert torch.equal(seen()(GOOD+1.6), seen()(GOOD+1)) and torch.equal(seen()(GOOD-3), seen()(GOOD-1))


def test_a_list_of_batches_is_not_a_set():
    x = torch.linspace(-1, 1, 150).view(150, 1, 1, 1).expand(-1, 1, 4, 4)
    assert torch.equal(extract(seen(), list(x.split(40)), 'cpu'), extract(seen(), x, 'cpu'))
    assert sum(map(len, chunks((x[:3], x[3:9]), 4))) == 9


@pytest.mark.parametrize('module,got',
                         [(nn.Flatten(0), r'got \(576,\)'),
                          (type('Pair', (nn.Module,), dict(forward=lambda self, x: (x, x)))(), 'got tuple')])
def test_what_is_no_features(module, got):
    with pytest.raises(ValueError, match=r'mine: expected features \(b d\) or maps \(b d h w\) for 3 '
                                         rf'images, {got}'):
        FeatureExtractor('mine', module, 8)(GOOD)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3))

CHANGES = {
    'a weight': lambda m: m[0].weight.data.view(-1)[7].add_(1e-6),
    'a buffer': lambda m: m[1].running_mean.add_(1e-6),
    'a setting': lambda m: setattr(m[3], 'stride', (2, 2)),
    'eps': lambda m: setattr(m[1], 'eps', 1e-3),
    'a layer': lambda m: m.__setitem__(2, nn.GELU()),
    'the order': lambda m: m.append(m[2]) and m.__delitem__(2),
}
@pytest.mark.parametrize('what', CHANGES)
def test_a_fingerprint_sees(what):
    a = net()
    b = net()
    assert fingerprint(a) == fingerprint(b)
    CHANGES[what](b)
    assert fingerprint(a) != fingerprint(b)


def test_a_fingerprint_sees_code_and_preprocessing_but_no_name():
    def own(forward, **held): return type('Own', (nn.Module,), dict(forward=forward, **held))()
    assert fingerprint(own(lambda self, x: x+1)) == fingerprint(own(lambda self, x: x+1))
    assert fingerprint(own(lambda self, x: x+1)) != fingerprint(own(lambda self, x: x+2))
    assert (fingerprint(own(lambda self, x: self.p,
                            p=property(lambda self: 1))) != fingerprint(own(lambda self, x: self.p,
                                                                            p=property(lambda self: 2))))
    assert (fingerprint(own(lambda self, x: [y+1 for y in x])) != fingerprint(own(lambda self,
                                                                                  x: [y+2 for y in x])))
    prints = [seen(**kw).fingerprint
              for kw in ({}, dict(size=32), dict(size=64), dict(size=32, resize='bicubic'))]
    assert len(set(prints)) == 4 and seen('another name').fingerprint == prints[0]


def test_a_fingerprint_is_the_same_in_every_process():
    code = ("from tokkit.features import efficientnet_lite0 as f; print(f(3, 32).fingerprint, f(3, "
            "64).fingerprint)")
    def said(seed):
        return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                              env=os.environ|{'PYTHONHASHSEED': seed}).stdout.split()
    a = said('1')
    b = said('7')
    assert a == b and a[0] != a[1]


SETTINGS = """
import functools, torch
from torch import nn
from torch.nn import functional as F
from tokkit.features import fingerprint
class Scale:
    def __init__(self, by): self.by = by
    def __call__(self, x): return x*self.by
class Own(nn.Module):
    def __init__(self, act): super().__init__(); self.act = act; self.again = self.forward
    def forward(self, x, of='ccc'): return self.act(x) if of in {'a', 'bb', 'ccc', 'dddd'} else x
def enclosing(p): return lambda x: x*p
def itself():
    def f(x): return f(x-1) if x else 0
    return f
torch.manual_seed(0)
layer, leaky, one = nn.Linear(2, 2), functools.partial(F.leaky_relu, negative_slope=.1), Scale(1)
held = [1, leaky]; held.append(held)
acts = [torch.relu, torch.sigmoid, F.relu, leaky,
        functools.partial(F.leaky_relu, negative_slope=.2), functools.partial(torch.clamp, min=0),
        one, Scale(2), one.__call__, Scale(2).__call__, enclosing(1), enclosing(2), enclosing(torch.relu),
        lambda x, p=3: x*p, lambda x, p=4: x*p, itself(),
        {'x', 'yy', 'zzz'}, frozenset('abcdef'), [torch.relu], {'f': torch.tanh}, held, (torch.tanh, 'tanh'),
        nn.ReLU, nn.GELU, 'a'.join, 'b'.join, object(),
        torch.Generator(), torch.arange(9999), [torch.arange(9999)],
        [torch.arange(9999)+(torch.arange(9999) == 5000)], torch, functools, torch.float16, layer.forward]
print(*[fingerprint(Own(a)) for a in acts])
"""

def test_settings_of_any_kind_have_no_address():
    """Functions of every kind, objects and sets:
    alike in two processes whose memory and order of sets differ, and all of them told apart"""
    def said(seed):
        return subprocess.run([sys.executable, '-c', SETTINGS], capture_output=True, text=True, check=True,
                              env=os.environ|{'PYTHONHASHSEED': seed}).stdout.split()
    a = said('1')
    b = said('7')
    assert a == b and len(a) == len(set(a)) == 35


def test_a_layer_used_twice_is_not_one_used_once():
    layer = nn.Linear(3, 3)
    assert fingerprint(nn.Sequential(layer, layer)) != fingerprint(nn.Sequential(layer))


def test_bicubic_does_not_leave_the_range():
    u = torch.zeros(1, 1, 8, 8)
    u[..., 4:] = 1
    x = _Prepare(24, (0.,), (1.,), 'bicubic')(u)
    assert x.min() == 0 and x.max() == 1


@pytest.mark.parametrize('change,words', [
    (lambda x: x/0, 'got NaN or infinity; look at the network that made them'),
    (lambda x: x.byte(), 'got torch.uint8; see from_uint8'),
    (lambda x: x[0], 'expected images (b c h w) in [-1,1], got (1, 4, 4)')])
def test_check_images(change, words):
    with pytest.raises(ValueError) as e: check_images(change(GOOD))
    assert words in str(e.value)


def test_ways_of_resizing():
    with pytest.raises(ValueError, match="resize must be bilinear or bicubic, got 'nearest'"):
        FeatureExtractor('odd', nn.Identity(), resize='nearest')


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='/dev/full is always full, on Linux')
def test_features_that_find_no_room():
    "The folder is named, and how to name another"
    file = FeatureFile(3)
    file._file = open('/dev/full', 'r+b', buffering=0)
    with pytest.raises(OSError) as e: file.append(torch.zeros(2, 3))
    assert str(e.value).startswith('no room for the features of 2 images in ') and '$TMPDIR' in str(e.value)
    come = HeldFeatures(2)
    with pytest.raises(ValueError, match='expected features of 2 images'): come.append(torch.zeros(3, 3))

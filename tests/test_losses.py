"""What every loss and discriminator must do, whatever the numbers: pull the right way,
leave the frozen alone, survive any batch"""
import copy, sys
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from safetensors.torch import save_file

from tokkit.core import make_rng
from tokkit.training import BatchNormLocal, DiffAug, DinoDiscriminator, Frozen, PatchGAN, blur_fade
from tokkit.layers import ViT, to_timm
from tokkit.training import (ADVERSARIAL, DISCRIMINATORS, LeCAM, PatchDiscriminator, SemanticLoss,
                             adaptive_weight, contrastive_loss, hinge_d, hinge_g, make_discriminator,
                             perceptual_loss, recon_loss)
from tokkit.features import LPIPS, lpips_weights

SMALL_VGG = 4, 8, 16, 32, 32


def draw(*shape, seed=0): return torch.randn(*shape, generator=make_rng(seed))

def images(b=4, c=1, size=28): return draw(b, c, size, size).tanh()

def vit(size=32): return ViT(size, 16, 3, 24, 12, 4, layer_scale=None, gelu='tanh')

@pytest.fixture(scope='module')
def semantic():
    torch.manual_seed(0)
    return SemanticLoss(8)


# meaning

@given(b=st.integers(1, 9), d=st.integers(1, 6), scale=st.floats(.1, 20), seed=st.integers(0, 99))
def test_contrastive_loss_is_symmetric_and_knows_no_order(b, d, scale, seed):
    x = draw(b, d, seed=seed)
    y = draw(b, d, seed=seed+1)
    order = torch.randperm(b, generator=make_rng(seed))
    loss = contrastive_loss(x, y, scale)
    assert loss >= -1e-6 and torch.allclose(loss, contrastive_loss(y, x, scale), rtol=1e-4, atol=1e-5)
    assert torch.allclose(loss, contrastive_loss(x[order], y[order], scale), rtol=1e-4, atol=1e-5)

def test_contrastive_loss_falls_when_followed():
    a = draw(16, 8).requires_grad_()
    b = draw(16, 8, seed=1)
    before = contrastive_loss(a, b)
    (g,) = torch.autograd.grad(before, a)
    assert contrastive_loss(a-g, b) < before

def test_semantic_loss_teaches_latents_and_projection_only(semantic):
    zq = draw(4, 9, 8).requires_grad_()
    semantic(zq, images()).backward()
    assert zq.grad.abs().sum() > 0 and all(p.grad.abs().sum() > 0 for p in semantic.parameters())
    assert ([k for k, _ in semantic.named_parameters()] == list(semantic.state_dict()) == ['project.weight',
                                                                                           'project.bias'])
    assert not any(p.requires_grad or p.grad is not None for p in semantic.teacher.module.parameters())

def test_teacher_moves_along_but_never_trains(semantic):
    moved = copy.deepcopy(semantic).double().train()
    assert ({p.dtype for p in moved.teacher.module.parameters()} == {torch.float64}
            and not moved.teacher.module.training)
    assert next(semantic.teacher.module.parameters()).dtype == torch.float32

def test_grey_and_rgb_mean_the_same(semantic):
    x = images()
    assert torch.equal(semantic.features(x), semantic.features(x.expand(-1, 3, -1, -1)))

def test_semantic_loss_under_autocast_is_the_same(semantic):
    zq = draw(4, 9, 8)
    x = images()
    with torch.autocast('cpu', torch.bfloat16): got = semantic(zq.bfloat16(), x)
    assert got.dtype == torch.float32 and torch.allclose(got, semantic(zq.bfloat16().float(), x), rtol=1e-5)

@pytest.mark.parametrize('shape', [(4, 7), (4, 7, 2, 2), (4, 5, 7)])
def test_any_module_may_teach(shape):
    class Teacher(torch.nn.Module):
        def forward(self, x): return torch.ones(len(x), *shape[1:])
    teacher = Teacher()
    for kind in ('class', 'patch') if len(shape) > 2 else ('class',):
        assert torch.isfinite(SemanticLoss(8, teacher, kind)(draw(4, 9, 8), images()))

class Says(torch.nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.shape = shape
    def forward(self, x): return torch.ones(len(x), *self.shape)

class Fixed(torch.nn.Module):
    def forward(self, x):
        assert x.shape[-1] == 224, 'only 224 pixels,\nnothing else'
        return x.flatten(1)

@pytest.mark.parametrize('shape', [(7,), (1, 7)])
def test_a_teacher_without_places_has_no_patches(shape):
    with pytest.raises(ValueError, match="kind='patch' needs a teacher with places"):
        SemanticLoss(8, Says(*shape), 'patch')

@pytest.mark.parametrize('teacher', [torch.nn.Conv2d(1, 7, 3), Fixed(), torch.nn.Conv2d(3, 7, 3).half()],
                         ids=['grey', 'fixed', 'half'])
def test_a_teacher_that_cannot_look_is_refused_in_a_line(teacher):
    with pytest.raises(ValueError,
                       match=r'teacher must take images \(b 3 h w\) in \[-1,1\] of any size; got') as e:
        SemanticLoss(8, teacher)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('teacher', [Says(), Says(2, 2, 2, 2)])
def test_a_teacher_that_returns_no_features_is_refused(teacher):
    with pytest.raises(ValueError, match='teacher must return features'): SemanticLoss(8, teacher)

def test_an_rgb_teacher_sees_grey_images_three_times():
    semantic = SemanticLoss(8, torch.nn.Conv2d(3, 7, 3))
    x = images()
    assert torch.equal(semantic.features(x), semantic.features(x.expand(-1, 3, -1, -1)))

def test_a_teacher_is_tried_where_it_is():
    """On a device that is not the CPU (any will do): zeros of the CPU would not fit,
    nor would a projection left there"""
    semantic = SemanticLoss(8, torch.nn.Conv2d(3, 7, 3, device='meta'))
    assert semantic.project.weight.shape == (8, 7) and semantic.project.weight.device.type == 'meta'

@pytest.mark.parametrize('options, says',
                         [(dict(teacher='clip'), "got 'clip'"), (dict(kind='word'), "got 'word'"),
                                           (dict(teacher='dinov2:x.safetensors'), 'no file x')])
def test_semantic_loss_says_what_is_wrong(options, says):
    with pytest.raises((ValueError, OSError), match=says): SemanticLoss(8, **options)

def test_a_dinov2_file_of_another_shape_is_named(tmp_path):
    state = {to_timm(k): v.contiguous() for k, v in ViT(32, 16, 3, 64, 1, 1).state_dict().items()}
    del state['blocks.0.attn.qkv.weight']
    save_file(state, tmp_path/'dino.safetensors')
    with pytest.raises(ValueError, match=r'dino.safetensors: 1 missing \(blocks.0.attn.qkv.weight\)'):
        SemanticLoss(8, f"dinov2:{tmp_path/'dino.safetensors'}")


# the game

@pytest.mark.parametrize('game', ADVERSARIAL)
def test_games_pull_the_right_way(game):
    d_loss, g_loss = ADVERSARIAL[game]
    real, fake = (torch.linspace(-.9, .9, 9).requires_grad_() for _ in range(2))
    up, down = torch.autograd.grad(d_loss(real, fake), (real, fake))
    assert (up < 0).all() and (down > 0).all()                              # real ones up, decoded ones down
    assert (torch.autograd.grad(g_loss(fake), fake)[0] < 0).all()           # the decoder wants its own up

@pytest.mark.parametrize('game', ADVERSARIAL)
def test_games_stay_finite(game):
    extreme = torch.tensor([-1e4, 1e4])
    assert all(torch.isfinite(l)
               for l in (ADVERSARIAL[game][0](extreme, -extreme), ADVERSARIAL[game][1](extreme)))

def test_logistic_games_are_cross_entropy():
    real = draw(6)
    fake = draw(6, seed=1)
    one = torch.ones(6)
    d, g = ADVERSARIAL['non-saturating']
    bce = F.binary_cross_entropy_with_logits
    assert (torch.allclose(d(real, fake), (bce(real, one)+bce(fake, 0*one))/2)
            and torch.allclose(g(fake), bce(fake, one)))
    assert torch.allclose(ADVERSARIAL['vanilla'][1](fake), -bce(fake, 0*one))

@pytest.mark.parametrize('kind', DISCRIMINATORS)
def test_every_discriminator_learns(kind):
    "A few steps on one batch lower its loss; the decoder gets a gradient; one image alone is fine"
    torch.manual_seed(0)
    discriminator = make_discriminator(kind, 1, **(dict(backbone=vit()) if kind == 'dino' else {}))
    x = images(9)
    xh = images(9)*.5
    opt = torch.optim.Adam([p for p in discriminator.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(6):
        losses.append(hinge_d(discriminator(x), discriminator(xh)))
        opt.zero_grad()
        losses[-1].backward()
        opt.step()
    assert losses[-1] < losses[0] and all(torch.isfinite(l) for l in losses)
    one = xh[:1].clone().requires_grad_()
    hinge_g(discriminator.eval()(one)).backward()
    assert one.grad.abs().sum() > 0

def a_discriminator(kind, **options):
    torch.manual_seed(0)
    return make_discriminator(kind, **(dict(backbone=vit()) if kind == 'dino' else {}), **options).eval()

@pytest.mark.parametrize('kind', DISCRIMINATORS)
def test_discriminators_are_called_alike(kind):
    "With or without a generator, for grey images unless told"
    discriminator = a_discriminator(kind)
    rng = make_rng(0)
    assert torch.equal(discriminator(images()), discriminator(images(), rng))
    assert torch.equal(rng.get_state(), make_rng(0).get_state())           # small images need no draw
    assert torch.isfinite(a_discriminator(kind, channels=3)(images(c=3), rng)).all()

@pytest.mark.parametrize('kind', DISCRIMINATORS)
def test_scores_and_losses_are_float32_under_autocast(kind):
    discriminator = a_discriminator(kind)
    lecam = LeCAM()
    with torch.autocast('cpu', torch.bfloat16):
        scores = discriminator(images())
        assert scores.dtype == torch.float32
        # as a discriminator of one's own may give them
        low = scores.bfloat16()
        for d, g in ADVERSARIAL.values():
            assert torch.equal(d(low, -low), d(low.float(), -low.float())) and g(low).dtype == torch.float32
        assert lecam(low, -low).dtype == torch.float32

@pytest.mark.parametrize('channels', [2, 4])
def test_frozen_discriminators_see_grey_or_rgb(channels):
    for make in (lambda: make_discriminator('features', channels),
                 lambda: DinoDiscriminator(channels, vit())):
        with pytest.raises(ValueError, match=f'channels must be 1 or 3, got {channels}'): make()
    with pytest.raises(ValueError, match='c 1 or 3, got'): DinoDiscriminator(1, vit())(images(c=channels))

def test_a_discriminators_frozen_part_is_in_no_checkpoint():
    torch.manual_seed(0)
    for discriminator in (make_discriminator('features', 1), DinoDiscriminator(1, vit())):
        frozen = [f.module for f in discriminator.modules() if isinstance(f, Frozen)]
        before = [p.clone() for f in frozen for p in f.parameters()]
        assert before and {k.split('.')[0] for k in discriminator.state_dict()} == {'heads'}
        discriminator(images()).sum().backward()
        after = [p for f in frozen for p in f.parameters()]
        assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, after, strict=True))

def test_patch_discriminator_is_the_one_of_the_published_pages():
    torch.manual_seed(0)
    scores = PatchDiscriminator()(torch.linspace(-1, 1, 784).view(1, 1, 28, 28))
    assert scores.shape == (1, 1, 7, 7)
    assert scores[0, 0, 0, 0].item() == pytest.approx(-0.00657231, rel=1e-4)

def test_small_images_are_refused_in_a_line():
    with pytest.raises(ValueError, match='at least 24 pixels'): PatchGAN(1)(images(size=16))

def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match='patch, patchgan, features, dino'): make_discriminator('gan')
    with pytest.raises(ValueError, match='efficientnet_lite2, lpips'): perceptual_loss('vgg')
    with pytest.raises(ValueError, match="'l1' or 'l2'"): recon_loss(images(), images(), 'l3')

def test_adaptive_weight_is_bounded():
    w = torch.ones(3, requires_grad=True)
    assert (adaptive_weight((w*1e9).sum(), (w*1e-9).sum(), w) == 1e4
            and adaptive_weight((w*0).sum(), w.sum(), w) == 0)
    assert (adaptive_weight((w*3).sum(), w.sum(), w, synchronize=True) == adaptive_weight((w*3).sum(),
                                                                                          w.sum(), w))

def test_lecam_resumes_where_it_was():
    one = LeCAM(.5)
    scores = [(draw(4, seed=i), draw(4, seed=9+i)) for i in range(4)]
    for s in scores[:2]: one(*s)
    two = LeCAM(.5)
    two.load_state_dict(one.state_dict())
    for s in scores[2:]: assert torch.equal(one(*s), two(*s))

@given(b=st.integers(1, 20))
def test_batch_norm_local_takes_any_batch(b):
    norm = BatchNormLocal(3)
    x = draw(b, 3, 5)*4+2
    y = norm(x)
    groups = -(-b//8)
    assert torch.allclose(y.mean((0, 2)), torch.zeros(3), atol=1e-4)
    start = 0
    for n in [len(t) for t in x.tensor_split(groups)]:
        assert n <= 8 and torch.allclose(y[start:start+n], norm(x[start:start+n]), atol=1e-5)
        start += n

@pytest.mark.parametrize('b', [1, 7, 9, 17])
def test_dino_discriminator_takes_any_batch(b):
    assert DinoDiscriminator(1, vit()).eval()(images(b)).shape == (b, 5*4)


def test_dino_discriminator_finds_its_weights(tmp_path, monkeypatch):
    monkeypatch.setenv('TOKKIT_DATA', str(tmp_path))
    with pytest.raises(FileNotFoundError, match="dino_vits16.safetensors; the DINO discriminator needs"):
        make_discriminator('dino', 1)
    given = ViT(224, 16, 3, 24, 12, 4, layer_scale=None)
    state = {to_timm(k): v.contiguous() for k, v in given.state_dict().items()}
    save_file(state, tmp_path/'dino_vits16.safetensors')
    discriminator = make_discriminator('dino', 1, width=24, heads=4)
    assert torch.equal(discriminator.backbone.module.cls_token, given.cls_token)
    del state['norm.bias']
    with pytest.raises(ValueError, match=r'1 missing \(norm.bias\)'):
        make_discriminator('dino', 1, backbone=state, width=24, heads=4)


# what a discriminator sees

@given(seed=st.integers(0, 999), b=st.integers(1, 4), c=st.sampled_from([1, 3]), h=st.integers(8, 40),
       w=st.integers(8, 40))
def test_augmentation_keeps_shape_and_repeats_itself(seed, b, c, h, w):
    x = draw(b, c, h, w)
    a, again = (DiffAug()(x, make_rng(seed), fade=.3) for _ in range(2))
    assert a.shape == x.shape and torch.equal(a, again) and torch.isfinite(a).all()

def test_augmentation_draws_the_same_number_whatever_it_decides():
    after = []
    for prob in (0., .5, 1.):
        rng = make_rng(0)
        DiffAug(prob)(images(), rng)
        after.append(torch.rand(1, generator=rng))
    assert after[0] == after[1] == after[2]

def test_draws_come_from_the_generator_wherever_the_images_are():
    assert DiffAug()(images().to('meta'), make_rng(0), fade=.5).device.type == 'meta'

def test_augmentation_treats_an_image_alike_in_any_company():
    "The gradient of one image never reaches another"
    x = images(3).requires_grad_()
    DiffAug()(x, make_rng(3))[0].sum().backward()
    assert x.grad[0].abs().sum() > 0 and x.grad[1:].abs().sum() == 0

@given(fade=st.floats(0, 1), h=st.integers(4, 40), w=st.integers(4, 40))
def test_blur_stays_within_the_image(fade, h, w):
    x = draw(1, 2, h, w)
    y = blur_fade(x, fade)
    assert y.shape == x.shape and y.min() >= x.min()-1e-4 and y.max() <= x.max()+1e-4


# LPIPS

def lpips_state():
    torch.manual_seed(0)
    return LPIPS(channels=SMALL_VGG).state_dict()

def test_lpips_is_the_same_in_training_mode():
    metric = LPIPS(lpips_state(), SMALL_VGG)
    x = images()
    assert torch.equal(metric(x, -x), torch.nn.Sequential(metric).train()[0](x, -x))

def test_lpips_finds_its_weights(tmp_path, monkeypatch):
    "In the data folder, else through the `lpips` package, else one line says how"
    state = lpips_state()
    monkeypatch.setenv('TOKKIT_DATA', str(tmp_path))
    monkeypatch.setitem(sys.modules, 'lpips', None)
    with pytest.raises(ImportError, match=r"pip install 'tokkit-lab\[pretrained\]'"): perceptual_loss('lpips')
    theirs = state | {f'lins.{i}.model.1.weight': state[f'lin{i}.model.1.weight'] for i in range(5)}
    package = SimpleNamespace(LPIPS=lambda net, verbose: SimpleNamespace(state_dict=lambda: theirs))
    monkeypatch.setitem(sys.modules, 'lpips', package)
    assert set(lpips_weights('pretrained')) == set(state)
    save_file(state, tmp_path/'lpips.safetensors')
    monkeypatch.setitem(sys.modules, 'lpips', None)
    x = images()
    assert torch.isfinite(perceptual_loss('lpips', channels=SMALL_VGG, size=32)(x, -x))

@pytest.mark.parametrize('error', [URLError('no network'), RuntimeError('invalid hash value\nof vgg16')])
def test_lpips_offline_says_it_in_a_line(error, tmp_path, monkeypatch):
    def fetch(net, verbose): raise error
    monkeypatch.setenv('TOKKIT_DATA', str(tmp_path))
    monkeypatch.setitem(sys.modules, 'lpips', SimpleNamespace(LPIPS=fetch))
    with pytest.raises(FileNotFoundError,
                       match='no LPIPS weights: put lpips.safetensors in .* or pass files') as e:
        perceptual_loss('lpips')
    assert '\n' not in str(e.value) and str(tmp_path) in str(e.value)

@pytest.mark.parametrize('damage', [lambda b: b'', lambda b: b'no weights at all', lambda b: b[:len(b)//2]])
def test_a_damaged_pth_is_named_in_a_line(damage, tmp_path):
    file = tmp_path/'vgg.pth'
    torch.save(lpips_state(), file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match='no LPIPS weights: .*vgg.pth is damaged') as e: lpips_weights(file)
    assert '\n' not in str(e.value)

def test_a_pth_of_something_else_is_named(tmp_path):
    torch.save([1, 2], tmp_path/'x.pth')
    with pytest.raises(ValueError, match='x.pth holds list, expected named tensors'):
        lpips_weights(tmp_path/'x.pth')

def test_lpips_names_what_does_not_fit(tmp_path):
    state = lpips_state()
    del state['lin2.model.1.weight']
    state['net.slice1.0.bias'] = torch.zeros(5)
    save_file(state, tmp_path/'w.safetensors')
    with pytest.raises(ValueError, match=r'w.safetensors: 1 missing \(lin2.model.1.weight\), 1 of another '
                                         r'shape \(net.slice1.0.bias'):
        LPIPS(tmp_path/'w.safetensors', SMALL_VGG)

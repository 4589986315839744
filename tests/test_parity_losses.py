"Losses, discriminators and augmentations against values recorded from the reference implementation"
import json, os, subprocess, sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from tokkit.training import (BatchNormLocal, DinoDiscriminator, PatchGAN, blur_fade, blur_schedule,
                             discriminator_weight, diff_augment)
from tokkit.layers import ViT, from_timm, to_timm
from tokkit.training import (ADVERSARIAL, LeCAM, SemanticLoss, VitTeacher, adaptive_weight, contrastive_loss,
                             recon_loss)
from tokkit.features import LPIPS

SMALL_VGG = 4, 8, 16, 32, 32


def close(got, want, tolerance=1e-5):
    "Within `tolerance` of the largest recorded value"
    assert (got.detach()-want).abs().max() <= tolerance*want.abs().max().clamp_min(1e-12)

def part(r, prefix): return {k.removeprefix(prefix): v for k, v in r.items() if k.startswith(prefix)}

def config(path):
    with safe_open(path, 'pt') as f: return json.loads(f.metadata()['config'])


# contrastive loss

@pytest.mark.parametrize('case, scale', [('s1', 1.), ('s100', 100.)])
def test_contrastive_loss(case, scale, fixtures):
    r = part(load_file(fixtures/'cliploss.safetensors'), f'{case}.')
    z_s, z_q = (r[k].clone().requires_grad_() for k in ('z_s', 'z_q'))
    loss = contrastive_loss(z_s, z_q, scale)
    close(loss, r['loss'])
    for t, k in ((z_s, 'grad_z_s'), (z_q, 'grad_z_q')):
        close(torch.autograd.grad(loss, t, retain_graph=True)[0], r[k], 1e-4)


def test_contrastive_loss_of_two_processes(fixtures, tmp_path):
    """Two real processes: each gets the loss of the global batch,
    and gradients whose mean is the one process's"""
    r = load_file(fixtures/'cliploss.safetensors')
    script = Path(__file__).parent/'losses_in_processes.py'
    env = dict(os.environ, OMP_NUM_THREADS='1')
    recorded = str(fixtures/'cliploss.safetensors')
    ranks = [subprocess.Popen([sys.executable, script, recorded, str(tmp_path), str(i)], env=env)
             for i in range(2)]
    assert [p.wait(timeout=120) for p in ranks] == [0, 0]
    got = [torch.load(tmp_path/f'{i}.pt', weights_only=True) for i in range(2)]
    for i, g in enumerate(got):
        want = part(r, f'ws2.rank{i}.')
        close(g['loss'], want['loss'])
        close(g['loss'], r['s1.loss'])
        close(g['grad_z_s'], want['grad_z_s'], 1e-4)
        close(g['grad_z_q'], want['grad_z_q'], 1e-4)
    close(torch.cat([g['grad_z_q'] for g in got])/2, r['s1.grad_z_q'], 1e-4)
    # what else is shared: the leash's means, and the weight if asked; both as one process with all of the
    # batch would have them
    one = LeCAM(.9)
    one(r['s1.z_q'], r['s1.z_s'])
    for g in got:
        close(g['real'], one.real)
        close(g['fake'], one.fake)
        close(g['together'], got[0]['together'], 0)
    w = torch.ones(16, requires_grad=True)
    close(got[0]['together'], adaptive_weight((r['s1.z_q']*w).square().mean(), (r['s1.z_s']*w).mean(), w))
    assert not torch.equal(got[0]['apart'], got[1]['apart'])


def test_semantic_loss_of_the_released_tokenizer(fixtures):
    "The teacher's class token through the shared projection, against the mean of the decoder's input"
    r = load_file(fixtures/'tok_dino_tiny.safetensors')
    vit = ViT(64, 8, 3, 48, 2, 4)
    vit.load_state_dict({from_timm(k): v for k, v in part(r, 'sd.semantic_model.').items()})

    semantic = SemanticLoss(8, VitTeacher(vit), scale=1.)
    semantic.project.load_state_dict(dict(weight=r['sd.quant_conv.weight'].flatten(1),
                                          bias=r['sd.quant_conv.bias']))
    x = r['in.images']
    close(semantic.teacher.module.seen(x), r['out.sem_input'])
    close(semantic.features(x)[:, 0], r['out.sem_feature'])
    close(semantic.project(semantic.features(x))[:, 0], r['out.sem_z_s'].flatten(1))
    # the loss itself, of the decoder input of training: perturbed tokens where the image was selected
    codebook = F.normalize(r['sd.quantize.embedding.weight'], dim=1)
    cfg = config(fixtures/'tok_dino_tiny.safetensors')
    n = r['train.nearest_indices'].view(len(x), -1)
    ids = n.clone()
    first = int(len(x)*cfg['beta'])
    ids[:first] = r['train.perturbed_indices_all'].view(len(x), -1)[:first]
    close(cfg['sem_loss_weight']*semantic(codebook[ids], x), r['train.sem_loss'])


# LPIPS

def lpips_of(state): return LPIPS(state, SMALL_VGG)

def test_lpips(fixtures):
    r = load_file(fixtures/'lpips_tiny.safetensors')
    metric = lpips_of(part(r, 'sd.')).train()
    in1 = r['in1'].clone().requires_grad_()
    d = metric(r['in0'], in1)
    close(d, r['out'].flatten())
    close(torch.autograd.grad(d.mean(), in1)[0], r['grad_in1'], 1e-4)


# discriminators

def test_patchgan(fixtures):
    r = load_file(fixtures/'disc_patchgan_tiny.safetensors')
    discriminator = PatchGAN(3, width=8).train()
    discriminator.load_state_dict(part(r, 'sd.'))
    x = r['in'].clone().requires_grad_()
    scores = discriminator(x)
    close(scores, r['train.logits'])
    close(torch.autograd.grad((scores*r['w']).sum(), x)[0], r['train.grad_in'], 1e-4)
    for k, v in part(r, 'train.after.').items(): close(discriminator.state_dict()[k], v)
    close(discriminator.eval()(r['in']), r['eval.logits'])


@pytest.fixture(scope='module')
def dino(fixtures): return load_file(fixtures/'disc_dino_tiny.safetensors')

def dino_discriminator(dino):
    vit = {k: v.float() for k, v in part(dino, 'backbone.').items()}
    discriminator = DinoDiscriminator(3, vit, width=48, heads=6)
    discriminator.load_state_dict(part(dino, 'sd.'))
    return discriminator.eval()

def test_dino_enlarged(dino):
    discriminator = dino_discriminator(dino)
    x = dino['up64.in'].clone().requires_grad_()
    for got, i in zip(discriminator.activations(discriminator.view(x)), range(5), strict=True):
        close(got, dino[f'up64.act{i}'].float(), 2e-3)
    scores = discriminator(x)
    close(scores, dino['up64.logits'])
    close(torch.autograd.grad((scores*dino['up64.w']).sum(), x)[0], dino['up64.grad_in'], 1e-4)

def test_dino_shrunk_or_as_it_is(dino):
    discriminator = dino_discriminator(dino)
    close(discriminator(dino['in256.uint8']/127.5-1), dino['area256.logits'])
    close(discriminator(F.interpolate(dino['up64.in'], (224, 224), mode='bilinear', align_corners=False)),
          dino['id224.logits'])

def test_dino_crop(dino, monkeypatch):
    "With the recorded corner in place of a drawn one"
    discriminator = dino_discriminator(dino)
    drawn = iter(dino['crop256.top_left'])
    monkeypatch.setattr(torch, 'rand', lambda *a, **k: torch.tensor(0.))
    monkeypatch.setattr(torch, 'randint', lambda *a, **k: next(drawn))
    close(discriminator(dino['in256.uint8']/127.5-1, torch.Generator()), dino['crop256.logits'])

def test_dino_in_training(dino):
    discriminator = dino_discriminator(dino).train()
    close(discriminator(dino['up64.in']), dino['train64.logits'])
    after = part(dino, 'train64.sd_after.')
    assert len(after) == 30
    for k, v in after.items(): close(discriminator.state_dict()[k], v)

def test_batch_norm_local(dino):
    norm = BatchNormLocal(4)
    norm.load_state_dict(dict(weight=dino['bnl.weight'], bias=dino['bnl.bias']))
    close(norm(dino['bnl.in']), dino['bnl.out'])
    close(norm.eval()(dino['bnl.in']), dino['bnl.out'])


# what a discriminator sees

@pytest.mark.parametrize('case', ['c0', 'c1', 'c2', 'c3', 'c4'])
def test_diffaug(case, fixtures):
    path = fixtures/'diffaug.safetensors'
    r = part(load_file(path), f'{case}.')
    cfg = config(path)[case]
    prob = abs(cfg['prob'])
    cutout = cfg['cutout']*(cfg['prob'] > 0)  # there, a negative probability means: without the cut
    x = blur_fade(r['in'], cfg['warmup_blur_schedule'])
    close(diff_augment(x, r['rand3'] <= prob, r['rand01'], cutout), r['out'])

def test_schedules_of_blur_and_discriminator(fixtures):
    r = json.loads((fixtures/'schedules.json').read_text())
    for steps in (0, 4):
        want = r['fade_blur'][f'disc_start=10,aug_fade_steps={steps}']
        assert [blur_schedule(i, 10, steps) for i in range(len(want))] == pytest.approx(want, abs=1e-12)
    want = r['disc_weight_active(global_step=train_steps+1,disc_start=10,w=0.5)']
    assert [discriminator_weight(i, 10) for i in range(len(want))] == want


# the whole objective, put together from its parts

def objective(r, discriminator, see=lambda x: x):
    "Three steps of both sides; `see` is what happens to images before the discriminator"
    metric = lpips_of(part(r, 'lpips.sd.'))
    d_loss, g_loss = ADVERSARIAL['hinge']
    lecam = LeCAM()
    last = r['in.last_layer'].clone().requires_grad_()
    x = r['in.images']
    for step in (1, 2, 3):
        want = part(r, f'step{step}.')
        weight = discriminator_weight(step-1, 2)
        xh = torch.tanh(F.conv2d(r['in.feat'], last))
        recon = recon_loss(xh, x)
        perceptual = metric(x, xh).mean()
        adversarial = g_loss(discriminator(see(xh)))
        balance = adaptive_weight(recon+perceptual, adversarial, last)
        total = recon+perceptual+weight*balance*adversarial+.11+.022+.3
        for got, k in ((recon, 'rec_loss'), (perceptual, 'lpips'), (adversarial, 'adv'),
                       (total, 'gen_total')):
            close(got, want[k])
        close(balance, want['d_weight'], 1e-4)
        close(torch.autograd.grad(total, last)[0], want['grad_last_layer'], 1e-4)
        fake = discriminator(see(xh.detach()))
        real = discriminator(see(x))
        leash = lecam(real, fake)
        loss = weight*(d_loss(real, fake)+.001*leash)
        close(loss, want['disc_total'])
        close(lecam.real, want['lecam_ema_real'].float())
        close(lecam.fake, want['lecam_ema_fake'].float())
        for k, v in part(want, 'disc_grad.').items():
            close(torch.autograd.grad(loss, discriminator.get_parameter(k))[0], v, 1e-4)

def test_objective_with_patchgan(fixtures):
    r = load_file(fixtures/'vqloss_patchgan.safetensors')
    discriminator = PatchGAN(3, width=8).train()
    discriminator.load_state_dict(part(r, 'disc.sd.'))
    objective(r, discriminator)


# names and shapes at full size

def shapes(module):
    return {k: [list(v.shape), str(v.dtype).removeprefix('torch.')] for k, v in module.state_dict().items()}

def test_names_and_shapes_at_full_size(fixtures):
    "The key map is the identity for discriminators and LPIPS; the DINO backbone is in timm's names"
    r = json.loads((fixtures/'state_dict_shapes.json').read_text())
    with torch.device('meta'):
        discriminator = DinoDiscriminator(3, ViT(224, 16, 3, 384, 12, 6, layer_scale=None, gelu='tanh'))
        assert shapes(discriminator) == r['dinodisc']
        assert shapes(PatchGAN(3)) == r['patchgan']
    assert shapes(LPIPS()) == r['lpips']
    backbone = {to_timm(k): v for k, v in shapes(discriminator.backbone.module).items()}
    assert (backbone == {k: v for k, v in r['dinodisc_backbone_not_in_checkpoint'].items()
                         if k not in ('x_scale', 'x_shift')})
    assert sum(p.numel() for p in discriminator.parameters()) == 7_386_245
    assert sum(p.numel() for p in PatchGAN(3).parameters()) == 2_765_633

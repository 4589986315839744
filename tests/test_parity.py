"""The quantizer, the perturbation, guidance,
annealing and averages against values recorded from the reference implementation"""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import load_file

from tokkit.generators import Guidance
from tokkit.training import ema_update
from tokkit.perturbation import OFFICIAL, Annealing, LatentPerturbation, perturb_codes
from tokkit.quantizers import VectorQuantizer, codebook_usage

GOLDEN = Path(__file__).parent/'golden'
CASES = 'ABCDEFG'


def close(got, want, tolerance=1e-5):
    assert (got-want).abs().max() <= tolerance*want.abs().max().clamp_min(1e-12)

def tokens(z): return rearrange(z, 'b d h w -> b (h w) d')


@pytest.mark.parametrize('name',
                         ['vq.safetensors', 'perturbation.safetensors', 'ema.safetensors',
                          'cfg_schedule.npz'])
def test_golden_values_are_the_recorded_ones(name, fixtures):
    assert (GOLDEN/name).read_bytes() == (fixtures/name).read_bytes()


@pytest.mark.parametrize('form', ['norm', 'raw'])
def test_vector_quantizer(form):
    r = {k.removeprefix(f'{form}.'):v for k,v in load_file(GOLDEN/'vq.safetensors').items()
         if k.startswith(form)}
    vq = VectorQuantizer(16, 4, l2_norm=form == 'norm').train()
    vq.embedding.weight.data = r['embedding'].clone()
    for i in range(3):
        now = {k.removeprefix(f'step{i}.'):v for k,v in r.items() if k.startswith(f'step{i}.')}
        z = tokens(now['z']).clone().requires_grad_()
        q = vq(z)
        assert torch.equal(q.ids.flatten(), now['indices'])
        close(q.zq.detach(), tokens(now['z_q']))
        close(q.codebook_loss, now['vq_loss'])
        close(q.commitment_loss, now['commit_loss'])
        close(vq.usage, now['ema_hits'])
        # every code is counted, none twice
        assert 100*codebook_usage(vq.usage/50, margin=0)[0] == 100
        used = (vq.usage >= .08*50/16).float().mean()*100
        close(used, now['usage_percent'][0])
        for loss,of,want in ((q.commitment_loss, z, tokens(now['grad_z_commit'])),
                             (q.codebook_loss, vq.embedding.weight, now['grad_E_vq']),
                             ((q.zq*tokens(now['w'])).sum(), z, tokens(now['grad_z_ste']))):
            close(torch.autograd.grad(loss, of, retain_graph=True)[0], want, 1e-4)


def recorded_case(case):
    with safe_open(GOLDEN/'perturbation.safetensors', 'pt') as f:
        r = {k.removeprefix(f'{case}.'):f.get_tensor(k) for k in f.keys() if k.startswith(f'{case}.')}
        return json.loads(f.metadata()['config'])[case], r


@pytest.mark.parametrize('case', CASES)
def test_perturbation_of_the_released_code(case, monkeypatch):
    "With the recorded draws in place of ours, the official preset picks the recorded codes"
    config,r = recorded_case(case)
    vq = VectorQuantizer(32, 6, l2_norm=config['codebook_norm']).eval()
    vq.embedding.weight.data = r['codebook'].clone().requires_grad_()
    raw = tokens(r['z']).clone().requires_grad_()
    z = vq.project(raw)
    clean = vq(raw)
    assert torch.equal(clean.ids.flatten(), r['nearest'])
    monkeypatch.setattr(torch, 'rand', lambda *a, **k: r['rand'].view(5, 9))
    monkeypatch.setattr(torch, 'randint', lambda *a, **k: r['randint'].view(5, 9))
    ids = perturb_codes(clean.ids, vq.codebook, config['alpha'], config['delta'], config['beta'], z=z,
                        **OFFICIAL)
    chosen = torch.arange(5) < config['n_perturbed_images']
    assert torch.equal(ids, torch.where(chosen[:,None], r['picked'].view(5, 9), clean.ids))
    plug = LatentPerturbation(config['alpha'], config['beta'], config['delta'], **OFFICIAL)
    out = plug(z, clean, vq.codebook)
    close(out.zq.detach(), tokens(r['out']))
    grad_z,grad_codes = torch.autograd.grad((out.zq*tokens(r['w'])).sum(), (raw, vq.embedding.weight),
                                            allow_unused=True)
    close(grad_z, tokens(r['grad_z']), 1e-4)
    assert grad_codes is None or not grad_codes.any()


def test_guidance_schedule():
    r = np.load(GOLDEN/'cfg_schedule.npz')
    for (scale,power),*tables in zip(r['scale_pow'], r['cfg_L256'], r['cfg_L16']):
        for table in tables:
            assert np.abs(Guidance(float(scale), float(power)).scales(len(table)).numpy()-table).max() <= 1e-5


def test_annealing():
    r = json.loads((GOLDEN/'annealing.json').read_text())
    full = LatentPerturbation(alpha=1., beta=.1, delta=100, annealing=Annealing(40, 120, .5))
    at = [full.at(e) for e in range(len(r['main.alpha']))]
    assert (np.allclose([p.alpha for p in at], r['main.alpha'], atol=1e-9)
            and [p.delta for p in at] == r['main.delta'])
    assert np.allclose([Annealing(100, 100, .5)(e) for e in range(len(r['post.ratio']))], r['post.ratio'])
    assert np.allclose([Annealing()(e) for e in range(len(r['main.ratio']))], r['main.ratio'])


def test_moving_average():
    r = load_file(GOLDEN/'ema.safetensors')
    average = r['ema_before'].clone()
    ema_update([average], [r['model']], .9999)
    close(average, r['ema_after'], 1e-6)

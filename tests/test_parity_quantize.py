"Multi-scale and product quantizers against values recorded from the reference implementation"
import json

import torch
from einops import rearrange
from safetensors import safe_open

from tokkit.quantizers import MultiScaleResidualQuantizer, ProductQuantizer


def close(got, want, tolerance=1e-5):
    assert (got-want).abs().max() <= tolerance*want.abs().max().clamp_min(1e-12)

def tokens(z): return rearrange(z, 'b d h w -> b (h w) d')


def recorded(path):
    with safe_open(path, 'pt') as f:
        return json.loads(f.metadata()['config']), {k:f.get_tensor(k) for k in f.keys()}


def multi_scale(config, r, **options):
    ms = MultiScaleResidualQuantizer(config['vocab'], config['dim'], tuple(config['v_patch_nums']), **options)
    if ms.stack: ms.stack[0].embedding.weight.data = r['sd.embedding.weight'].clone()
    for i,conv in enumerate(ms.phi):
        conv.weight.data = r[f'sd.quant_resi.qresi_ls.{i}.weight']
        conv.bias.data = r[f'sd.quant_resi.qresi_ls.{i}.bias']
    return ms


def test_residual_scales_in_training(fixtures, monkeypatch):
    config,r = recorded(fixtures/'rq_multiscale.safetensors')
    ms = multi_scale(config, r, drop=config['codebook_drop'], commitment=config['beta']).train()
    monkeypatch.setattr(torch, 'randint', lambda *a, **k: r['in.dropout'])
    q = ms(tokens(r['in.f']))
    close(q.zq.detach(), tokens(r['train.f_hat']))
    close(q.codebook_loss, r['train.vq_loss'])
    close(q.commitment_loss, r['train.commit_loss'])
    margin = .08*len(r['in.f'])*64/config['vocab']
    # there one counter serves all scales, so the later ones start with a tenth
    hits = ms.usage*torch.tensor([1, .1, .1, .1])[:,None]
    close((hits >= margin).float().mean(1)*100, r['train.usages'])


def test_residual_scales_in_use(fixtures):
    config,r = recorded(fixtures/'rq_multiscale.safetensors')
    ms = multi_scale(config, r).eval()
    q = ms(tokens(r['in.f']))
    for s,ids in enumerate(ms.split_levels(q.ids)): assert torch.equal(ids, r[f'eval.idx{s}'])
    for s,hat in enumerate(ms.progress(q.ids)): close(hat, tokens(r[f'eval.fhat{s}']))


def test_signs_of_scales(fixtures):
    config,r = recorded(fixtures/'lfq_multiscale.safetensors')
    ms = multi_scale(config, r, signs=True, shrink=config['scale']).train()
    q = ms(tokens(r['in.f']))
    for s,ids in enumerate(ms.split_levels(q.ids)): assert torch.equal(ids, r[f'idx{s}'])
    close(q.zq.detach(), tokens(r['train.f_hat']))
    close(q.codebook_loss, r['train.vq_loss'])
    close(q.commitment_loss, r['train.commit_loss'])


def test_product(fixtures):
    config,r = recorded(fixtures/'tok_pq2_tiny.safetensors')
    pq = ProductQuantizer(config['codebook_size'], 2*config['codebook_embed_dim'], groups=2).train()
    for i,book in enumerate(pq.stack):
        book.embedding.weight.data = r[f'sd.quantizes.{i}.embedding.weight'].clone()
    # there the groups lie one after the other
    q = pq(rearrange(r['out.h'], 'b d (g n) 1 -> b n (g d)', g=2))
    for i,ids in enumerate(pq.split_levels(q.ids)): assert torch.equal(ids, r[f'out.indices{i}'])
    close(q.codebook_loss, r['train.vq_loss'])
    close(q.commitment_loss, r['train.commit_loss'])

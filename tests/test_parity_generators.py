"The autoregressive generator against values recorded from the released RAR"
import json

import numpy as np
import pytest, torch
from safetensors import safe_open

from tokkit.generators import autoregressive as ar, autoregressive_sampler as sampler
from tokkit.generators import (AR_PRESETS, ARCfg, ARGenerator, load_robustok_generator, random_ratio,
                               released_decay, robustok_generator_state)
from tokkit.core import make_rng
from tokkit.generators import Guidance, Sampling, drop_labels


def near(got, want, rel=1e-5):
    assert (got-want).abs().max() <= rel*want.abs().max(), (got-want).abs().max()/want.abs().max()


@pytest.fixture(scope='module')
def recorded(fixtures):
    with safe_open(fixtures/'rar_tiny.safetensors', 'pt') as f:
        return {k: f.get_tensor(k) for k in f.keys()} | dict(config=json.loads(f.metadata()['config']))


@pytest.fixture(scope='module')
def gen(recorded):
    c = recorded['config']
    cfg = ARCfg(c['image_seq_len'], c['codebook_size'], c['condition_num_classes'], c['hidden_size'],
                c['layers'], c['heads'],
                c['intermediate']/c['hidden_size'], order='random', modulated=True, qk_norm=True,
                target_aware=True)
    state = {k[3:]: v for k, v in recorded.items() if k.startswith('sd.')}
    gen = load_robustok_generator(ARGenerator(cfg), state).eval()
    assert all(torch.equal(v, state[k]) for k, v in robustok_generator_state(gen).items())
    return gen


def labels_of(recorded): return recorded['in.class_id'], torch.full_like(recorded['in.class_id'], 10)


def test_training_logits(gen, recorded):
    "Random and raster order, with and without the label"
    y, none = labels_of(recorded)
    order = recorded['in.orders']
    ids = recorded['in.tokens']
    assert torch.equal(gen.cfg.codebook_size+1+y, recorded['in.condition_ids'])
    permuted = ids.gather(1, order)
    assert torch.equal(permuted, recorded['train.random.labels'])
    with torch.no_grad():
        near(gen.logits(permuted, y, order), recorded['train.random.logits'])
        near(gen.logits(ids, y), recorded['train.raster.logits'])
        near(gen.logits(ids, none), recorded['train.raster.uncond_logits'])


def test_loss_and_gradients(gen, recorded, monkeypatch):
    "The loss of the recorded orders, how often it is right, and the gradients"
    y = recorded['in.class_id']
    order = recorded['in.orders']
    monkeypatch.setattr(ar, 'draw_orders', lambda b, n, ratio, rng: order)
    monkeypatch.setattr(ar, 'drop_labels', lambda labels, *_: labels)
    gen.zero_grad()
    out = gen.losses(recorded['in.tokens'], y, done=0.)
    near(out['loss'].detach(), recorded['train.random.loss'])
    assert out['accuracy'].item() == pytest.approx(recorded['train.random.correct'].item(), abs=1e-6)
    out['loss'].backward()
    grads = {official: p.grad for official, p in zip(robustok_generator_state(gen), gen.parameters())}
    for k in [k for k in recorded if k.startswith('grad.')]:
        name = k[5:].removesuffix('.first20')
        near(grads[name][:, :20] if k.endswith('first20') else grads[name], recorded[k], 1e-4)
    gen.zero_grad()
    with torch.no_grad(): raster = gen.losses(recorded['in.tokens'], y, done=1.)['loss']
    near(raster, recorded['train.raster.loss'])


def test_labels_left_out(gen, recorded, monkeypatch):
    "The recorded draws leave out the recorded labels, and the null class is the recorded one"
    draws = recorded['labeldrop.rand']
    want = recorded['labeldrop.condition']
    monkeypatch.setattr(torch, 'rand', lambda *a, **k: draws)
    y = torch.where(draws < .1, 0, want-gen.blank-1)
    assert torch.equal(drop_labels(y, .1, gen.classes)+gen.blank+1, want)
    assert (recorded['out.none_condition'] == gen.classes+gen.blank+1).all()


@pytest.mark.parametrize('t', [0, 5, 15])
def test_prefixes(gen, recorded, t):
    with torch.no_grad():
        near(gen.logits(recorded['in.tokens'][:, :t], recorded['in.class_id']),
             recorded[f'sampling.prefix{t}.logits'])


CASES = ['g0_kv', 'g0_nokv', 'g6_kv', 'g6_nokv', 'g16_kv', 'g6_kv_tf0.7', 'g6_kv_tf0.0', 'g6_kv_tf1.0']


@pytest.mark.parametrize('case', CASES)
def test_sampled_ids(gen, recorded, case, monkeypatch):
    "The recorded ids, exactly: by the sampler with its cache, and by the whole model without"
    how = recorded['config']['gen'][case]
    y = recorded['in.class_id']
    assert set(CASES) == set(recorded['config']['gen'])
    guidance = Guidance(how['guidance_scale'], how['pow'])
    keep = None if how['tf_prob'] is None else (recorded['in.tokens'], how['tf_prob'])
    if keep is not None:
        rand = recorded[f'gen.{case}.rand']
        assert torch.equal(rand < how['tf_prob'], recorded[f'gen.{case}.keep_mask'])
        noise = sampler.row_noise
        monkeypatch.setattr(sampler, 'row_noise', lambda seeds, shape, stream, **k: (
            rand if stream == 'keep' else noise(seeds, shape, stream, **k)))
    seen = []
    want = recorded[f'gen.{case}.ids']
    ids = gen.sample(y, Sampling(guidance, how['temperature']), keep=keep, rng=make_rng(0),
                     callback=seen.append)
    assert torch.equal(ids, want)
    logits = torch.stack([s['logits'] for s in seen], 1)
    near(logits, recorded[f'gen.{case}.logits'], 2e-5)
    with torch.no_grad(): c, u = (gen.logits(ids[:, :-1], l) for l in labels_of(recorded))
    whole = u+guidance.scales(16)[:, None]*(c-u)
    near(whole, recorded[f'gen.{case}.logits'], 2e-5)
    drawn = whole.argmax(-1)
    assert torch.equal(drawn if keep is None
                       else torch.where(recorded[f'gen.{case}.keep_mask'], recorded['in.tokens'], drawn),
                       want)


def test_guidance_table(fixtures):
    with np.load(fixtures/'cfg_schedule.npz') as f:
        for L in (256, 16):
            for (scale, power), want in zip(f['scale_pow'], f[f'cfg_L{L}']):
                got = Guidance(float(scale), float(power)).scales(L).numpy()
                assert np.allclose(got, want if scale else 1., atol=1e-5, rtol=0), (L, scale, power)


def test_random_ratio(fixtures):
    r = json.loads((fixtures/'schedules.json').read_text())
    for step, want in zip(r['rar.random_ratio_steps'], r['rar.random_ratio']):
        assert random_ratio(step/250_000) == pytest.approx(want, abs=1e-12)


def test_weight_decay(fixtures):
    "The same parameters are spared, by name"
    want = json.loads((fixtures/'rar_weight_decay_groups.json').read_text())
    cfg = ARCfg(4, 8, 2, 16, 1, 2, order='random', modulated=True, qk_norm=True, target_aware=True)
    gen = ARGenerator(cfg)
    names = {id(p): name for name, p in zip(robustok_generator_state(gen), gen.parameters())}
    spared, others = ({names[id(p)] for p in group['params']} for group in released_decay(gen, .03))
    assert (spared, others) == (set(want['no_decay']), set(want['decay']))


@pytest.mark.parametrize('name,size', [('rar-b', 265_645_312), ('rar-l', 467_962_880)])
def test_full_size(fixtures, name, size):
    "Keys, shapes and number of parameters of the released models"
    want = json.loads((fixtures/'state_dict_shapes.json').read_text())[name.replace('-', '_')]
    with torch.device('meta'): gen = ARGenerator(AR_PRESETS[name])
    assert {k: [list(v.shape), 'float32'] for k, v in robustok_generator_state(gen).items()} == want
    assert sum(p.numel() for p in gen.parameters()) == size

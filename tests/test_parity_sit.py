"""SiT on a line of latents against values recorded from MAETok's code, under its tensor names"""
import json

import pytest
import torch
from safetensors import safe_open
from recordings import outputs
from test_parity_tokenizer import close, recorded

from tokkit.generators import (SiTCfg, SiTGenerator, flow, follow_sit, guided, path_at, sit_time_embedding,
                               sit_times)
from tokkit.zoo_generators import SIT_RULES, sit_state
from tokkit.published import by_rules

NAME = 'zoo/sit_1d'


@pytest.fixture(scope='module')
def sit(fixtures):
    config, sd, *rest = recorded(fixtures, NAME, 'sd', 'in', 'out', 'loss', 'grad', 'sample')
    generator = SiTGenerator(SiTCfg(n=config['input_size'], dim=config['in_channels'],
                                    classes=config['num_classes'], width=config['hidden_size'],
                                    depth=config['depth'], heads=config['num_heads']))
    generator.load_state_dict(sit_state(generator, sd))
    return generator.eval(), *rest

@torch.no_grad()
def test_activations_and_velocity(sit):
    generator, given, out, *_ = sit
    first, second = generator.blocks
    parts = dict(attn0=first.attn, mlp0=first.mlp, block0=first, block1=second, t_embed=generator.time)
    with outputs(**parts) as found:
        close(generator.velocity(given['x'], given['t'], given['y']), out['velocity'])
    for name, got in found.items(): close(got, out[name])
    close(generator.embed(given['x'])+generator.pos, out['embedded'])
    time = generator.time(sit_time_embedding(given['t']))
    close(time+generator.label(given['y']), out['condition'])


def of_case(loss, case):
    "What was recorded of one loss"
    return {k.removeprefix(f'{case}.'): v for k, v in loss.items() if k.startswith(f'{case}.')}

@pytest.mark.parametrize('path', ['linear', 'cosine'])
@pytest.mark.parametrize('times', ['uniform', 'lognormal'])
def test_losses_and_gradients(sit, path, times):
    generator, given, _, loss, grad, _ = sit
    said = of_case(loss, f'{path}_{times}')
    drawn = said['time_draw']
    if times == 'lognormal':
        odds = drawn.exp()
        drawn = odds/(1+odds) if path == 'linear' else 2/torch.pi*odds.atan()
    labels = given['y'].masked_fill(said['drop_ids'].bool(), generator.classes)
    x, noise = given['x'], said['noise']
    point = path_at(1-drawn[:,None,None], path)
    truth = -(point.signal_slope*x+point.noise_slope*noise)         # theirs: noise minus data
    error = generator.velocity(point.signal*x+point.noise*noise, drawn, labels)-truth
    per_image = error.square().flatten(1).mean(1)
    close(per_image, said['per_image'])
    if (path, times) != ('cosine', 'lognormal'): return
    names = {by_rules(name, SIT_RULES): p for name, p in generator.named_parameters()}
    for name, got in zip(grad, torch.autograd.grad(per_image.mean(), [names[name] for name in grad])):
        close(got, grad[name], 1e-4)

def test_loss_of_the_kit_is_theirs(sit, monkeypatch):
    "Linear path, their draws in the place of ours"
    generator, given, _, loss, *_ = sit
    said = of_case(loss, 'linear_uniform')
    def dropped(labels, *_): return labels.masked_fill(said['drop_ids'].bool(), generator.classes)
    monkeypatch.setattr(flow, 'draw_times', lambda *_: 1-said['time_draw'])
    monkeypatch.setattr(flow, 'drop_labels', dropped)
    monkeypatch.setattr(torch, 'randn', lambda *_, **__: said['noise'])
    with torch.no_grad(): found = generator.losses(given['x'], given['y'])['loss']
    close(found, said['per_image'].mean())


def recorded_samplers(fixtures):
    with safe_open(fixtures/f'{NAME}.safetensors', 'pt') as f: return json.loads(f.metadata()['samplers'])

@torch.no_grad()
@pytest.mark.parametrize('name', ['euler', 'euler_cfg', 'heun_cfg', 'sde', 'sde_cfg', 'sde_cosine'])
def test_samplers(sit, fixtures, name):
    generator, given, *_, sample = sit
    how = recorded_samplers(fixtures)[name]
    method = 'sde' if how['mode'] == 'sde' else 'heun' if how.get('heun') else 'euler'
    times = sit_times(how['num_steps'], method=method)
    inside = (times[:-1] >= how.get('low', 0.)) & (times[:-1] <= how.get('high', 1.))
    scales = torch.where(inside, how['cfg_scale'], 1.)
    def velocity(x, time, scale):
        def predict(x, y): return generator.velocity(x.float(), time.float().expand(len(x)), y)
        return guided(predict, x, given['y'], generator.classes, scale).double()
    out = follow_sit(velocity, sample[f'{name}.latents'].double(), times, scales, method,
                     sample.get(f'{name}.noise'), how.get('path', 'linear'))
    close(out, sample[f'{name}.out'])

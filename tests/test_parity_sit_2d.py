"""SiT on a grid of latents against values recorded from the authors' code, under its tensor names"""
import json
from functools import partial

import pytest
import torch
from einops import rearrange
from safetensors import safe_open
from recordings import check_full_size
from test_parity_tokenizer import close, recorded

from tokkit.generators import (PATH_ENDS, Guidance, SiT2DCfg, SiTChurning, flow, guided_pair, load_generator,
                               path_at, sample_batches, sample_dopri5, sample_euler, sample_heun2,
                               sample_sit_sde, save_generator, sit_2d, sit_positions, sit_time_embedding)
from tokkit.published import PUBLISHED
from tokkit.zoo import load, published_models
from tokkit.zoo_generators import sit_2d_generator

NAME = 'zoo/sit_2d'
PATHS = dict(Linear='linear', GVP='cosine', VP='vp')
SAMPLERS = ['euler', 'euler_cfg', 'heun2', 'dopri5', 'sde', 'sde_euler_last', 'sde_heun', 'sde_nolast',
            'sde_gvp']


def line(maps): return rearrange(maps, '... d h w -> ... (h w) d')

def metadata(fixtures, field):
    with safe_open(fixtures/f'{NAME}.safetensors', 'pt') as f: return json.loads(f.metadata()[field])

@pytest.fixture(scope='module')
def sit(fixtures, tmp_path_factory):
    "The recorded weights in a file, through `load`"
    config, sd, *rest = recorded(fixtures, NAME, 'sd', 'in', 'out', 'loss', 'sample')
    sizes = dict(side=config['input_size'], dim=config['in_channels'], classes=config['num_classes'],
                 width=config['hidden_size'], depth=config['depth'], heads=config['num_heads'],
                 patch=config['patch_size'], learn_sigma=config['learn_sigma'], std=1.)
    file = tmp_path_factory.mktemp('sit')/'small.pt'
    torch.save(dict(model={}, ema=sd), file)
    entry = PUBLISHED['sit-xl-2']
    PUBLISHED.register('sit-small', type(entry)(**vars(entry)|dict(build=partial(sit_2d_generator, **sizes),
                                                                   title='small')))
    generator = load('sit-small', file)
    del PUBLISHED._things['sit-small']
    return generator, *rest

@torch.no_grad()
def test_activations_and_velocity(sit):
    generator, given, out, *_ = sit
    found = {}
    def keep(name):
        def hook(_, __, result): found[name] = result
        return hook
    def last(_, entered): found['final'] = generator.head.patches(*entered)
    first, second = generator.blocks
    hooks = [first.register_forward_hook(keep('block0')), second.register_forward_hook(keep('block1'))]
    hooks.append(generator.head.register_forward_pre_hook(last))
    close(generator(line(given['x']), given['t'], given['y']), line(out['velocity']))
    for hook in hooks: hook.remove()
    assert set(found) == {'block0', 'block1', 'final'}
    for name, got in found.items(): close(got, out[name])
    close(generator.embed(line(given['x']))+generator.pos, out['embedded'])
    close(generator.time(sit_time_embedding(given['t']))+generator.label(given['y']), out['condition'])
    assert generator.loaded.weights == 'ema'

def test_table_of_places(fixtures):
    sd, = recorded(fixtures, NAME, 'sd')[1:]
    close(sit_positions((4, 4), 48)[None], sd['pos_embed'])

@torch.no_grad()
def test_guidance_of_three_channels(sit):
    generator, given, out, *_ = sit
    def predict(x, y): return generator(x, given['t'].repeat(2), y)
    pair = guided_pair(predict, line(given['x']), given['y'], generator.classes, 2.5)
    close(pair, line(out['with_cfg']))


@torch.no_grad()
@pytest.mark.parametrize('name', ['linear', 'gvp', 'vp'])
def test_losses(sit, fixtures, name, monkeypatch):
    "Their draws in the place of ours: an image at a time, and the loss of the kit"
    generator, given, _, loss, _ = sit
    path = PATHS[metadata(fixtures, 'losses')[name][0]]
    said = {k.removeprefix(f'{name}.'): v for k, v in loss.items() if k.startswith(f'{name}.')}
    labels = given['y'].masked_fill(said['drop_ids'].bool(), generator.classes)
    x, noise = line(given['x']), line(said['noise'])
    t = said['uniform']*PATH_ENDS.get(path, 1.)
    point = path_at(t[:,None,None], path)
    error = (generator(point.signal*x+point.noise*noise, t, labels)
             -(point.signal_slope*x+point.noise_slope*noise))
    close(error.square().flatten(1).mean(1), said['per_image'])
    monkeypatch.setattr(flow, 'draw_times', lambda *_: said['uniform'])
    monkeypatch.setattr(flow, 'drop_labels', lambda *_: labels)
    monkeypatch.setattr(torch, 'randn', lambda *_, **__: noise)
    monkeypatch.setattr(generator, 'cfg', SiT2DCfg(**vars(generator.cfg)|dict(path=path)))
    close(generator.losses(x, given['y'])['loss'], said['per_image'].mean())


def drawn_by(sit, how, latents, noise):
    "What a recorded sampler gives here"
    generator, given, *_ = sit
    path = PATHS[how.get('path', 'Linear')]
    guidance = Guidance(how['cfg_scale'])
    velocity = sit_2d._velocity_2d(generator, given['y'], guidance)
    steps = how['num_steps']-1
    if how['method'] == 'dopri5':
        both = latents if guidance.scale == 1 else torch.cat([latents, latents])
        return sample_dopri5(velocity, both)[:len(latents)]
    if how['mode'] == 'ode':
        times = torch.linspace(0, 1, how['num_steps']).double()
        return dict(euler=sample_euler, heun2=sample_heun2)[how['method']](velocity, latents, times)
    last = how['last'] and how['last'].lower()
    churning = SiTChurning(how['form'], how['norm'], last, how['last_size'], how['method'] == 'Heun')
    times = churning.times(steps+(last is not None), 0., path)
    return sample_sit_sde(velocity, latents, times, noise[:,:len(latents)], churning, path)

@torch.no_grad()
@pytest.mark.parametrize('name', SAMPLERS)
def test_samplers(sit, fixtures, name):
    how = metadata(fixtures, 'samplers')[name]
    sample = sit[-1]
    noise = sample.get(f'{name}.noise')
    got = drawn_by(sit, how, line(sample[f'{name}.latents']), None if noise is None else line(noise))
    close(got, line(sample[f'{name}.out']))

def test_every_sampler_is_tested(fixtures):
    assert set(metadata(fixtures, 'samplers')) == set(SAMPLERS)

@pytest.mark.parametrize('name', ['euler', 'heun2', 'sde', 'sde_heun', 'sde_nolast', 'sde_gvp', 'dopri5'])
def test_sample_is_the_sampler(sit, fixtures, name, monkeypatch):
    "`generator.sample`, given their draws, gives their latents"
    generator, given, *_, sample = sit
    how = metadata(fixtures, 'samplers')[name]
    start = line(sample[f'{name}.latents'])
    noise = sample.get(f'{name}.noise')
    def draws(seeds, shape, stream, **_):
        return start if stream == 'noise' else line(noise)[:,:len(seeds)].transpose(0, 1)
    monkeypatch.setattr(sit_2d, 'row_noise', draws)
    path = PATHS[how.get('path', 'Linear')]
    monkeypatch.setattr(generator, 'cfg', SiT2DCfg(**vars(generator.cfg)|dict(path=path)))
    settings = dict(method='sde' if how['mode'] == 'sde' else how['method'].replace('heun2', 'heun'))
    if name != 'dopri5': settings['steps'] = how['num_steps']-(how.get('last') is None)
    if how['mode'] == 'sde':
        last = how['last'] and how['last'].lower()
        settings['churning'] = SiTChurning(how['form'], how['norm'], last, heun=how['method'] == 'Heun')
    got = generator.sample(given['y'], how['cfg_scale'], **settings)
    # of dopri5 each row has steps of its own
    close(got, line(sample[f'{name}.out']), 2e-3 if name == 'dopri5' else 1e-5)


def test_dopri5_of_a_guided_batch_goes_by_both_halves(sit):
    generator, given, *_ = sit
    label = given['y'][:1]
    made = generator.sample(label, 3., rng=torch.tensor([5]), method='dopri5')
    noise = sit_2d.row_noise(torch.tensor([5]), generator.shape, 'noise', normal=True)
    velocity = sit_2d._velocity_2d(generator, label, Guidance(3.))
    with torch.no_grad():
        pair = sample_dopri5(velocity, torch.cat([noise, noise]))
        alone = sample_dopri5(velocity, noise)
    close(made, pair[:1], 1e-6)
    assert not torch.equal(pair[:1], alone)

def test_a_damaged_network_is_told_of(sit):
    def broken(x, time): return x*float('nan')
    with pytest.raises(FloatingPointError, match='not finite at step 0'):
        sample_dopri5(broken, torch.ones(1, 2, 3))

def test_callbacks_tell_every_step(sit):
    generator, given, *_ = sit
    for method, steps in dict(euler=5, heun=5, sde=5, dopri5=1).items():
        told = []
        how = {} if method == 'dopri5' else dict(steps=5)
        made = generator.sample(given['y'], 1.5, rng=torch.tensor([1, 2, 3]), method=method,
                                callback=told.append, **how)
        assert [s['i'] for s in told] == list(range(steps)) and {s['steps'] for s in told} == {steps}
        assert told[-1]['t'] == 1 and torch.equal(told[-1]['latents'], made)
        assert all(s['clean'].isfinite().all() for s in told)

@pytest.mark.parametrize('path', SiT2DCfg.paths)
def test_saved_and_kept(path, tmp_path):
    "Any path: a file and back, more kept is nearer, batches change nothing"
    torch.manual_seed(0)
    generator = sit_2d_generator(4, width=32, depth=1, heads=2, classes=3, path=path).eval()
    for p in generator.parameters():
        if not p.any(): torch.nn.init.normal_(p, std=.05)
    again = load_generator(save_generator(generator, tmp_path/'g'))
    assert again.fingerprint == generator.fingerprint and again.cfg == generator.cfg
    real, labels = 5*torch.randn(4, 16, 4), torch.arange(4)%3
    for method in ('euler', 'heun', 'sde'):
        def drawn(sigma): return again.sample(labels, keep=(real, sigma), rng=torch.arange(4), method=method,
                                              steps=20)
        far = [(drawn(sigma)-real).abs().mean() for sigma in (0., .5, .9, .99)]
        assert far == sorted(far, reverse=True) and all(d.isfinite() for d in far)
        whole, _ = sample_batches(again, labels, 2., batch=4, seed=1, steps=4, method=method)
        one, _ = sample_batches(again, labels, 2., batch=1, seed=1, steps=4, method=method)
        close(one, whole, 1e-4)

def test_none_are_drawn():
    generator = sit_2d_generator(4, width=32, depth=1, heads=2, classes=3).eval()
    for method in sit_2d.METHODS_2D:
        assert generator.sample(torch.zeros(0, dtype=torch.long), method=method).shape == (0, 16, 4)

def test_what_goes_wrong():
    generator = sit_2d_generator(4, width=32, depth=1, heads=2, classes=3).eval()
    label = torch.tensor([0])
    with pytest.raises(ValueError, match='churning is of the method sde'):
        generator.sample(label, method='euler', churning=SiTChurning())
    with pytest.raises(ValueError, match='steps must be'): generator.sample(label, steps=0)
    with pytest.raises(ValueError, match='form must be one of'): SiTChurning('SBDM')
    with pytest.raises(ValueError, match='last must be None or one of'): SiTChurning(last='Mean')
    with pytest.raises(ValueError, match='path must be one of linear, cosine, vp'):
        sit_2d_generator(4, path='bent')


def test_names_and_shapes_at_full_size(fixtures):
    shapes, theirs, model = check_full_size(fixtures, 'shapes_gpt_maetok_sit.json', 'sit_xl_2_256',
                                            PUBLISHED['sit-xl-2'])
    assert len(model.state_dict()) == len(theirs) == len(shapes)

def test_its_row_names_the_autoencoder():
    row = published_models().set_index('name').loc['sit-xl-2']
    assert row['kind'] == 'generator' and 'AutoencoderKL' in row['images'] and row['latents'] == '1024 x 4'

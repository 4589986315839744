"""RAR on MaskGIT's ids against values recorded from the authors' code, under their tensor names"""
import json

import pytest
import torch
from test_parity_tokenizer import close, recorded

from tokkit.generators import Guidance, Sampling, autoregressive as ar, token_probabilities
from tokkit.layers import to_timm
from tokkit.published import PUBLISHED
from tokkit.zoo_generators import RAR_SIZES, rar_generator, rar_state


@pytest.fixture(scope='module')
def rar(fixtures):
    config, sd, given, out, train = recorded(fixtures, 'zoo/rar_maskgit', 'sd', 'in', 'out', 'train')
    network = config['generator']
    generator = rar_generator(n=network['image_seq_len'], codebook_size=config['codebook_size'],
                              classes=network['condition_num_classes'], width=network['hidden_size'],
                              depth=network['num_hidden_layers'], heads=network['num_attention_heads'],
                              ratio=network['intermediate_size']/network['hidden_size'], dropout=0.)
    generator.load_state_dict(rar_state(generator, {k: v.float() for k, v in sd.items()}))
    return generator.eval(), config, given, out, train

def labels_of(given, out, generator):
    "The labels after the recorded draws left some out: the last row of the table is none"
    return out['condition_ids']-generator.blank-1

@torch.no_grad()
def test_training_logits(rar):
    generator, _, given, out, _ = rar
    orders = given['orders']
    ids = given['tokens'].gather(1, orders)
    assert torch.equal(ids, out['train_labels'])
    close(generator.logits(ids, labels_of(given, out, generator), orders), out['train_logits'])

def test_loss_and_gradients(rar, monkeypatch):
    generator, _, given, out, train = rar
    labels = labels_of(given, out, generator)
    monkeypatch.setattr(ar, 'draw_orders', lambda b, n, ratio, rng: given['orders'])
    monkeypatch.setattr(ar, 'drop_labels', lambda *_: labels)
    found = generator.losses(given['tokens'], torch.zeros_like(labels), done=0.)
    close(found['loss'].detach(), train['loss'])
    close(found['accuracy'].float(), train['correct_tokens'])
    names = {to_timm(name): p for name, p in generator.named_parameters()}
    grads = {k.removeprefix('grad.'): v for k, v in train.items() if k.startswith('grad.')}
    for name, got in zip(grads, torch.autograd.grad(found['loss'], [names[name] for name in grads])):
        close(got, grads[name], 1e-4)

@pytest.mark.parametrize('case', ['rar_b', 'rar_xl', 'constant_cfg', 'no_cfg'])
def test_ids_step_by_step(rar, case):
    "Their draws were replaced by the likeliest code; a power of 0 is a constant scale"
    generator, config, given, out, _ = rar
    how = config['generation'][case]
    guidance = Guidance(how['guidance_scale'], how['guidance_scale_pow'] or None)
    seen = []
    ids = generator.sample(given['gen.condition'], Sampling(guidance, how['randomize_temperature'], top_k=1),
                           callback=lambda said: seen.append(said['logits']))
    assert torch.equal(ids, out[f'gen.{case}.ids'])
    probs = token_probabilities(torch.stack(seen, 1), how['randomize_temperature'])
    close(probs, out[f'gen.{case}.probs'], 2e-5)


@pytest.mark.parametrize('size', RAR_SIZES)
def test_names_and_shapes_at_full_size(fixtures, size):
    shapes = json.loads((fixtures/'zoo'/'shapes_titok_maskgit.json').read_text())[f'rar_{size}']
    with torch.device('meta'): generator = PUBLISHED[f'rar-{size}'].build()
    ours = {to_timm(k): list(v.shape) for k, v in generator.state_dict().items()}
    assert ours == {k: shape for k, (shape, _) in shapes.items()}

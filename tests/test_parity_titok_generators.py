"""TiTok's generators, BERT and U-ViT, against values recorded from the authors' code, by their tensor names:
logits, masks, losses, gradients, ids before every step; names and shapes of the full-size files"""
import json

import pytest
import torch
from test_parity_tokenizer import close, recorded

from tokkit.cli import main
from tokkit.core import make_rng
from tokkit.data import ImageSet
from tokkit.generators import (Guidance, Sampling, hidden_entries, load_generator, make_generator,
                               sample_batches, save_generator, titok_maskgit, titok_plan)
from tokkit.posttraining import latent_pairs
from tokkit.published import PUBLISHED, by_rules
from tokkit.tokenizers import encode_all
from tokkit.training import GeneratorTraining, TensorPairs, train_generator
from tokkit.zoo.load import _sorted_out
from tokkit.zoo_generators import (IMAGEBERT_RULES, TITOK_SAMPLING, titok_generator, titok_generator_state,
                                   uvit_rules)
from tokkit.zoo_tokenizers import titok_tokenizer

NETWORKS = dict(ViT='imagebert', UViT='uvit')
CASES = 'constant', 'linear', 'power_cosine', 'noguid', 'greedy'


def made(config, sd, **changes):
    "A recorded generator"
    g = config['generator']
    sizes = dict(n=g['image_seq_len'], codebook_size=config['codebook_size'],
                 classes=g['condition_num_classes'], width=g['hidden_size'],
                 depth=g['num_hidden_layers'], heads=g['num_attention_heads'],
                 ratio=g['intermediate_size']/g['hidden_size'], dropout=0.,
                 label_smoothing=config['losses']['label_smoothing'],
                 known_weight=config['losses']['loss_weight_unmasked_token'],
                 label_dropout=config['losses']['cond_drop_prob'])
    generator = titok_generator(NETWORKS[g['model_type']], **sizes|changes)
    generator.load_state_dict(titok_generator_state(generator, {k: v.float() for k, v in sd.items()}))
    return generator.eval()

@pytest.fixture(scope='module', params=['titok_imagebert', 'titok_uvit'])
def recording(fixtures, request):
    return recorded(fixtures, f'zoo/{request.param}', 'sd', 'in', 'out', 'train')

@pytest.fixture(scope='module')
def generator(recording): return made(*recording[:2])


@torch.no_grad()
def test_logits(recording, generator):
    _, _, given, out, _ = recording
    none = torch.full_like(given['condition'], generator.classes)
    close(generator.logits(given['input_ids'], given['condition']), out['logits_cond'])
    close(generator.logits(given['input_ids'], none), out['logits_uncond'])


def at_names(generator, name):
    "Where the gradient of a tensor of theirs is: our parameter, and which of its rows"
    uvit = generator.kind == 'uvit'
    rules = uvit_rules(generator.cfg.depth) if uvit else IMAGEBERT_RULES
    part = next((part for part in ('query', 'key', 'value') if f'.self.{part}.' in name), None)
    whole = name.replace(f'.self.{part}.', '.self.qkv.')
    p = next(p for ours, p in generator.named_parameters() if by_rules(ours, rules) == whole)
    if part is None: return p, slice(None)
    w = generator.cfg.width
    i = ('query', 'key', 'value').index(part)
    return p, slice(i*w, i*w+w)

def test_masks_loss_and_gradients(recording, generator, monkeypatch):
    "Their draws in the place of ours, in the order in which ours are drawn"
    config, _, given, out, train = recording
    t, lots = given['train.t'], given['train.rand']
    hidden = hidden_entries(t, lots)
    assert torch.equal(hidden, out['train_masks'])
    ids = given['train.tokens'].masked_fill(hidden, generator.codebook_size)
    assert torch.equal(ids, out['train_masked_ids'])
    labels = given['condition'].masked_fill(given['train.label_drop_rand'] < generator.label_dropout,
                                            generator.classes)
    close(generator.logits(ids, labels).detach(), train['logits'])
    draws = iter([t, lots, given['train.label_drop_rand']])
    monkeypatch.setattr(torch, 'rand', lambda *_, **__: next(draws))
    found = generator.losses(given['train.tokens'], given['condition'])
    monkeypatch.undo()
    close(found['loss'].detach(), train['loss'])
    close(found['accuracy'], train['correct_tokens'])
    grads = {k.removeprefix('grad.'): v for k, v in train.items() if k.startswith('grad.')}
    for name, want in grads.items():
        p, rows = at_names(generator, name)
        got, = torch.autograd.grad(found['loss'], p, retain_graph=True)
        close(got[rows].reshape(want.shape), want, 1e-4)


def sampling_of(how):
    "Their settings in the kit's: a scale of constant and of linear guidance is one more there"
    scale, decay = how['guidance_scale'], how['guidance_decay']
    if decay == 'power-cosine': guidance = Guidance(scale, how['guidance_scale_pow'])
    else: guidance = Guidance(1+scale, kind=decay)
    return Sampling(guidance, steps=how['num_sample_steps'], choice_temperature=how['randomize_temperature'])

@pytest.mark.parametrize('case', CASES)
def test_ids_before_every_step(recording, monkeypatch, case):
    config, sd, given, out, _ = recording
    how = config['generation'][case]
    generator = made(config, sd, annealed=how['softmax_temperature_annealing'])
    def theirs(seeds, shape, stream, device):
        kind, i = stream.split()
        return given[f'gen.{case}.u_{dict(draw="token", choice="conf")[kind]}'][int(i)]
    monkeypatch.setattr(titok_maskgit, 'row_noise', theirs)
    mask = torch.tensor(generator.codebook_size)
    seen = [torch.full_like(out[f'gen.{case}.ids'], generator.codebook_size)]
    def note(said): seen.append(said['latents'].where(said['known'], mask))
    ids = generator.sample(given['gen.condition'], sampling_of(how), callback=note)
    assert torch.equal(torch.stack(seen[:-1]), out[f'gen.{case}.ids_before_step'])
    assert torch.equal(ids, out[f'gen.{case}.ids']) and torch.equal(seen[-1], ids)


@pytest.mark.parametrize('name', ['s-128', 'b-64', 'l-32'])
def test_names_and_shapes_at_full_size(fixtures, name):
    tables = json.loads((fixtures/'zoo'/'shapes_titok_maskgit.json').read_text())
    size, n = name.split('-')
    table = f'generator_titok_{size}{n}'
    if table in tables: shapes = tables[table]
    else:
        told = tables['_derived'][table]
        assert not told['removed']
        shapes = tables[told['same_as']] | told['changed_or_added']
    with torch.device('meta'):
        theirs = {k: torch.empty(shape, dtype=getattr(torch, dtype)) for k, (shape, dtype) in shapes.items()}
        generator = PUBLISHED[f'titok-generator-{name}'].build()
    ours = titok_generator_state(generator, theirs)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in generator.state_dict().items()}
    assert sum(p.numel() for p in generator.parameters()) == tables['_parameters'][table]
    if name != 'l-32': assert sum(v.numel() for v in theirs.values()) == tables['_parameters'][table]
    assert TITOK_SAMPLING[size].steps == (64 if size == 's' else 8)


def test_numbers_of_places_are_left_out():
    theirs = {f'model.embeddings.{name}': torch.ones(2)
              for name in ('position_ids', 'position_embeddings.weight')}
    kept, left = _sorted_out(PUBLISHED['titok-generator-b-64'], theirs)
    assert list(kept) == ['model.embeddings.position_embeddings.weight'] and sum(left.values()) == 1


def test_plan_never_ends_early():
    for steps in (1, 2, 5, 40):
        hidden = torch.arange(30)
        plan = titok_plan(hidden, steps)
        assert (plan[:,-1] == 0).all() and (plan.diff(dim=1) <= 0).all()
        assert (plan[1:,:-1] >= 1).all() and (plan[0] == 0).all()
        assert (plan[2:,:1] < hidden[2:,None]).all()

def test_more_steps_than_entries(generator):
    seen = []
    labels = torch.arange(4)
    ids = generator.sample(labels, steps=generator.cfg.n+6, rng=make_rng(0), callback=seen.append)
    assert len(seen) == generator.cfg.n+6 and seen[-1]['known'].all()
    assert torch.equal(sum(s['new'].int() for s in seen), torch.ones_like(ids))

@pytest.mark.parametrize('sigma', [0., .4, 1.])
def test_keep(generator, sigma):
    "What is kept stays, every other entry is set once, and no row depends on another"
    real = torch.randint(generator.codebook_size, (9, *generator.shape), generator=make_rng(5))
    labels = torch.arange(9)%generator.classes
    seen = []
    ids = generator.sample(labels, 3., keep=(real, sigma), rng=make_rng(1), callback=seen.append)
    held = seen[0]['known'] & ~seen[0]['new']
    assert torch.equal(ids[held], real[held])
    assert held.float().mean().item() == pytest.approx(sigma, abs=.15)
    assert torch.equal(sum(s['new'].int() for s in seen), (~held).int())
    one, _ = sample_batches(generator, labels, 3., keep=(real, sigma), batch=1, seed=4)
    all_, _ = sample_batches(generator, labels, 3., keep=(real, sigma), batch=9, seed=4)
    assert torch.equal(one, all_)

def test_trained_saved_and_read_back(recording, tmp_path):
    config, sd, *_ = recording
    generator = made(config, sd)
    before = generator.fingerprint
    ids = torch.randint(generator.codebook_size, (16, *generator.shape), generator=make_rng(2))
    labels = torch.arange(16)%generator.classes
    first = generator.loss(ids, labels, make_rng(0)).item()
    train_generator(generator, TensorPairs(ids, labels), GeneratorTraining(epochs=10, batch=16, lr=3e-3),
                    device='cpu')
    generator.eval()
    assert generator.fingerprint != before and generator.loss(ids, labels, make_rng(0)).item() < first
    back = load_generator(save_generator(generator, tmp_path/'g'))
    assert back.cfg == generator.cfg and back.fingerprint == generator.fingerprint
    drawn = [g.sample(labels, 2., rng=make_rng(3)) for g in (generator, back)]
    assert torch.equal(*drawn)


@pytest.fixture(scope='module', params=['imagebert', 'uvit'])
def pair(request):
    "A small TiTok and a generator of its ids"
    torch.manual_seed(0)
    tok = titok_tokenizer((32, 1, 4), (32, 1, 4), 6, size=32, patch=8, codebook_size=64, code_dim=8).eval()
    return tok, make_generator(request.param, tok.spec, 2, width=32, depth=2, heads=4).eval()

def test_pairs(pair):
    tok, generator = pair
    pixels = torch.randint(256, (6, 3, 32, 32), generator=make_rng(0)).to(torch.uint8)
    images = ImageSet(pixels, torch.arange(6)%2, ['a', 'b'], 'noise')
    real = encode_all(tok, images)
    whole, half = (latent_pairs(generator, tok, images, sigma, known=real, source='tokens', seed=0)
                   for sigma in (1., .5))
    assert torch.equal(whole.latents, real)
    assert .1 < (half.latents != real).float().mean() < .9

def test_command(pair, tmp_path, capsys):
    tok, generator = pair
    tok.save(tmp_path/'tok')
    save_generator(generator, tmp_path/'gen')
    words = ['--device', 'cpu', 'sample', '--tokenizer', str(tmp_path/'tok'), '--generator',
             str(tmp_path/'gen'), '-n', '4', '--guidance', '3', '--power', '2', '--steps', '3', '--out']
    assert main([*words, str(tmp_path/'a')]) == 0
    assert len(list((tmp_path/'a').rglob('*.png'))) == 4
    assert main([*words, str(tmp_path/'a')]) == 2 and 'is there already' in capsys.readouterr().err

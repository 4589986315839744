"""GigaTok's tokenizer and generator against values recorded from the authors' code, under their tensor names:
activations, ids, images, losses and gradients; ids under each schedule of guidance; names and shapes"""
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from recordings import check_full_size, outputs
from test_parity_tokenizer import close, recorded

from tokkit.generators import Guidance, token_probabilities
from tokkit.published import PUBLISHED, by_rules
from tokkit.zoo_generators import GPT_RULES, ScheduledGuidance, gigatok_generator, gpt_state
from tokkit.zoo_tokenizers import gigatok_state, gigatok_tokenizer

GPT = 'zoo/gigatok_gpt'
MLP = 's1to2decoder.distill_mlp'


def rows(z): return z[:,:,0].mT         # theirs: (b d 1 n)
def batched(t): return t.transpose(0, 1)    # theirs: (n b d)

@pytest.fixture(scope='module')
def gigatok(fixtures):
    config, sd, *rest = recorded(fixtures, 'zoo/gigatok', 'sd', 'in', 'out', 'train', 'grad')
    def network(side):
        return tuple(config['transformer'][config[f'{side}_size']][k] for k in ('width', 'layers', 'heads'))
    tok = gigatok_tokenizer(
        network('encoder'), network('decoder'), config['image_size'], dict(width=config['ch'], depth=2),
        entropy=config['entropy_loss_ratio'], patch=2**(len(config['encoder_ch_mult'])-1),
        latents=config['num_latent_tokens'], multipliers=tuple(config['encoder_ch_mult']),
        z_channels=config['z_channels'], codebook_size=config['codebook_size'],
        code_dim=config['codebook_embed_dim'], commitment=config['commit_loss_beta'])
    kept = {k: v.float() for k, v in sd.items() if 'distill_mlp' not in k}
    tok.load_state_dict(gigatok_state(tok, kept))
    return tok.eval(), *rest, {k: v for k, v in sd.items() if 'distill_mlp' in k}

@torch.no_grad()
def test_encoder(gigatok):
    tok, given, out, *_ = gigatok
    encoder = tok.encoder
    grid = encoder.cnn.features(given['images'])
    close(grid, out['cnn_encoder'])
    memory = encoder.body.memory(grid.flatten(2).mT)
    close(memory, batched(out['memory']))
    queries = encoder.queries(memory)
    close(queries, batched(out['queries']))
    body = encoder.body
    close(body.layers[0](queries, memory, body.places, body.memory_places), batched(out['enc_layer0']))
    close(encoder.conv_out(body(queries, memory)), rows(out['qformer']))
    close(tok.encode(given['images']), rows(out['pre_quant']))

@torch.no_grad()
def test_codes_and_images(gigatok):
    tok, given, out, *_, left = gigatok
    assert torch.equal(tok.tokenize(given['images']).flatten(), out['indices'])
    q = tok.quantize(tok.encode(given['images']))
    close(q.zq, rows(out['quantized']))
    decoder = tok.decoder
    memory = decoder.memory(q.zq)
    close(memory, batched(out['dec_memory']))
    queries = memory[:,:1].expand(-1, 64, -1)
    close(queries, batched(out['dec_queries']))
    body = decoder.body
    layer = body.layers[0](queries, memory, body.places, body.memory_places)
    close(layer, batched(out['dec_layer0']))
    close(decoder.spatial(q.zq), out['decoder_spatial'])
    close(tok.detokenize(given['codes']), out['decode_code'])
    inner = body.layers[1](layer, memory, body.places, body.memory_places)      # the second, `distill_depth`
    for part in (0, 2, 4):              # a perceptron of training alone, which no tokenizer here has
        weight, bias = (left[f'{MLP}.{part}.{kind}'].float() for kind in ('weight', 'bias'))
        inner = F.linear(F.silu(inner) if part else inner, weight, bias)
    close(inner, out['inner_feat'])

def test_losses_and_gradients(gigatok):
    tok, given, out, train, grad, _ = gigatok
    z = rows(out['pre_quant']).clone().requires_grad_()
    vq = tok.quantizer.train()
    q = vq(z)
    vq.eval()
    close(q.codebook_loss.detach()[None], train['vq_loss'])
    close(q.commitment_loss.detach()[None], train['commit_loss'])
    close(q.prior_loss.detach()[None], train['entropy_loss'])
    mine = torch.autograd.grad((q.zq*rows(given['grad_weight'])).sum(), z, retain_graph=True)[0]
    close(mine, rows(grad['straight_through']), 1e-4)
    by_latents, by_codes = torch.autograd.grad(q.loss, (z, vq.embedding.weight))
    close(by_latents, rows(grad['losses_pre_quant']), 1e-4)
    close(by_codes, grad['losses_embedding'], 1e-4)
    grid = out['cnn_encoder']
    spatial = tok.decoder.spatial(rows(out['quantized']))
    close(F.mse_loss(spatial, grid).detach()[None], train['feature_loss'])
    with torch.no_grad(): close(tok.decoder.cnn.from_features(grid), train['direct_reconstruction'])

@pytest.mark.parametrize('name', ['ss', 'sb', 'bl', 'xlxxl'])
def test_names_and_shapes_at_full_size(fixtures, name):
    check_full_size(fixtures, 'shapes_gpt_maetok_sit.json', f'gigatok_VQ_{name.upper()}256',
                    PUBLISHED[f'gigatok-{name}'])


@pytest.fixture(scope='module')
def gpt(fixtures):
    config, sd, *rest = recorded(fixtures, GPT, 'sd', 'in', 'out', 'train', 'grad', 'gen')
    sizes = dict(n='block_size', codebook_size='vocab_size', classes='num_classes', width='dim',
                 depth='n_layer', heads='n_head', multiple='multiple_of')
    generator = gigatok_generator(**{ours: config[theirs] for ours, theirs in sizes.items()}, dropout=0.)
    generator.load_state_dict(gpt_state(generator, sd))
    return generator.eval(), *rest

@torch.no_grad()
def test_generator_activations(gpt):
    generator, given, out, *_ = gpt
    first, second = generator.blocks
    parts = dict(embedded=generator.dropout, layer0=first, layer1=second)
    with outputs(**parts) as found:
        close(generator.logits(given['tokens'], given['labels']), out['logits'])
    assert set(found) == set(parts)
    for name, got in found.items(): close(got, out[name])

def test_generator_loss_and_gradient(gpt):
    generator, given, _, train, grad, _ = gpt
    labels = given['labels'].masked_fill(train['drop_ids'].bool(), generator.classes)
    logits = generator.scores(generator.frames(given['tokens'])[:,:-1], labels)[:,:,0]
    close(logits, train['logits'])
    loss = F.cross_entropy(logits.mT, given['tokens'])
    close(loss[None], train['loss'])
    names = {by_rules(name, GPT_RULES): p for name, p in generator.named_parameters()}
    got, = torch.autograd.grad(loss, names['positional_embedding'])
    close(got[0], grad['positional_embedding'], 1e-4)


def recorded_cases(fixtures):
    with safe_open(fixtures/f'{GPT}.safetensors', 'pt') as f: return json.loads(f.metadata()['cases'])

def guidance_of(case):
    "Theirs by its schedule"
    if case['cfg_schedule'] == 'constant': return Guidance(case['cfg_scale'])
    how = case['cfg_schedule_kwargs']
    window = how.get('window_start', 0.), how.get('window_end', 1.)
    return ScheduledGuidance(case['cfg_scale'], schedule=case['cfg_schedule'], window=window)

GREEDY = ['greedy', 'step', 'linear', 'linear_re', 'triangular', 'rectangular', 'step_unguided']

@pytest.mark.parametrize('name', GREEDY)
def test_greedy_ids_under_each_schedule(gpt, fixtures, name):
    generator, given, *_, gen = gpt
    case = recorded_cases(fixtures)[name]
    assert not case['sample_logits']
    seen = []
    ids = generator.sample(given['labels'], guidance_of(case), top_k=1,
                           callback=lambda said: seen.append(said['logits']))
    assert torch.equal(ids, gen[f'{name}.ids'])
    close(torch.stack(seen, 1), gen[f'{name}.logits'])

@torch.no_grad()
def test_sampled_distribution(gpt, fixtures):
    "Their draws are torch's multinomial, ours are not: the distributions, given the ids drawn before"
    generator, given, *_, gen = gpt
    case = recorded_cases(fixtures)['sample_step']
    ids = gen['sample_step.ids']
    scales = guidance_of(case).scales(16)[:,None]
    none = torch.full_like(given['labels'], generator.classes)
    conditional, free = (generator.logits(ids, labels)[:,:-1] for labels in (given['labels'], none))
    logits = free+scales*(conditional-free)
    close(logits, gen['sample_step.logits'])
    how = dict(temperature=case['temperature'], top_k=case['top_k'] or None, top_p=case['top_p'])
    close(token_probabilities(logits, **how), gen['sample_step.probs'])
    torch.manual_seed(case['seed'])
    drawn = [torch.multinomial(p, 1)[:,0] for p in gen['sample_step.probs'].unbind(1)]
    assert torch.equal(torch.stack(drawn, 1), ids)

def test_every_recorded_case_is_compared(fixtures):
    assert set(recorded_cases(fixtures)) == {*GREEDY, 'sample_step'}

def test_generator_names_and_shapes_at_full_size(fixtures):
    check_full_size(fixtures, 'shapes_gpt_maetok_sit.json', 'gigatok_gpt_B', PUBLISHED['gigatok-gpt-b-ss'])

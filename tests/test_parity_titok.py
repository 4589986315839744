"""TiTok of both generations against values recorded from the authors' code, under their tensor names"""
import json

import pytest
import torch
from test_parity_tokenizer import close, recorded

from tokkit.data import to_uint8
from tokkit.tokenizers import load_tokenizer
from tokkit.published import PUBLISHED, by_rules
from tokkit.zoo.load import _sorted_out
from tokkit.zoo_tokenizers import titok_rules, titok_state, titok_tokenizer

LEVELS = 3      # of the recorded MaskGIT


def sizes(config):
    "Arguments of `titok_tokenizer`"
    m = config['model']['vq_model']
    def network(side): return tuple(config[side][k] for k in ('width', 'layers', 'heads'))
    made = dict(encoder=network('encoder'), decoder=network('decoder'), latents=m['num_latent_tokens'],
                legacy=m.get('is_legacy', True), size=config['model']['crop_size'],
                patch=m['vit_enc_patch_size'], code_dim=m['token_size'])
    if 'pixel' in config:
        p = config['pixel']
        made |= dict(pixels=dict(multipliers=tuple(p['channel_mult']), width=p['hidden_channels'],
                                 depth=p['num_res_blocks'], codebook_size=p['num_embeddings'],
                                 code_dim=p['embedding_dim']))
    if 'text_context_length' in m: made |= dict(text=(m['text_context_length'], m['text_embed_dim']))
    if m.get('quantize_mode') == 'vae': return made|dict(quantizer='kl', codebook_size=0)
    return made|dict(codebook_size=m['codebook_size'], l2_norm=m['use_l2_norm'])

def made(fixtures, name):
    "A recorded tokenizer, and what was recorded of it"
    config, sd, given, out, train = recorded(fixtures, f'zoo/{name}', 'sd', 'in', 'out', 'train')
    tok = titok_tokenizer(**sizes(config))
    tok.load_state_dict(titok_state(tok, {k: v.float() for k, v in sd.items()}))
    return tok.eval(), given, out, train

@pytest.fixture(scope='module', params=['titok', 'titok_vq8k', 'titok_vae', 'tatitok_vq'])
def titok(fixtures, request):
    tok, given, *rest = made(fixtures, request.param)
    # of every row its own: the first one is kept, all are given below
    if tok.decoder.text is not None: tok.decoder.read(given['text_guidance'][0])
    return tok, given, *rest

def rows(z): return z[:,:,0].mT         # theirs: (b d 1 n)

@torch.no_grad()
def test_encoder(titok):
    tok, given, out, _ = titok
    encoder = tok.encoder
    x = 2*given['images']-1             # theirs lie in [0,1]
    sequence = encoder.sequence(x)
    close(sequence, out['enc.sequence_before_ln_pre'])
    close(encoder.body.blocks[0](encoder.body.ln_pre(sequence)), out['enc.after_block0'])
    kept = encoder.body(sequence, slice(-6, None))
    close(kept, out['enc.latents_after_ln_post'])
    close(encoder.projected(kept), out['enc.conv_out_input'][...,0].mT)
    close(tok.encode(x), rows(out['z']))

@torch.no_grad()
def test_codes_and_images(titok):
    tok, given, out, train = titok
    x = 2*given['images']-1
    def unit(image): return (image+1)/2
    if 'indices' in out:
        assert torch.equal(tok.tokenize(x), out['indices'][:,0])
        q = tok.quantize(tok.encode(x))
        close(q.zq, rows(out['z_q']))
        close(q.codebook_loss, train['codebook_loss'])
        close(q.commitment_loss, train['commitment_loss'])
        close(q.loss, train['quantizer_loss'])
        zq = q.zq
    else: zq = rows(out['sample'])
    decoder = tok.decoder
    text = given.get('text_guidance')
    def decode(z): return tok.decode(z) if text is None else decoder(z, text)
    if 'indices' in out: close(unit(decode(tok.codes(out['indices'][:,0]))), out['decode_tokens'])
    close(decoder.embed(zq), out['dec.embed'])
    sequence = decoder.sequence(zq, text)
    close(sequence, out['dec.sequence_before_ln_pre'])
    patches = decoder.body(sequence, slice(1, 17))
    close(patches, out['dec.patches_after_ln_post'])
    close(unit(decode(zq)), out['decoded'])
    if text is not None: close(unit(tok.decode(zq))[:1], out['decoded'][:1])
    if hasattr(decoder.pixels, 'ffn'):
        close(decoder.pixels.ffn(patches), out['dec.ffn'].flatten(2).mT)
        close(decoder.pixels.mixture(patches), out['soft_embedding'].flatten(2).mT)
    else: close(decoder.pixels.head(patches), out['dec.ffn'])
    assert (to_uint8(decode(zq)).permute(0, 2, 3, 1).int()-out['image_uint8'].int()).abs().max() <= 1

@torch.no_grad()
def test_gaussian_latents(fixtures):
    tok, given, out, train = made(fixtures, 'titok_vae')
    z = tok.encode(2*given['images']-1)
    q = tok.quantize(z)                                 # in evaluation the mean
    close(q.zq, rows(out['mean']))
    close((tok.decode(q.zq)+1)/2, out['decoded_from_mean'])
    mean, spread = z.chunk(2, -1)
    close(mean+(spread/2).exp()*rows(given['noise']), rows(out['sample']))
    divergence = .5*(mean.square()+spread.exp()-1-spread).sum(-1)
    close(divergence, train['kl'])
    # theirs is a sum over channels and tokens, ours a mean: another weight says the same
    numbers = q.zq[0].numel()
    close(q.prior_loss/tok.quantizer.kl*numbers, train['kl_loss'])


def test_a_saved_one_is_read_back(titok, tmp_path):
    tok, given, *_ = titok
    back = load_tokenizer(tok.save(tmp_path/'titok'))
    assert back.fingerprint == tok.fingerprint
    with torch.no_grad(): assert torch.equal(*(t.reconstruct(2*given['images']-1) for t in (tok, back)))

def test_first_stage(fixtures):
    "Cross-entropy with MaskGIT's codes, its gradients, and the image of the likeliest codes"
    tok, given, out, train = made(fixtures, 'titok')
    pixels = tok.decoder.pixels
    def of_codes(zq): return pixels.ffn(tok.decoder.body(tok.decoder.sequence(zq), slice(1, 17)))
    q = tok.quantize(tok.encode(2*given['images']-1))
    logits = of_codes(q.zq)
    ce = torch.nn.functional.cross_entropy(logits.mT, given['stage1.target_codes'])
    close(ce, train['stage1.ce'])
    close(ce+q.loss, train['stage1.loss'])
    grads = {k.removeprefix('stage1.grad.'): v for k, v in train.items() if k.startswith('stage1.grad.')}
    names = {by_rules(name, titok_rules(LEVELS)): p for name, p in tok.named_parameters()}
    for name, got in zip(grads, torch.autograd.grad(ce+q.loss, [names[name] for name in grads])):
        close(got.reshape(grads[name].shape), grads[name], 1e-4)
    codes = logits.argmax(-1)
    assert torch.equal(codes, out['stage1.codes'].flatten(1))
    with torch.no_grad(): image = (pixels.decoder(pixels.codes(codes))+1)/2
    close(image.clamp(0, 1), out['stage1.image'])


FULL = {'titok-s-128':'titok_s128', 'titok-b-64':'titok_b64', 'titok-l-32':'titok_l32',
        'titok-bl-64-vq8k':'titok_bl64_vq8k', 'titok-sl-256-vq8k':'titok_sl256_vq8k',
        'titok-bl-128-vq8k':'titok_bl128_vq8k', 'titok-bl-64-vae':'titok_bl64_vae_c16',
        'titok-bl-128-vae':'titok_bl128_vae_c16', 'titok-ll-32-vae':'titok_ll32_vae_c16',
        'tatitok-bl-32-vq':'tatitok_bl32_vq', 'tatitok-bl-64-vq':'tatitok_bl64_vq',
        'tatitok-bl-128-vq':'tatitok_bl128_vq', 'tatitok-bl-32-vae':'tatitok_bl32_vae',
        'tatitok-bl-64-vae':'tatitok_bl64_vae', 'tatitok-sl-128-vae':'tatitok_sl128_vae'}

def table_of(tables, name):
    "Names and shapes of a file, some told as differences from another"
    if name in tables: return tables[name]
    told = tables['_derived'][name]
    same = {k: v for k, v in tables[told['same_as']].items() if k not in told['removed']}
    return same | told['changed_or_added']

@pytest.mark.parametrize('name', FULL)
def test_names_and_shapes_at_full_size(fixtures, name):
    tables = json.loads((fixtures/'zoo'/'shapes_titok_maskgit.json').read_text())
    shapes = table_of(tables, FULL[name])
    with torch.device('meta'):
        theirs = {k: torch.empty(shape, dtype=getattr(torch, dtype)) for k, (shape, dtype) in shapes.items()}
        tok = PUBLISHED[name].build()
    ours = titok_state(tok, theirs)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in tok.state_dict().items()}
    assert sum(p.numel() for p in tok.parameters()) == tables['_parameters'][FULL[name]]


def test_usage_in_a_checkpoint_is_left_out():
    entry = PUBLISHED['tatitok-bl-32-vq']
    theirs = {name: torch.ones(2) for name in ('quantize.embed_prob', 'quantize.embedding.weight')}
    kept, left = _sorted_out(entry, theirs)
    assert list(kept) == ['quantize.embedding.weight'] and sum(left.values()) == 1
    with torch.device('meta'): assert entry.build().decoder.text.shape == (1, 77, 768)

def test_a_text_that_is_not_there_is_asked_for_in_one_line():
    small = titok_tokenizer((32, 1, 4), (32, 1, 4), 6, size=32, patch=8, codebook_size=64, code_dim=8,
                            text=(5, 16))
    with pytest.raises(ValueError, match='was given none') as e: small.reconstruct(torch.zeros(1, 3, 32, 32))
    assert '\n' not in str(e.value)
    for text, says in ((torch.ones(4, 16), r'a text is 5 states of 16 channels.*got \(1, 4, 16\)'),
                       (torch.full((5, 16), torch.nan), 'not finite')):
        with pytest.raises(ValueError, match=says): small.decoder.read(text)

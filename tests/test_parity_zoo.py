"""Published models against values recorded from the authors' code, under the authors' tensor names:
ids exact, images and activations to 1e-5 of the largest value; names and shapes of the full-size files"""
import json, os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_parity_tokenizer import close, recorded, tokens

from tokkit.data import to_uint8
from tokkit.tokenizers import load_tokenizer
from tokkit.published import PUBLISHED
from tokkit.zoo import load, published_models
from tokkit.zoo_tokenizers import llamagen_state, llamagen_tokenizer


@pytest.fixture(scope='module')
def llamagen(fixtures):
    config, sd, given, out, out2, train = recorded(fixtures, 'zoo/llamagen_vq', 'sd', 'in', 'out', 'out2',
                                                   'train')
    tok = llamagen_tokenizer(tuple(config['ch_mult']), 32, width=config['ch'], depth=config['num_res_blocks'],
                             z_channels=config['z_channels'], codebook_size=config['codebook_size'],
                             code_dim=config['codebook_embed_dim'])
    theirs = {k: v.float() for k, v in sd.items() if not k.endswith('codebook_used')}
    tok.load_state_dict(llamagen_state(tok, theirs))
    return tok.eval(), given, out, out2, train

@torch.no_grad()
def test_llamagen_images_and_ids(llamagen):
    tok, given, out, *_ = llamagen
    x = given['images']
    close(tok.encoder.features(x), out['encoder'])
    close(tok.encode(x), tokens(out['prequant']))
    assert torch.equal(tok.tokenize(x), out['indices'])
    close(tok.quantize(tok.encode(x)).zq, tokens(out['quant']))
    close(tok.reconstruct(x), out['image'])
    close(tok.detokenize(out['indices']), out['image_from_indices'])
    close(tok.detokenize(given['indices']), out['detokenized'])
    # theirs truncate, ours round as every metric here does
    assert (to_uint8(tok.reconstruct(x)).int()-out['uint8'].int()).abs().max() <= 1

@torch.no_grad()
def test_llamagen_takes_images_of_another_size(llamagen):
    tok, given, _, out2, _ = llamagen
    other = tok.sized(*given['images2'].shape[2:])
    assert torch.equal(other.tokenize(given['images2']), out2['indices'])
    close(other.reconstruct(given['images2']), out2['image'])
    broad = tok.sized(32, 48)
    assert broad.reconstruct(torch.zeros(1, 3, 32, 48)).shape == (1, 3, 32, 48)

def test_llamagen_quantizer_in_training(llamagen):
    tok, given, out, _, train = llamagen
    vq = tok.quantizer.train()
    z = tokens(out['prequant']).requires_grad_()
    q = vq(z)
    close(q.codebook_loss, train['vq_loss'])
    close(q.commitment_loss, train['commit_loss'])
    slope, rows = torch.autograd.grad(q.loss, [z, vq.embedding.weight], retain_graph=True)
    close(slope, tokens(train['grad_prequant']))
    close(rows, train['grad_embedding'])
    straight, = torch.autograd.grad((q.zq*tokens(given['w'])).sum(), z)
    close(straight, tokens(train['grad_prequant_st']))
    vq.eval()


@pytest.mark.parametrize('name', ['llamagen-vq16', 'llamagen-vq8'])
def test_names_and_shapes_at_full_size(fixtures, name):
    shapes = json.loads((fixtures/'zoo'/'shapes_cnn_vq.json').read_text())[name.replace('-', '_')]
    with torch.device('meta'):
        theirs = {k: torch.empty(shape, dtype=getattr(torch, dtype)) for k, (shape, dtype) in shapes.items()}
        tok = PUBLISHED[name].build()
    kept = {k: v for k, v in theirs.items() if not k.endswith('codebook_used')}
    assert len(kept) == len(theirs)-1
    ours = llamagen_state(tok, kept)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in tok.state_dict().items()}


@pytest.fixture(scope='module')
def taef2():
    folder = Path(os.environ.get('TOKKIT_WEIGHTS') or Path(__file__).resolve().parents[2]/'shared'/'weights')
    file = folder/'taef2.safetensors'
    if not file.is_file(): pytest.skip('no taef2.safetensors: set TOKKIT_WEIGHTS to the folder that holds it')
    return load('taef2', file).sized(64, 64)

@torch.no_grad()
def test_taef2(fixtures, taef2):
    want = load_file(fixtures/'zoo'/'taef2_values.safetensors')
    x = want['in.uint8'].float()/255*2-1
    def image(z): return (taef2.decode(tokens(z))+1)/2       # theirs lie in [0,1]
    close(taef2.encode(x), tokens(want['out.z']))
    close((taef2.reconstruct(x)+1)/2, want['out.image'])
    close(image(torch.zeros_like(want['out.z'])), want['out.image_zero'])
    close(image(want['out.z']+want['in.noise']), want['out.image_noise'])

def test_taef2_is_saved_by_the_function_that_makes_it(taef2, tmp_path):
    back = load_tokenizer(taef2.save(tmp_path/'taef2'))
    assert back.image_shape == (3, 64, 64) and back.fingerprint == taef2.fingerprint

def test_taef2_of_unequal_sides(taef2):
    with torch.no_grad(): made = taef2.sized(64, 96).reconstruct(torch.zeros(2, 3, 64, 96))
    assert made.shape == (2, 3, 64, 96)


def test_every_entry_is_told_in_the_table():
    table = published_models().set_index('name')
    assert list(table.index) == list(PUBLISHED)
    assert table.loc['llamagen-vq16', 'codes'] == 16384 and table.loc['taef2', 'codes'] == 'continuous'
    assert not table.isna().any().any() and (table != '').all().all()


@pytest.mark.parametrize('content, words', [
    (lambda p: torch.save(dict(optimizer={}), p),
     "holds no 'ema' and no 'model' and no 'state_dict'; it has optimizer"),
    (lambda p: p.write_bytes(b'PK'), "is no checkpoint in torch's zip format"),
    (lambda p: torch.save(dict(model=dict(weight=torch.ones(2))), p), 'not the weights of llamagen-vq16'),
])
def test_other_files_are_refused_in_a_line(tmp_path, content, words):
    path = tmp_path/'vq.pt'
    content(path)
    with pytest.raises(ValueError) as e: load('llamagen-vq16', path)
    assert words in str(e.value) and '\n' not in str(e.value)

def test_a_file_that_ends_early(tmp_path):
    path = tmp_path/'whole.pt'
    torch.save(dict(model={f'w{i}': torch.ones(1000) for i in range(9)}), path)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(ValueError, match='fetch it again'): load('llamagen-vq8', path)

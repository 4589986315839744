"""Open-MAGVIT2 against values recorded from the authors' code: activations on the way, ids, images, losses
and gradients, by both sets of weights; names and shapes of the full-size files"""
import re

import pytest
import torch
from test_parity_convolutional import check_taps
from recordings import check_full_size
from test_parity_tokenizer import close, recorded, tokens

from tokkit.published import PUBLISHED
from tokkit.zoo_tokenizers import join_bits, magvit2_rules, magvit2_state, magvit2_tokenizer, split_bits


@pytest.fixture(scope='module')
def magvit2(fixtures):
    "The tokenizer with averaged weights, the one without, and what was recorded"
    config, sd, *rest = recorded(fixtures, 'zoo/open_magvit2', 'sd', 'in', 'out', 'out2', 'raw', 'train',
                                 'tap')
    network = config['ddconfig']
    theirs = {k: v.float() for k, v in sd.items() if not re.search(r'model_ema\.(decay|num_updates)$', k)}
    made = []
    for state in (theirs, {k: v for k, v in theirs.items() if not k.startswith('model_ema.')}):
        # half the recorded side: the network has no grid of its own
        tok = magvit2_tokenizer(tuple(network['ch_mult']), network['resolution']//2, width=network['ch'],
                                depth=network['num_res_blocks'], codebook_size=config['n_embed'])
        tok.load_state_dict(magvit2_state(tok, state))
        made.append(tok.eval())
    return config, *made, *rest

@torch.no_grad()
def test_images_and_ids(magvit2):
    "By the averaged weights, which its authors evaluate with, and by the others; of two sizes"
    config, tok, plain, given, out, out2, raw, *_ = magvit2
    x = given['images']
    assert tok.cfg.code_dim == config['embed_dim']
    close(tok.encode(x), tokens(out['encoder']))
    assert torch.equal(tok.tokenize(x), out['indices'])
    close(tok.quantize(tok.encode(x)).zq, tokens(out['quant']))
    close(tok.reconstruct(x), out['image'])
    close(tok.codes(given['indices']), tokens(out['codes']))
    close(tok.detokenize(given['indices']), out['detokenized'])
    assert torch.equal(plain.tokenize(x), raw['indices'])
    close(plain.reconstruct(x), raw['image'])
    other = tok.sized(*given['images2'].shape[2:])
    assert torch.equal(other.tokenize(given['images2']), out2['indices'])
    close(other.reconstruct(given['images2']), out2['image'])

def test_ids_in_parts(magvit2):
    config, _, _, _, out, *_ = magvit2
    parts = split_bits(out['indices'], tuple(config['factorized_bits']))
    assert torch.equal(parts[...,0], out['indices_pre']) and torch.equal(parts[...,1], out['indices_post'])
    assert torch.equal(join_bits(parts, tuple(config['factorized_bits'])), out['indices'])

@torch.no_grad()
def test_on_the_way(magvit2):
    _, tok, _, given, *_, taps = magvit2
    assert len(taps) == 9
    check_taps(tok, magvit2_rules(2), given['images'], taps)

def test_quantizer_in_training(magvit2):
    _, tok, _, given, *_, train, _ = magvit2
    vq = tok.quantizer.train()
    z = tokens(given['prequant_train']).requires_grad_()
    q = vq(z)
    each, over_all = vq.entropies(z)
    commitment, entropy = q.commitment_loss/vq.commitment, q.prior_loss/vq.entropy
    close(each, train['per_sample_entropy'])
    close(over_all, train['codebook_entropy'])
    close(entropy, train['entropy_aux_loss'])
    close(commitment, train['commitment'])
    decoded = (q.zq*tokens(given['w'])).sum()
    for total, name in ((entropy, 'aux'), (commitment, 'commit'), (decoded, 'st')):
        slope, = torch.autograd.grad(total, z, retain_graph=True)
        close(slope, tokens(train[f'grad_prequant_{name}']), 1e-4)
    vq.eval()


FULL = [('open-magvit2-256', 'open_magvit2_256_L'), ('open-magvit2-128', 'open_magvit2_128_L'),
        ('open-magvit2-pretrain-262144', 'open_magvit2_256_L')]

@pytest.mark.parametrize('name, key', FULL)
def test_names_and_shapes_at_full_size(fixtures, name, key):
    check_full_size(fixtures, 'shapes_cnn_vq.json', key, PUBLISHED[name])

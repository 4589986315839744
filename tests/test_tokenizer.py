"Every preset of the tokenizer: the same weights as ever, the same verbs, errors in one line, files of earlier versions"
import json

import pytest
import torch

from tokkit.tokenizer import TOKENIZERS, Tokenizer, TokenizerCfg, make_tokenizer

GOLDEN = {  # preset: fingerprints of seeds 0 and 1. Published results were made with these weights
    'tiny': ('a47ec38143', '4456bd5fe8'), 'tiny-16': ('e1d9605dc8', '00b9c15294'), 'tiny-rgb': ('178cb7bea6', '20b88a9381'),
    'tiny-1d': ('45fdb0080d', 'c54a5fdba7'), 'tiny-kl0': ('1ac433e2a6', '28be4561b2'), 'tiny-cnn': ('83df357a7a', '93ec4311fb'),
    'small': ('4fef5670d6', '996583e363'),
}


@pytest.mark.parametrize('name', GOLDEN)
def test_weights_of_a_preset_never_change(name):
    assert tuple(make_tokenizer(name, seed=s).fingerprint for s in (0, 1)) == GOLDEN[name]

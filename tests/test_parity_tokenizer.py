"The paper's tokenizer against values recorded from the released code: every tensor on the way, losses, gradients, names and shapes"
import json

import pytest
import torch
from einops import rearrange
from safetensors import safe_open

from tokkit.layers import ViT, load_vit


def recorded(fixtures, name, *prefixes):
    "Configuration and tensors of a recording; with prefixes, one dictionary a prefix"
    with safe_open(fixtures/f'{name}.safetensors', 'pt') as f:
        config, tensors = json.loads(f.metadata()['config']), {k: f.get_tensor(k) for k in f.keys()}
    return config, *({k.removeprefix(f'{p}.'): v for k, v in tensors.items() if k.startswith(f'{p}.')} for p in prefixes)


def close(got, want, tolerance=1e-5):
    assert got.shape == want.shape, f"{tuple(got.shape)} instead of {tuple(want.shape)}"
    assert (got-want).abs().max() <= tolerance*want.abs().max().clamp_min(1e-12)


def tokens(maps): return rearrange(maps, 'b d h w -> b (h w) d')


def test_dinov2_weights_for_another_image_and_patch_size(fixtures):
    _, given, want = recorded(fixtures, 'dinov2_init_resample', 'in', 'out')
    vit = ViT(256, 16, 3, width=8, depth=0, heads=2)
    load_vit(vit, given | {k: v for k, v in vit.state_dict().items() if k.startswith('norm') or k == 'patch_embed.proj.bias'})
    for name, value in want.items(): close(vit.state_dict()[name], value)

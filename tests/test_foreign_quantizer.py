"""A quantizer and a pair of networks of another package: registered once, then made, trained, saved
and loaded like ours"""
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn

from tokkit.core import registry
from tokkit.tokenizers import BACKBONES, Backbone, Tokenizer, TokenizerCfg, make_tokenizer
from tokkit.quantizers import (QUANTIZERS, Quantized, Quantizer, make_quantizer, quantizer_options,
                               straight_through)


class Clock(Quantizer):
    "Latents of two channels, named by their hour: K directions on a circle"
    chooses_dim = True

    def __init__(self, codebook_size:int, dim:int|None = None, commitment:float = .25, first:float = 0.):
        super().__init__(codebook_size, 2)
        if not 0 <= first < 1: raise ValueError(f"first must be in [0, 1), got {first}")
        self.commitment = commitment
        turn = 2*torch.pi*(torch.arange(codebook_size)+first)/codebook_size
        self.register_buffer('hands', torch.stack([turn.cos(), turn.sin()], -1), persistent=False)

    @property
    def codebook(self): return self.hands
    def project(self, z): return nn.functional.normalize(z, dim=-1)
    def codes(self, ids): return self.hands[ids]

    def snap(self, z):
        zh = self.project(z)
        ids = (zh@self.hands.T).argmax(-1)
        away = (zh-self.codes(ids)).square().mean()
        return Quantized(straight_through(zh, self.codes(ids)), ids, z.new_zeros(()), self.commitment*away)


class Flat(nn.Module):
    "One matrix from all pixels to all latents"
    def __init__(self, cfg:TokenizerCfg, dim:int, bias:bool):
        super().__init__()
        self.shape = cfg.tokens, dim
        self.out = nn.Linear(cfg.channels*cfg.size**2, cfg.tokens*dim, bias)
    def forward(self, x): return self.out(x.flatten(1)).view(-1, *self.shape)


class Unflat(nn.Module):
    "And back"
    def __init__(self, cfg:TokenizerCfg, dim:int, bias:bool):
        super().__init__()
        self.shape = cfg.channels, cfg.size, cfg.size
        self.out = nn.Linear(cfg.tokens*dim, cfg.channels*cfg.size**2, bias)
    def forward(self, zq): return self.out(zq.flatten(1)).view(-1, *self.shape)
    @property
    def last_layer(self): return self.out.weight


class FlatBackbone(Backbone):
    "Two matrices"
    encoder = Flat
    decoder = Unflat
    options = dict(bias=True)

    @staticmethod
    def check(cfg):
        if cfg.size > 64: raise ValueError(f"flat takes images of at most 64 pixels a side, got {cfg.size}")


@pytest.fixture
def registered(monkeypatch):
    "Ours for the time of a test; a package would leave them there"
    for table,name,kind in ((QUANTIZERS, 'clock', Clock), (BACKBONES, 'flat', FlatBackbone)):
        monkeypatch.setattr(table, '_things', dict(table._things))
        table.register(name, kind)


CHANGES = dict(kind='flat', quantizer='clock', codebook_size=12, quantizer_options=dict(first=.5),
               backbone_options=dict(bias=False))

def images(): return torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))*2-1


def test_its_options_are_known(registered):
    assert quantizer_options('clock') == ['commitment', 'first']
    q = make_quantizer('clock', 12, first=.5).eval()
    hours = torch.arange(12)
    assert torch.equal(q(3*q.codes(hours)[None]).ids[0], hours)
    assert set(q.neighbours(torch.tensor([0]), 3)[0].tolist()) == {11, 0, 1}


def test_the_configuration_gives_it_what_it_takes(registered):
    tok = make_tokenizer('tiny', commitment=2., **CHANGES)
    assert tok.cfg.code_dim == 2 == tok.spec.shape[1]           # the quantizer chose
    assert tok.quantizer.commitment == 2. and tok.encoder.out.bias is None


def test_one_step_and_files(registered, tmp_path):
    tok = make_tokenizer('tiny', **CHANGES).train()
    x = images()
    optimiser = torch.optim.Adam(tok.parameters(), 1e-3)
    losses = []
    for _ in range(2):
        q = tok.quantize(tok.encode(x))
        loss = (tok.decode(q.zq)-x).square().mean()+q.loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[1] < losses[0] and tok.last_layer.grad.abs().sum() > 0
    back = Tokenizer.load(tok.save(tmp_path))
    assert back.fingerprint == tok.fingerprint and back.cfg == tok.cfg
    tok.eval()
    with torch.no_grad():
        assert torch.equal(back.tokenize(x), tok.tokenize(x))
        assert (back.detokenize(back.tokenize(x))-back.reconstruct(x)).abs().max() < 1e-5


def test_its_options_are_a_part_of_the_fingerprint(registered):
    plain = {k:v for k,v in CHANGES.items() if k != 'backbone_options'}
    one, two = (make_tokenizer('tiny', **plain, backbone_options=o) for o in ({}, dict(bias=True)))
    assert one.fingerprint != two.fingerprint


@pytest.mark.parametrize('change,said', [
    (dict(size=96), 'flat takes images of at most 64 pixels a side, got 96'),
    (dict(backbone_options=dict(wide=1)), "flat has no option 'wide'; it has bias"),
    (dict(quantizer_options=dict(last=1)), "clock has no option 'last'; it has commitment, first"),
    (dict(quantizer_options=dict(first=2.)), 'first must be in [0, 1), got 2.0'),
    (dict(codebook_size=0), 'codebook_size 0 means continuous latents (vq, kl, none); clock needs a'),
])
def test_its_checks_are_made(registered, change, said):
    with pytest.raises(ValueError) as e: make_tokenizer('tiny', **CHANGES | change)
    assert said in str(e.value) and '\n' not in str(e.value)


def test_both_come_from_an_installed_package(monkeypatch):
    "Nobody registers anything: the names are looked up among the entry points"
    offered = {'tokkit.quantizers': EntryPoint('clock', 'test_foreign_quantizer:Clock', 'tokkit.quantizers'),
               'tokkit.backbones': EntryPoint('flat', 'test_foreign_quantizer:FlatBackbone',
                                              'tokkit.backbones')}
    monkeypatch.setattr(registry, 'entry_points', lambda group: [offered[group]])
    for table in (QUANTIZERS, BACKBONES):
        monkeypatch.setattr(table, '_things', dict(table._things))
        monkeypatch.setattr(table, '_looked', False)
    assert make_tokenizer('tiny', **CHANGES).spec.codebook_size == 12


def test_without_it_the_names_are_unknown():
    with pytest.raises(ValueError, match="kind must be one of vit, robustok, .*, got 'flat'"):
        TokenizerCfg(kind='flat')
    with pytest.raises(ValueError, match="quantizer must be one of .* none.* got 'clock'"):
        TokenizerCfg(quantizer='clock')

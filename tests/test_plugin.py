"Perturbations inside tokenizers of other packages: the real ones"
import copy, importlib, io

import pytest
import torch
from torch import nn

from tokkit.core import make_rng
from tokkit.perturbation import LatentPerturbation, perturbation
from tokkit.perturbation import attach, find_quantizer, to_tokens
from tokkit.quantizers import make_quantizer

vqp = pytest.importorskip('vector_quantize_pytorch', reason="vector-quantize-pytorch is not installed: pip "
                                                            "install 'tokkit-lab[dev]'")
diffusers = pytest.importorskip('diffusers', reason="diffusers is not installed: pip install "
                                                    "'tokkit-lab[dev]'")

class Mine(nn.Module):
    "A quantizer of nobody's package"
    def __init__(self, normal=False):
        super().__init__()
        self.embedding = nn.Embedding(32, 8)
        self.normal = normal
    def forward(self, x):
        e = nn.functional.normalize(self.embedding.weight, dim=-1) if self.normal else self.embedding.weight
        zq = e[torch.cdist(x.flatten(2).transpose(1, 2), e[None]).argmin(-1)].transpose(1, 2).view_as(x)
        return dict(quantized=x+(zq-x).detach(), loss=(zq-x.detach()).square().mean())

def diffusers_vq(): return importlib.import_module('diffusers.models.autoencoders.vae').VectorQuantizer

IMAGE = (6, 8, 4, 4)
ROW = (6, 16, 8)
MODULES = {
    'VectorQuantize': (lambda: vqp.VectorQuantize(8, 32), ROW),
    'VectorQuantize image': (lambda: vqp.VectorQuantize(8, 32, accept_image_fmap=True, use_cosine_sim=True),
                             IMAGE),
    'VectorQuantize channels first': (lambda: vqp.VectorQuantize(8, 32, channel_last=False), (6, 8, 16)),
    'VectorQuantize projected': (lambda: vqp.VectorQuantize(8, 32, codebook_dim=4), ROW),
    'VectorQuantize straight': (lambda: vqp.VectorQuantize(8, 32, rotation_trick=False), ROW),
    'VectorQuantize heads': (lambda: vqp.VectorQuantize(8, 32, heads=2, codebook_dim=4), ROW),
    'VectorQuantize separate heads': (lambda: vqp.VectorQuantize(8, 32, heads=2, codebook_dim=3,
                                                                 separate_codebook_per_head=True), ROW),
    'ResidualVQ': (lambda: vqp.ResidualVQ(dim=8, codebook_size=32, num_quantizers=3), ROW),
    # with images, version 1.32 of the package wants as many rows and columns as channels
    'ResidualVQ image': (lambda: vqp.ResidualVQ(dim=8, codebook_size=32, num_quantizers=3,
                                                accept_image_fmap=True, shared_codebook=True), (6, 8, 8, 8)),
    'ResidualFSQ': (lambda: vqp.ResidualFSQ(dim=8, levels=[8, 5, 5], num_quantizers=2), ROW),
    'ResidualLFQ': (lambda: vqp.ResidualLFQ(dim=8, codebook_size=32, num_quantizers=2), ROW),
    'ResidualSimVQ': (lambda: vqp.ResidualSimVQ(dim=8, codebook_size=32, num_quantizers=2), ROW),
    'SimVQ': (lambda: vqp.SimVQ(dim=8, codebook_size=32), ROW),
    'FSQ': (lambda: vqp.FSQ([8, 5, 5], dim=8), ROW),
    'FSQ image': (lambda: vqp.FSQ([8, 5, 5], dim=8), IMAGE),
    'LFQ': (lambda: vqp.LFQ(codebook_size=32, dim=8), ROW),
    'LFQ sphere image': (lambda: vqp.LFQ(codebook_size=256, dim=8, spherical=True), IMAGE),
    'diffusers VectorQuantizer': (lambda: diffusers_vq()(32, 8, .25), IMAGE),
    'plain': (Mine, IMAGE),
    'plain normalised': (lambda: Mine(normal=True), IMAGE),
    **{f'tokkit {kind}': (lambda kind=kind: make_quantizer(kind, 32, None if kind == 'lfq' else 8),
                          (6, 16, 5) if kind == 'lfq' else ROW) for kind in ('vq', 'pq', 'rq', 'lfq')},
}

def latents(output):
    "The tensor that is passed on"
    return output['quantized'] if isinstance(output, dict) else output[0]

def made(name):
    torch.manual_seed(0)
    make,shape = MODULES[name]
    return make(), torch.randn(shape, generator=make_rng(0)).requires_grad_()

def copies(module): return copy.deepcopy(module)     # a forward pass in training moves some codebooks


@pytest.mark.parametrize('name', MODULES)
def test_perturbed_in_training_only(name):
    module,x = made(name)
    twin = copies(module)
    torch.manual_seed(1)
    clean = twin(x)
    handle = attach(LatentPerturbation(.5, .5, 6, include_self=False), module)
    torch.manual_seed(1)
    hurt = module(x)
    assert type(hurt) is type(clean)
    a = latents(clean)
    b = latents(hurt)
    assert a.shape == b.shape and torch.isfinite(b).all()
    touched = (a != b).flatten(1).any(1)
    assert (touched.sum() == 3 and handle.rate == pytest.approx(.25, abs=.011)
            and torch.equal(a[~touched], b[~touched]))
    if isinstance(clean, tuple):
        for c,h in zip(clean[1:], hurt[1:]):                    # ids and losses are those of the clean codes
            if isinstance(c, torch.Tensor): assert torch.equal(c, h)
    module.eval()
    twin.load_state_dict(module.state_dict())
    twin.eval()
    assert torch.equal(latents(module(x)), latents(twin(x)))
    module.train()
    twin.train()
    handle.remove()
    torch.manual_seed(1)
    c = twin(x)
    torch.manual_seed(1)
    assert torch.equal(latents(module(x)), latents(c)) and not module._forward_hooks


@pytest.mark.parametrize('name', MODULES)
def test_replacements_are_codes_among_the_neighbours(name):
    module,x = made(name)
    handle = attach(LatentPerturbation(1., 1., 5, include_self=False), module)
    out = latents(module(x)).detach()
    codes = handle.reading.codes
    p = handle.last
    rows = to_tokens(out, handle.reading.channels_first(out))
    assert torch.allclose(rows, codes.codes(p.ids), atol=1e-4)
    module.eval()
    clean = module(x)
    module.train()
    # codebooks that did not move meanwhile
    if not isinstance(clean, dict) and name.startswith(('FSQ', 'LFQ', 'tokkit')):
        ids = clean[1].reshape(p.ids.shape).long()
        assert ((codes.neighbours(ids, 5, False) == p.ids[...,None]).any(-1)).all()


@pytest.mark.parametrize('name', MODULES)
def test_gradient_has_the_form_it_had(name):
    """What reaches the latents is what the clean pass would send there;
    what reaches weights behind the codes sees the new codes"""
    module,x = made(name)
    # running means would move the codes between output and look-up
    module.freeze_codebook = True
    twin = copies(module)
    torch.manual_seed(1)
    a = latents(twin(x))
    weight = torch.randn(a.shape, generator=make_rng(1))
    clean, = torch.autograd.grad((a*weight).sum(), x)
    attach(LatentPerturbation(1., 1., 5), module)
    torch.manual_seed(1)
    b = latents(module(x))
    hurt, = torch.autograd.grad((b*weight).sum(), x, retain_graph=True)
    assert torch.allclose(clean, hurt, atol=1e-5)
    (b*weight).sum().backward()
    behind = [p for n,p in module.named_parameters() if 'project_out' in n]
    assert all(p.grad is None or not p.grad.any() for n,p in module.named_parameters() if 'project' not in n)
    # the gradient of a linear layer is its input (the new codes) times what comes back
    if behind and behind[0].ndim == 2:
        layer = next(m for n,m in module.named_modules() if n == 'project_out')
        first = handle_first(module, b)
        back = to_tokens(weight, first)
        rows = to_tokens(b, first).detach()
        codes = torch.linalg.lstsq(layer.weight,
                                   (rows-(0 if layer.bias is None else layer.bias)).flatten(0,
                                                                                            1).T).solution.T
        assert torch.allclose(layer.weight.grad, back.flatten(0, 1).T@codes, atol=2e-3)

def handle_first(module, out): return find_quantizer(module)[1].channels_first(out)


def test_latent_neighbours_and_every_kind_run_on_real_modules():
    for name in ('VectorQuantize', 'VectorQuantize image', 'VectorQuantize heads', 'ResidualVQ', 'FSQ', 'LFQ',
                 'diffusers VectorQuantizer', 'plain'):
        for kind in ('official', 'uniform', 'frequency', 'blocks', 'drop', 'gaussian', 'interpolate', 'rae',
                     'adversarial'):
            module,x = made(name)
            with perturbation(kind, alpha=.5, beta=1., delta=5).attach(module) as handle:
                handle.gradient = torch.randn(x.shape, generator=make_rng(3))
                out = latents(module(x))
            assert torch.isfinite(out).all() and handle.rate > 0, (name, kind)


def test_dropped_levels_stay_dropped():
    torch.manual_seed(0)
    rvq = vqp.ResidualVQ(dim=8, codebook_size=32, num_quantizers=4, quantize_dropout=True)
    x = torch.randn(6, 16, 8, generator=make_rng(0))
    handle = attach(LatentPerturbation(1., 1., 5, include_self=False), rvq)
    out,ids,_ = rvq(x, rand_quantize_dropout_fixed_seed=1)
    assert ((ids == -1).any()
            and torch.allclose(out, rvq.get_output_from_indices(torch.where(ids < 0, ids, handle.last.ids)),
                               atol=1e-4))


# --- whole models

def small_vq_model():
    torch.manual_seed(0)
    return diffusers.VQModel(1, 1, block_out_channels=(8, 8), down_block_types=('DownEncoderBlock2D',)*2,
                             up_block_types=('UpDecoderBlock2D',)*2, latent_channels=4,
                             norm_num_groups=4, num_vq_embeddings=32, mid_block_add_attention=False)

def small_kl_model():
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(1, 1, block_out_channels=(8, 8), down_block_types=('DownEncoderBlock2D',
                                   )*2, up_block_types=('UpDecoderBlock2D',)*2, latent_channels=4,
                                   norm_num_groups=4, mid_block_add_attention=False)

@pytest.mark.parametrize('make,damage',
                         [(small_vq_model, LatentPerturbation(.5, .5, 6)),
                          (small_kl_model, perturbation('gaussian', beta=.5, strength=2.))])
def test_diffusers_models(make, damage):
    model = make().train()
    x = torch.randn(4, 1, 16, 16, generator=make_rng(0))
    clean = model(x).sample
    with damage.attach(model) as handle: hurt = model(x).sample
    assert ((clean-hurt).abs().flatten(1).amax(1) > 1e-4).sum() == 2 and handle.rate > 0
    with damage.attach(model):
        model.eval()
        quiet = model(x).sample
        model.train()
    model.eval()
    assert torch.equal(quiet, model(x).sample)


def test_a_model_that_holds_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), vqp.VectorQuantize(8, 32))
    x = torch.randn(4, 9, 3)
    with attach(LatentPerturbation(1., 1., 6), model): a = model(x)[0]
    model.eval()
    assert a.shape == model(x)[0].shape
    assert find_quantizer(model)[0] is model[1]


def test_tokkits_own_tokenizer():
    from tokkit.tokenizers import make_tokenizer
    tok = make_tokenizer('tiny-16').train()
    x = torch.randn(4, 1, 28, 28, generator=make_rng(0)).clamp(-1, 1)
    clean = tok.quantize(tok.encode(x))
    with attach(LatentPerturbation(1., .5, 9), tok) as handle: hurt = tok.quantize(tok.encode(x))
    assert (clean.zq != hurt.zq).flatten(1).any(1).sum() == 2 and 0 < handle.rate <= .5


def test_copies_and_files_are_not_perturbed():
    module,x = made('VectorQuantize straight')
    handle = attach(LatentPerturbation(1., 1., 6, include_self=False), module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        out,ids,_ = twin(x)
        again = copy.deepcopy(twin)
        again._forward_hooks.clear()
        assert handle.last is None and out.shape == x.shape
    out,ids,_ = module(x)
    assert handle.rate == 1.


def test_seeds_epochs_and_shards():
    def draw(seed=0, epoch=0, shard=(0, 1), rows=slice(None)):
        module,x = made('diffusers VectorQuantizer')
        handle = attach(LatentPerturbation(1., .5, 6, annealing=lambda e: 1/(1+e)), module, seed=seed,
                        shard=shard)
        handle.epoch = epoch
        module(x[rows])
        return handle.last.ids, handle.rate
    whole = draw()[0]
    assert (torch.equal(whole, draw()[0]) and not torch.equal(whole, draw(seed=1)[0])
            and draw(epoch=3)[1] < draw()[1])
    assert torch.equal(torch.cat([draw(shard=(r, 2), rows=slice(3*r, 3*r+3))[0] for r in range(2)]), whole)


# --- what it cannot read

class Strange(nn.Module):
    "Shows a codebook, and gives something else"
    def __init__(self):
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(32, 8))
    def forward(self, x): return x*2

@pytest.mark.parametrize('make,says', [
    (lambda: nn.Linear(3, 3), 'Linear holds no quantizer that can be read'),
    (lambda: nn.ModuleList([vqp.VectorQuantize(8, 32), vqp.FSQ([8, 5])]),
     r'holds 2 quantizers \(0, 1\): attach to one of them'),
    (lambda: vqp.VectorQuantize(8, 32, affine_param=True), 'affine_param or vq_bridge'),
    (lambda: vqp.ResidualVQ(dim=8, codebook_size=(32, 16)), 'of several sizes'),
    (lambda: vqp.FSQ([8, 5], num_codebooks=2), 'several codebooks or a rotation'),
    (lambda: vqp.VectorQuantize(8, 4), r'delta must be a whole number in 1\.\.4')])
def test_refused_when_attached(make, says):
    with pytest.raises(ValueError, match=says) as error: attach(LatentPerturbation(delta=6), make())
    assert '\n' not in str(error.value)

def test_refused_when_run():
    module = Strange()
    attach(LatentPerturbation(1., 1., 6), module)
    with pytest.raises(ValueError, match='is not made of rows of its codebook') as error:
        module(torch.randn(2, 5, 8))
    assert '\n' not in str(error.value)
    with pytest.raises(ValueError, match='gave no latents of the 8 channels'): module(torch.randn(2, 5, 7))

def test_refused_twice_and_for_the_wrong_latents():
    module = vqp.VectorQuantize(8, 32)
    handle = attach(LatentPerturbation(delta=6), module)
    with pytest.raises(ValueError, match='perturbed already'): attach(LatentPerturbation(delta=6), module)
    handle.remove()
    attach(LatentPerturbation(delta=6), module)
    with pytest.raises(ValueError, match='AutoencoderKL: .*continuous latents have none'):
        attach(perturbation('nearest'), small_kl_model())
    module = vqp.VectorQuantize(8, 32)
    attach(perturbation('adversarial', delta=4), module)
    with pytest.raises(ValueError, match='pass its gradient'): module(torch.randn(2, 5, 8))


def test_rows_of_exactly_length_one():
    "Such a codebook is its own normalised one, so that both readings fit equally well"
    unit = Mine()
    unit.embedding = nn.Embedding.from_pretrained(torch.eye(8), freeze=False)
    x = torch.eye(8)[None, :4].transpose(1, 2)
    LatentPerturbation(1., 1., 4).attach(unit)
    assert unit.train()(x)['quantized'].shape == x.shape

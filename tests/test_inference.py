"""Fast copies: for every generator, the same sample in any batch,
frequencies that stay, replayed steps, and what they refuse"""
import copy, subprocess, sys
from dataclasses import replace
from pathlib import Path

import pytest, torch
from torch import nn

from tokkit.generators import ARCfg, ARGenerator
from tokkit.core import make_rng
from tokkit.inference import FullLinear, Int8Linear, KeptSteps, inference_copy, input_ranges
from tokkit.generators import FlowCfg, FlowGenerator
from tokkit.generators import LatentGenerator, row_seeds
from tokkit.generators import MaskedCfg, MaskedGenerator

SMALL = ARCfg(n=12, codebook_size=7, classes=3, width=32, depth=2, heads=2)
RAR = replace(SMALL, order='random', modulated=True, qk_norm=True, target_aware=True)
MAKE = {'ar': lambda: ARGenerator(SMALL), 'rar': lambda: ARGenerator(RAR),
        'levels': lambda: ARGenerator(replace(SMALL, levels=2)),
        'masked': lambda: MaskedGenerator(MaskedCfg(n=12, codebook_size=7, classes=3, width=32, depth=2,
                                                    heads=2)),
        'flow': lambda: FlowGenerator(FlowCfg(n=12, dim=4, classes=3, width=32, depth=2, heads=2))}
needs_int8 = pytest.mark.skipif('fbgemm' not in torch.backends.quantized.supported_engines,
                                reason="this PyTorch has no FBGEMM, so no int8")
quiet = pytest.mark.filterwarnings('ignore:this CPU has no instructions for bf16')


def make(kind, seed=0):
    "Random weights, all gates open"
    torch.manual_seed(seed)
    gen = MAKE[kind]().eval()
    for key,p in gen.named_parameters():
        nn.init.normal_(p, std=.5 if 'embed' in key or p.ndim < 2 else 1.5*p.shape[-1]**-.5)
    return gen

@pytest.fixture(scope='module', params=MAKE)
def gen(request): return make(request.param)

def labels(b): return torch.arange(b)%3
def seeds(b): return row_seeds(make_rng(1), b)


@needs_int8
def test_int8_for_every_generator(gen):
    before = gen.fingerprint
    whole = inference_copy(gen)
    linears = [m for m in gen.modules() if isinstance(m, nn.Linear)]
    assert (sum(isinstance(m, Int8Linear) for m in whole.modules()) == len(linears)-1
            and gen.fingerprint == before != whole.fingerprint)
    out = whole.sample(labels(9), 2., rng=seeds(9))
    assert (out.shape == (9, *gen.shape) and not any(p.requires_grad for p in whole.parameters())
            and not whole.training)
    exact = gen.sample(labels(9), 2., rng=seeds(9))
    if gen.codebook_size: assert (out == exact).float().mean() > .4
    else: assert (out-exact).norm() < .3*exact.norm()

@needs_int8
@pytest.mark.parametrize('b', [1, 7, 64])
def test_int8_samples_do_not_depend_on_the_batch(gen, b):
    whole = inference_copy(gen)
    many = whole.sample(labels(64), 2., rng=seeds(64))
    few = whole.sample(labels(b), 2., rng=seeds(b))
    if gen.codebook_size: assert torch.equal(few, many[:b])
    # fp32 in between rounds to another whole number now and then
    else: torch.testing.assert_close(few, many[:b], rtol=0, atol=1e-2)

@needs_int8
@pytest.mark.parametrize('kind', ['rar', 'masked'])
def test_int8_keeps_the_frequencies(kind):
    gen = make(kind)
    n = 1500
    counts = [torch.bincount(g.sample(labels(n), 1.5, rng=make_rng(s, 'frequencies')).flatten(),
                             minlength=7).double() for g,s in ((gen, 1), (inference_copy(gen), 2))]
    a,b = (c/c.sum() for c in counts)
    assert (a-b).abs().max() < .02, (a, b)

@needs_int8
def test_keep_and_labels_as_ever(gen):
    whole = inference_copy(gen)
    real = gen.sample(labels(5), rng=seeds(5))
    assert torch.equal(whole.sample(labels(5), keep=(real, 1.), rng=seeds(5)), real)
    assert torch.equal(whole.sample(labels(5), keep=(real, 0.), rng=seeds(5)),
                       whole.sample(labels(5), rng=seeds(5)))
    assert whole.sample(labels(0)).shape == (0, *gen.shape)
    with pytest.raises(ValueError, match=r'labels must be in 0\.\.2'): whole.sample(labels(3)+1)

def test_fp32_is_the_generator_itself(gen):
    same = inference_copy(gen, 'fp32')
    for _ in range(2):
        assert torch.equal(same.sample(labels(7), 2., rng=seeds(7)), gen.sample(labels(7), 2., rng=seeds(7)))
    # the same kinds, other rows; then fewer kinds
    order = torch.tensor([2,0,0,1,2,1,1])
    for y in (order, order.clamp(max=1)):
        assert torch.equal(same.sample(y, 2., rng=seeds(7)), gen.sample(y, 2., rng=seeds(7)))

@quiet
def test_bf16_for_every_generator(gen):
    half = inference_copy(gen, 'bf16')
    out,exact = (g.sample(labels(6), 2., rng=seeds(6)) for g in (half, gen))
    assert (sum(isinstance(m, FullLinear) for m in half.modules()) == 1
            and next(half.blocks.parameters()).dtype == torch.bfloat16)
    if gen.codebook_size: assert (out == exact).float().mean() > .4
    else: assert (out-exact).norm() < .3*exact.norm()

COMPILED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_inference import MAKE, inference_copy, labels, make, seeds
for kind,precision in ('rar', 'int8'), ('flow', 'fp32'):
    gen = make(kind)
    compiled = inference_copy(gen, precision, compile="aot_eager")
    plain = inference_copy(gen, precision)
    out,same = (g.sample(labels(4), 2., rng=seeds(4)) for g in (compiled, plain))
    torch.testing.assert_close(out, same, rtol=0, atol=1e-3 if kind == 'flow' else 0)
    counters = torch._dynamo.utils.counters
    assert 0 < counters['stats']['unique_graphs'] < 9 and not counters['graph_break'], counters
    torch._dynamo.reset(); counters.clear()
"""

@needs_int8
def test_compiled_blocks_change_nothing():
    "In a process of its own: the compiler cannot follow the checks of shapes that tests switch on"
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', COMPILED, str(Path(__file__).parent)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

@pytest.mark.parametrize('kind', ['ar', 'rar', 'levels'])
@pytest.mark.parametrize('guidance', [1., 2.])
@pytest.mark.parametrize('bucket', [1, 5, 64])
def test_replayed_steps(kind, guidance, bucket):
    """Everything of a replayed graph but the recording: fixed tensors,
    masked buckets, one more call with other labels"""
    gen = make(kind)
    replayed = copy.deepcopy(gen)
    replayed.sampler = KeptSteps(replayed.sampler, capture=lambda step: step, bucket=bucket)
    for y in (labels(6), labels(6).flip(0), labels(6)):
        assert torch.equal(replayed.sample(y, guidance, rng=seeds(6)), gen.sample(y, guidance, rng=seeds(6)))
    assert (len(replayed.sampler.graphs) == -(-replayed.sampler.steps.length//bucket)-((gen.prefix)//bucket
                                                                                       if bucket == 1 else 0))

def test_kept_modulations_are_those_of_the_labels():
    gen = make('rar')
    kept = inference_copy(gen, 'fp32')
    for y in (torch.tensor([0,1]), torch.tensor([1,2]), torch.tensor([2,2]), torch.tensor([0,1])):
        assert torch.equal(kept.sample(y, 2., rng=seeds(2)), gen.sample(y, 2., rng=seeds(2)))
    assert kept.sampler.kinds == (0, 1, 3)

def test_ranges_name_the_last_layer_last(gen):
    ranges = input_ranges(gen, samples=2)
    assert list(ranges)[-1] in ('lm_head', 'head') and all(low <= high for low,high in ranges.values())
    assert not any(m._forward_pre_hooks for m in gen.modules())

class Plain(LatentGenerator):
    "Has neither blocks nor steps"
    kind = 'plain'
    shape = (4,)
    classes = 3
    label_dropout = 0.
    codebook_size = 5
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 8)
        self.head = nn.Linear(8, 5)
    def losses(self, latents, labels, rng=None, done=1.): return {}
    def sample(self, labels, *args, **kwargs):
        return self.head(self.inner(nn.functional.one_hot(labels, 3).float())).argmax(-1)[:,None].expand(-1,
                                                                                                         4)

def test_refusals_are_one_line():
    gen = Plain().eval()
    for line,kwargs in (("precision must be one of fp32, bf16, int8, got 'fp4'", dict(precision='fp4')),
                        ("got 'magic'", dict(compile='magic')),
                        ("made of `blocks`, and Plain has none", dict(precision='fp32', compile='aot_eager')),
                        ("graphs are CUDA graphs, and this generator is on cpu", dict(graphs=True))):
        with pytest.raises(ValueError) as e: inference_copy(gen, **kwargs)
        assert line in str(e.value) and '\n' not in str(e.value)
    assert inference_copy(gen, 'fp32').sample(labels(2)).shape == (2,4)

@needs_int8
def test_int8_goes_with_its_layers():
    from tokkit.inference import _Packed
    whole = Int8Linear(nn.Linear(8, 8), -1., 1.)
    key = whole.packed.key
    other = copy.deepcopy(whole)
    x = torch.randn(3, 8, generator=make_rng(0))
    expected = whole(x)
    del whole
    assert (torch.equal(other(x), expected)
            and torch.equal(torch.ops.tokkit.int8_linear(x, other.key, 8), expected))
    del other
    assert key not in _Packed.made

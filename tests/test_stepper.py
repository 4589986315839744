"The stepper without a browser: its moments are the sampler's, its numbers are right, and the skin follows"
import io
from functools import lru_cache

import numpy as np, pytest, torch
from PIL import Image

from tokkit.generators import ARCfg, ARGenerator
from tokkit.core import make_rng
from tokkit.data import fashion_mnist
from tokkit.generators import FlowCfg, FlowGenerator
from tokkit.generators import MaskedCfg, MaskedGenerator
from tokkit.ui import SamplerStepper, chance_ink, chart, map_tiles, veil
from tokkit.tokenizers import make_tokenizer

SMALL = dict(classes=10, width=16, depth=1, heads=2)
KINDS = 'ar', 'masked', 'ar levels', 'masked levels', 'flow'


@lru_cache
def pair(kind):
    "An untrained generator and tokenizer that belong together"
    torch.manual_seed(0)
    levels = 2 if 'levels' in kind else 1
    if kind == 'flow':
        g = FlowGenerator(FlowCfg(n=49, dim=16, **SMALL))
        tok = make_tokenizer('tiny-kl0')
        g = FlowGenerator(FlowCfg(*tok.spec.shape, **SMALL))
        torch.nn.init.normal_(g.head.weight, std=.3)
        torch.nn.init.normal_(g.final[1].weight, std=.3)
        return g.eval(), tok.eval()
    tok = make_tokenizer('tiny-pq' if levels == 2 else 'tiny')
    cfg = dict(n=49, codebook_size=tok.spec.codebook_size, levels=levels, **SMALL)
    g = ARGenerator(ARCfg(**cfg)) if kind.startswith('ar') else MaskedGenerator(MaskedCfg(**cfg))
    with torch.no_grad(): (g.lm_head if kind.startswith('ar') else g.head).weight.mul_(8)
    return g.eval(), tok.eval()

def stepper(kind='ar', n=3, **state): return SamplerStepper(*pair(kind), n=n, **state)

@pytest.fixture(scope='module')
def images(): return fashion_mnist('test', n=8)


@pytest.mark.parametrize('kind', KINDS)
def test_moments_are_those_of_the_sampler(kind):
    s = stepper(kind, guidance=2., temperature=.8, seed=3)
    g, _ = pair(kind)
    seen = []
    out = g.sample(torch.arange(3), 2., temperature=.8, rng=make_rng(3, 'stepper'), callback=seen.append)
    trace = s.trace()
    assert torch.equal(trace[-1].latents, out) and len(trace) == len(seen) == trace[0].steps
    for m, raw in zip(trace, seen):
        assert m.i == raw['i'] and torch.equal(m.latents, raw['latents'])
        if kind == 'flow':
            assert m.t == raw['t'] and torch.equal(m.clean, raw['clean']) and m.known is None
            continue
        assert torch.equal(m.known, raw['known'])
        p = (raw['logits']/.8).softmax(-1)
        for row in range(3):
            at = m.entry[row]
            if kind == 'ar':
                assert at == raw['position']
                here = p[row]
            elif kind == 'ar levels':
                assert divmod(at.item(), 2) in raw['position']
                here = p[row, raw['position'].index(divmod(at.item(), 2))]
            else: here = p[row].flatten(0, -2)[at]
            assert torch.allclose(m.p[row], here)
            code = raw['latents'][row].flatten()[at]
            assert m.code[row] == code and m.rank[row] == 1+(here > here[code]).sum()
            assert m.chance[row].flatten()[at].item() == pytest.approx(here[code].item())
            # the surest
            assert m.new[row].flatten()[at] and m.chance[row][m.new[row]].max() == m.chance[row].flatten()[at]
    if kind != 'flow':
        assert torch.equal(sum(m.new.int() for m in trace), torch.ones(out.shape, dtype=torch.int))
        assert (not trace[-1].chance.isnan().any()
                and all(torch.equal(m.chance.isnan(), ~m.known) for m in trace))


@pytest.mark.parametrize('kind', KINDS)
def test_every_step_can_be_drawn(kind):
    s = stepper(kind, n=2, **({} if kind.startswith('ar') else dict(steps=6)))
    last = len(s.trace())-1
    for step in (0, last//2, last):
        m = s.set(step=step).moment()
        assert (m.i == step and s.numbers().startswith(f'step {step+1} of {last+1}')
                and '\n' not in s.numbers())
        assert s.picture(footer=True).size[0] >= 126+2*90
    assert len(s.rows(m)) == {'ar': 4, 'masked': 5, 'flow': 4}[kind.split()[0]]
    if 'levels' in kind: assert 'level' in s.set(step=0).numbers()


def test_the_line_of_numbers():
    s = stepper('ar', step=10, sample=2)
    m = s.moment()
    bits = -(m.p[2]*m.p[2].log2()).nansum().item()
    assert s.numbers() == (f"step 11 of 49 · sample 2: row 1, column 3: code {m.code[2]}, rank {m.rank[2]} "
                           "of 512, probability "
                           f"{m.p[2, m.code[2]]:.1%} · as uncertain as among {2**bits:.0f} equal codes")
    s = stepper('masked', steps=4, step=1)
    m = s.moment()
    assert f'{m.new[0].sum()} codes set, {49-m.known[0].sum()} of 49 hidden; the surest, row' in s.numbers()
    s = stepper('flow', steps=4, step=3)
    assert 't = 1.00 · the estimate is' in s.numbers()


@pytest.mark.parametrize('kind', ['ar', 'flow'])
def test_only_the_sampler_knobs_sample(kind):
    s = stepper(kind)
    calls = []
    g = s.generator
    sample = g.sample
    try:
        g.sample = lambda *a, **k: calls.append(1) or sample(*a, **k)
        s.trace()
        s.set(step=7).picture()
        s.numbers()
        if kind == 'ar': s.set(sample=1).picture()
        assert len(calls) == 1
        for i, change in enumerate([dict(seed=1), dict(label=4), dict(guidance=3.), dict(temperature=.5)]):
            before = s.trace()[-1].latents
            assert not torch.equal(s.set(**change).trace()[-1].latents, before) and len(calls) == 2+i
        with torch.no_grad(): g.label.weight.add_(0) if kind == 'flow' else g.pos_embed.add_(0)
        s.trace()
        assert len(calls) == 6  # a weight was written
    finally: del g.sample


def test_labels():
    s = SamplerStepper(*pair('ar'), n=12)
    assert s.labels.tolist() == [*range(10), 0, 1] and s.set(label=7).labels.tolist() == [7]*12


def test_steps_move_the_sliders_end():
    s = stepper('masked', steps=12, step=11)
    assert s.set(steps=4).moment().i == 3 and s.knobs['step'].max == s.play.max == 3
    assert s.set(steps=20, step=15).moment().i == 15 and s.knobs['step'].max == s.play.max == 19
    assert stepper('ar levels').moment().steps == 50                # a level later: one step more


@pytest.mark.parametrize('kind', ['ar', 'masked', 'flow'])
def test_keeps_a_part_of_real_images(kind, images):
    g, tok = pair(kind)
    s = SamplerStepper(g, tok, n=3, images=images, sigma=.5)
    with torch.no_grad():
        real = tok.encode(images[:3][0])
        real = tok.quantize(real).zq if kind == 'flow' else tok.tokenize(images[:3][0])
    assert torch.equal(s.real, real) and s.classes == list(images.classes)
    want = g.sample(torch.arange(3), 1.5, keep=(real, .5), rng=make_rng(0, 'stepper'))
    assert torch.equal(s.trace()[-1].latents, want)
    s.widget
    s.set(sigma=1.)
    if kind == 'flow': assert 'not possible:</b> keep σ 1 leaves nothing' in s.line.value
    else:
        assert torch.equal(s.trace()[-1].latents, real) and 'not possible' not in s.line.value
        if kind == 'masked': assert 'nothing is set in this step' in s.numbers() and s.picture().size


def test_what_is_set_has_its_color_and_what_is_new_a_frame():
    known = torch.zeros(1, 49, dtype=torch.bool)
    known[0, [3, 11]] = True
    tiles = map_tiles(np.full((1, 49, 3), 200, np.uint8), known, (7, 7))[0]
    by_token = lambda pixels: pixels.all(-1).reshape(7, 12, 7, 12)
    framed = by_token(tiles == 25).any((1, 3)).reshape(-1)
    assert framed.nonzero()[0].tolist() == [3, 11]
    x = np.zeros((1, 84, 84, 3), np.uint8)
    dark = by_token(veil(x, known, (7, 7))[0] == 0).all((1, 3)).reshape(-1)
    assert dark.nonzero()[0].tolist() == [3, 11]
    ink = chance_ink(torch.tensor([[0., .1, .5, 1., torch.nan]]))[0].astype(int)
    assert (np.diff(ink[:4].sum(1)) > 0).all() and (ink[4] == 240).all()

def test_an_unlikely_code_stands_alone_in_the_chart():
    p = torch.arange(40, 0, -1.)
    p /= p.sum()
    colors = np.random.default_rng(0).integers(0, 200, (40, 3)).astype(np.uint8)
    def shows(image, c): return (np.asarray(image) == colors[c]).all(-1).any()
    usual = chart(p, 3, colors)
    rare = chart(p, 35, colors)
    assert shows(usual, 3) and not shows(usual, 35) and shows(rare, 35) and shows(rare, 0)


def test_tokens_on_no_grid():
    tok = make_tokenizer('tiny-1d', latents=12)
    assert tok.spec.grid is None
    torch.manual_seed(0)
    s = SamplerStepper(ARGenerator(ARCfg(12, tok.spec.codebook_size, **SMALL)).eval(), tok, n=2, step=5)
    assert 'token 5: code' in s.numbers() and s.picture().size


def test_the_skin_follows_the_knobs():
    s = stepper('masked', steps=5)
    assert s.image.value == b'' and s.line.value == ''
    s.widget
    before = s.image.value
    line = s.line.value
    s.knobs['step'].value = 2
    assert s.image.value != before and s.line.value != line
    assert Image.open(io.BytesIO(s.image.value)).size == s.picture().size
    before = s.image.value
    s.knobs['sample'].value = 1
    assert s.image.value != before
    # the slider's end moves, and the view with it
    s.knobs['steps'].value = 2
    assert s.line.value.split('>')[1].startswith('step 2 of 2')


def test_a_failure_is_one_line():
    torch.manual_seed(0)
    g = MaskedGenerator(MaskedCfg(49, 512, **SMALL)).eval()
    s = SamplerStepper(g, pair('masked')[1], n=2)
    s.widget
    before = s.image.value
    with torch.no_grad(): g.head.bias[0] = torch.nan
    s.redraw()
    assert ('not possible:</b> the generator&#x27;s prediction is not finite at step 0' in s.line.value
            and s.image.value == before)
    with torch.no_grad(): g.head.bias[0] = 0
    s.redraw()
    assert 'not possible' not in s.line.value


def test_leaves_models_as_they_were():
    torch.manual_seed(0)
    g = ARGenerator(ARCfg(49, 512, **SMALL)).train()
    tok = make_tokenizer('tiny').train()
    before = g.fingerprint, tok.fingerprint
    SamplerStepper(g, tok, n=2).widget
    assert (g.training and tok.training and before == (g.fingerprint, tok.fingerprint)
            and all(p.grad is None for p in (*g.parameters(), *tok.parameters())))


def test_no_guidance_without_label_dropout(recwarn):
    torch.manual_seed(0)
    g = MaskedGenerator(MaskedCfg(49, 512, label_dropout=0., **SMALL)).eval()
    s = SamplerStepper(g, pair('masked')[1], n=2, steps=2)
    s.picture()
    assert s.knobs['guidance'].disabled and s.state['guidance'] == 1 and not recwarn.list
    with pytest.raises(ValueError, match='trained without label dropout'): s.set(guidance=2.)


@pytest.mark.parametrize('kind,changes,says', [
    ('ar', dict(top=1), "no knob 'top'; it has label"),
    ('ar', dict(steps=3), 'goes code by code'),
    ('masked', dict(sigma=.5), 'no images were given'),
    ('flow', dict(sample=1), 'latents are continuous')])
def test_refuses_knobs(kind, changes, says):
    with pytest.raises(ValueError, match=says): stepper(kind).set(**changes)

@pytest.mark.parametrize('kind,other,options,says',
                         [('ar', 'flow', {}, 'must belong together'),
                          ('flow', 'ar', {}, 'must belong together'),
    ('ar', 'ar levels', {}, 'must belong together'), ('ar', 'ar', dict(n=0), 'at least one sample'),
                          ('ar', 'ar', dict(classes=['a']), 'must name 10 labels'),
    ('ar', 'ar', dict(images=torch.zeros(2, 1, 28, 28)), 'one for each of 6 samples, got 2')])
def test_refuses(kind, other, options, says):
    with pytest.raises(ValueError, match=says): SamplerStepper(pair(kind)[0], pair(other)[1], **options)


def test_same_picture_same_bytes():
    a, b = (stepper('masked', steps=4, step=1).picture().tobytes() for _ in range(2))
    assert a == b

def test_strip():
    assert stepper('ar').static_strip([0, 24, 48]).size == (126+3*90, 3*90+18)
    assert stepper('flow', steps=6).static_strip().size == (126+3*90, 5*90+18)

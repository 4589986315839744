"The explorer without a browser: what the knobs mean, what is refused, and that the skin follows"
import io

import numpy as np, pytest, torch
from PIL import Image

from tokkit.core import make_rng
from tokkit.data import fashion_mnist
from tokkit.perturbation import perturb_codes
from tokkit.tokenizers import make_tokenizer
from tokkit.ui import PerturbationExplorer, code_colors, png_bytes, published_explorer, token_tiles


@pytest.fixture(scope='module')
def images(): return fashion_mnist('test', n=20)

@pytest.fixture(scope='module')
def tok(): return make_tokenizer('tiny')

@pytest.fixture
def explorer(tok, images): return PerturbationExplorer(tok, images, alpha=.5, delta=16)


def test_shows_what_perturb_codes_gives(explorer, tok, images):
    shown = explorer.perturbed()
    x = images[:8][0]
    tok.eval()
    with torch.no_grad():
        ids = tok.tokenize(x)
        moved = perturb_codes(ids, tok.codebook, .5, 16, rng=make_rng(0, 'explore', 0))
        assert torch.equal(shown.ids, ids) and torch.equal(shown.moved, moved)
        assert torch.allclose(shown.damaged, tok.detokenize(moved), atol=1e-5)
        error = ((tok.detokenize(moved).clamp(-1, 1)-tok.detokenize(ids).clamp(-1,
                                                                               1)).square().mean().sqrt()*127.5)
    assert shown.rmse == pytest.approx(error.item(), rel=1e-4)
    assert shown.psnr == pytest.approx(20*np.log10(255/error.item()), rel=1e-4)
    assert shown.rate == (ids != moved).double().mean().item()


@pytest.mark.parametrize('still', [dict(alpha=0), dict(beta=0), dict(delta=1)])
def test_no_dose_no_difference(explorer, still):
    shown = explorer.set(**still).perturbed()
    assert (torch.equal(shown.moved, shown.ids) and shown.rmse == 0 and shown.psnr == float('inf')
            and shown.code_distance == 0)
    assert 'inf' in explorer.numbers()


@pytest.mark.parametrize('choice',
                         [dict(rate='bernoulli'), dict(neighbours='latent'), dict(include_self=False),
                          dict(seed=3), dict(page=1)])
def test_every_knob_matters(explorer, choice):
    before = explorer.perturbed().moved
    assert not torch.equal(explorer.set(**choice).perturbed().moved, before)


def test_beta_is_the_fraction_of_images(explorer):
    shown = explorer.set(beta=.25).perturbed()
    assert (shown.moved != shown.ids).any(1).sum() == 2


def test_last_page_may_be_short(explorer):
    assert len(explorer.set(page=2).perturbed().x) == 4        # 20 images, 8 at once
    assert explorer.picture().size[0] < explorer.set(page=0).picture().size[0]


def test_the_skin_follows_the_knobs(explorer):
    assert explorer.image.value == b''
    explorer.widget
    before = explorer.image.value
    line = explorer.line.value
    explorer.knobs['alpha'].value = .75
    assert explorer.image.value != before and explorer.line.value != line
    assert Image.open(io.BytesIO(explorer.image.value)).size == explorer.picture().size


def test_a_refusal_is_one_line(explorer):
    explorer.widget
    before = explorer.image.value
    explorer.set(include_self=False, delta=512)
    assert ('not possible:' in explorer.line.value and '1..511' in explorer.line.value
            and '\n' not in explorer.line.value)
    assert explorer.image.value == before
    explorer.set(delta=511)
    assert 'not possible' not in explorer.line.value and explorer.image.value != before


def test_leaves_the_tokenizer_as_it_was(images):
    tok = make_tokenizer('tiny').train()
    before = tok.fingerprint
    PerturbationExplorer(tok, images).widget
    assert tok.training and tok.fingerprint == before and all(p.grad is None for p in tok.parameters())


def test_notices_new_weights(explorer, tok):
    before = explorer.perturbed().clean
    with torch.no_grad(): tok.decoder.embed.bias.add_(1)
    after = explorer.perturbed().clean
    with torch.no_grad(): tok.decoder.embed.bias.sub_(1)
    assert not torch.equal(after, before)


def test_is_there_for_rgb_and_latent_tokens():
    x = torch.rand(3, 3, 32, 32, generator=make_rng(0))*2-1
    assert PerturbationExplorer(make_tokenizer('tiny-rgb'), x).picture().size[0] > 3*90
    assert (PerturbationExplorer(make_tokenizer('tiny-1d'), fashion_mnist('test', n=2),
                                 alpha=.25).perturbed().ids.shape == (2, 16))


@pytest.mark.parametrize('tok,images,says',
                         [('tiny-kl0', 4, 'needs a tokenizer with codes'), ('tiny', 0, 'at least one image')])
def test_refuses(tok, images, says):
    with pytest.raises(ValueError, match=says):
        PerturbationExplorer(make_tokenizer(tok), torch.zeros(images, 1, 28, 28))


def test_unknown_knob(explorer):
    with pytest.raises(ValueError, match="no knob 'gamma'; it has alpha"): explorer.set(gamma=1)


def test_frames_mark_exactly_the_replaced(tok):
    clean = torch.arange(49)[None]
    moved = clean.clone()
    moved[0, [3, 11]] = 500
    tiles = token_tiles(moved, clean, code_colors(tok.codebook), (7, 7))[0]
    framed = (tiles == 25).all(-1).reshape(7, 12, 7, 12).any((1, 3)).reshape(-1)
    assert framed.nonzero()[0].tolist() == [3, 11]


def test_same_picture_same_bytes(tok, images):
    a, b = (png_bytes(PerturbationExplorer(tok, images, seed=4).picture(), 64) for _ in range(2))
    assert a == b


def test_published_pages_hold_every_picture(tok, images):
    page = published_explorer(tok, images, alphas=(0, .5), deltas=(2, 8, 32), n=2)
    stills = [still.value for stack in page.children[1].children for still in stack.children]
    assert len(stills) == 6 and len(set(map(bytes, stills))) == 6
    alone = PerturbationExplorer(tok, images, 2, alpha=.5, delta=8).picture()
    assert bytes(stills[3]) == png_bytes(alone, 32)            # second strength, second rate

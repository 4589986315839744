"""The training step: parts of a batch, several processes, compiled,
in half precision, and what happens when it goes wrong"""
import json, subprocess, sys, warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokkit.data import fashion_mnist
from tokkit.perturbation import Annealing, LatentPerturbation
from tokkit.tokenizers import make_tokenizer
from tokkit.training import GeneratorTraining, ImageTraining, TensorPairs, train_tokenizer
from tokkit.training.train import _compiled

SCRIPT = Path(__file__).with_name('train_in_processes.py')
TERMS = dict(reconstruction='recon', perceptual='perceptual', semantic='semantic', adversarial='adversarial')


def losses(folder, processes=1, **changes):
    "Losses of a small training in as many processes"
    folder.mkdir()
    launcher = (['-m', 'torch.distributed.run', '--nproc-per-node', str(processes), '--standalone']
                if processes > 1 else [])
    done = subprocess.run([sys.executable, *launcher, str(SCRIPT), str(folder/'losses.json'),
                           json.dumps(changes)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder/'losses.json').read_text())

def train(work=None, images=None, perturbation=LatentPerturbation(.7, .5, 20), **changes):
    "A tokenizer after a short training, and its losses"
    tok = make_tokenizer('tiny-16', width=16, depth=1)
    cfg = ImageTraining(**dict(epochs=2, batch=32, lr=1e-3, perceptual=0, revive=0) | changes)
    history = train_tokenizer(tok, fashion_mnist('train', 128) if images is None else images, cfg,
                              perturbation, work=work, device='cpu')
    return tok, history


def test_two_processes_train_as_one(tmp_path):
    """The same global batch, the same draws, the same losses: pixels,
    contrast over all images, their distribution, the game and its balance"""
    terms = dict(semantic=.1, distribution=.1, distribution_kind='frechet',
                 distribution_options=dict(layers=[1, 4], size=28))
    one = losses(tmp_path/'one', **terms)
    two = losses(tmp_path/'two', 2, **terms)
    assert (set(one) == set(two) >= {'loss', 'recon', 'semantic', 'frechet', 'adversarial', 'discriminator',
                                     'replaced', 'quantizer'})
    for name in one: assert two[name] == pytest.approx(one[name], rel=2e-4, abs=1e-6), name


def test_parts_of_a_batch(tmp_path):
    "Without a game: a discriminator's spectral norm iterates, and its balance is struck, once a part"
    whole = losses(tmp_path/'whole', adversarial=0)
    parts = losses(tmp_path/'parts', adversarial=0, accumulate=4)
    for name in whole.keys()-{'usage'}:
        assert parts[name] == pytest.approx(whole[name], rel=2e-4, abs=1e-6), name


def test_compiled(tmp_path):
    "Traced by torch.compile: the same training up to rounding"
    plain = losses(tmp_path/'plain', adversarial=0, epochs=1)
    traced = losses(tmp_path/'traced', adversarial=0, epochs=1, compile='aot_eager')
    assert traced['loss'] == pytest.approx(plain['loss'], rel=1e-4)

def test_nothing_compiled_is_left_behind():
    tok = make_tokenizer('tiny-16', width=16, depth=1)
    with _compiled('eager', tok.encoder): assert tok.encoder._compiled_call_impl is not None
    assert tok.encoder._compiled_call_impl is None


def test_half_precision():
    tok, history = train(precision='bf16', semantic=.1, adversarial=.1, adversarial_start=0.)
    full = train(semantic=.1, adversarial=.1, adversarial_start=0.)[1]
    assert history.loss.tolist() == pytest.approx(full.loss.tolist(), rel=.05)
    assert all(p.dtype == torch.float32 for p in tok.parameters())


@pytest.mark.parametrize('term', TERMS)
def test_a_weight_of_zero_leaves_the_term_out(term):
    all_on = dict(reconstruction=1., perceptual=.1, semantic=.1, adversarial=.1, adversarial_start=0.)
    history = train(epochs=1, **all_on|{term: 0})[1]
    assert TERMS[term] not in history and set(TERMS.values())-{TERMS[term]} <= set(history)


def test_batch_of_a_loss_that_is_not_finite_is_kept(tmp_path):
    x, y = fashion_mnist('train', 128)[:]
    x[5, 0, 3, 3] = float('nan')
    with pytest.raises(FloatingPointError,
                       match=r'the loss is nan at step \d+ .* its batch is kept in') as error:
        train(tmp_path, TensorPairs(x, y))
    kept = load_file(next(tmp_path.glob('nonfinite-*.safetensors')))
    assert ('nonfinite' in str(error.value) and kept['batch.0'].shape == (32, 1, 28, 28)
            and kept['batch.0'].isnan().sum() == 1)


@pytest.mark.parametrize('changes',
                         [dict(), dict(semantic=.1),
                          dict(distribution=.1, distribution_kind='frechet',
                               distribution_options=dict(layers=(1, 4), size=28)),
                          dict(adversarial=.1, adversarial_start=.2, discriminator_augment=1.,
                               discriminator_blur=.5)])
def test_killed_and_resumed(tmp_path, changes):
    "Killed in the second epoch and taken up again: the same weights, bit for bit"
    def play(work, kill=False):
        tok = make_tokenizer('tiny-16', width=16, depth=1)
        def die(learner):
            if kill and learner.epoch == 1: raise KeyboardInterrupt
        cfg = ImageTraining(epochs=3, batch=32, perceptual=0, revive=2, **changes)
        try:
            train_tokenizer(tok, fashion_mnist('train', 96), cfg,
                            LatentPerturbation(1., .5, 11, Annealing(1, 2)), work=work, preview=die,
                            device='cpu')
        except KeyboardInterrupt: pass
        return tok.fingerprint
    whole = play(tmp_path/'whole')
    play(tmp_path/'killed', kill=True)
    assert play(tmp_path/'killed') == whole


def test_what_has_not_converged_is_said():
    "The held-out loss of a training that has just begun still falls; one that stands still says nothing"
    images = fashion_mnist('train', 128)
    tok = make_tokenizer('tiny-16', width=16, depth=1)
    cfg = ImageTraining(epochs=2, batch=32, perceptual=0, ema=0.)
    with pytest.warns(UserWarning, match='still falls by .* an epoch, so this tokenizer has not converged'):
        history = train_tokenizer(tok, images, cfg, validation=fashion_mnist('test', 64), device='cpu')
    assert history.validation.iloc[-1] < history.validation.iloc[0] and not tok.training
    slow = ImageTraining(epochs=2, batch=32, perceptual=0, lr=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        train_tokenizer(tok, images, slow, validation=fashion_mnist('test', 64), device='cpu')


@pytest.mark.parametrize('settings, said', [
    (dict(epochs=0), 'epochs and batch must be at least 1'),
    (dict(semantic=-.1), r'the weight semantic must be in \[0, inf\], got -0.1'),
    (dict(reconstruction=0, perceptual=0), 'nothing to learn from'),
    (dict(adversarial_kind='poker'),
     "adversarial_kind must be one of hinge, non-saturating, vanilla, got 'poker'"),
    (dict(reconstruction=0, perceptual_every=2), 'something to learn from at every step'),
    (dict(batch=50, accumulate=4), 'accumulate must divide batch, got 4 parts of 50 images'),
])
def test_settings_for_images_that_no_training_can_use(settings, said):
    with pytest.raises(ValueError, match=said): ImageTraining(**settings)

@pytest.mark.parametrize('settings, said', [
    (dict(decay='biases'), "decay must be one of matrices, released, got 'biases'"),
    (dict(lr=-1), 'lr must be in'),
])
def test_settings_for_latents_that_no_training_can_use(settings, said):
    with pytest.raises(ValueError, match=said): GeneratorTraining(**settings)

@pytest.mark.parametrize('settings', [
    dict(perceptual_every=1),
    dict(perceptual=0, semantic=.1),
    dict(perceptual=0, adversarial=.1, adversarial_start=0, adaptive=False),
])
def test_without_pixels_another_term_at_every_step_is_enough(settings):
    assert ImageTraining(reconstruction=0, **settings).reconstruction == 0

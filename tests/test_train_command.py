"`tokkit train`: a recipe is followed, taken up again after a kill, and mistaken for no other"
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from tokkit.cli import main
from tokkit.generators import load_generator
from tokkit.recipes import RECIPES, read_recipe
from tokkit.tokenizers import load_tokenizer

SMALL = ['--set', 'tokenizer.width=16', '--set', 'tokenizer.depth=1', '--set', 'batch=16', '--set',
         'distribution=0', '--device', 'cpu']


def train(*words): return main(['train', *map(str, words)])


def test_a_folder_becomes_a_tokenizer_and_a_generator(photographs, tmp_path, capsys):
    tok, gen = tmp_path/'plain', tmp_path/'gen'
    assert train('tokenizer', '--data', photographs, '--out', tok, '--set', 'epochs=2', *SMALL) == 0
    said = capsys.readouterr()
    assert str(tok) in said.out and 'next: tokkit metric all' in said.err
    assert load_tokenizer(tok).image_shape == (3, 32, 32)
    assert 'validation' in pd.read_csv(tok/'history.csv')
    assert read_recipe(tok/'recipe.yaml').training.epochs == 2
    shape = ['--set', 'generator.width=16', '--set', 'generator.depth=1', '--set', 'batch=16', '--set',
             'epochs=1', '--device', 'cpu']
    assert train('generator', '--tokenizer', tok, '--data', photographs, '--out', gen, *shape) == 0
    assert load_generator(gen).classes == 2
    # again: found, and not trained again
    before = (gen/'model.safetensors').stat().st_mtime_ns
    capsys.readouterr()
    assert train('generator', '--tokenizer', tok, '--data', photographs, '--out', gen, *shape) == 0
    assert 'was there already' in capsys.readouterr().err
    assert (gen/'model.safetensors').stat().st_mtime_ns == before


def test_the_recipe_beside_a_result_makes_it_again(photographs, tmp_path):
    a, b = tmp_path/'a', tmp_path/'b'
    small = ['--set', 'epochs=1', '--set', 'distribution=.1', *SMALL[:-4], *SMALL[-2:]]
    words = ['--preset', 'laptop-perturbed', '--data', photographs, '--n', 32, *small]
    assert train('tokenizer', *words, '--out', a) == 0
    assert train('tokenizer', '--config', a/'recipe.yaml', '--out', b, '--device', 'cpu') == 0
    assert load_tokenizer(a).fingerprint == load_tokenizer(b).fingerprint
    # the annealing is that of eight epochs, brought to one
    annealing = yaml.safe_load((a/'recipe.yaml').read_text())['perturbation']['annealing']
    assert annealing == dict(start=.2, end=.6, end_ratio=.5)


def test_other_settings_are_refused(photographs, tmp_path, capsys):
    words = ['tokenizer', '--data', photographs, '--out', tmp_path/'one', '--n', 32, '--set', 'epochs=1',
             *SMALL]
    assert train(*words) == 0
    assert train(*words, '--set', 'lr=1e-4') == 2
    assert 'training.lr is 0.003 there and 0.0001 here' in capsys.readouterr().err


@pytest.mark.parametrize('words,told', [
    (['tokenizer', '--set', 'epoch=3'], 'did you mean epochs?'),
    (['tokenizer', '--set', 'kind=cnn'], 'tokenizer.kind or perturbation.kind'),
    (['tokenizer', '--set', 'lr=fast'], 'training.lr must be float'),
    (['tokenizer', '--set', 'lr'], 'expected NAME=VALUE'),
    (['tokenizer', '--set', 'size=30'], 'patch must divide size'),
    (['tokenizer', '--preset', 'laptop-ar'], 'no recipe of a tokenizer; those are laptop-plain'),
    (['tokenizer', '--preset', 'laptop-plan'], 'laptop-plain'),
    (['tokenizer', '--tokens', 'x'], '--tokens belongs to tokkit train generator'),
    (['generator'], 'needs --tokenizer'),
    (['tokenizer', '--config', 'no.yaml'], 'no.yaml'),
])
def test_bad_words(words, told, tmp_path, capsys):
    assert train(*words, '--out', tmp_path/'out') == 2
    said = capsys.readouterr().err
    assert told in said and len(said.strip().splitlines()) == 1 and not (tmp_path/'out').exists()


def test_estimate_trains_nothing(tmp_path, capsys):
    assert train('tokenizer', '--n', 128, '--estimate', '--out', tmp_path/'out', *SMALL) == 0
    said = capsys.readouterr().out
    assert re.search(r'0\.0\d M parameters, 64 steps of \S+ s: about', said) and not (tmp_path/'out').exists()


def test_a_killed_training_goes_on(tmp_path):
    "Killed in the middle, the same command ends with the weights of a training that was not killed"
    words = ['train', 'tokenizer', '--n', '256', '--set', 'epochs=6', *SMALL, '--out']
    command = [Path(sys.executable).parent/'tokkit', *words]
    process = subprocess.Popen([*command, tmp_path/'killed'], stderr=subprocess.DEVNULL,
                               env=dict(os.environ, TOKKIT_QUIET='1'))
    def kept(): return [*tmp_path.glob('.work-killed-*/checkpoint-*.pt')]
    until = time.time()+120
    while not kept() and time.time() < until: time.sleep(.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert kept(), 'no checkpoint within two minutes'
    finished = (tmp_path/'killed').exists()
    assert main([*words, str(tmp_path/'killed')]) == 0 and main([*words, str(tmp_path/'whole')]) == 0
    assert load_tokenizer(tmp_path/'killed').fingerprint == load_tokenizer(tmp_path/'whole').fingerprint
    assert not finished, 'the training ended before it was killed: give it more epochs'


@pytest.mark.parametrize('name', RECIPES)
def test_every_preset_is_written_and_read(name, tmp_path):
    from tokkit.recipes import write_recipe
    assert read_recipe(write_recipe(RECIPES[name], tmp_path/'recipe.yaml')) == RECIPES[name]


def test_a_training_is_watched_by_a_tracker(photographs, tmp_path, monkeypatch, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    monkeypatch.setenv('TOKKIT_RUNS', str(tmp_path/'runs'))
    words = ['tokenizer', '--data', photographs, '--set', 'epochs=2', *SMALL]
    assert train(*words, '--out', tmp_path/'watched', '--track', 'tensorboard') == 0
    assert train(*words, '--out', tmp_path/'alone') == 0
    weights = [(tmp_path/name/'model.safetensors').read_bytes() for name in ('watched', 'alone')]
    assert weights[0] == weights[1], "a tracker changes nothing"
    seen = EventAccumulator(str(tmp_path/'runs'/'tracking'/f'{tmp_path.name}-watched')).Reload()
    assert len(seen.Scalars('epoch/recon')) == 2 and len(seen.Scalars('epoch/usage')) == 2
    assert seen.Tags()['images'] and 'lr/0' in seen.Tags()['scalars']
    # one that takes no pictures, as trackio's takes none
    from accelerate.tracking import TensorBoardTracker
    monkeypatch.delattr(TensorBoardTracker, 'log_images')
    assert train(*words, '--out', tmp_path/'without', '--track', 'tensorboard') == 0
    capsys.readouterr()
    assert train(*words, '--out', tmp_path/'other', '--track', 'wandb') == 2
    assert 'needs the package wandb, which is not installed; pip install wandb' in capsys.readouterr().err
    assert not (tmp_path/'other').exists()

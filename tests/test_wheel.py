"tokkit installed from its wheel, in an empty folder, without a checkout"
import os, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHELL = [sys.executable, '-c', 'import sys; from tokkit.cli import main; sys.exit(main())']


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "A folder with nothing but what the wheel brings"
    home = tmp_path_factory.mktemp('wheel')
    source = home/'source'       # a build leaves files where it is made
    source.mkdir()
    for name in ('setup.py', 'settings.ini', 'README.md'): shutil.copy(ROOT/name, source)
    for name in ('tokkit', 'nbs'):
        shutil.copytree(ROOT/name, source/name, ignore=shutil.ignore_patterns('__pycache__', '.*'))
    pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
    build = [*pip, 'wheel', source, '--no-deps', '--no-build-isolation', '--wheel-dir', home]
    subprocess.run(build, check=True)
    wheel, = home.glob('tokkit_lab-*.whl')
    subprocess.run([*pip, 'install', '--no-deps', '--target', home/'site', wheel], check=True)
    return home/'site'

@pytest.fixture
def tokkit(installed, tmp_path):
    "The command in an empty folder; the four files of the images lie in the data folder"
    (tmp_path/'data').mkdir()
    (tmp_path/'data'/'fashion_mnist').symlink_to(ROOT/'data'/'fashion_mnist')
    (tmp_path/'here').mkdir()
    env = {k: v for k,v in os.environ.items() if not k.startswith('TOKKIT_')}
    env |= dict(PYTHONPATH=str(installed), TOKKIT_DATA=str(tmp_path/'data'), TOKKIT_DEVICE='cpu',
                TOKKIT_QUIET='1')
    def call(*words, **more):
        return subprocess.run([*SHELL, *map(str, words)], cwd=tmp_path/'here', env=env|more,
                              capture_output=True, text=True, timeout=600)
    call.here = tmp_path/'here'
    return call


def test_it_is_the_installed_one(installed, tokkit):
    where = subprocess.run([sys.executable, '-c', 'import tokkit; print(tokkit.__file__)'], cwd=tokkit.here,
                           env=os.environ|dict(PYTHONPATH=str(installed)), capture_output=True, text=True)
    assert Path(where.stdout.strip()).is_relative_to(installed)
    assert (installed/'tokkit'/'notebooks'/'explore'/'x1_dose_slider.ipynb').is_file()

def test_commands_find_their_notebooks(tokkit):
    done = tokkit('run')
    assert done.returncode == 0 and 'e00_demo' in done.stdout and 'bench_perturb' in done.stdout, done.stderr
    assert 'parameters (-p NAME VALUE)' in tokkit('run', 'e02_dose_response', '--help').stdout
    done = tokkit('docs')
    assert done.returncode == 2 and "needs tokkit's source tree" in done.stderr

@pytest.mark.slow
def test_train_and_sweep(tokkit):
    small = 'tokenizer.width=16', 'tokenizer.depth=1', 'distribution=0', 'batch=16', 'epochs=1'
    short = [part for word in small for part in ('--set', word)]
    done = tokkit('train', 'tokenizer', '-n', 32, '--out', 'tok', *short)
    assert done.returncode == 0 and (tokkit.here/'tok'/'model.safetensors').is_file(), done.stderr
    small = ['-p', 'preset', 'smoke']
    done = tokkit('sweep', 'e06_codebook_anatomy.yaml', '-g', 'seed=0', *small, '--minutes', 0)
    assert done.returncode == 0 and 'left' in done.stderr, done.stderr
    done = tokkit('run', 'e06_codebook_anatomy', *small)
    assert done.returncode == 0 and (tokkit.here/'runs'/'e06_codebook_anatomy').is_dir(), done.stderr

@pytest.mark.slow
def test_demo(tokkit):
    small = dict(train_images=64, n=64, n_pfid=64, batch=32, pairs=64, width=32, depth=1, base_epochs=0)
    words = [part for name,value in small.items() for part in ('-p', name, value)]
    done = tokkit('demo', '--preset', 'smoke', *words)
    assert done.returncode == 0 and (tokkit.here/'runs'/'demo').is_dir(), done.stderr

def test_lab_copies_the_explorers(installed, tokkit):
    code = ("from pathlib import Path; from tokkit.cli.commands import explorers_folder; "
            "print(explorers_folder(Path.cwd()))")
    def copy():
        done = subprocess.run([sys.executable, '-c', code], cwd=tokkit.here, capture_output=True, text=True,
                              env=os.environ|dict(PYTHONPATH=str(installed)))
        assert done.returncode == 0, done.stderr
    copy()
    (tokkit.here/'tokkit-explore'/'x1_dose_slider.ipynb').write_text('mine')
    copy()      # a second call leaves what was changed
    assert (tokkit.here/'tokkit-explore'/'x1_dose_slider.ipynb').read_text() == 'mine'

def test_without_images_and_network_it_says_what_to_fetch(tokkit, tmp_path):
    (tmp_path/'data'/'fashion_mnist').unlink()
    nowhere = 'http://127.0.0.1:9'
    done = tokkit('train', 'tokenizer', '-n', 32, '--out', 'tok', http_proxy=nowhere, HTTP_PROXY=nowhere)
    files = ('train-images-idx3-ubyte.gz', 'train-labels-idx1-ubyte.gz', 't10k-images-idx3-ubyte.gz',
             't10k-labels-idx1-ubyte.gz')
    assert done.returncode == 2 and all(f in done.stderr for f in files), done.stderr

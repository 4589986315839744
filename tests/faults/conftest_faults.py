"""What the tests of faults share: small real models and images,
and how a command or a call is told to have failed well"""
import os, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image

SHELL = [sys.executable, '-c', 'import sys; from tokkit.cli import main; sys.exit(main())']
TINY = Path(__file__).parent.parent/'notebooks'/'tiny.ipynb'


def make_images(folder:Path, n:int, side:int = 28, seed:int = 0) -> Path:
    "Colour images of noise in two class folders"
    draw = np.random.default_rng(seed)
    for i in range(n):
        (folder/f'class{i%2}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (side, side, 3),
                                      dtype=np.uint8)).save(folder/f'class{i%2}'/f'{i:03d}.png')
    return folder


@pytest.fixture(scope='session')
def own(tmp_path_factory) -> Path:
    "A folder of colour images, an untrained tokenizer of them and a generator of its tokens; never changed"
    from tokkit.generators import ARCfg, ARGenerator
    from tokkit.generators import save_generator
    from tokkit.tokenizers import make_tokenizer
    home = tmp_path_factory.mktemp('own')
    make_images(home/'images', 64)
    tok = make_tokenizer('tiny', channels=3, width=32, depth=1, codebook_size=32)
    tok.save(home/'tokenizer')
    torch.manual_seed(0)
    save_generator(ARGenerator(ARCfg(tok.spec.shape[0], 32, 2, 32, 1)), home/'generator')
    return home


@pytest.fixture
def tokkit(capsys):
    "Call the command in this process: words -> (exit code, standard output, standard error)"
    from tokkit.cli import main
    def call(*words, **options):
        capsys.readouterr()
        try: code = main([str(w) for w in words])
        except SystemExit as e: code = e.code                       # argparse
        out = capsys.readouterr()
        return code, out.out, out.err
    return call


def says(error, call, *words):
    "`call` raises `error` with one line that has all the words"
    with pytest.raises(error) as e: call()
    told = str(e.value)
    assert '\n' not in told and all(str(w) in told for w in words), told


def start(*words, **env) -> subprocess.Popen:
    "The command in a process of its own"
    return subprocess.Popen([*SHELL, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True,
                            env=os.environ | dict(TOKKIT_QUIET='1', TOKKIT_DEVICE='cpu', OMP_NUM_THREADS='1')
                            | env)



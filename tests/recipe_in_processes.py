"""The paper's recipe in miniature, by the commands alone: shards, main-training, tokens of ten crops,
a generator, samples, their measure, post-training, a comparison. Two processes do it, and each command is
killed once and called again; one process does the same beside them. Called by test_recipe_in_processes.py;
by hand: python tests/recipe_in_processes.py FOLDER"""
import io, json, os, subprocess, sys, tarfile, time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from PIL import Image

TRAIN, TEST = 320, 64        # images


def pack(folder:Path):
    "Garments in tars, the class as the folder, two tars of training images and one of others"
    from tokkit.data import fashion_mnist, to_uint8
    folder.mkdir()
    sets = dict(train=fashion_mnist('train', TRAIN), test=fashion_mnist('test', TEST))
    half = TRAIN//2
    tars = {'train-0': ('train', range(half)), 'train-1': ('train', range(half, TRAIN)),
            'test-0': ('test', range(TEST))}
    for name, (part, rows) in tars.items():
        images = sets[part]
        with tarfile.open(folder/f'{name}.tar', 'w') as tar:
            for i in rows:
                x, y = images[i]
                picture = io.BytesIO()
                Image.fromarray(to_uint8(x)[0].numpy()).save(picture, 'png')
                member = tarfile.TarInfo(f'{int(y)}/{part}{i:04d}.png')
                member.size = picture.tell()
                tar.addfile(member, io.BytesIO(picture.getvalue()))


def settings(*words): return [part for word in words for part in ('--set', word)]

SHORT = settings('epochs=2', 'batch=16', 'precision=no')
OFFLINE = settings('perceptual_kind=efficientnet_lite2', 'discriminator=features')
# paper-main's shape, tiny, with the networks that need no download
MAIN = settings('init=none', 'tokenizer.width=88', 'tokenizer.depth=1', 'tokenizer.heads=2',
                'tokenizer.latents=16', 'tokenizer.patch=8', 'tokenizer.codebook_size=64',
                'tokenizer.code_dim=8', 'perturbation.beta=.5', 'perturbation.delta=20', 'images.n=96',
                "semantic_options={'teacher':'efficientnet_lite2'}")
RAR = settings('generator.width=32', 'generator.depth=1', 'generator.heads=2')

def commands(inputs:Path, out:Path) -> dict[str,list]:
    "Every command, its models from `inputs`"
    data = ['--data', inputs/'shards']
    tok = ['--tokenizer', inputs/'tok']
    gen = ['--generator', inputs/'gen']
    cards = inputs/'healed'/'cards'
    return {
        'tok': ['train', 'tokenizer', '--preset', 'paper-main', *data, '--size', 32, '--out', out/'tok',
                *MAIN, *SHORT, *OFFLINE],
        'tokens': ['encode', *tok, *data, '--views', 'ten-crop', '--out', out/'tokens'],
        'gen': ['train', 'generator', '--preset', 'paper-rar-b', *tok, '--tokens', inputs/'tokens',
                '--out', out/'gen', *RAR, *SHORT],
        'samples.npz': ['sample', *tok, *gen, '-n', 600, '--out', out/'samples.npz'],
        'cards.json': ['evaluate', inputs/'samples.npz', '--reference', inputs/'shards', '--json',
                       out/'cards.json'],
        'healed': ['posttrain', '--preset', 'paper-post', *tok, *gen, *data, '-n', 96, '--out', out/'healed',
                   *SHORT, *OFFLINE],
        'changes.txt': ['compare', cards/'before.json', cards/'healed.json']}

# what lies in the work folder when a command is in the middle; others are killed while they look at images
MIDDLE = {'tok': '**/checkpoint*', 'tokens': '**/part-*', 'gen': '**/checkpoint*', 'healed': '**/checkpoint*',
          'samples.npz': '**/part-*'}


def started(words, processes:int, log) -> subprocess.Popen:
    "A command in so many processes, in a session of its own"
    several = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', processes]
    line = [sys.executable, *(several if processes > 1 else []), '-m', 'tokkit', *words, '--device', 'cpu']
    if words[0] == 'compare': line = line[:-2]
    quiet = dict(os.environ, OMP_NUM_THREADS='1', TOKKIT_QUIET='1')
    return subprocess.Popen([str(w) for w in line], env=quiet, stdout=log, stderr=subprocess.STDOUT,
                            start_new_session=True)

def done(words, processes:int, log:Path):
    "A command to its end"
    with open(log, 'a') as f: code = started(words, processes, f).wait(timeout=300)
    if code: raise RuntimeError(f'{words[:2]} ended with {code}:\n{log.read_text()[-3000:]}')

def kill_all(launcher:int):
    "Kill a launcher and its workers, which have sessions of their own"
    for p in [psutil.Process(launcher), *psutil.Process(launcher).children(recursive=True)]:
        try: p.kill()
        except psutil.NoSuchProcess: pass

def killed(name:str, words, processes:int, out:Path, log:Path) -> bool:
    "A command that is killed in the middle, with all its processes; whether it was before its end"
    with open(log, 'a') as f: process = started(words, processes, f)
    begun = time.monotonic()
    while process.poll() is None:
        middle = [p for work in out.glob(f'.work-{name}-*') for p in work.glob(MIDDLE.get(name, '-'))]
        if middle or name not in MIDDLE and time.monotonic()-begun > 4: break
        time.sleep(.02)
    early = process.poll() is None
    if early: kill_all(process.pid)
    process.wait()
    return early


def play(home:Path) -> dict[str,bool]: # command -> whether the kill came before its end
    "Two processes in home/two, killed and called again; one process in home/one, with the models of two"
    two, one = home/'two', home/'one'
    for folder in (two, one): folder.mkdir(parents=True)
    pack(two/'shards')
    came = {}
    for name, words in commands(two, two).items():
        log = two/f'{name}.log'
        came[name] = killed(name, words, 2, two, log)
        if came[name] and (two/name).exists(): raise RuntimeError(f'{name} came too early')
        done(words, 2, log)
        done(commands(two, one)[name], 1, one/f'{name}.log')
    return came


def losses(folder:Path, name:str) -> pd.DataFrame:
    return pd.read_csv(folder/name/'history.csv')

# what a discriminator sees is augmented by draws of each process, and balanced by each, as released
GAME = ['loss', 'adversarial', 'discriminator']

def compare(home:Path) -> dict[str,dict[str,float]]: # training -> largest relative difference of its losses
    "Ids, samples and measured numbers are equal; how far losses of trainings are, but for the game and in it"
    two, one = home/'two', home/'one'
    for file in ('tokens.npy', 'labels.npy'):
        assert (two/'tokens'/file).read_bytes() == (one/'tokens'/file).read_bytes(), file
    a, b = (np.load(folder/'samples.npz') for folder in (two, one))
    assert all((a[key] == b[key]).all() for key in a.files) and a['arr_0'].shape == (600, 32, 32, 3)
    assert json.loads((two/'cards.json').read_text()) == json.loads((one/'cards.json').read_text())
    def changes(folder): return (folder/'changes.txt.log').read_text().strip().splitlines()
    assert changes(two)[-1] == changes(one)[-1]
    apart = {}
    for name in ('tok', 'gen', 'healed', 'healed/control'):
        first, second = losses(two, name), losses(one, name)
        assert list(first) == list(second) and len(first) == 2
        far = ((first-second).abs()/second.abs().clip(lower=1e-3)).max()
        game = far.index.isin(GAME) if 'adversarial' in far else np.zeros(len(far), bool)
        in_game = float(far[game].max()) if game.any() else 0.
        apart[name] = dict(rounding=float(far[~game].max()), game=in_game)
    return apart


if __name__ == '__main__':
    home = Path(sys.argv[1])
    print('killed before the end:', play(home))
    print('largest relative difference of losses:', compare(home))

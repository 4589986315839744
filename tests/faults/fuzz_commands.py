"""Thousands of mutated inputs of the command line, in one process: words, files and folders, none may end
in anything but one line

    python tests/faults/fuzz_commands.py 5000             # so many, seed 0
    python tests/faults/fuzz_commands.py 500 --seed 3

Whatever would take long (trainings, runs, JupyterLab, the site) is cut off after its checks; nothing
outside a temporary folder is written or deleted. Exit code 0 when every input ended with exit code 0, 1 or
2 and without a traceback.
"""
import argparse, contextlib, io, json, os, random, shutil, sys, tempfile, time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]
from conftest_faults import TINY, make_images

BASE = [ # words of commands that work; every path is relative to the folder of the case
    'run tiny.ipynb -p seed 2 -p alpha .5 --out runs --threads 1 --device cpu', 'run tiny.ipynb -p deltas '
                                                                                '4,8 -p name plain',
        'sweep tiny.ipynb -g seed=1,2 -g alpha=0,.5 -p name x --workers 2 --minutes 0 --out runs',
    'sweep s.yaml --minutes 0 --out runs', 'sweep s.yaml -g seed=4 --devices cpu --threads 1 --minutes 0',
        'results runs', 'results runs --csv out.csv', 'verify runs', 'clean runs', 'clean runs --all',
        'lab --port 8888 --no-browser', 'docs --out site',
    'demo --preset smoke --out runs -p delta 4 -p alpha .5', 'demo --preset smoke --generator masked -p '
                                                             'sigma .9 -p n 64 -p seed 3',
        'demo --preset smoke -p data images -p size 28 -p tokenizer tiny -p codebook_size 64',
    'metric rfid --tokenizer tokenizer --data images --bootstrap 0 -n 8', 'metric pfid --tokenizer tokenizer '
                                                                          '--data images --deltas 2,4 '
                                                                          '--alphas .5 --bootstrap 0 -n 8 '
                                                                          '--seed 1',
        'metric ifid --tokenizer tokenizer --data images -n 8 --top-k 3 --bootstrap 0',
    'metric rfid --tokenizer tokenizer --data images -n 8 --bootstrap 2 --json card.json --extractor '
    'efficientnet_lite0.b11@32',
        'metric rfid --tokenizer tokenizer --data images -n 8 --bootstrap 0 --reference stats.npz',
    'posttrain --tokenizer tokenizer --generator generator --data images --out healed -n 16 --sigma .9,.5 '
    '--epochs 1', 'posttrain --tokenizer tokenizer --generator generator --data images --out healed --mode '
                  'unpaired --distribution 1 --lora 2',
    '--device cpu metric rfid --tokenizer tokenizer --data images -n 8 --bootstrap 0', '--help',
        'metric --help', '--version']
ODD = ['', ' ', '-', '--', '-1', '0', '1e400', 'nan', 'inf', '-inf', 'None', 'true', '[]', '[1', '{}',
       '{[1]: 2}', '(', '1,', ',', '9'*400, 'x'*5000, 'ä', '\0', '\n', '{a}', '%s', '../x', '~nobody', '.',
       'images', 'runs', 'tokenizer', 's.yaml',
       'tiny.ipynb', 'pipe', '--out', '--data', '-p', '-g', '-n', '--seed', '1.5', '2**31', str(2**63), '-'
       +str(2**70), 'seed', 'seed=1', 'seed=', '=', 'cpu', 'cuda:0', 'cuda:-1', 'cpu:99', 'rfid', 'demo',
       '!!python/none']
FILES = ['tokenizer/config.json', 'tokenizer/model.safetensors', 'generator/config.json',
         'generator/model.safetensors', 's.yaml', 'tiny.ipynb', 'stats.npz', 'images/class0/000.png',
         'runs/tiny/{run}/metrics.json', 'runs/tiny/{run}/params.json',
         'runs/tiny/{run}/.tokkit', 'runs/tiny/{run}/timing.json']
READERS = {'tokenizer': [15, 16, 17, 18, 19, 20, 21], 'generator': [20, 21], 's.yaml': [3, 4],
           'tiny.ipynb': [0, 1, 2, 3], 'stats.npz': [19], 'images': [14, 15, 20], 'runs': [5, 6, 7, 9, 0]}


def home(folder:Path) -> Path:
    "A folder with one of everything"
    import torch
    from tokkit.generators import ARCfg, ARGenerator
    from tokkit.data import load_images
    from tokkit.features import default_extractor, extract
    from tokkit.generators import save_generator
    from tokkit.features import FeatureStats
    from tokkit.metrics import save_stats
    from tokkit.runs import run_experiment
    from tokkit.tokenizers import make_tokenizer
    make_images(folder/'images', 64)
    shutil.copy(TINY, folder/'tiny.ipynb')
    tok = make_tokenizer('tiny', channels=3, width=16, depth=1, codebook_size=32)
    tok.save(folder/'tokenizer')
    torch.manual_seed(0)
    save_generator(ARGenerator(ARCfg(tok.spec.shape[0], 32, 2, 32, 1)), folder/'generator')
    (folder/'s.yaml').write_text('notebook: tiny.ipynb\ngrid: {seed: [1, 2], alpha: [0, .5]}\nparams: {name: '
                                 'x}\nworkers: 2\ndevices: [cpu]\nminutes: 5\n')
    judge = default_extractor(28)
    save_stats(folder/'stats.npz',
               FeatureStats.from_features(extract(judge, load_images(folder/'images', size=28), 'cpu'),
                                          judge.name))
    run_experiment(folder/'tiny.ipynb', {}, folder/'runs', 'cpu')
    os.mkfifo(folder/'pipe')
    return folder


def cut_short(folder:Path):
    "Nothing is trained, executed or opened, and nothing outside `folder` is deleted"
    import tokkit.cli.commands, tokkit.cli.posttraining, tokkit.core, tokkit.demo, tokkit.runs.execute
    class Enough(OSError): "The checks are over"
    def enough(*args, **kwargs): raise Enough('cut off after the checks')
    def stages(cfg, *args, **kwargs):
        tokkit.demo.Demo(cfg, folder/'runs', 'cpu').images
        enough()
    delete = tokkit.core.delete
    def inside(path):
        return delete(path) if Path(path).resolve().is_relative_to(folder.resolve()) else enough()
    tokkit.demo.run_stages = stages
    tokkit.cli.posttraining._train_decoder = enough
    tokkit.runs.execute._execute = enough
    tokkit.core.delete = inside
    tokkit.cli.commands.os.execv = tokkit.cli.commands.subprocess.run = enough


def odd_word(rng, word:str) -> str:
    "A word that is a little or entirely different"
    how = rng.randrange(6)
    if how < 3: return rng.choice(ODD)
    if how == 3 and word:
        i = rng.randrange(len(word))
        return word[:i]+rng.choice('0-.,=[]{}()x%*\'"é ')+word[i+1:]
    if how == 4: return word*2
    return word[:rng.randrange(len(word)+1)]

def odd_words(rng, words:list[str]) -> list[str]:
    "Some words changed, dropped, doubled or exchanged; none leads out of the folder"
    words = list(words)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not words: break
        i = rng.randrange(len(words))
        how = rng.randrange(5)
        if how < 2: words[i] = odd_word(rng, words[i])
        elif how == 2: del words[i]
        elif how == 3: words.insert(i, odd_word(rng, words[i]))
        else:
            j = rng.randrange(len(words))
            words[i], words[j] = words[j], words[i]
    return [w.lstrip('/') for w in words]

def odd_bytes(rng, content:bytes, name:str) -> bytes:
    "A file that is a little or entirely different; of JSON and YAML also one value"
    how = rng.randrange(7)
    if how == 0: return content[:rng.randrange(len(content)+1)]
    if how == 1 and content:
        b = bytearray(content)
        b[rng.randrange(len(b))] ^= 1 << rng.randrange(8)
        return bytes(b)
    if how == 2:
        return rng.choice((b'', b'null', b'[]', b'5', b'{}', b'"x"', b'\0'*9, b'['*9999, rng.randbytes(50)))
    if how == 3:
        i = rng.randrange(len(content)+1)
        return (content[:i]+rng.choice((b'"', b'{', b']', b'1e999', b'NaN', b'\xff', b'*a', b'  ', b'\n'))
                +content[i:])
    try: o = json.loads(content)
    except ValueError:
        text = content.decode('utf-8', 'replace')
        return (text.replace(rng.choice(text.split() or ['']), rng.choice(ODD), 1).encode('utf-8', 'replace')
                if name.endswith('yaml') else content[::-1])
    inner = o
    while isinstance(inner, (dict, list)) and inner:
        key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        if rng.random() < .4 or not isinstance(inner[key], (dict, list)) or not inner[key]:
            inner[key] = rng.choice((None, [], {}, -1, 0, 1, 2.5, 1e18, 'x', True, [[1]], {'a': 1},
                                     float('nan'), 10**30))
            break
        inner = inner[key]
    return json.dumps(o).encode()


def call(words:list[str]) -> tuple[int|str,str]:
    "Exit code, or what escaped; and what was said"
    from tokkit.cli import main
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: code = main(words)
        except SystemExit as e: code = e.code if e.code is not None else 0
        except BaseException as e: code = f'{type(e).__name__}: {e}'
    return code, err.getvalue()


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('n', type=int)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--verbose', action='store_true')
    args = parser.parse_args(argv)
    os.environ |= dict(TOKKIT_QUIET='1', TOKKIT_DEVICE='cpu')
    os.environ.pop('TOKKIT_RUNS', None)
    rng = random.Random(args.seed)
    codes = Counter()
    bad = []
    start = time.time()
    with tempfile.TemporaryDirectory() as d:
        whole = home(Path(d)/'whole')
        case = Path(d)/'case'
        case.mkdir()
        run = next(p.name for p in (whole/'runs'/'tiny').iterdir() if not p.name.startswith('.'))
        cut_short(Path(d))
        os.environ['TOKKIT_DATA'] = f'{d}/data'
        for i in range(args.n):
            for p in case.iterdir(): shutil.rmtree(p) if p.is_dir() and not p.is_symlink() else p.unlink()
            shutil.copytree(whole, case, dirs_exist_ok=True, ignore=shutil.ignore_patterns('pipe'))
            os.mkfifo(case/'pipe')
            os.chdir(case)
            if rng.random() < .5:
                changed = ''
                words = odd_words(rng, rng.choice(BASE).split(' '))
            else:
                changed = rng.choice(FILES).format(run=run)
                words = BASE[rng.choice(READERS[changed.split('/')[0]])].split(' ')
                Path(changed).write_bytes(odd_bytes(rng, Path(changed).read_bytes(), changed))
            if 'clean' in words and '--yes' in words: words.remove('--yes')
            began = time.time()
            code, said = call(words)
            took = time.time()-began
            codes[str(code)] += 1
            if code not in (0, 1, 2, 130) or 'Traceback' in said or took > 30:
                bad.append((i, words, changed, code, said[-300:], round(took, 1)))
            if args.verbose: print(i, code, words, changed, said.strip()[-150:], f'{took:.2f}', sep=' | ')
        os.chdir(whole)
    for b in bad: print('BAD', *b, sep=' | ')
    print(f'{args.n} inputs, seed {args.seed}: {len(bad)} bad; exit codes {dict(codes)}; '
          f'{time.time()-start:.0f} s')
    return int(bool(bad))

if __name__ == '__main__': sys.exit(main())

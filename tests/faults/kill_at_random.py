"""Kill `tokkit demo`, `tokkit sweep` and `tokkit posttrain` with SIGKILL at random moments, call them
again, and compare with uninterrupted calls

    python tests/faults/kill_at_random.py 20             # so many kills, shared out among the three, seed 0
    python tests/faults/kill_at_random.py 3 --seed 5 --only sweep

Exit code 0 when after every kill the second call gave the same bytes (demo, post-training) or rows (sweep),
and nothing temporary was left.
"""
import argparse, os, random, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]
from conftest_faults import SHELL, TINY, make_images

SMALL = [w for k,v in dict(train_images=300, n=100, n_pfid=100, pairs=150, bootstrap=4).items()
         for w in ('-p', k, str(v))]


def models(folder:Path) -> Path:
    "Images, a tokenizer of them and a generator of its tokens"
    import torch
    from tokkit.generators import ARCfg, ARGenerator
    from tokkit.generators import save_generator
    from tokkit.tokenizers import make_tokenizer
    make_images(folder/'images', 64)
    tok = make_tokenizer('tiny', channels=3, width=32, depth=1, codebook_size=32)
    tok.save(folder/'tokenizer')
    torch.manual_seed(0)
    save_generator(ARGenerator(ARCfg(tok.spec.shape[0], 32, 2, 32, 1)), folder/'generator')
    return folder


def words(command:str, own:Path, out:Path) -> list[str]:
    "A command that writes below `out`"
    if command == 'demo': return ['demo', '--preset', 'smoke', '--out', str(out), *SMALL]
    if command == 'sweep':
        return ['sweep', str(TINY), '-g', 'seed=1,2', '-g', 'alpha=0,.5', '--workers', '2', '--out', str(out)]
    return ['posttrain', '--tokenizer', f'{own}/tokenizer', '--generator', f'{own}/generator', '--data',
            f'{own}/images', '--out', f'{out}/healed', '--epochs', '20', '--sigma', '.9,.5']


def start(command:str, own:Path, out:Path) -> subprocess.Popen:
    env = (os.environ
           | dict(OMP_NUM_THREADS='1', TOKKIT_DEVICE='cpu', TOKKIT_QUIET='1', TOKKIT_DATA=str(own/'data')))
    return subprocess.Popen([*SHELL, *words(command, own, out)], env=env, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def result(command:str, out:Path):
    "What the command computed, in a form that can be compared"
    if command == 'demo': return (out/'demo'/'metrics.json').read_bytes()
    if command == 'posttrain':
        return (out/'healed'/'model.safetensors').read_bytes(), (out/'healed'/'history.csv').read_text()
    from tokkit.runs import collect
    table = collect(out)
    return table[['run_id', 'metric', 'value', 'seed', 'alpha']].to_csv(index=False)


def kill_once(command:str, own:Path, out:Path, after:float) -> bool:
    "Kill a fresh call after so many seconds, finish with a second one; whether it was still at work"
    child = start(command, own, out)
    try:
        child.wait(after)
        return False
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
        child.wait()
    finally: child.stderr.close()
    # it had finished and was about to end
    if command == 'posttrain' and (out/'healed').exists(): return False
    again = start(command, own, out)
    told = again.communicate(timeout=600)[1]
    if again.returncode:
        raise SystemExit(f'tokkit {command}, called again after a kill, ended with '
                         f'{again.returncode}:\n{told[-2000:]}')
    return True


def check(folder:Path, commands:list[str], kills:int, seed:int, say=print) -> list[str]:
    "So many kills of the commands in turn; what was not as in uninterrupted calls"
    own = models(folder/'own')
    rng = random.Random(seed)
    wrong = []
    whole = {}
    took = {}
    for command in dict.fromkeys(commands):
        began = time.time()
        child = start(command, own, folder/f'whole-{command}')
        told = child.communicate(timeout=600)[1]
        if child.returncode:
            raise SystemExit(f'tokkit {command} ended with {child.returncode}:\n{told[-2000:]}')
        took[command], whole[command] = time.time()-began, result(command, folder/f'whole-{command}')
    for i in range(kills):
        command = commands[i%len(commands)]
        out = folder/f'killed-{i}'
        after = rng.uniform(.05, .95)*took[command]
        while not kill_once(command, own, out, after):  # the machine was quicker now
            shutil.rmtree(out)
            after /= 2
        if result(command, out) != whole[command]:
            wrong.append(f'kill {i} of {command} after {after:.2f} s: other values')
        wrong += [f'kill {i} of {command}: left over: {p.relative_to(out)}' for p in out.rglob('.*')
                  if p.name != '.tokkit']
        say(f'kill {i}: {command}, after {after:.2f} of {took[command]:.2f} s')
        shutil.rmtree(out)
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('kills', type=int)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', choices=['demo', 'sweep', 'posttrain'])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as d:
        wrong = check(Path(d), [args.only] if args.only else ['demo', 'sweep', 'posttrain'], args.kills,
                      args.seed)
    print(*wrong, f'{args.kills} kills, seed {args.seed}: {len(wrong)} differences', sep='\n')
    return int(bool(wrong))

if __name__ == '__main__': sys.exit(main())

"""Kill `tokkit demo` with SIGKILL in one or in every stage, call it again, and compare with an
uninterrupted run

    python tests/kill_demo.py --list                   # the stages of a run
    python tests/kill_demo.py                          # kill it once in every stage of one chain of calls
    python tests/kill_demo.py --seed 3                 # in one stage, drawn by the seed
    # in this one; after -- options of `tokkit demo`
    python tests/kill_demo.py --stage 'generator of plain' -- -p n 100

Each stage is killed after a part of the time it took in the uninterrupted run. At the end metrics.json must
have the same bytes, no artifact may have been made from other numbers, and nothing temporary may be left.
Exit code 0 when all of that holds.
"""
import argparse, os, random, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path
from queue import Empty, Queue
from threading import Thread

COMMAND = [sys.executable, '-c', 'import sys; from tokkit.cli import main; sys.exit(main())', 'demo',
           '--preset', 'smoke']
STAGE = re.compile(r'\[\s*\d+/\d+\] (.+)|(the report)$')


def demo(out:Path, options:list[str], kill:str|None = None, after:float = 0.) -> tuple[int, dict[str,float]]:
    """Call the demo; with `kill`, end it `after` seconds into that stage.
    Returns the exit code and the seconds of each stage"""
    env = (os.environ
           | dict(OMP_NUM_THREADS=os.environ.get('OMP_NUM_THREADS', '1'), TOKKIT_DEVICE='cpu',
                  TOKKIT_QUIET='1'))
    process = subprocess.Popen([*COMMAND, '--out', str(out), *options], stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, text=True, env=env)
    lines = Queue()
    started = {}
    tail = []
    Thread(target=lambda: [lines.put((time.monotonic(), line)) for line in process.stderr]
           +[lines.put((0, None))], daemon=True).start()
    while True:
        end = started[kill]+after if kill in started else None
        try: at, line = lines.get(timeout=None if end is None else max(0, end-time.monotonic()))
        except Empty:
            process.kill()
            break
        if line is None: break
        tail = [*tail, line.rstrip()][-5:]
        if found := STAGE.search(line.strip()): started[found[1] or found[2]] = at
    code = process.wait()
    names = list(started)
    times = [*started.values(), time.monotonic()]
    if code not in (0, -9): raise SystemExit('tokkit demo failed:\n'+'\n'.join(tail))
    return code, {name:times[i+1]-times[i] for i,name in enumerate(names)}


def differences(whole:Path, killed:Path) -> list[str]:
    "What is not as in the uninterrupted run"
    wrong = ([] if (whole/'demo'/'metrics.json').read_bytes() == (killed/'demo'/'metrics.json').read_bytes()
             else ['metrics.json has other bytes'])
    made = [sorted(str(p.relative_to(root)) for p in root.glob('*/*') if p.is_dir())
            for root in (whole, killed)]
    wrong += [f'only in one of them: {name}' for name in sorted(set(made[0]) ^ set(made[1]))]
    wrong += [f'other weights: {p.relative_to(whole)}' for p in whole.rglob('*.safetensors')
              if (q := killed/p.relative_to(whole)).exists() and p.read_bytes() != q.read_bytes()]
    return wrong + [f'left over: {p.relative_to(killed)}' for p in killed.rglob('.*') if p.name != '.tokkit']


def check(folder:Path, stages:list[str]|None = None, seed:int|None = None, options:list[str] = (),
          say=print) -> list[str]:
    "Kill the demo in `stages` (None: in all; one drawn when a seed is given) and return the differences"
    _, took = demo(folder/'whole', options)
    draw = random.Random(seed)
    names = stages or ([draw.choice(list(took))] if seed is not None else list(took))
    if unknown := set(names)-set(took):
        raise SystemExit(f"no stage {sorted(unknown)[0]!r}; there are: {', '.join(took)}")
    for name in names:
        after = took[name]*draw.uniform(.1, .6)
        # the machine was quicker now: the last stage was over
        while demo(folder/'killed', options, name, after)[0] == 0:
            after /= 3
            for p in ('demo', 'e00_demo'): shutil.rmtree(folder/'killed'/p)
        say(f"{name}: killed after {after:.2f} of {took[name]:.2f} s")
    demo(folder/'killed', options)
    return differences(folder/'whole', folder/'killed')


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--stage', action='append', help='a stage by name; may be repeated')
    parser.add_argument('--seed', type=int, help='draw one stage')
    parser.add_argument('--list', action='store_true', help='only list the stages')
    parser.add_argument('options', nargs='*', help='options of tokkit demo, after --')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as d:
        if args.list:
            print(*demo(Path(d), args.options)[1], sep='\n')
            return 0
        wrong = check(Path(d), args.stage, args.seed, args.options, lambda line: print(line, flush=True))
    print(*(wrong or ['the same bytes as an uninterrupted run']), sep='\n')
    return int(bool(wrong))


if __name__ == '__main__': sys.exit(main())

"""Does this checkout give the same numbers as another commit? `python tools/same_values.py COMMIT`

Runs `tokkit demo --preset smoke` and `tokkit run e02_dose_response -p preset smoke` from both, on the CPU
with one thread, and compares every value bit for bit. What names a run (ids, commits, paths) may differ.
Exit code 0 when all values are equal.
"""
import argparse, json, os, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    'demo': ['demo', '--preset', 'smoke'],
    'e02_dose_response': ['run', 'e02_dose_response', '-p', 'preset', 'smoke'],
}
NAMES = 'run_id', 'commit', 'experiment'       # columns that say where a value comes from


def unpack(commit:str, folder:Path) -> Path:
    "The files of a commit, without its history"
    folder.mkdir()
    archive = subprocess.run(['git', '-C', ROOT, 'archive', commit], check=True, capture_output=True).stdout
    subprocess.run(['tar', 'x', '-C', folder], input=archive, check=True)
    return folder


def tokkit(checkout:Path, out:Path, words:list[str]):
    "A command of a checkout, in a process of its own"
    env = dict(os.environ, PYTHONPATH=str(checkout), OMP_NUM_THREADS='1', MKL_NUM_THREADS='1',
               TOKKIT_DEVICE='cpu', TOKKIT_QUIET='1')
    code = 'import sys; from tokkit.cli import main; sys.exit(main())'
    command = [sys.executable, '-c', code, *words, '--out', out]
    done = subprocess.run(command, env=env, cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"tokkit {' '.join(words)} in {checkout} ended with "
                 f"{done.returncode}:\n{done.stderr[-3000:]}")


def values(out:Path) -> dict[str, list[dict]]:
    "Experiment -> its rows, without what only names them"
    found = {}
    for path in sorted(out.glob('e0*/*/metrics.json')):
        rows = json.loads(path.read_text(encoding='utf-8'))['rows']
        found[path.parent.parent.name] = [{k: v for k, v in row.items() if k not in NAMES} for row in rows]
    return found


def differences(before:dict[str, list[dict]], now:dict[str, list[dict]]) -> list[str]:
    "What is not equal, a line each"
    found = []
    for name in sorted(before.keys() | now.keys()):
        old = before.get(name, [])
        new = now.get(name, [])
        if len(old) != len(new): found.append(f'{name}: {len(old)} rows before, {len(new)} now')
        for i, (a, b) in enumerate(zip(old, new)):
            if a != b: found.append(f'{name}, row {i}: {a} became {b}')
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('commit', help='what to compare HEAD with')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name, commit in dict(before=args.commit, now='HEAD').items():
            checkout = unpack(commit, Path(folder)/name)
            out = Path(folder)/f'{name}-runs'
            for words in COMMANDS.values(): tokkit(checkout, out, words)
            found[name] = values(out)
    differ = differences(found['before'], found['now'])
    for line in differ: print(line)
    rows = sum(map(len, found['now'].values()))
    print(f"{rows} rows of {', '.join(sorted(found['now']))}: {len(differ)} differ from {args.commit}")
    return int(bool(differ) or not rows)


if __name__ == '__main__': sys.exit(main())

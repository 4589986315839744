"""Flip random single bits in all that a smoke demo made, call the demo again, and see that every flip was
noticed or changed nothing

    tokkit demo --preset smoke --out FOLDER
    python tests/faults/flip_bits.py FOLDER 200          # so many flips, seed 0; the folder is copied first

After each flip the demo, the table of results and the comparison with checksums are called. A flip counts
as noticed when one of them says so; a file that nobody reads must be as before after the call. Exit code 0
when no flip changed a number in silence.
"""
import argparse, contextlib, io, os, random, shutil, sys, tempfile, time
from collections import Counter
from pathlib import Path


def call(*words) -> tuple[int,str,str]:
    from tokkit.cli import main
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(w) for w in words])
    return code, out.getvalue(), err.getvalue()


def numbers(said:str, root:Path) -> str: return said.replace(str(root), 'ROOT')


def results(root:Path) -> str:
    "The numbers of all finished runs; not by which commit they were computed"
    from tokkit.runs import collect
    return collect(root)[['run_id', 'metric', 'value', 'se', 'n']].to_csv(index=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('flips', type=int)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    os.environ |= dict(TOKKIT_QUIET='1', TOKKIT_DEVICE='cpu')
    rng = random.Random(args.seed)
    what = Counter()
    bad = []
    start = time.time()
    with tempfile.TemporaryDirectory() as d:
        root = Path(d)/'runs'
        shutil.copytree(args.folder, root)
        demo = 'demo', '--preset', 'smoke', '--out', root
        code, table, _ = call(*demo)
        table_of_runs = results(root)
        metrics = (root/'demo'/'metrics.json').read_bytes()
        assert code == 0
        for i in range(args.flips):
            kind = rng.choice(sorted(p for p in root.iterdir() if p.is_dir()))
            path = rng.choice(sorted(p for p in kind.rglob('*') if p.is_file() and p.stat().st_size))
            before = path.read_bytes()
            bits = bytearray(before)
            at = rng.randrange(len(bits))
            bits[at] ^= 1 << rng.randrange(8)
            path.write_bytes(bits)
            name = path.relative_to(root).as_posix()
            found = call('verify', root)[0] == 1
            left_out = 'damaged' in call('results', root)[2]
            code, said, err = call(*demo)
            same = (code == 0 and numbers(said, root) == numbers(table, root)
                    and (root/'demo'/'metrics.json').read_bytes() == metrics
                    and results(root) == table_of_runs)
            noticed = 'is damaged' in err
            for p in root.rglob('*.damaged'): shutil.rmtree(p) if p.is_dir() else p.unlink()
            # made again, or written anew by the same command
            harmless = path.read_bytes() == before
            how = ('noticed and made again' if noticed else 'written anew' if harmless
                   and kind.name == 'demo' else 'unnoticed')
            what[f'{how} ({kind.name})'] += 1
            if not same or how == 'unnoticed' or (kind.name != 'demo' and not found) or call('verify',
                                                                                             root)[0]:
                bad.append((i, name, at, how, same, found, left_out, code, err[-300:]))
            if not same or path.read_bytes() != before and path.suffix == '.safetensors':
                path.write_bytes(before)
            print(i, name, how, 'same numbers' if same else 'OTHER NUMBERS', f'{time.time()-start:.0f} s',
                  flush=True)
    for b in bad: print('BAD', *b, sep=' | ')
    print(f'{args.flips} flips, seed {args.seed}: {len(bad)} bad; {dict(what)}; {time.time()-start:.0f} s')
    return int(bool(bad))

if __name__ == '__main__': sys.exit(main())

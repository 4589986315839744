"""How much memory `tokkit encode` takes for 5,000 and for 50,000 images of a folder, repeated through shards:
python tools/encode_memory.py TOKENIZER FOLDER"""
import os, re, shutil, statistics, subprocess, sys, tarfile, tempfile
from pathlib import Path

RUNS = 3
# the system's allocator keeps up to 64 MB that were freed, or not, as it happens; with these it does not
STEADY = dict(MALLOC_MMAP_THRESHOLD_=str(2**20), MALLOC_TRIM_THRESHOLD_=str(2**21))
CHILD = """
import sys
from pathlib import Path
from tokkit.cli import main
assert main(sys.argv[1:]) == 0
print(Path('/proc/self/status').read_text())
"""


def pack(folder:Path, home:Path, tars:int = 5, images:int = 1000):
    "Pack the first images of a folder into tars, and give each tar ten names"
    files = sorted(p for p in folder.rglob('*') if p.suffix in ('.png', '.jpg'))[:tars*images]
    if len(files) < tars*images: raise SystemExit(f'{folder} has {len(files)} images of {tars*images}')
    for i in range(tars):
        with tarfile.open(home/f'packed-{i}.tar', 'w') as tar:
            for file in files[i::tars]: tar.add(file, f'{file.parent.name}/{file.name}')
    for i in range(10*tars): (home/f'train-{i:02d}.tar').symlink_to(home/f'packed-{i%tars}.tar')


def peak(tokenizer:Path, home:Path, last:int) -> float:
    "The largest memory of the process that encoded the shards 00 to `last`, in MB"
    out = home/'tokens'
    words = ['--device', 'cpu', 'encode', '--tokenizer', tokenizer, '--out', out, '--data',
             f'shards:{home}/train-{{00..{last:02d}}}.tar']
    done = subprocess.run([sys.executable, '-c', CHILD, *map(str, words)], check=True, capture_output=True,
                          text=True, env=os.environ|STEADY)
    shutil.rmtree(out)
    return int(re.search(r'VmHWM:\s+(\d+) kB', done.stdout)[1])/1000


if __name__ == '__main__':
    tokenizer, folder = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as home:
        pack(folder.resolve(), Path(home))
        for last in (4, 49):
            found = [peak(tokenizer.resolve(), Path(home), last) for _ in range(RUNS)]
            spread = f'{min(found):.0f} to {max(found):.0f}'
            print(f'{1000*(last+1):6,} images: {statistics.median(found):.0f} MB ({spread})')

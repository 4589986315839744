"""Notebooks are clean and tokkit/ is what they export:
cleaning and exporting a copy of the checkout changes nothing"""
import shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ('nbs', 'tokkit', 'settings.ini', 'setup.py', 'pyproject.toml')
SKIP = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '_proc', '_docs', '.*.tmp',
                              '.*.tokkit-tmp')


def contents(folder:Path) -> dict[str,bytes]:
    "Every file below a folder, by name"
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()
            and '__pycache__' not in p.parts}


def test_clean_and_export_change_nothing(tmp_path):
    for part in PARTS:
        if (ROOT/part).is_dir(): shutil.copytree(ROOT/part, tmp_path/part, ignore=SKIP)
        else: shutil.copy(ROOT/part, tmp_path/part)
    before = contents(tmp_path)
    code = ("from nbdev.clean import nbdev_clean; from nbdev.doclinks import nbdev_export; "
            "nbdev_clean.__wrapped__(); nbdev_export.__wrapped__()")
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True,
                          timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    after = contents(tmp_path)
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    assert not changed, (f"`nbdev_clean; nbdev_export` would change {changed}: run both and commit what they "
                         "change")

"What is installed: the distribution's name, its files, its types"
import shutil, subprocess, sys, zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    "The wheel, built from a copy, so that the checkout stays clean"
    copy = tmp_path_factory.mktemp('source')
    for name in ('settings.ini', 'setup.py', 'README.md'): shutil.copy(ROOT/name, copy)
    shutil.copytree(ROOT/'tokkit', copy/'tokkit', ignore=shutil.ignore_patterns('__pycache__'))
    command = [sys.executable, '-m', 'pip', 'wheel', '--disable-pip-version-check', '--no-deps',
               '--no-build-isolation', '-w', copy/'wheels', copy]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    return zipfile.ZipFile(next((copy/'wheels').glob('*.whl')))


def read(wheel:zipfile.ZipFile, name:str) -> str:
    return wheel.read(next(n for n in wheel.namelist() if n.endswith(f'.dist-info/{name}'))).decode()


def test_name(wheel):
    "`tokkit` belongs to somebody else on the package index; the import name stays"
    assert 'Name: tokkit-lab\n' in read(wheel, 'METADATA')
    assert read(wheel, 'top_level.txt').split() == ['tokkit']


def test_entry_points(wheel):
    points = read(wheel, 'entry_points.txt')
    assert 'tokkit = tokkit.cli:main' in points and 'tokkit = tokkit._modidx:d' in points


def test_files(wheel):
    "Every module, and the mark that the package carries types"
    there = set(wheel.namelist())
    assert 'tokkit/py.typed' in there
    assert not {p.relative_to(ROOT).as_posix() for p in (ROOT/'tokkit').rglob('*.py')}-there

"How lines are written: ruff's rules of pyproject.toml, and what ruff has no rule for"
import ast, json, re, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(p for p in (ROOT/'tokkit').rglob('*.py') if p.name not in ('__init__.py', '_modidx.py'))


def test_ruff_is_content():
    command = [sys.executable, '-m', 'ruff', 'check', '--output-format', 'concise', '.']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:]+done.stderr[-500:]


def statements(path:Path) -> list[ast.stmt]:
    tree = ast.parse(path.read_text(encoding='utf-8'))
    return [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]


def test_tuples_are_not_assigned_to_tuples():
    "`a,b = x,y` is two statements, unless both sides share names (a swap); at most three lines in a thousand"
    lines, found = 0, []
    for path in MODULES:
        lines += len(path.read_text(encoding='utf-8').splitlines())
        for node in statements(path):
            pairs = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
            if pairs and isinstance(node.value, ast.Tuple): found.append(f'{path.name}:{node.lineno}')
    assert len(found) <= .003*lines, found


@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.relative_to(ROOT/'tokkit').as_posix())
def test_functions_are_short(path):
    "At most 45 lines with the signature"
    long = [f'{node.name} ({node.end_lineno-node.lineno+1})' for node in statements(path)
            if isinstance(node, ast.FunctionDef) and node.end_lineno-node.lineno+1 > 45]
    assert not long, f"{path.name}: {', '.join(long)}: which ideas are in them?"


def test_export_cells_are_small():
    "Nine of ten have at most 35 lines"
    lengths = []
    for path in (ROOT/'nbs').rglob('*.ipynb'):
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            source = ''.join(cell['source'])
            if re.search(r'^#\|\s*exports?\b', source, re.M): lengths.append(len(source.splitlines())-1)
    lengths.sort()
    ninth = lengths[int(.9*len(lengths))]
    assert ninth <= 35, f"{ninth} lines; the longest {lengths[-5:]}"

"""The house: folders import downwards, a module imports smaller numbers of its own folder,
and nbs/ mirrors tokkit/"""
import ast, re
from functools import cache
from pathlib import Path

import pytest
from test_site import builder

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
PACKAGE = ROOT/'tokkit'
HOUSE = list(builder().HOUSE)        # from the ground up


def pages() -> dict[str, str]:
    """Module -> the notebook that it is exported from, below nbs/;
    as `metrics.card` -> `metrics/05_card.ipynb`"""
    found = {}
    for p in sorted(NBS.rglob('*.ipynb')):
        exported = re.search(r'#\| default_exp ([\w.]+)', p.read_text(encoding='utf-8'))
        if exported: found[exported[1]] = p.relative_to(NBS).as_posix()
    return found

PAGES = pages()


def file_of(module:str) -> Path: return PACKAGE/(module.replace('.', '/')+'.py')
def is_docstring(node:ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
def floor(module:str) -> int: return HOUSE.index(module.split('.')[0])
def number(module:str) -> str: return PAGES[module].split('/')[-1][:2]


@cache
def imported(module:str) -> set[str]:
    "What a module imports of tokkit, anywhere in it: modules, or whole folders"
    found = set()
    package = ['tokkit', *module.split('.')[:-1]]
    for node in ast.walk(ast.parse(file_of(module).read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom):
            above = package[:len(package)-node.level+1] if node.level else []
            name = '.'.join([*above, *filter(None, [node.module])])
            found |= {f'{name}.{a.name}' for a in node.names} if name == 'tokkit' else {name}
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
    names = {name.removeprefix('tokkit.') for name in found if name.startswith('tokkit.')}
    return {name for name in names if name.split('.')[0] in HOUSE}


@pytest.mark.parametrize('module', PAGES)
def test_arrows_point_down(module):
    """Other folders: only lower ones. The own folder: only modules with a smaller number,
    and never the folder itself"""
    folder = module.split('.')[0]
    for other in imported(module):
        if other.split('.')[0] != folder:
            assert floor(other) < floor(module), (f"{module} imports {other}, which lies above it; from the "
                                                  f"ground up: {', '.join(HOUSE)}")
        else:
            assert other in PAGES, f"{module} imports its own folder {other}: name the module"
            assert number(other) < number(module), (f"{module} ({number(module)}) imports {other} "
                                                    f"({number(other)}) of the same folder")


@pytest.mark.parametrize('module', PAGES)
def test_notebook_mirrors_module(module):
    "nbs/metrics/05_card.ipynb exports tokkit/metrics/card.py"
    assert re.sub(r'(^|/)\d\d_', r'\1', PAGES[module]) == module.replace('.', '/')+'.ipynb'
    assert file_of(module).is_file()


@pytest.mark.parametrize('module', PAGES)
def test_one_idea(module):
    "Statements, not lines: nobody gains by packing; docstrings are no statements"
    nodes = ast.walk(ast.parse(file_of(module).read_text(encoding='utf-8')))
    count = sum(isinstance(node, ast.stmt) and not is_docstring(node) for node in nodes)
    assert count <= 220, f"{module} has {count} statements (limit 220): which two ideas are in it?"


@pytest.mark.parametrize('folder', [name for name in HOUSE if (PACKAGE/name).is_dir()])
def test_folders(folder):
    "Each offers the public names of all its modules, in their order; no two modules share a name"
    modules = [m for m in PAGES if m.startswith(folder+'.')]
    assert len(modules) <= 12, f"{folder} holds {len(modules)} modules (limit 12)"
    offered = re.findall(r'^from \.(\w+) import \*$',
                         (PACKAGE/folder/'__init__.py').read_text(encoding='utf-8'), re.M)
    assert [f'{folder}.{m}' for m in offered] == modules
    seen = {}
    for module in modules:
        for name in public_names(module):
            assert name not in seen, f"{module} and {seen[name]} both offer {name}"
            seen[name] = module


def public_names(module:str) -> list[str]:
    for node in ast.parse(file_of(module).read_text(encoding='utf-8')).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__':
            return ast.literal_eval(node.value)
    return []


def test_every_module_has_a_notebook():
    there = {p.relative_to(PACKAGE).with_suffix('').as_posix().replace('/', '.')
             for p in PACKAGE.rglob('*.py')
             if p.name not in ('__init__.py', '_modidx.py', '__main__.py')}
    assert there == set(PAGES), ("in tokkit/ but from no notebook, or the other way round: "
                                 f"{sorted(there ^ set(PAGES))}")


def test_every_folder_is_in_the_house():
    there = ({p.name for p in PACKAGE.iterdir() if (p/'__init__.py').is_file()}
             | {m for m in PAGES if '.' not in m})
    assert there == set(HOUSE)


def test_numbers_are_unique():
    for folder in HOUSE:
        numbers = [p.name[:2] for p in sorted((NBS/folder).glob('[0-9][0-9]_*.ipynb'))]
        assert len(numbers) == len(set(numbers)), f"two notebooks of nbs/{folder} share a number"

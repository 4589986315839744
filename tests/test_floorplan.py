"The floor plan as a test: a notebook imports only notebooks with a smaller number, and only those of its row"
import ast, re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PKG, NBS = ROOT/'tokkit', ROOT/'nbs'
ANY = range(100)  # still only smaller numbers

MAY_IMPORT = {  # module -> the numbers of the notebooks it may import
    # 0 ground
    'core': (), 'data': (0,), 'show': (0,), 'augment': (0, 1), 'folders': (0,), 'token_cache': (0, 1, 4), 'neighbours': (0,),
    # 1 tokenizers
    'quantize': (0, 9), 'layers': (0,), 'tokenizer': (0, 9, 10, 11), 'zoo': (0, 10, 11, 12), 'official': (0, 10, 11, 12),
    # 2 perturbation: knows tensors, not tokenizers
    'perturb': (0, 9, 10), 'plugin': (0, 9, 10, 20),
    # 3 metrics: features, metrics and critics know images, not tokenizers; evaluate joins them
    'features': (0, 1, 11), 'metrics': (0, 1), 'evaluate': (0, 1, 9, 10, 12, 20, 30, 31), 'lpips': (0,), 'kernels': (0, 31),
    'critics': (0, 11, 30), 'moments': (0, 1, 30), 'fidelity': (0, 31), 'ifid': (0, 1, 10, 12, 30, 31, 32),
    'scorecard': (0, 1, 10, 12, 20, 30, 31, 32, 33, 34, 36, 37),
    # 4 generators: know latents, not pixels
    'generator': (0,), 'fast': (0, 11, 40), 'autoregressive': (0, 11, 40), 'masked': (0, 11, 40), 'flow': (0, 11, 40),
    'generators': (0, 40, 42, 43, 44), 'pairs': (0, 1, 4, 9, 12, 40),
    # 5 training: the learner knows batches, not images
    'learner': (0, 4), 'losses': (0, 11, 30, 33, 35), 'train': (0, 1, 4, 10, 12, 20, 35, 40, 42, 50, 51), 'posttrain': (0, 1, 12, 20, 31, 32, 38, 39, 40, 49, 50, 51, 52),
    'unpaired': (0, 1, 12, 39, 49, 51, 52, 53), 'sigma': (0, 1, 12, 34, 40, 49, 51, 52, 53), 'spectrum': (12, 30, 49), 'absorb': (0, 10, 12, 20, 49),
    # 6 study
    'parameters': (0, 1, 4), 'sweep': (0, 32), 'runs': (0, 4, 59, 60), 'engine': (0, 61), 'demo': ANY,
    'shift': (0, 1, 5, 10, 12, 20, 30, 31, 32, 34, 40), 'calibrate': (0, 9, 10, 20, 31, 34, 63), 'predictors': (0, 60),
    # 7 surfaces
    'plots': (0, 2, 60, 66), 'widgets': (0, 2, 9, 10, 12, 20, 40, 42, 70), 'stepper': (0, 2, 10, 12, 20, 40, 42, 70, 71),
    'before_after': (0, 12, 40, 49, 71), 'report': (), 'cli_options': ANY, 'cli_models': ANY, 'cli': ANY, 'all': ANY,
}


def number(module:Path) -> int|None:
    "The number of the notebook a module is exported from; None when it is not exported"
    found = re.search(r'File to edit: \.\./nbs/(\d\d)_', module.read_text(encoding='utf-8'))
    return int(found[1]) if found else None

FLOORS = {p.stem: number(p) for p in sorted(PKG.glob('*.py')) if number(p) is not None}


def imports(module:Path) -> set[str]:
    "Names of the tokkit modules that a module imports, anywhere in it"
    out = set()
    for o in ast.walk(ast.parse(module.read_text(encoding='utf-8'))):
        if isinstance(o, ast.ImportFrom) and o.level == 1: out |= {o.module.split('.')[0]} if o.module else {a.name for a in o.names}
        if isinstance(o, ast.ImportFrom) and o.level == 0 and (o.module or '').startswith('tokkit.'): out.add(o.module.split('.')[1])
        if isinstance(o, ast.Import): out |= {a.name.split('.')[1] for a in o.names if a.name.startswith('tokkit.')}
    return {name for name in out if (PKG/f'{name}.py').exists()}


@pytest.mark.parametrize('module', FLOORS)
def test_arrows_point_down(module):
    assert module in MAY_IMPORT, f"{module} has no row in MAY_IMPORT: say which notebooks it may import"
    floor, used = FLOORS[module], {d: FLOORS.get(d) for d in imports(PKG/f'{module}.py')}
    wrong = {d: n for d, n in used.items() if n is None or n >= floor or n not in MAY_IMPORT[module]}
    assert not wrong, f"{module} (floor {floor}) imports {wrong}; it may import {list(MAY_IMPORT[module])} below {floor}"


@pytest.mark.parametrize('module', FLOORS)
def test_small(module):
    n = sum(1 for l in (PKG/f'{module}.py').read_text(encoding='utf-8').splitlines() if l.strip() and not l.lstrip().startswith('#'))
    assert n <= 400, f"{module} has {n} exported lines; split it (limit 400)"


def test_every_module_has_a_notebook():
    stray = [p.name for p in PKG.glob('*.py') if p.name not in ('__init__.py', '_modidx.py', '__main__.py') and
             not any(NBS.glob(f'[0-9][0-9]_{p.stem}.ipynb'))]
    assert not stray, f"{stray} in tokkit/ come from no notebook: delete them, or restore the notebook"


def test_numbers_are_unique():
    seen = [p.name[:2] for p in NBS.glob('[0-9][0-9]_*.ipynb')]
    assert len(seen) == len(set(seen)), f"two notebooks share a number: {sorted(n for n in seen if seen.count(n) > 1)}"

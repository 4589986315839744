"What the result pages draw from the tables in results/"
import json, math
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.category import StrCategoryConverter

RESULTS = Path(__file__).resolve().parent.parent/'nbs'/'results'
PAGES = sorted(p.stem for p in RESULTS.glob('*.ipynb'))


def is_number(text:str) -> bool:
    try: return math.isfinite(float(text))
    except ValueError: return False


@pytest.fixture
def drawn(monkeypatch):
    "Run a page and answer its figures"
    monkeypatch.chdir(RESULTS)
    monkeypatch.setattr(plt, 'close', lambda *_: None)
    monkeypatch.setitem(plt.rcParams, 'figure.max_open_warning', 0)

    def run(page:str) -> list:
        names = {}
        for cell in json.loads((RESULTS/f'{page}.ipynb').read_text(encoding='utf-8'))['cells']:
            if cell['cell_type'] == 'code': exec(''.join(cell['source']), names)
        return [plt.figure(number) for number in plt.get_fignums()]
    yield run
    monkeypatch.undo()
    plt.close('all')


@pytest.mark.parametrize('page', PAGES)
def test_axes_of_numbers_are_numeric(page, drawn):
    """Numbers that were read as words stand on an axis in the order of the table,
    evenly apart: a curve over them zigzags"""
    for figure in drawn(page):
        for ax in figure.axes:
            for axis in (ax.xaxis, ax.yaxis):
                words = (list(axis.units._mapping) if isinstance(axis.get_converter(), StrCategoryConverter)
                         else [])
                assert not words or not all(map(is_number, words)), (f"{page}: {axis.get_label_text()!r} is "
                                                                     f"an axis of words: {words}")

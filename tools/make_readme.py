"""Write README.md from nbs/index.ipynb: `python tools/make_readme.py`

What a reader of the repository sees is the site's first page: its text, its code and its pictures, with
links that work from the root.
"""
import re
from pathlib import Path
from posixpath import normpath

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
PICTURES = 'README_files'


def readme(index:Path=ROOT/'nbs'/'index.ipynb') -> tuple[str, dict[str,bytes]]:
    "The README's text, and its pictures by file name"
    nb = nbformat.read(index, as_version=4)
    nb.cells = [c for c in nb.cells if not re.search(r'^#\|\s*(hide\b|include:\s*false)', c.source, re.M)]
    if nb.cells and nb.cells[0].cell_type == 'raw': del nb.cells[0]  # front matter
    for c in nb.cells: c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
    nb.cells = [c for c in nb.cells if c.source.strip() or c.get('outputs')]
    text, extra = MarkdownExporter().from_notebook_node(nb,
                                                        resources=dict(output_files_dir=PICTURES,
                                                                       unique_key='picture'))

    def from_root(m):
        away = re.match(r'[a-z]+:|#|/', m[2]) or m[2].startswith(PICTURES)
        return m[1]+(m[2] if away else normpath('nbs/'+m[2]))
    text = re.sub(r'(\]\()([^)\s]+)', from_root, text)
    text = re.sub(r'(!\[[^\]]*\]\([^)]*\))\{[^}]*\}', r'\1', text)  # Quarto's picture attributes
    text = re.sub(r'\n{3,}', '\n\n', re.sub(r'[ \t]+\n', '\n', text)).strip()+'\n'
    return text, extra.get('outputs') or {}


if __name__ == '__main__':
    text, pictures = readme()
    (ROOT/'README.md').write_text(text, encoding='utf-8')
    for old in (ROOT/PICTURES).glob('*'): old.unlink()
    for name, data in pictures.items():
        (ROOT/name).parent.mkdir(exist_ok=True)
        (ROOT/name).write_bytes(data)

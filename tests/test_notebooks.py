"What a reviewer would otherwise say again and again about the notebooks"
import ast, json, re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
ALL = [str(p.relative_to(NBS)) for p in sorted(NBS.rglob('*.ipynb'))
       if not any(part.startswith(('_', '.')) for part in p.relative_to(NBS).parts)]
CORE = [n for n in ALL if '#| default_exp' in (NBS/n).read_text(encoding='utf-8')]     # they export a module
# papermill sources: parameters, no outputs
BARE = [n for n in ALL if n.startswith(('experiments/', 'benchmarks/'))]


@cache
def cells(name:str) -> list[dict]: return json.loads((NBS/name).read_text(encoding='utf-8'))['cells']
def source(cell:dict) -> str: return ''.join(cell['source'])
def is_export(cell:dict) -> bool:
    return cell['cell_type'] == 'code' and bool(re.search(r'^#\|\s*exports?i?\b', source(cell), re.M))
def text(name:str) -> str: return '\n'.join(map(source, cells(name)))


@pytest.mark.parametrize('name', ALL)
def test_form(name):
    first = next(c for c in cells(name) if c['cell_type'] == 'markdown')
    assert re.fullmatch(r'# \S.*\n\n> \S.*', source(first)), (f"{name}: the first markdown cell must be `# "
                                                              "name`, an empty line, `> one-line promise`, "
                                                              "and nothing else, for the site drops the rest")
    size = (NBS/name).stat().st_size
    assert size <= 300_000, f"{name} has {size/1000:.0f} kB (limit 300): fewer or smaller pictures"
    shown = any('application/vnd.jupyter.widget-view+json' in o.get('data', {}) for c in cells(name)
                for o in c.get('outputs', []))
    widgets = json.loads((NBS/name).read_text(encoding='utf-8'))['metadata'].get('widgets')
    assert shown or not widgets, (f"{name}: a saved widget state that no output shows (progress bars?): "
                                  "delete metadata.widgets")
    ids = [c['id'] for c in cells(name)]
    assert len(ids) == len(set(ids)), f"{name}: two cells share an id"
    counted = [c['id'] for c in cells(name) if c.get('execution_count')]
    assert not counted, f"{name}: execution counts in {counted}; run nbdev_clean"


@pytest.mark.parametrize('name', ALL)
def test_knows_no_machine(name):
    found = re.findall(r'(?:/(?:tmp|home|root|work|mnt|Users)/|[A-Z]:\\\\Users)[^\s\'"]*',
                       (NBS/name).read_text(encoding='utf-8'))
    assert not found, f"{name} holds paths of some machine: {found[:3]}"


@pytest.mark.parametrize('name', ALL)
def test_pictures_have_words(name):
    prose = '\n'.join(source(c) for c in cells(name) if c['cell_type'] == 'markdown')
    mute = [m[0] for m in re.finditer(r'!\[([^\]]*)\]\([^)]*\)(\{[^}]*\})?', prose) if not m[1].strip()
            and 'alt=' not in (m[2] or '')]
    assert not mute, f"{name}: pictures without alternative text: {mute}"


@pytest.mark.parametrize('name', CORE)
def test_every_section_starts_with_a_sentence(name):
    bare = []
    for cell,after in zip(cells(name), cells(name)[1:]):
        if cell['cell_type'] != 'markdown': continue
        lines = [line for line in source(cell).splitlines() if line.strip()]
        headings = [line.startswith('##') for line in lines]
        bare += [a for a,first,second in zip(lines, headings, headings[1:]) if first and second]
        if lines and headings[-1] and after['cell_type'] == 'code': bare.append(lines[-1])
    assert not bare, f"{name}: headings without a sentence: {bare}"


def has_picture(name:str) -> bool:
    shown = [mime for c in cells(name) for o in c.get('outputs', []) for mime in o.get('data', {})]
    drawn = any('<svg' in str(o) or '<img' in str(o) for c in cells(name) for o in c.get('outputs', []))
    prose = any('![' in source(c) for c in cells(name) if c['cell_type'] == 'markdown')
    pictures = 'image/', 'application/vnd.jupyter.widget'
    return drawn or prose or any(mime.startswith(pictures) for mime in shown)


@pytest.mark.parametrize('name', CORE)
def test_a_picture_or_the_reason_why_not(name):
    said = any('no picture' in source(c) for c in cells(name) if c['cell_type'] == 'markdown')
    assert has_picture(name) or said, (f"{name} shows no picture: add one where people would rather look "
                                       "than read, or say why: `This page has no picture: ...`")


@pytest.mark.parametrize('name', [n for n in ALL if n not in BARE])
def test_pictures_are_small(name):
    sizes = [len(''.join(o['data']['image/png']))*3/4/1000 for c in cells(name) for o in c.get('outputs', [])
             if 'image/png' in o.get('data', {})]
    assert all(s <= 60 for s in sizes), (f"{name}: a picture of {max(sizes):.0f} kB (limit 60): dpi 72, "
                                         "fewer images")
    limit = 3 if name in CORE else 12
    assert len(sizes) <= limit, f"{name}: {len(sizes)} saved pictures (limit {limit})"


@pytest.mark.parametrize('name', BARE)
def test_experiments_are_bare(name):
    assert any('parameters' in c['metadata'].get('tags', [])
               for c in cells(name)), (f"{name}: no cell is tagged `parameters`")
    assert not any(c.get('outputs') for c in cells(name)), (f"{name}: saved outputs in a notebook that "
                                                            "papermill runs; clear them")


@pytest.mark.parametrize('name', CORE)
def test_core_pages_teach(name):
    exported = [source(c) for c in cells(name) if is_export(c)]
    public = [o.name for s in exported for o in ast.parse(re.sub(r'^\s*[%!].*', '', s, flags=re.M)).body
              if isinstance(o, (ast.FunctionDef, ast.ClassDef)) and not o.name.startswith('_')]
    lessons = [c for c in cells(name) if c['cell_type'] == 'code' and not is_export(c)
               and re.search(r'\btest_\w+\(|\bassert\b', source(c))]
    assert len(lessons) >= .35*len(public), (
        f"{name}: {len(lessons)} lesson cells for {len(public)} public names (at least 0.35 each): {public}")
    if not name.startswith('cli/'):
        loud = [s.splitlines()[0] for s in exported if re.search(r'(?<![\w.])print\(', s)]
        assert not loud, f"{name}: print( in exported code; return it, or show a bar"
    mixed = [s for s in exported if re.search(r'^(from \S+ import|import) ', s, re.M)
             and re.search(r'^(def|class|@)', s, re.M)]
    assert not mixed, (f"{name}: imports stand in a cell of their own (the documentation runs import cells "
                       f"alone): {mixed[0][:80]!r}")
    last = [source(c) for c in cells(name) if c['cell_type'] == 'markdown'][-1]
    assert '**Used by**' in last, (f"{name}: ends without the line `**Used by** ... · **Related how-to** ... "
                                   "· **Related experiment** ...`")


def test_lessons_are_many():
    "Over all core pages, at least six lesson cells for ten public functions and classes"
    code = [source(c) for name in CORE for c in cells(name) if c['cell_type'] == 'code']
    exported = [s for s in code if re.search(r'^#\|\s*exports?\b', s, re.M)]
    public = [o.name for s in exported for o in ast.parse(s).body
              if isinstance(o, (ast.FunctionDef, ast.ClassDef)) and not o.name.startswith('_')]
    lessons = [s for s in code if s not in exported and re.search(r'\btest_\w+\(|\bassert\b', s)]
    assert len(lessons) >= .6*len(public), f"{len(lessons)} lesson cells for {len(public)} public names"

"""Build the site from nbs/ into _docs/ without Quarto: `python tools/build_site.py [FOLDER]`

nbdev processes the notebooks (show_doc, links between names), smalldocs turns them into pages, and this
file does what lies between the two: nbdev's page names, links that work without a server, numbered figures
and equations, saved widgets, and KaTeX and the widget manager from npm instead of from a CDN. nbs/ stays a
plain Quarto project: whoever has Quarto can run `nbdev_docs`.
"""
import json, os, re, shutil, subprocess, sys, tarfile, tempfile
from configparser import ConfigParser
from functools import cache
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
VENDORED = {  # npm package -> what the pages need of it
    'katex@0.16.22': ('LICENSE', 'dist/katex.min.css', 'dist/katex.min.js', 'dist/contrib/auto-render.min.js',
                      'dist/fonts/*.woff2'),
    '@jupyter-widgets/html-manager@1.0.14': ('LICENSE', 'dist/embed.js'),
}
# folder of tokkit/ and nbs/ -> its heading in the navigation; from the ground up: a folder imports only those
# before it
HOUSE = {
    'processes': 'Processes', 'core': 'Core', 'data': 'Data', 'layers': 'Layers', 'show': 'Pictures',
    'runs': 'Runs',
    'quantizers': 'Quantizers', 'tokenizers': 'Tokenizers', 'generators': 'Generators',
    'inference': 'Faster sampling',
    'adapters': 'Models of your own', 'published': 'Published models',
    'zoo_tokenizers': 'Published tokenizers',
    'zoo_generators': 'Published generators', 'zoo': 'The zoo',
    'perturbation': 'Perturbation', 'features': 'Features', 'metrics': 'Metrics',
    'protocols': 'Protocols', 'training': 'Training',
    'posttraining': 'Post-training', 'recipes': 'Recipes', 'analysis': 'Analysis', 'demo': 'Demo',
    'ui': 'Figures and explorers', 'cli': 'Command line'}
SECTIONS = {'How-to': 'howto', 'Explain': 'explain', 'Results': 'results', 'Explore': 'explore',
            'Experiments': 'experiments', 'Benchmarks': 'benchmarks'}
VIEW = 'application/vnd.jupyter.widget-view+json'
STATE = 'application/vnd.jupyter.widget-state+json'


def source_of(cell:dict) -> str: return ''.join(cell['source'])


@cache
def home() -> str:
    "Where the site will be published, as settings.ini says"
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']['doc_host']+ini['DEFAULT']['doc_baseurl'].rstrip('/')+'/'


def navigation(nbs:Path) -> dict:
    """Navigation in the order a newcomer needs it: start here, how-to,
    explain, results, explore, and the reference by folder"""
    def pages(pattern): return [str(p.relative_to(nbs)) for p in sorted(nbs.glob(pattern))]
    def section(name, contents): return [dict(section=name, contents=contents)] if contents else []
    reference = [part for folder, name in HOUSE.items()
                 for part in section(name, pages(f'{folder}/*.ipynb') or pages(f'{folder}.ipynb'))]
    contents = section('Start here', pages('index.ipynb')+pages('tutorials/*.ipynb'))
    for name, folder in SECTIONS.items(): contents += section(name, pages(f'{folder}/*.ipynb'))
    first = dict(Tutorial='tutorials/*.ipynb', Perturbation='perturbation/*_kinds.ipynb',
                 Metrics='metrics/*_reconstruction.ipynb', Results='results/*.ipynb')
    left = [dict(text=name, href=pages(pattern)[0]) for name, pattern in first.items() if pages(pattern)]
    return {'website': {'navbar': {'left': left},
                        'sidebar': {'contents': contents+section('Reference', reference)}}}


def write_sidebar(nbs:Path) -> str:
    "Write nbs/sidebar.yml, which Quarto reads too"
    text = ('# Written by tools/build_site.py from the list of notebooks\n'
            +yaml.safe_dump(navigation(nbs), sort_keys=False))
    (nbs/'sidebar.yml').write_text(text, encoding='utf-8')
    return text


def process():
    """nbdev's part, in the current folder: notebooks -> _proc/.
    In this one process, so that torch is imported once"""
    import ast, inspect
    import fastcore.docments as docments
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    parses = docments._parses

    # a class that inherits from another library's may carry annotations or source that cannot be read: show
    # it without them
    def signature(o, **kwargs):
        try: return inspect.signature(o, **kwargs)
        except NameError as e: raise ValueError(str(e)) from e
    def tolerant(o):
        try: return parses(o)
        except SyntaxError: return ast.parse('')
    docments.signature = signature
    docments._parses = tolerant
    refresh_quarto_yml()
    proc_nbs(n_workers=0, force=True)


def relative(url:str, page:str, names:dict[str,str]) -> str:
    "A link as smalldocs wants it: from the page, to the new page names, never to the published site"
    if url.startswith(home()): url = relpath(url[len(home()):] or 'index.html', dirname(page) or '.')
    path, mark, anchor = url.partition('#')
    target = normpath(join(dirname(page), path))
    new = names.get(re.sub(r'\.html$', '.ipynb', target)) if not re.match(r'[a-z]+:|/', path) else None
    return (relpath(new, dirname(page) or '.') if new else path)+mark+anchor


def number_references(text:list[str]) -> list[str]:
    "Number the figures, tables and equations of a page, in order, and turn `@fig-x` into a link to them"
    words = dict(fig='Figure', tbl='Table', eq='Equation')
    count = {}
    labels = {}
    for kind, name in re.findall(r'(?:\{#|^#\|\s*label:\s*)(fig|tbl|eq)-([\w-]+)', '\n'.join(text), re.M):
        count[kind] = count.get(kind, 0)+1
        labels[f'{kind}-{name}'] = (words[kind], count[kind])

    def equation(m): return f"::: {{#{m[2]}}}\n$${m[1].rstrip()} \\tag{{{labels[m[2]][1]}}}$$\n:::"
    def caption(m): return f"{m[0]}{labels[m[1]][0]} {labels[m[1]][1]}: " if m[1] in labels else m[0]
    def link(m): return '[{} {}](#{})'.format(*labels[m[1]], m[1]) if m[1] in labels else m[0]
    out = []
    for t in text:
        t = re.sub(r'\$\$((?:(?!\$\$).)+)\$\$\s*\{#(eq-[\w-]+)\}', equation, t, flags=re.S)
        t = re.sub(r'^#\|\s*label:\s*((?:fig|tbl)-[\w-]+)\n#\|\s*(?:fig|tbl)-cap:\s*["\']?', caption, t,
                   flags=re.M)
        out.append(t if t.startswith('#|') else re.sub(r'(?<![\w`])@((?:fig|tbl|eq)-[\w-]+)', link, t))
    return out


def take_widgets(nbs:Path) -> dict[str,dict]:
    """Take the saved widget states out of the notebooks (nbdev stumbles over linked widgets):
    notebook -> state"""
    states = {}
    for p in sorted(nbs.rglob('*.ipynb')):
        nb = json.loads(p.read_text(encoding='utf-8'))
        state = nb['metadata'].pop('widgets', {}).get(STATE, {})
        if state.get('state'): states[p.relative_to(nbs).as_posix()] = state
        p.write_text(json.dumps(nb), encoding='utf-8')
    return states


def show_widgets(cells:list[dict], state:dict|None):
    "Saved widgets come alive in the page, without a kernel; views without a saved state are left out"
    # a state that nothing shows
    if not any(VIEW in o.get('data', {}) for c in cells for o in c.get('outputs', [])): return
    for cell in cells:
        for o in [o for o in cell.get('outputs', []) if VIEW in o.get('data', {})]:
            view = o['data'].pop(VIEW)
            if state: o['data'] = {'text/html': f'<script type="{VIEW}">{json.dumps(view)}</script>'}
            elif set(o['data']) <= {'text/plain'}: cell['outputs'].remove(o)
    if state:
        saved = json.dumps(state).replace('</', '<\\/')
        cells.append(dict(cell_type='markdown', metadata={}, source=f'```{{=html}}\n<script '
                                                                    f'type="{STATE}">{saved}</script>\n```'))


def adapt(proc:Path, nbs:Path, states:dict[str,dict]):
    "Between nbdev and smalldocs: rename the processed notebooks and rewrite what smalldocs reads differently"
    notebooks = {}
    names = {}
    for p in sorted(proc.rglob('*.ipynb')):
        old = p.relative_to(proc).as_posix()
        nb = json.loads(p.read_text(encoding='utf-8'))
        front = re.match(r'---\n(.*?)\n---', source_of(nb['cells'][0]), re.S) if nb['cells'] else None
        output = (yaml.safe_load(front[1]) or {}).get('output-file') if front else None
        notebooks[old], names[old] = (nb, join(dirname(old), output.replace('.html', '.ipynb')) if output
                                      else old)
    twice = sorted(n for n in names.values() if list(names.values()).count(n) > 1)
    if twice: raise ValueError(f"two notebooks would become the page {twice[0]}; rename one")
    for old, nb in notebooks.items():
        # `output-file` has done its work
        if front := re.match(r'---\n.*?\n---', source_of(nb['cells'][0]), re.S):
            nb['cells'][0]['source'] = re.sub(r'^output-file:.*\n', '', front[0], flags=re.M)
        show_widgets(nb['cells'], states.get(old))
        def links(text): return re.sub(r'\]\(([^)\s]+)', lambda m: ']('+relative(m[1], old, names), text)
        def doc(text):  # nbdev shows a class as a function that makes it, and links names inside code blocks
            text = re.sub(r'```python\n.*?\n```', lambda m: re.sub(r'\[(`[^`]+`)\]\([^)]*\)', r'\1', m[0]),
                          text, flags=re.S)
            return re.sub(r'^def (?=[A-Z])(.*?\))(?:->None)?:$', r'class \1', links(text), count=1,
                          flags=re.M | re.S)
        for cell, text in zip(nb['cells'], number_references([source_of(c) for c in nb['cells']])):
            cell['source'] = links(text) if cell['cell_type'] == 'markdown' else text
            for o in cell.get('outputs', []):
                if 'text/markdown' in o.get('data', {}):
                    o['data']['text/markdown'] = doc(''.join(o['data']['text/markdown']))
        (proc/old).unlink()
        (proc/names[old]).write_text(json.dumps(nb), encoding='utf-8')
    bar = write_sidebar(nbs)
    for old, new in names.items(): bar = re.sub(rf'(?<=- |: ){re.escape(old)}$', new, bar, flags=re.M)
    (proc/'sidebar.yml').write_text(bar, encoding='utf-8')


def vendor(package:str, wanted:tuple[str,...], cache:Path) -> Path|None:
    """Files of an npm package, fetched once into `cache`; None,
    with a line that says why, when that is impossible"""
    folder = cache/package.replace('/', '-')
    if folder.is_dir(): return folder
    if not shutil.which('npm'):
        print(f"site: no npm here, so no {package}")
        return None
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as tmp:
        got = subprocess.run(['npm', 'pack', '--silent', package], cwd=tmp, capture_output=True, text=True,
                             stdin=subprocess.DEVNULL, timeout=300)
        if got.returncode:
            print(f"site: npm cannot fetch {package} "
                  f"({(got.stderr.strip().splitlines() or ['no reason given'])[0]})")
            return None
        with tarfile.open(next(Path(tmp).glob('*.tgz'))) as t:
            t.extraction_filter = getattr(tarfile, 'data_filter', None)    # Python 3.11 has it from 3.11.4 on
            t.extractall(Path(tmp)/'all')
        package = Path(tmp)/'all'/'package'
        for pattern in wanted:
            for f in package.glob(pattern):
                to = Path(tmp)/'kept'/f.relative_to(package).as_posix().removeprefix('dist/')
                to.parent.mkdir(parents=True, exist_ok=True)
                f.rename(to)
        if not folder.exists(): (Path(tmp)/'kept').rename(folder)
    return folder


def finish(out:Path, cache:Path):
    "After smalldocs: vendored scripts instead of the CDN, and a search index that opens without a server"
    katex, widgets = (vendor(p, wanted, cache) for p, wanted in VENDORED.items())
    if katex: shutil.copytree(katex, out/'site_libs/katex', dirs_exist_ok=True)
    else: print("site: formulas are shown as TeX")
    if widgets: shutil.copytree(widgets, out/'site_libs/widgets', dirs_exist_ok=True)
    for css in (out/'site_libs/themes').rglob('*.css'):  # web fonts that a theme fetches from elsewhere
        css.write_text(re.sub(r'@import url\(["\']?https?://[^)]*\);', '', css.read_text(encoding='utf-8')),
                       encoding='utf-8')
    index = (out/'search.json').read_text(encoding='utf-8').replace('</', '<\\/')
    # pages opened from disk may not fetch files: hand the index over instead
    (out/'site_libs/search-index.js').write_text(
        f"(() => {{ const index = {index}, fetched = window.fetch;\n"
        "  window.fetch = (url, ...rest) => String(url).endsWith('search.json') ? Promise.resolve({json: "
        "async () => index}) : fetched(url, ...rest);\n"
        "})();\n", encoding='utf-8')
    for page in out.rglob('*.html'):
        text = page.read_text(encoding='utf-8')
        up = relpath('.', page.parent.relative_to(out).as_posix())
        cdn = r'https://cdn\.jsdelivr\.net/npm/katex@[\d.]+/dist'
        if katex: text = re.sub(cdn, f'{up}/site_libs/katex', text)
        else: text = re.sub(rf'<(?:link|script)[^>]*{cdn}[^>]*>(?:</script>)?', '', text)
        if widgets and VIEW in text:
            text = text.replace('</body>', f'<script src="{up}/site_libs/widgets/embed.js"></script></body>')
        text = re.sub(r'(<script src="[^"]*site_libs/smalldocs\.js")',
                      rf'<script src="{up}/site_libs/search-index.js"></script>\1', text, count=1)
        page.write_text(text, encoding='utf-8')


def _unwanted(folder:str, names:list[str]) -> set[str]:
    "What is not copied with nbs/: leftovers of editors, and runs that were made where a notebook lies"
    made = ({'runs'} if Path(folder).name in ('experiments', 'benchmarks', 'explore', 'tutorials', 'howto')
            else set())
    return shutil.ignore_patterns('.ipynb_checkpoints', '_proc', '.*.tmp')(folder, names) | made & set(names)


def build(out:Path, nbs:Path=ROOT/'nbs', cache:Path=ROOT/'.tools'/'npm') -> list[str]:
    "Build the site into `out`; returns smalldocs' warnings"
    from smalldocs.site import build as render
    with tempfile.TemporaryDirectory() as tmp:
        work = Path(tmp)
        shutil.copytree(nbs, work/'nbs', ignore=_unwanted)
        shutil.copytree(ROOT/'tokkit', work/'tokkit', ignore=shutil.ignore_patterns('__pycache__'))
        shutil.copy(ROOT/'settings.ini', work)
        states = take_widgets(work/'nbs')
        done = subprocess.run([sys.executable, __file__, '--process'], cwd=work, capture_output=True,
                              text=True, stdin=subprocess.DEVNULL,
                              env=dict(os.environ,
                                       PYTHONPATH=os.pathsep.join([str(ROOT),
                                                                   os.environ.get('PYTHONPATH', '')])))
        if done.returncode:
            raise RuntimeError(f"nbdev could not process the notebooks:\n{done.stderr[-3000:]}")
        adapt(work/'_proc', work/'nbs', states)
        site = render(work/'_proc', quiet=True)
        finish(site.out, cache)
        shutil.copytree(site.out, out, dirs_exist_ok=True)
    return site.warnings


def publish(out:Path) -> list[str]:
    """Build beside `out` and put the finished site in its place;
    a folder with anything else in it is refused before the work begins"""
    from tokkit.core import locked, replaced_dir
    with locked(out, f'the site {out}'), replaced_dir(out) as new: return build(new)


if __name__ == '__main__':
    if '--process' in sys.argv: sys.exit(process())
    out = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT/'_docs')
    try: told = publish(out)
    except OSError as e: sys.exit(f'tokkit: {e}')
    for w in told: print(f'site: {w}')
    write_sidebar(ROOT/'nbs')
    print(f"{len(list(out.rglob('*.html')))} pages in {out}; open {out/'index.html'}")

"The site builds from a clean checkout and opens in a real browser, from disk, with nothing missing"
import importlib.util, re, shutil, subprocess, sys
from pathlib import Path

import pytest, yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'


def builder():
    spec = importlib.util.spec_from_file_location('build_site', ROOT/'tools'/'build_site.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Path:
    "The built site; once for this module"
    out = tmp_path_factory.mktemp('site')/'_docs'
    done = subprocess.run([sys.executable, ROOT/'tools'/'build_site.py', out], cwd=ROOT, capture_output=True,
                          text=True, timeout=900, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    (out.parent/'said').write_text(done.stdout, encoding='utf-8')
    return out


def test_builds_without_complaint(site):
    said = (site.parent/'said').read_text(encoding='utf-8').splitlines()
    complaints = [l for l in said if l.startswith('site:') and 'npm' not in l and 'TeX' not in l]
    assert not complaints, '\n'.join(complaints)


@pytest.fixture
def opened(site, browser):
    "Open a page and collect whatever goes wrong in it"
    trouble = []
    page = browser.new_page(viewport=dict(width=1300, height=900))
    page.on('requestfailed', lambda r: trouble.append(f'failed: {r.url}'))
    page.on('response', lambda r: trouble.append(f'{r.status}: {r.url}') if r.status >= 400 else None)
    page.on('request', lambda r: trouble.append(f'leaves the site: {r.url}') if r.url.startswith('http')
            else None)
    page.on('console', lambda m: trouble.append(f'console: {m.text}') if m.type == 'error' else None)
    page.on('pageerror', lambda e: trouble.append(f'script: {e}'))

    def go(name:str):
        page.goto((site/name).as_uri())
        page.wait_for_load_state('load')
        return page
    yield go
    page.close()
    assert not trouble, '\n'.join(trouble)


def html_name(notebook:Path) -> str:
    "The page of a notebook: number stripped, as nbdev names it"
    return str(notebook.relative_to(NBS).with_name(re.sub(r'^\d+[a-zA-Z]?_', '', notebook.stem)+'.html'))


PAGES = [html_name(p) for p in sorted(NBS.rglob('*.ipynb'))
         if not any(part.startswith(('_', '.')) for part in p.relative_to(NBS).parts)]


# what a reader sees of a page, without its code
PROSE = '''main => {
    const copy = main.cloneNode(true);
    copy.querySelectorAll('pre, code').forEach(e => e.remove());
    return copy.textContent;
}'''


# one page of every folder always opens; a third of the others, as conftest draws them
FOLDERS = {Path(name).parent for name in PAGES}
FIRST = {min(name for name in PAGES if Path(name).parent == folder) for folder in FOLDERS}


@pytest.mark.parametrize('name', [pytest.param(name, marks=() if name in FIRST else pytest.mark.alike)
                                  for name in PAGES])
def test_opens(name, opened):
    page = opened(name)
    assert page.locator('h1').first.inner_text().strip()
    widths = page.eval_on_selector_all('main img', 'es => es.map(e => e.naturalWidth)')
    assert all(w > 0 for w in widths), f"{name}: {widths.count(0)} of {len(widths)} pictures are broken"
    prose = page.locator('main').evaluate(PROSE)
    assert '$\\' not in prose or not shutil.which('npm'), f"{name}: TeX shows as text"
    failed = page.eval_on_selector_all('.katex-error, .katex [style*="color:#cc0000"]',
                                       'es => es.map(e => e.title || e.innerText)')
    assert not failed, f"{name}: a formula that KaTeX cannot read: {failed}"
    text = page.locator('main').inner_text()
    shown = [word for word in ('#|', '@fig-', '@eq-') if word in text]
    assert not shown, f"{name}: a directive or a reference shows as text: {shown}"


def test_formulas(opened):
    if not shutil.which('npm'): pytest.skip("no npm on the PATH, so no KaTeX: formulas are shown as TeX")
    page = opened('perturbation/kinds.html')
    page.wait_for_selector('.katex')
    assert page.locator('.katex-error').count() == 0


def test_search(opened):
    page = opened('index.html')
    page.locator('.smalldocs-search input').first.fill('neighbour')
    page.wait_for_selector('.search-result')
    found = page.eval_on_selector_all('.search-result', 'es => es.map(e => e.getAttribute("href"))')
    assert any('codebook.html' in f for f in found), found
    page.locator('.search-result', has_text='codebook').first.click()
    page.wait_for_url('**/codebook.html*')


def test_links_between_names(site):
    main = {p.stem: p.read_text(encoding='utf-8').split('<main')[1].split('</main>')[0]
            for p in site.rglob('*.html')}
    linked = [name for name, text in main.items() if re.search(r'href="\.\./core/\w+\.html#', text)]
    assert linked, "no page of another folder links to a name of the core pages"
    away = [name for name, text in main.items() if builder().home() in text]
    assert not away, f"{away} link to the published site instead of to the page beside them"


def test_navigation_is_written():
    want = builder().navigation(NBS)
    written = yaml.safe_load((NBS/'sidebar.yml').read_text(encoding='utf-8'))
    assert written == want, "nbs/sidebar.yml misses a page: python tools/build_site.py"


def test_references_are_numbered():
    number = builder().number_references
    text = number(['$$a = b$$ {#eq-one}\n\nSee @eq-one and @fig-dose.',
                   '#| label: fig-dose\n#| fig-cap: "Dose"\nplot()'])
    assert ('\\tag{1}$$' in text[0] and '[Equation 1](#eq-one)' in text[0]
            and '[Figure 1](#fig-dose)' in text[0])
    assert 'fig-cap: "Figure 1: Dose"' in text[1]
    assert number(['mail@fig-tree.org']) == ['mail@fig-tree.org']


def test_saved_widgets_live_without_a_kernel(tmp_path, browser):
    if not shutil.which('npm'): pytest.skip("no npm on the PATH, so no widget manager")
    import io, ipywidgets, nbformat
    from ipywidgets.embed import embed_data
    from PIL import Image

    def still(shade:int) -> ipywidgets.Image:
        buffer = io.BytesIO()
        Image.new('L', (8+shade, 8), shade).save(buffer, 'png')
        return ipywidgets.Image(value=buffer.getvalue(), format='png')
    slider = ipywidgets.IntSlider(max=2)
    stack = ipywidgets.Stack([still(s) for s in (0, 60, 120)], selected_index=0)
    ipywidgets.jslink((slider, 'value'), (stack, 'selected_index'))
    saved = embed_data(views=[ipywidgets.VBox([slider, stack])])
    view = nbformat.v4.new_output('display_data',
                                  {'application/vnd.jupyter.widget-view+json': saved['view_specs'][0],
                                   'text/plain': 'VBox()'})
    cells = [nbformat.v4.new_markdown_cell('# live\n\n> A saved widget'),
             nbformat.v4.new_code_cell('show()', outputs=[view])]
    widgets = {'application/vnd.jupyter.widget-state+json': saved['manager_state']}
    nb = nbformat.v4.new_notebook(cells=cells, metadata={'widgets': widgets})
    (tmp_path/'nbs').mkdir()
    for name in ('_quarto.yml', 'styles.css'): shutil.copy(NBS/name, tmp_path/'nbs')
    nbformat.write(nb, tmp_path/'nbs'/'index.ipynb')
    assert builder().build(tmp_path/'out', tmp_path/'nbs') == []
    page = browser.new_page()
    page.goto((tmp_path/'out'/'index.html').as_uri())
    page.wait_for_selector('.noUi-handle')
    def width():
        return page.evaluate("Math.max(...[...document.querySelectorAll('.widget-image')].filter(e => "
                             "e.offsetParent).map(e => e.naturalWidth))")
    page.wait_for_function("[...document.querySelectorAll('.widget-image')].some(e => e.naturalWidth == 8)")
    assert width() == 8
    page.locator('.noUi-handle').focus()
    page.keyboard.press('ArrowRight')
    page.wait_for_function("[...document.querySelectorAll('.widget-image')].some(e => e.offsetParent && "
                           "e.naturalWidth == 68)")
    page.close()

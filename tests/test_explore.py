"Explorers in a real browser: JupyterLab opens the notebook, a slider moves, the picture changes"
import json, os, secrets, shutil, signal, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
QUIET = {'@jupyterlab/apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False,
                                                             doNotDisturbMode=True)}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture(scope='module')
def lab(tmp_path_factory, browser):
    "JupyterLab on copies of the explorers, on 127.0.0.1 with a token; gives a function that opens one"
    home = tmp_path_factory.mktemp('lab')
    port = free_port()
    token = secrets.token_hex(16)
    for name, settings in QUIET.items():
        file = home/'settings'/f'{name}.jupyterlab-settings'
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(settings))
    shutil.copytree(ROOT/'nbs'/'explore', home/'explore')
    # what is tested is the explorer: a tokenizer of seconds will do
    for notebook in (home/'explore').glob('*.ipynb'):
        text = notebook.read_text(encoding='utf-8')
        small = text.replace("demo_tokenizer('default'",
                             "demo_tokenizer('smoke'").replace("demo_cfg('default'", "demo_cfg('smoke'")
        assert small != text, f"{notebook.name} opens with another tokenizer: say here how it is made small"
        notebook.write_text(small, encoding='utf-8')
    folders = {k: str(home/k.lower())
               for k in ('JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'IPYTHONDIR',
                         'JUPYTERLAB_WORKSPACES_DIR')}
    env = dict(os.environ, **folders, JUPYTERLAB_SETTINGS_DIR=str(home/'settings'), JUPYTER_TOKEN=token,
               PYTHONPATH=str(ROOT),
               OMP_NUM_THREADS='1', TOKKIT_RUNS=str(home/'runs'))
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--ip=127.0.0.1', f'--port={port}',
               '--ServerApp.port_retries=0',
               '--expose-app-in-browser', '--allow-root', f'--ServerApp.root_dir={home/"explore"}']
    with open(home/'log', 'w') as log:
        server = subprocess.Popen(command, cwd=home, env=env, stdout=log, stderr=subprocess.STDOUT,
                                  start_new_session=True)
    url = f'http://127.0.0.1:{port}'
    pages = []

    def started() -> bool:
        try: return urllib.request.urlopen(f'{url}/api/status?token={token}', timeout=2).status == 200
        except OSError: return False

    def opened(name:str):
        "The page of one explorer, all cells running"
        page = browser.new_page(viewport=dict(width=1400, height=1100))
        pages.append(page)
        page.goto(f'{url}/lab/tree/{name}?token={token}&reset', timeout=120_000)
        page.wait_for_function(f"{KERNEL} === 'idle'", timeout=180_000)
        page.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
        return page

    try:
        until = time.monotonic()+180
        while not started():
            alive = server.poll() is None and time.monotonic() < until
            assert alive, f"JupyterLab did not start:\n{(home/'log').read_text()[-2000:]}"
            time.sleep(.3)
        yield opened
    finally:
        for page in pages: page.close()
        os.killpg(server.pid, signal.SIGTERM)
        try: server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def changes(page, read:str, before:str):
    "Wait until the JavaScript expression `read` gives something else than `before`, and give it back"
    page.wait_for_function(f"before => {{ const now = {read}; return now && now !== before }}", arg=before,
                           timeout=60_000)
    return page.evaluate(read)


PICTURE = "document.querySelector('img.widget-image')?.src"
LINE = "document.querySelector('.widget-html-content')?.innerText"
STDERR = '.jp-RenderedText[data-mime-type="application/vnd.jupyter.stderr"]'
KERNEL = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status"


def test_dose_slider(lab):
    page = lab('x1_dose_slider.ipynb')
    page.locator('img.widget-image').wait_for(timeout=400_000)
    assert page.evaluate("document.querySelector('img.widget-image').naturalWidth") > 500
    picture = page.evaluate(PICTURE)
    line = page.evaluate(LINE)
    assert 'of tokens replaced in 8 of 8 images' in line

    alpha, delta = (page.locator('.noUi-handle').nth(i) for i in (0, 1))
    alpha.focus()
    page.keyboard.press('ArrowRight')
    picture = changes(page, PICTURE, picture)
    line = changes(page, LINE, line)
    assert '(asked: 55.0%)' in line

    delta.focus()
    page.keyboard.press('End')  # all codes are neighbours
    picture = changes(page, PICTURE, picture)
    line = changes(page, LINE, line)
    page.locator('.widget-checkbox input').click()                      # without itself that is one too many
    line = changes(page, LINE, line)
    assert line.startswith('not possible: delta must be') and page.evaluate(PICTURE) == picture
    assert not page.locator(STDERR).count(), "a traceback or warning in the notebook"


def test_sampler_stepper(lab):
    page = lab('x5_sampler_stepper.ipynb')
    page.locator('img.widget-image').wait_for(timeout=400_000)
    assert page.evaluate("document.querySelector('img.widget-image').naturalWidth") > 500
    picture = page.evaluate(PICTURE)
    line = page.evaluate(LINE)
    assert line.startswith('step 1 of 49 · sample 0: row 0, column 0: code') and 'of 512, probability' in line

    def handle(name): return page.locator('.widget-inline-hbox').filter(has_text=name).locator('.noUi-handle')
    handle('step').last.focus()
    page.keyboard.press('ArrowRight')  # 'steps' comes first, and is of no use here
    picture = changes(page, PICTURE, picture)
    line = changes(page, LINE, line)
    assert line.startswith('step 2 of 49 · sample 0: row 0, column 1: code')

    handle('guidance').focus()
    page.keyboard.press('ArrowRight')  # samples anew
    picture = changes(page, PICTURE, picture)
    line = changes(page, LINE, line)
    handle('chart of').focus()
    page.keyboard.press('ArrowRight')
    picture = changes(page, PICTURE, picture)
    line = changes(page, LINE, line)
    assert line.startswith('step 2 of 49 · sample 1')

    handle('keep').focus()
    page.keyboard.press('End')  # all codes are real ones
    picture = changes(page, PICTURE, picture)
    page.locator('.widget-play button').first.click()                      # it plays by itself
    page.wait_for_function(f"() => Number({LINE}.split(' ')[1]) > 4", timeout=60_000)
    assert not page.locator(STDERR).count(), "a traceback or warning in the notebook"


def test_before_after(lab):
    page = lab('x7_before_after.ipynb')
    page.locator('img.widget-image').wait_for(timeout=400_000)
    assert page.evaluate("document.querySelector('img.widget-image').naturalWidth") > 500
    picture = page.evaluate(PICTURE)
    line = page.evaluate(LINE)
    assert "of ids are not the image's" in line and 'after − image' in line

    def handle(name): return page.locator('.widget-inline-hbox').filter(has_text=name).locator('.noUi-handle')
    handle('keep').focus()
    page.keyboard.press('Home')  # nothing is kept: free samples
    picture = changes(page, PICTURE, picture)
    line = changes(page, LINE, line)
    assert line.endswith('no image belongs to them')
    handle('seed').focus()
    page.keyboard.press('ArrowRight')
    picture = changes(page, PICTURE, picture)
    line = changes(page, LINE, line)
    handle('keep').focus()
    page.keyboard.press('End')  # all codes are the image's own
    picture = changes(page, PICTURE, picture)
    line = changes(page, LINE, line)
    assert line.startswith("0.0% of ids are not the image's")
    page.locator('.widget-dropdown select').select_option(index=1)         # its picture, encoded again
    line = changes(page, LINE, line)
    assert not line.startswith('0.0%')
    assert not page.locator(STDERR).count(), "a traceback or warning in the notebook"

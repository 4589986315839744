"What all tests share: the checkout, the recorded values, a browser, and the plain last line"
import hashlib, os, random, shutil
from pathlib import Path

import hypothesis, pytest, torch
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault('TOKKIT_QUIET', '1')
os.environ.setdefault('MPLBACKEND', 'agg')
# a busy machine is not a failure
hypothesis.settings.register_profile('tokkit', deadline=None, derandomize='CI' in os.environ)
hypothesis.settings.load_profile('tokkit')
torch.manual_seed(0)    # for the fixtures of whole modules


@pytest.fixture(scope='session')
def root() -> Path:
    "The checkout"
    return ROOT


@pytest.fixture(scope='session')
def fixtures() -> Path:
    "Recorded values of the reference implementation: `$TOKKIT_FIXTURES`"
    folder = Path(os.environ.get('TOKKIT_FIXTURES') or ROOT.parent/'shared'/'fixtures')
    if not folder.is_dir():
        pytest.skip(f"no recorded values at {folder.name}/: set TOKKIT_FIXTURES to their folder")
    return folder


@pytest.fixture(scope='session')
def photographs(tmp_path_factory):
    "A folder of colour images with two classes and two parts, of several sizes"
    home = tmp_path_factory.mktemp('photographs')
    rng = np.random.default_rng(0)
    for part, n in dict(train=40, test=12).items():
        for kind in ('dark', 'light'):
            (home/part/kind).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 120, (20+i%3, 24, 3), dtype=np.uint8)+(120 if kind == 'light' else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(home/part/kind/f'{i}.png')
    return home


@pytest.fixture(autouse=True)
def own_runs(tmp_path_factory, monkeypatch):
    "No test writes runs into the checkout"
    monkeypatch.setenv('TOKKIT_RUNS', str(tmp_path_factory.mktemp('runs')))


@pytest.fixture(autouse=True)
def same_draws():
    "A test that draws from torch's own generator draws the same every time, whichever tests ran before"
    torch.manual_seed(0)


def chromium_path() -> str:
    "The installed Chromium or Chrome; skips the test when there is none"
    names = ['chromium', 'chromium-browser', 'google-chrome',
             '/Applications/Google Chrome.app/Contents/MacOS/Google Chrome']
    found = next(filter(None, map(shutil.which, names)), None)
    if not found: pytest.skip("no chromium or google-chrome on the PATH (Debian: apt-get install chromium)")
    return found


@pytest.fixture(scope='module')
def browser():
    "A headless browser, shared by the tests of a module: `page = browser.new_page()`"
    executable = chromium_path()
    sync_api = pytest.importorskip('playwright.sync_api', reason="playwright is not installed: pip install "
                                                                 "'tokkit-lab[dev]'")
    with sync_api.sync_playwright() as p:
        chrome = p.chromium.launch(executable_path=executable,
                                   args=['--no-sandbox', '--disable-gpu', '--disable-background-networking'])
        yield chrome
        chrome.close()


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes most of a minute and rarely breaks; a third of them run')
    config.addinivalue_line('markers', 'alike: one of very many of a kind; a third of them run')


def pytest_collection_modifyitems(items):
    """A third of the tests marked `slow` run, and of those marked `alike`, drawn by the contents of the
    package: another state draws others. `TOKKIT_ALL=1` runs all, and so does naming one of them alone"""
    if os.environ.get('TOKKIT_ALL'): return
    sources = b''.join(path.read_bytes() for path in sorted((ROOT/'tokkit').rglob('*.py')))
    draw = random.Random(hashlib.sha256(sources).hexdigest())
    for name in ('slow', 'alike'):
        skip = pytest.mark.skip(reason=f'{name}, and not drawn for this state: TOKKIT_ALL=1 runs it')
        marked = sorted((item for item in items if item.get_closest_marker(name)), key=lambda i: i.nodeid)
        left_out = len(marked)*2//3 if len(marked) > 1 else 0
        for item in draw.sample(marked, left_out): item.add_marker(skip)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With several workers, a file stays on one of them, so that what its tests share is made once;
    the pages are dealt out one by one"""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid:str) -> str:
            file = nodeid.split('::')[0]
            return nodeid if file.endswith('test_run_notebooks.py') else file

    return ByFile(config, log)


def pytest_sessionfinish(session, exitstatus):
    session.config.tokkit_exit = int(exitstatus)


def pytest_unconfigure(config):
    "The last line of a test run, in plain words: N passed, N failed, N skipped"
    reporter = config.pluginmanager.get_plugin('terminalreporter')
    if reporter is None or hasattr(config, 'workerinput') or config.option.collectonly: return
    n = {k: len(reporter.stats.get(k, []))
         for k in ('passed', 'failed', 'error', 'skipped', 'xfailed', 'xpassed')}
    # a run that broke off did not pass
    failed = n['failed']+n['error'] or int(getattr(config, 'tokkit_exit', 1) != 0)
    print(f"{n['passed']+n['xpassed']} passed, {failed} failed, {n['skipped']+n['xfailed']} skipped",
          flush=True)

"The main job, end to end, at its smallest size: `tokkit demo --preset smoke`, and again"
import json, os, subprocess, sys, time
from pathlib import Path

import pytest


def demo(out:Path, seconds:int, *more:str) -> subprocess.CompletedProcess:
    "Run the command as a user does, in a process of its own"
    command = [Path(sys.executable).parent/'tokkit', 'demo', '--preset', 'smoke', '--out', out, *more]
    env = dict(os.environ, OMP_NUM_THREADS='1', TOKKIT_DEVICE='cpu')
    done = subprocess.run(command, cwd=out.parent, env=env, capture_output=True, text=True, timeout=seconds,
                          stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope='module')
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    "A finished demo: its folder, and what it said"
    out = tmp_path_factory.mktemp('demo')/'out'
    return out, demo(out, 900)


def test_demo_leaves_its_report(finished):
    out, done = finished
    reports = {p.name for p in out.rglob('report.*') if p.stat().st_size > 1000}
    assert reports == {'report.ipynb', 'report.html'}
    for metric in ('rFID', 'pFID', 'gFID'):
        assert metric in done.stdout, f"the table on the terminal lacks {metric}"
    assert 'Traceback' not in done.stdout+done.stderr
    assert not list(out.rglob('*.tmp')), "temporary files were left behind"


def test_report_draws_its_formulas(finished, browser):
    "In the file itself: no TeX is left, and nothing is asked for"
    out, _ = finished
    asked = []
    page = browser.new_page()
    page.on('request', lambda r: asked.append(r.url) if not r.url.startswith(('file:', 'data:')) else None)
    page.goto(next(out.rglob('report.html')).as_uri())
    text = page.locator('body').inner_text()
    assert page.locator('math').count() >= 1 and '$\\' not in text and '\\alpha' not in text
    assert not asked
    page.close()


def test_demo_reuses_what_is_finished(finished):
    out, _ = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob('*.safetensors')}
    assert before, "no checkpoint was kept"
    start = time.monotonic()
    demo(out, 300)
    assert {p: p.stat().st_mtime_ns
            for p in out.rglob('*.safetensors')} == before, ("a finished stage was made again")
    assert time.monotonic()-start < 120, "a second call must reuse the finished stages"


@pytest.mark.slow
@pytest.mark.parametrize('generator', ['masked', 'flow'])
def test_demo_with_another_generator(generator, tmp_path):
    "The same story with tokens that are filled in, and with continuous latents"
    small = dict(train_images=300, n=100, n_pfid=100, pairs=100, bootstrap=4)
    done = demo(tmp_path/'out', 600, '--generator', generator,
                *[w for k,v in small.items() for w in ('-p', k, str(v))])
    for metric in ('rFID', 'pFID', 'gFID'):
        assert metric in done.stdout, f"the table on the terminal lacks {metric}"
    config = json.loads(next((tmp_path/'out'/'generator').glob('*/config.json')).read_text())
    assert config['kind'] == f'{generator.capitalize()}Generator'

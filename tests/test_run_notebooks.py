"Every page that is not an experiment runs from top to bottom: one notebook, one process, one case"
import os, signal, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
SECONDS = 600  # a page that takes longer does not belong among the pages that a reader runs
PAGES = [str(p.relative_to(NBS)) for p in sorted(NBS.rglob('*.ipynb'))
         if not (p.parent/'.notest').exists()
         and not any(part.startswith(('_', '.')) for part in p.relative_to(NBS).parts)]
# pages that train for more than a minute
SLOW = {'tutorials/01_first_tokenizer.ipynb', 'tutorials/03_generate.ipynb',
        'tutorials/04_heal_the_decoder.ipynb', 'tutorials/05_measure.ipynb',
        'howto/heal_on_your_own_images.ipynb', 'explain/which_ruler.ipynb', 'ui/08_before_after.ipynb',
        'analysis/06_decoder_sensitivity.ipynb', 'howto/posttrain_your_own_decoder.ipynb'}


def test_slow_pages_are_pages(): assert SLOW <= set(PAGES)


@pytest.mark.parametrize('name', [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
                                  for name in PAGES])
def test_runs(name, tmp_path):
    env = dict(os.environ, OMP_NUM_THREADS='1', TOKKIT_RUNS=str(tmp_path/'runs'), PYTHONPATH=str(ROOT),
               IPYTHONDIR=str(tmp_path/'ipython'))
    code = f"from nbdev.test import nbdev_test; nbdev_test.__wrapped__({str(NBS/name)!r}, n_workers=0)"
    # its own session, so that a notebook that hangs is ended together with whatever it started
    with open(tmp_path/'log', 'w+') as log:
        child = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, env=env, stdout=log,
                                 stderr=subprocess.STDOUT,
                                 stdin=subprocess.DEVNULL, start_new_session=True)
        try: status = child.wait(SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            status = f"stopped after {SECONDS} s"
        log.seek(0)
        said = log.read()
    assert status == 0 and 'Success' in said, f"{name}: {status}\n{said[-4000:]}"

"""Runs a page in a process of its own, forked from one that has imported the large libraries once"""
import multiprocessing, os, signal, sys
from pathlib import Path

# what nearly every page waits for; nothing of tokkit, which a page imports by itself
PRELOADED = ['torch', 'nbdev.test', 'pandas', 'matplotlib.pyplot', 'seaborn', 'scipy.stats', 'accelerate',
             'efficientnet_lite_pytorch', 'einops', 'safetensors.torch', 'sklearn.manifold', 'ipywidgets',
             'nbconvert', 'papermill', 'diffusers']


def _play(page:str, log:str, env:dict[str, str]):
    "In the page's process: what it prints goes to a file"
    os.setsid()             # so that a page that hangs is ended together with whatever it started
    os.environ.update(env)
    written = os.open(log, os.O_WRONLY|os.O_CREAT|os.O_TRUNC)
    for stream in (1, 2): os.dup2(written, stream)
    from nbdev.test import nbdev_test
    nbdev_test.__wrapped__(page, n_workers=0)
    sys.stdout.flush()


def play_page(page:Path, folder:Path, seconds:float) -> tuple[int|str, str]:
    "The page's exit status, or that it was stopped after so many seconds; and what it said"
    log = folder/'log'
    env = dict(OMP_NUM_THREADS='1', TOKKIT_RUNS=str(folder/'runs'), IPYTHONDIR=str(folder/'ipython'))
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOADED)
    child = context.Process(target=_play, args=(str(page), str(log), env))
    child.start()
    child.join(seconds)
    status = child.exitcode
    if status is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.join()
        status = f"stopped after {seconds} s"
    said = log.read_text(encoding='utf-8', errors='replace') if log.is_file() else ''
    return status, said

"Weights that are spread over processes learn what whole ones learn, and their checkpoints are whole"
import json, os, subprocess, sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name('spread_in_processes.py')


def trained(folder:Path, name:str, kind:str, processes:int, last:int = -1, work:str|None = None) -> dict|None:
    "What a training tells, or None where it vanished before its end"
    out = folder/f'{name}.json'
    several = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', processes]
    launcher = several if processes > 1 else []
    words = [sys.executable, *launcher, SCRIPT, out, folder/(work or name), kind, last]
    quiet = dict(os.environ, TORCH_CPP_LOG_LEVEL='ERROR')
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=300, env=quiet)
    if last >= 0: return None
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())|dict(weights=torch.load(out.with_suffix('.pt'), weights_only=True))


@pytest.mark.slow
def test_spread_weights_learn_what_whole_ones_do(tmp_path):
    "In two processes; killed in the second epoch and gone on with, spread again or whole in one process"
    whole = trained(tmp_path, 'whole', 'whole', 2)
    spread = trained(tmp_path, 'spread', 'fsdp', 2)
    assert spread['kinds'] == ['Parameter']         # what comes back is a generator like any other
    torch.testing.assert_close(spread['weights'], whole['weights'], rtol=1e-4, atol=1e-5)
    assert trained(tmp_path, 'killed', 'fsdp', 2, last=6) is None
    assert list((tmp_path/'killed').glob('checkpoint-4.pt'))
    again = trained(tmp_path, 'again', 'fsdp', 2, work='killed')
    assert again['hash'] == spread['hash'] and again['history'] == spread['history']

"""What loading costs: the network takes the file's tensors as its own; each entry can be built so"""
import os, subprocess, sys

import pytest
import torch
from accelerate import init_empty_weights

from tokkit.published import PUBLISHED, by_rules
from tokkit.zoo import load
from tokkit.zoo_generators import GPT_RULES

CODE = """
import sys
from tokkit.zoo import load
def held(line:str) -> int:   # bytes; getrusage would count the process that started this one, too
    return next(int(l.split()[1])*1024 for l in open('/proc/self/status') if l.startswith(line))
before = held('VmRSS')
model = load(sys.argv[1], sys.argv[2])
for parameter in model.parameters(): parameter.sum()       # every page of the file was touched
print(held('VmHWM')-before)
"""


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='reads /proc, as Linux has it')
def test_in_memory_once(tmp_path):
    "At most 1.2 times the file: the generator of 111 M parameters, 444 MB"
    torch.manual_seed(0)
    theirs = {by_rules(name, GPT_RULES): t for name, t in load('llamagen-b-256').state_dict().items()}
    file = tmp_path/'c2i_B_256.pt'
    torch.save(dict(model=theirs), file)
    made = subprocess.run([sys.executable, '-c', CODE, 'llamagen-b-256', str(file)], capture_output=True,
                          text=True, check=True, env=os.environ|dict(OMP_NUM_THREADS='1'))
    assert int(made.stdout) <= 1.2*file.stat().st_size


@pytest.mark.parametrize('name', PUBLISHED)
def test_built_without_memory(name):
    "Parameters without memory; what is computed once and stands in no file is there"
    with init_empty_weights(include_buffers=False): model = PUBLISHED[name].build()
    assert all(parameter.is_meta for parameter in model.parameters())
    filed = set(model.state_dict())
    assert not [key for key, buffer in model.named_buffers() if buffer.is_meta and key not in filed]


def test_tensors_of_the_user_stay_the_users():
    "What was given as tensors is copied: training the model leaves them as they are"
    theirs = {by_rules(name, GPT_RULES): t for name, t in load('llamagen-b-256').state_dict().items()}
    model = load('llamagen-b-256', theirs)
    with torch.no_grad(): model.lm_head.weight.zero_()
    assert theirs['output.weight'].abs().sum() > 0

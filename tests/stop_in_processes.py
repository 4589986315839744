"""Trainings in two processes, of which one is asked to stop: both put them down at the same step, and end as
though nobody had asked; called by test_long_runs.py with a folder and the names of trainings"""
import sys, warnings
from contextlib import nullcontext
from pathlib import Path

import torch

from test_long_runs import ALWAYS, asked, places, same, TRAININGS
from tokkit.generators import ARCfg, ARGenerator
from tokkit.processes import is_main, joined, process_count, process_index, Stopped, stopping
from tokkit.training import GeneratorTraining, TensorPairs, train_generator

folder, *names = sys.argv[1:]
warnings.filterwarnings('error', '.* is damaged')
with joined():
    assert process_count() == 2
    try: train_generator(ARGenerator(ARCfg(n=4, codebook_size=8, classes=2, width=16, depth=1, heads=2)),
                         TensorPairs(torch.zeros(30, 4, dtype=torch.long), torch.zeros(30, dtype=torch.long)),
                         GeneratorTraining(epochs=1, batch=15), device='cpu')
    except ValueError as e: assert str(e) == ("a batch of 15 cannot be shared equally by 2 processes; give "
                                              "batch=14 or batch=16"), e
    else: raise AssertionError('a batch of 15 was taken')
    for name in names:
        train = TRAININGS[name]
        whole = train(Path(folder)/name/'whole')
        broken = Path(folder)/name/'broken'
        for step, who in ((8, 1), (13, 0)):
            with stopping(), asked(step) if process_index() == who else nullcontext():
                try: train(broken, minutes=ALWAYS)
                except Stopped as e: assert e.code == 75 and f'step {step} of 18 is saved' in str(e)
                else: raise AssertionError('nobody heeded the request')
            assert places(broken)[0] == (step, step//6, step%6)
        assert same(train(broken), whole), name
    if is_main(): (Path(folder)/'done').write_text('done')

"""Trainings in two processes, of which one is asked to stop: both put them down at the same step, and end as
though nobody had asked; called by test_long_runs.py with a folder and the names of trainings"""
import sys, warnings
from contextlib import nullcontext
from pathlib import Path

from test_long_runs import asked, places, same, TRAININGS
from tokkit.processes import is_main, joined, process_count, process_index, Stopped, stopping

folder, *names = sys.argv[1:]
warnings.filterwarnings('error', '.* is damaged')
with joined():
    assert process_count() == 2
    for name in names:
        train = TRAININGS[name]
        whole = train(Path(folder)/name/'whole')
        broken = Path(folder)/name/'broken'
        for step, who in ((8, 1), (13, 0)):
            with stopping(), asked(step) if process_index() == who else nullcontext():
                try: train(broken)
                except Stopped as e: assert e.code == 75 and f'step {step} of 18 is saved' in str(e)
                else: raise AssertionError('nobody heeded the request')
            assert places(broken)[0] == (step, step//6, step%6)
        assert same(train(broken), whole), name
    if is_main(): (Path(folder)/'done').write_text('done')

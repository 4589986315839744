"Learning rates against values recorded from the reference implementation"
import json

import numpy as np

from tokkit.training import EpochCosine


def test_learning_rates(fixtures):
    "Main-training and post-training, decoder and discriminator: the rate during every epoch"
    r = json.loads((fixtures/'schedules.json').read_text())
    def rates(name): return np.array(r[name])
    def ours(schedule, peak, n): return np.array([peak*schedule((e+.5)/schedule.epochs) for e in range(n)])
    cases = {'main.lr_gen_during_epoch': (2.4e-4, EpochCosine(200, 1, 1e-5/2.4e-4, 5e-5/2.4e-4)),
             'main.lr_disc_during_epoch': (8e-4, EpochCosine(200, 4, 1e-5/8e-4, 5e-5/8e-4, delay=56)),
             'post.lr_gen_during_epoch': (5e-5, EpochCosine(100, 1, .2, .2)),
             'post.lr_disc_during_epoch': (5e-5, EpochCosine(100, 2, .2, .2))}
    for name,(peak,schedule) in cases.items():
        want = rates(name)
        assert np.allclose(ours(schedule, peak, len(want)), want, rtol=1e-9), name

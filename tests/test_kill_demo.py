"""A demo killed in a stage and called again gives the same bytes:
one stage a run of the tests, drawn by `$TOKKIT_KILL_SEED`"""
import os

import pytest

from kill_demo import check

SMALL = [word for k, v in dict(train_images=300, n=100, n_pfid=100, pairs=150, bootstrap=4).items()
         for word in ('-p', k, str(v))]


@pytest.mark.slow
def test_killed_in_one_stage(tmp_path, capsys):
    seed = int(os.environ.get('TOKKIT_KILL_SEED', '0'))
    said = []
    wrong = check(tmp_path, seed=seed, options=SMALL, say=said.append)
    with capsys.disabled(): print(f'\nseed {seed}, {said[0]}')
    assert not wrong and ': killed after' in said[0], [*said, *wrong]

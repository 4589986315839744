"The paper's recipe in miniature under two processes, each command killed once and called again"
import pytest
from recipe_in_processes import compare, play


@pytest.mark.slow
def test_recipe_in_two_processes(tmp_path):
    """Tokens, samples and cards are those of one process; losses differ by rounding, and by each process's
    own draws of labels that are dropped and of what a discriminator sees"""
    came = play(tmp_path)
    assert all(came.values()), came
    apart = compare(tmp_path)
    assert all(far['rounding'] < .01 and far['game'] < .2 for far in apart.values()), apart

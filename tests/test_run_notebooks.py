"Every page that is not an experiment runs from top to bottom: one notebook, one process, one case"
from pathlib import Path

import pytest
from play_page import play_page

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
        'analysis/06_decoder_sensitivity.ipynb', 'howto/posttrain_your_own_decoder.ipynb',
        'howto/post_train_a_published_tokenizer.ipynb', 'analysis/04_calibration.ipynb',
        'features/03_extractors.ipynb', 'index.ipynb'}


def test_slow_pages_are_pages(): assert SLOW <= set(PAGES)


@pytest.mark.parametrize('name', [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
                                  for name in PAGES])
def test_runs(name, tmp_path):
    status, said = play_page(NBS/name, tmp_path, SECONDS)
    assert status == 0 and 'Success' in said, f"{name}: {status}\n{said[-4000:]}"

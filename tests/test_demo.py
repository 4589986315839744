"The demo's notebook offers what its settings are"
from dataclasses import fields
from pathlib import Path

from tokkit.cli import main
from tokkit.demo import DemoCfg
from tokkit.runs import notebook_params

NOTEBOOK = Path(__file__).resolve().parent.parent/'nbs'/'experiments'/'e00_demo.ipynb'


def test_every_setting_is_a_parameter():
    "In the same order, each left to the preset, each with its help"
    found = notebook_params(NOTEBOOK)
    assert list(found) == ['preset', *(field.name for field in fields(DemoCfg))]
    assert all(p.help for p in found.values())
    assert all(p.default is None for name, p in found.items() if name != 'preset')


def test_command_line_takes_them(tmp_path, capsys):
    "A value that is out of range is refused by the demo, not by a list of names that has fallen behind"
    assert (main(['demo', '--preset', 'smoke', '--out', str(tmp_path), '-p', 'semantic', '.1', '-p',
                  'end_ratio', '2']) == 2)
    assert 'end_ratio must be in [0, 1], got 2.0' in capsys.readouterr().err

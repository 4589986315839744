"The newcomer's names, and how long they take to come"
import subprocess, sys

import pytest

import tokkit


@pytest.mark.parametrize('name', tokkit.__all__)
def test_name_is_importable(name): assert getattr(tokkit, name).__name__.startswith(name)

def test_unknown_name():
    with pytest.raises(AttributeError, match="has no attribute 'Tokeniser'"): tokkit.Tokeniser

def test_importing_tokkit_imports_no_torch():
    done = subprocess.run([sys.executable, '-c', 'import sys, tokkit; print("torch" in sys.modules)'],
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'False'

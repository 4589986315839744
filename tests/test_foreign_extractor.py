"""An extractor and a source of images that another package adds: by one registration in this process, or
by an entry point"""
import json, os, subprocess, sys

import pytest
import torch

from tokkit.cli import main
from tokkit.data import IMAGE_SOURCES, ImageFolder, ImageSet, load_images
from tokkit.features import EXTRACTORS, FeatureExtractor, get_extractor
from tokkit.metrics import rfid
from tokkit.tokenizers import make_tokenizer

# the whole of another package: two functions
PACKAGE = '''
import torch
from tokkit.data import ImageRequest, ImageSet
from tokkit.features import FeatureExtractor

def means(name, size):
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    return FeatureExtractor(name, net, mean=(.5,), std=(.5,))

def noise(asked: ImageRequest):
    shape = (int(asked.where or 64), asked.channels, asked.size or 28, asked.size or 28)
    rng = torch.Generator().manual_seed(len(asked.split))
    return ImageSet(torch.randint(256, shape, generator=rng, dtype=torch.uint8), name=f'noise/{asked.split}')
'''
ENTRY_POINTS = '''
[tokkit.extractors]
means = foreign:means
broken = no_such_module:extractor

[tokkit.data]
noise = foreign:noise
'''


@pytest.fixture
def foreign():
    "The two functions, registered in this process for one test"
    found = {}
    exec(PACKAGE, found)
    EXTRACTORS.register('means', found['means'])
    IMAGE_SOURCES.register('noise', found['noise'])
    yield found
    del EXTRACTORS._things['means'], IMAGE_SOURCES._things['noise']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A saved tokenizer"
    where = tmp_path_factory.mktemp('foreign')/'tok'
    torch.manual_seed(0)
    make_tokenizer('tiny', width=16, depth=1).save(where)
    return where


def words(folder, card) -> list[str]:
    "The command that measures with both"
    return ['metric', 'rfid', '--tokenizer', str(folder), '--data', 'noise:40', '-n', '20',
            '--bootstrap', '0', '--extractor', 'means', '--json', str(card), '--device', 'cpu']


def test_in_this_process(foreign, folder, tmp_path, capsys):
    assert main(words(folder, tmp_path/'card.json')) == 0
    said = json.loads((tmp_path/'card.json').read_text())
    assert said['extractor'].startswith('means') and said['n'] == 20
    assert 'rFID[means]' in (out := capsys.readouterr().out) and 'noise/test' in out


def test_as_functions(foreign, folder):
    tok = make_tokenizer('tiny', width=16, depth=1).eval()
    images = load_images('noise:40', size=28, channels=1)
    card = rfid(tok, images, extractor='means', bootstrap=0, device='cpu')
    mine = rfid(tok, images, extractor=get_extractor('means'), bootstrap=0, device='cpu')
    assert card.value == mine.value and card.extractor.startswith('means')
    assert len(load_images('noise:40', n=7)) == 7                  # whoever forgets n is helped


def test_ifid_finds_its_neighbours_there(foreign, folder, tmp_path):
    "The other part of the data is asked for by the same word"
    asked = words(folder, tmp_path/'card.json')
    asked[1] = 'ifid'
    assert main(asked) == 0


def test_by_an_entry_point(folder, tmp_path):
    "A package that is only installed is found by a new process, and a broken one costs a warning"
    (tmp_path/'foreign.py').write_text(PACKAGE)
    about = tmp_path/'foreign-1.0.dist-info'
    about.mkdir()
    (about/'METADATA').write_text('Metadata-Version: 2.1\nName: foreign\nVersion: 1.0\n')
    (about/'entry_points.txt').write_text(ENTRY_POINTS)
    shell = [sys.executable, '-c', 'import sys; from tokkit.cli import main; sys.exit(main())']
    path = os.pathsep.join([str(tmp_path), *sys.path])
    def tokkit(asked):
        return subprocess.run([*shell, *asked], capture_output=True, text=True, timeout=300,
                              env=os.environ|dict(PYTHONPATH=path))
    done = tokkit(words(folder, tmp_path/'card.json'))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path/'card.json').read_text())['extractor'].startswith('means')
    assert 'broken of no_such_module:extractor cannot be used: ModuleNotFoundError' in done.stderr
    no_such = words(folder, tmp_path/'card.json')
    no_such[5] = 'nowhere'
    done = tokkit(no_such)
    assert done.returncode == 2 and "expected 'fashion_mnist', 'noise' or a folder of images" in done.stderr


def test_a_name_that_is_taken(foreign):
    with pytest.raises(ValueError, match="there is a data source 'fashion_mnist' already"):
        IMAGE_SOURCES.register('fashion_mnist', lambda asked: None)
    with pytest.raises(ValueError, match="there is a feature extractor 'clip' already"):
        EXTRACTORS.register('clip', lambda name, size: None)


@pytest.mark.parametrize('gives, says', [
    (lambda asked: torch.zeros(4, 1, 28, 28), 'gave Tensor; expected an ImageSet'),
    (lambda asked: ImageSet(torch.zeros(4, 1, 9, 9, dtype=torch.uint8)),
     'gave images of 9 pixels, asked for 28')])
def test_a_source_that_errs(gives, says):
    IMAGE_SOURCES.register('erring', gives)
    try:
        with pytest.raises(ValueError, match=says): load_images('erring', size=28)
    finally: del IMAGE_SOURCES._things['erring']


@pytest.mark.parametrize('gives, says', [
    (lambda name, size: torch.nn.Flatten(), 'gave Flatten; expected a FeatureExtractor'),
    (lambda name, size: FeatureExtractor('other', torch.nn.Flatten()), "called 'other', which nobody finds")])
def test_an_extractor_that_errs(gives, says):
    EXTRACTORS.register('erring', gives)
    try:
        with pytest.raises(ValueError, match=says): get_extractor('erring')
    finally: del EXTRACTORS._things['erring']


def test_a_folder_keeps_its_name(tmp_path, monkeypatch):
    "Folders that are called like a source, or have a colon in their names"
    from PIL import Image
    for name in ('fashion_mnist', 'folder', 'a:b'):
        (tmp_path/name).mkdir()
        Image.new('L', (8, 8), 9).save(tmp_path/name/'one.png')
    monkeypatch.chdir(tmp_path)
    for word in ('folder:fashion_mnist', './fashion_mnist', 'folder', 'a:b'):
        assert isinstance(load_images(word, size=8, memory=0.), ImageFolder), word
    assert load_images('fashion_mnist', n=3).name.startswith('fashion_mnist/test')

"""From a folder of photographs to a comparison of plain, perturbed and post-trained, by the commands alone"""
import contextlib, json, os, signal, subprocess, sys, time

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from waiting import wait_for
from tokkit.cli import main
from tokkit.data import TokenCache
from tokkit.metrics import Card, load_samples

CPU = ['--device', 'cpu']

def settings(*words): return [part for word in words for part in ('--set', word)]

SHORT = 'batch=16', 'epochs=1'
TOK = settings('tokenizer.width=16', 'tokenizer.depth=1', 'distribution=0', *SHORT)
GEN = settings('generator.width=16', 'generator.depth=1', *SHORT)


def tokkit(*words): assert main([*map(str, words), *CPU]) == 0, words


@pytest.fixture(scope='module')
def story(photographs, tmp_path_factory):
    "Everything made once: two tokenizers, tokens, a generator, a healed decoder"
    home = tmp_path_factory.mktemp('story')
    for name in ('plain', 'perturbed'):
        tokkit('train', 'tokenizer', '--preset', f'laptop-{name}', '--data', photographs, '--out', home/name,
               *TOK)
    tokkit('encode', '--tokenizer', home/'plain', '--data', photographs, '--out', home/'tokens')
    models = ['--tokenizer', home/'plain', '--generator', home/'gen']
    tokkit('train', 'generator', '--tokenizer', home/'plain', '--tokens', home/'tokens', '--out', home/'gen',
           *GEN)
    tokkit('posttrain', *models, '--data', photographs, '--epochs', 1, '--out', home/'healed')
    return home


def test_tokens_are_those_of_the_images(story, photographs):
    cache = TokenCache.open(story/'tokens')
    assert cache.kind == 'ids' and len(cache) == 80 and cache.classes == ['dark', 'light']
    # found again, and not made again
    before = (story/'tokens'/'tokens.npy').stat().st_mtime_ns
    tokkit('encode', '--tokenizer', story/'plain', '--data', photographs, '--out', story/'tokens')
    assert (story/'tokens'/'tokens.npy').stat().st_mtime_ns == before


def test_samples_are_the_same_in_every_form(story, tmp_path):
    how = ['--tokenizer', story/'plain', '--generator', story/'gen', '-n', 6, '--seed', 3]
    tokkit('sample', *how, '--out', tmp_path/'a.npz')
    tokkit('sample', *how, '--out', tmp_path/'a.safetensors')
    tokkit('sample', *how, '--out', tmp_path/'a')
    pictures = load_samples(tmp_path/'a.npz')
    assert pictures.shape == (3, 32, 32) and pictures.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert load_file(tmp_path/'a.safetensors')['latents'].shape == (6, 64)
    files = sorted((tmp_path/'a').glob('*/*.png'), key=lambda p: p.name)
    assert [f.parent.name for f in files] == ['0000', '0001']*3
    same = np.stack([np.asarray(Image.open(f)) for f in files])
    assert (same == pictures.images.permute(0, 2, 3, 1).numpy()).all()


def test_a_generator_is_measured_as_its_samples_are(story, photographs, tmp_path):
    how = ['--reference', photographs, '--bootstrap', 4, '-n', 20, '--metrics', 'gFID']
    models = ['--tokenizer', story/'plain', '--generator', story/'gen']
    tokkit('evaluate', *models, *how, '--json', tmp_path/'drawn.json')
    tokkit('sample', *models, '-n', 20, '--out', tmp_path/'s.npz')
    tokkit('evaluate', tmp_path/'s.npz', *how, '--json', tmp_path/'read.json')
    drawn, read = (json.loads((tmp_path/f'{name}.json').read_text())[0] for name in ('drawn', 'read'))
    assert drawn['metric'] == read['metric'] == 'gFID' and drawn['n'] == read['n'] == 20
    tokkit('metric', 'gfid', *models, '--data', photographs, '-n', 20, '--bootstrap', 4, '--upscale',
           '--json', tmp_path/'metric.json')
    assert json.loads((tmp_path/'metric.json').read_text())['value'] == drawn['value']
    # bytes in the file, floats in passing
    assert drawn['value'] == pytest.approx(read['value'], rel=.02)
    tokkit('sample', *models, '-n', 20, '--out', tmp_path/'s')
    tokkit('evaluate', tmp_path/'s', *how, '--json', tmp_path/'folder.json')
    folder = json.loads((tmp_path/'folder.json').read_text())[0]
    assert folder['value'] == pytest.approx(read['value']) and folder['extractor'] == read['extractor']


def test_grey_samples_are_measured_against_grey_images(tmp_path):
    tok, gen = tmp_path/'tok', tmp_path/'gen'
    tokkit('train', 'tokenizer', '--n', 64, '--out', tok, *TOK)
    tokkit('train', 'generator', '--tokenizer', tok, '--n', 64, '--out', gen, *GEN)
    tokkit('sample', '--tokenizer', tok, '--generator', gen, '-n', 20, '--out', tmp_path/'s.npz')
    tokkit('evaluate', tmp_path/'s.npz', '--bootstrap', 0, '--metrics', 'gFID')


def test_a_statistic_near_zero_is_compared_by_difference(tmp_path, capsys):
    def file(name, value):
        card = Card('KID', value, .01, 100, 'lite0', 'test', settings=dict(error='bootstrap'))
        (tmp_path/name).mkdir()
        (tmp_path/name/'cards.json').write_text(json.dumps([card.to_dict()]))
        return str(tmp_path/name/'cards.json')
    assert main(['compare', file('a', -.001), file('b', .004)]) == 0
    said = capsys.readouterr()
    assert '+0.005' in said.out and '%' not in said.out and 'clearly higher: none' in said.err
    assert str(tmp_path/'b'/'cards') in said.out


def test_words_that_do_not_go_together(story, photographs, tmp_path, capsys):
    def fails(*words):
        capsys.readouterr()
        assert main([*map(str, words), *CPU]) == 2
        return capsys.readouterr().err
    models = ['--tokenizer', story/'plain', '--generator', story/'gen']
    assert 'takes none' in fails('sample', *models, '--steps', 5, '--out', tmp_path/'s')
    assert 'holds no tokens' in fails('encode', '--tokenizer', story/'plain', '--data', photographs, '--out',
                                      photographs)
    assert 'leave out --data' in fails('train', 'generator', '--tokenizer', story/'plain', '--tokens',
                                       story/'tokens', '--data', photographs, '--out', tmp_path/'g')
    assert 'give --set batch=80' in fails('train', 'tokenizer', '--data', photographs, '--out', tmp_path/'t',
                                          '--set', 'batch=128')
    assert 'flow' in fails('train', 'generator', '--preset', 'laptop-flow', '--tokenizer', story/'plain',
                           '--tokens', story/'tokens', '--out', tmp_path/'g', *settings('batch=16'))
    assert not [p.name for p in tmp_path.iterdir()]


def test_results_are_compared(story, photographs, tmp_path, capsys):
    for name in ('plain', 'healed'):
        tokkit('evaluate', '--tokenizer', story/name, '--generator', story/'gen', '--reference', photographs,
               '--bootstrap', 8, '-n', 20, '--metrics', 'gFID,precision', '--json', tmp_path/f'{name}.json')
    capsys.readouterr()
    assert main(['compare', str(tmp_path/'plain.json'), str(tmp_path/'healed.json'), '--figure',
                 str(tmp_path/'changes.png')]) == 0
    said = capsys.readouterr()
    assert 'gFID' in said.out and 'paired bootstrap' in said.out and '±' in said.out
    assert 'half a 95% interval' in said.err and 'left out' not in said.err
    assert Image.open(tmp_path/'changes.png').size[0] > 300
    assert main(['compare', str(tmp_path/'plain.json')]) == 2
    assert 'needs two files' in capsys.readouterr().err


@pytest.mark.parametrize('words,told', [
    (['evaluate'], 'got neither'),
    (['evaluate', 'x.npz', '--generator', 'g', '--tokenizer', 't'], 'got both'),
    (['evaluate', 'x.npz'], 'x.npz'),
    (['sample', '--tokenizer', 't', '--generator', 'g', '--out', 'a.txt'], 'names a new folder'),
    (['encode', '--tokenizer', 'nowhere', '--out', 'c'], 'nowhere'),
    (['compare', 'a.json', 'b.json'], 'a.json'),
])
def test_bad_words(words, told, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert told in said and len(said.strip().splitlines()) == 1


def test_tokens_of_another_tokenizer_are_refused(story, tmp_path, capsys):
    words = ['--tokenizer', story/'perturbed', '--tokens', story/'tokens', '--out', tmp_path/'g']
    assert main(['train', 'generator', *map(str, words), *GEN, *CPU]) == 2
    assert 'latents of another tokenizer' in capsys.readouterr().err


def test_a_generator_learns_from_several_views(story, photographs, tmp_path):
    tokkit('encode', '--tokenizer', story/'plain', '--data', photographs, '--views', 'ten-crop', '--out',
           tmp_path/'ten')
    cache = TokenCache.open(tmp_path/'ten')
    assert cache.views == 10 and len(cache) == 80 and cache.array.shape == (80, 10, 64)
    tokkit('train', 'generator', '--tokenizer', story/'plain', '--tokens', tmp_path/'ten', '--out',
           tmp_path/'g', *GEN)
    with pytest.raises(SystemExit): main(['encode', '--tokenizer', 'a', '--out', 'b', '--views', 'five'])


@pytest.mark.slow
def test_every_command_is_killed_once_and_finished(story, photographs, tmp_path):
    "The same command again makes what an undisturbed one made, to the byte"
    start = 'import sys; from tokkit.cli import main; sys.exit(main())'
    shell = [sys.executable, '-c', start, *CPU]
    def killed_and_finished(*words, at_work):
        words = [*map(str, words)]
        child = subprocess.Popen([*shell, *words], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                 start_new_session=True)
        wait_for(lambda: at_work() or child.poll() is not None)
        with contextlib.suppress(ProcessLookupError): os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        subprocess.run([*shell, *words], check=True, capture_output=True, timeout=300)
    def working(name): return lambda: any(tmp_path.glob(f'.work-{name}-*/*'))
    def soon():
        begun = time.monotonic()
        return lambda: time.monotonic() > begun+2.
    killed_and_finished('train', 'tokenizer', '--preset', 'laptop-plain', '--data', photographs, '--out',
                        tmp_path/'plain', *TOK, at_work=working('plain'))
    killed_and_finished('encode', '--tokenizer', tmp_path/'plain', '--data', photographs, '--out',
                        tmp_path/'tokens', at_work=soon())
    killed_and_finished('train', 'generator', '--tokenizer', tmp_path/'plain', '--tokens', tmp_path/'tokens',
                        '--out', tmp_path/'gen', *GEN, at_work=working('gen'))
    models = ['--tokenizer', tmp_path/'plain', '--generator', tmp_path/'gen']
    killed_and_finished('posttrain', *models, '--data', photographs, '--epochs', 1, '--out',
                        tmp_path/'healed', at_work=working('healed'))
    killed_and_finished('sample', *models, '-n', 6, '--out', tmp_path/'s.npz', at_work=soon())
    killed_and_finished('evaluate', tmp_path/'s.npz', '--reference', photographs, '-n', 6, '--metrics',
                        'gFID', '--json', tmp_path/'cards.json', at_work=soon())
    cards = tmp_path/'healed'/'cards'
    killed_and_finished('compare', cards/'control.json', cards/'healed.json', '--figure', tmp_path/'c.png',
                        at_work=soon())
    for name in ('plain', 'gen', 'healed', 'healed/control'):
        mine, theirs = (home/name/'model.safetensors' for home in (tmp_path, story))
        assert load_file(mine).keys() == load_file(theirs).keys()
        assert all(a.equal(b) for a,b in zip(load_file(mine).values(), load_file(theirs).values())), name
    assert (tmp_path/'c.png').is_file() and json.loads((tmp_path/'cards.json').read_text())
    left = [p.name for p in tmp_path.iterdir() if p.name.startswith('.') and p.suffix != '.lock']
    assert not left, left

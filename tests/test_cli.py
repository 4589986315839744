"The tokkit command: help that explains, mistakes in one line, runs and tables"
import json, os, re, shutil, signal, subprocess, sys, urllib.request
from pathlib import Path

import pandas as pd
import pytest

from waiting import wait_for
from tokkit import __version__
from tokkit.cli import COMMANDS, command_options, main
from tokkit.cli.options import read_sweep
from tokkit.runs import grid_runs

TINY = Path(__file__).parent/'notebooks'/'tiny.ipynb'
EXPERIMENTS = Path(__file__).parent.parent/'nbs'/'experiments'
SHELL = [sys.executable, '-c', 'import sys; from tokkit.cli import main; sys.exit(main())']


def tokkit(*args, **env) -> subprocess.CompletedProcess:
    "The command in a process of its own"
    return subprocess.run([*SHELL, *map(str, args)], capture_output=True, text=True, timeout=300,
                          env=os.environ | env)

# help
def test_start_is_quick():
    "Asking for help imports neither torch nor pandas"
    code = ("import sys; from tokkit.cli import main\ntry: main(['--help'])\nexcept SystemExit: "
            "pass\nprint([m for m in ('torch','pandas','matplotlib','papermill') if m in sys.modules])")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == '[]', done.stdout

def test_version(capsys):
    with pytest.raises(SystemExit) as e: main(['--version'])
    assert e.value.code == 0 and capsys.readouterr().out == f'tokkit {__version__}\n'

def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit): main(['--help'])
    said = ' '.join(capsys.readouterr().out.split())
    for command in COMMANDS: assert ' '.join([command.__name__.rstrip('_'), command.__doc__]) in said

@pytest.mark.parametrize('command', COMMANDS, ids=lambda c: c.__name__)
def test_every_option_is_explained(command, capsys):
    with pytest.raises(SystemExit) as e: main([command.__name__.rstrip('_'), '--help'])
    said = ' '.join(capsys.readouterr().out.split())
    assert e.value.code == 0 and command.__doc__ in said
    for name, option in command_options(command).items():
        comment = option['docment']
        assert comment and comment in said.replace('- ', '-'), f'{command.__name__} --{name} has no help'

def test_the_shell_finds_it():
    script = Path(sys.executable).parent/'tokkit'
    if not script.exists(): pytest.skip('tokkit is not installed as a command here: pip install -e .')
    assert (subprocess.run([script, '--version'], capture_output=True,
                           text=True).stdout == f'tokkit {__version__}\n')


# mistakes
@pytest.mark.parametrize('words, says', [
    (['run', 'no_such'], "no notebook 'no_such'; there are"),
    (['run', str(TINY), '-p', 'sed', '1'], 'tiny has no parameter sed; it has: alpha=0.5'),
    (['run', str(TINY), '-p', 'seed', 'x'], "parameter seed must be int, like its default 1; got 'x'"),
    (['run', str(TINY), '--out', str(TINY)], 'cannot write below'),
    (['--device', 'gpu', 'run', str(TINY)], "device must be cpu, cuda, cuda:N or mps, got 'gpu'"),
    (['sweep', str(TINY)], 'tokkit sweep needs a grid'),
    (['sweep', str(TINY), '-g', 'seed'], "-g expects NAME=VALUE,VALUE such as alpha=0,.5; got 'seed'"),
    (['sweep', str(TINY), '-g', 'seed=1', '--workers', '0'],
     'workers must be a whole number in 1..1000, got 0'),
    (['metric', 'pfid', '--tokenizer', 'nowhere'], 'nowhere'),
    (['metric', 'rfid', '--tokenizer', 'nowhere', '--deltas', '3'], ''),
    (['metric', 'gfid', '--tokenizer', 'nowhere'], 'gfid needs --generator'),
    (['metric', 'rfid', '--tokenizer', 'nowhere', '--guidance', '2'], '--guidance belong to gfid'),
    (['posttrain', '--tokenizer', 'a', '--generator', 'b', '--out', str(TINY)],
     'is there already; choose another --out'),
    (['demo', '--preset', 'huge'], "preset must be one of"),
])
def test_mistakes_are_one_line(words, says, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith('tokkit: ') and said.count('\n') == 1 and says in said, said

def test_debug_shows_the_traceback():
    done = tokkit('run', 'no_such', TOKKIT_DEBUG='1')
    assert done.returncode == 1 and 'Traceback' in done.stderr and "no notebook 'no_such'" in done.stderr

def test_bugs_are_not_hidden(monkeypatch, tmp_path):
    def broken(*args, **kwargs): raise KeyError('a bug')
    monkeypatch.setattr('tokkit.runs.collect', broken)
    monkeypatch.setenv('TOKKIT_DEBUG', '1')
    with pytest.raises(KeyError): main(['results', str(tmp_path)])


# runs, sweeps, tables
def test_run_sweep_results(tmp_path, capsys):
    out = ['--out', str(tmp_path/'runs')]
    assert main(['run', str(TINY), '-p', 'seed', '3', '-p', 'deltas', '1,2', *out]) == 0
    said = capsys.readouterr().out
    assert 'rFID' in said and Path(said.splitlines()[-1]).name.startswith('seed3-deltas1+2-')
    (tmp_path/'two.yaml').write_text(f'notebook: {TINY}\ngrid:\n  seed: [1, 2]\nparams:\n  mode: '
                                     'fail2\nworkers: 2\n')
    assert main(['sweep', str(tmp_path/'two.yaml'), '--devices', 'cpu', *out]) == 1  # seed 2 fails
    said = capsys.readouterr()
    assert 'ValueError: delta must be in [1, 64]' in said.err and '1 done, 1 failed' in said.err
    assert main(['sweep', str(TINY), '-g', 'seed=1', '-p', 'mode', 'fail2', *out]) == 0
    assert '1 reused' in capsys.readouterr().err
    assert main(['results', str(tmp_path/'runs'), '--csv', str(tmp_path/'all.csv')]) == 0
    said = capsys.readouterr()
    # constant, so named once
    assert ('left out: tiny/seed2' in said.err and '2 runs, 2 values' in said.err
            and said.out.count('experiment tiny') == 1)
    table = pd.read_csv(tmp_path/'all.csv')
    assert (sorted(table.seed) == [1, 3]
            and {'metric','value','run_id','commit','alpha','deltas'} <= set(table))

@pytest.mark.parametrize('text, says',
                         [('notebook: [', 'not valid YAML'),
                          ('grid: {seed: [1]}', 'must have notebook and grid'),
                          ('notebook: x\ngrid: {}\nworker: 2', 'worker'),
                          ('grid: {seed: 1}\nnotebook: a\ngrid: {seed: 2}', 'it has the key grid twice'),
                          ('notebook: a\ngrid: 5', 'Expected object | array, got int'),
                          ('notebook: a\ngrid: {1: [2]}', 'Expected str'),
                          ('notebook: a\ngrid: {}\nworkers: two', 'Expected int | null, got str'),
                          ('notebook: a\ngrid: &g {seed: [*g]}', 'its aliases (*name) unfold to more than')])
def test_damaged_sweep_files(tmp_path, text, says, capsys):
    (tmp_path/'s.yaml').write_text(text)
    assert main(['sweep', str(tmp_path/'s.yaml')]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count('\n') == 1

@pytest.mark.parametrize('path', sorted(EXPERIMENTS.glob('*.yaml')), ids=lambda p: p.stem)
def test_every_published_sweep_can_be_called(path):
    "Its file is read, and each of its points is one of its notebook"
    spec = read_sweep(path)
    assert grid_runs(spec['notebook'], spec['grid'], spec.get('params'))

def test_run_lists_experiments_and_their_parameters(capsys):
    assert main(['run']) == 0
    assert 'e10_dose_of_error ' in capsys.readouterr().out
    assert main(['run', 'e10_dose_of_error', '--help']) == 0
    said = capsys.readouterr().out
    assert said.startswith('e10_dose_of_error: ') and 'sigma 0.9' in said
    assert main(['run', 'no_such_notebook', '--help']) == 2
    assert 'no notebook' in capsys.readouterr().err

def test_a_parameter_is_given_as_one_word_or_as_two(tmp_path, capsys):
    folders = []
    for words in (['-p', 'alpha=.25'], ['-p', 'alpha', '.25']):
        assert main(['run', str(TINY), *words, '--out', str(tmp_path)]) == 0
        folders.append(capsys.readouterr().out.splitlines()[-1])
    assert len(set(folders)) == 1 and 'alpha0.25' in folders[0]

def test_results_of_nothing(tmp_path, capsys):
    assert main(['results', str(tmp_path)]) == 0 and 'no finished runs' in capsys.readouterr().err

def test_interrupt_says_how_to_go_on(tmp_path):
    "Ctrl-C ends the runs at work, says one line, and a second call does what is missing"
    gate = tmp_path/'gate'
    words = ['sweep', TINY, '-g', 'seed=1,2', '-p', 'mode', 'wait', '-p', 'gate', gate, '--out',
             tmp_path/'runs']
    first = subprocess.Popen([*SHELL, *map(str, words)], stderr=subprocess.PIPE, text=True, env=os.environ
                             | dict(TOKKIT_QUIET='1'))
    kernel = int(wait_for(lambda: gate.with_suffix('.pids').exists()
                          and gate.with_suffix('.pids').read_text()).split()[0])
    first.send_signal(signal.SIGINT)
    said = first.communicate(timeout=60)[1]
    assert (first.returncode == 130 and 'interrupted; the same command goes on from here' in said
            and 'Traceback' not in said)
    wait_for(lambda: not Path(f'/proc/{kernel}').exists() if sys.platform == 'linux' else True, 10)
    gate.with_suffix('.open').write_text('')
    done = tokkit(*words)
    assert done.returncode == 0 and '2 done' in done.stderr, done.stderr


# a tokenizer of one's own, on a folder of one's own
@pytest.fixture(scope='module')
def own(tmp_path_factory):
    "A folder of colour images, an untrained tokenizer of such images and a generator of its tokens"
    import numpy as np, torch
    from PIL import Image
    from tokkit.generators import ARCfg, ARGenerator
    from tokkit.tokenizers import make_tokenizer
    from tokkit.core import save_model
    home = tmp_path_factory.mktemp('own')
    draw = np.random.default_rng(0)
    for i in range(120):
        (home/'images'/f'class{i%2}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (40, 36, 3),
                                      dtype=np.uint8)).save(home/'images'/f'class{i%2}'/f'{i:03d}.png')
    tok = make_tokenizer('tiny', size=28, channels=3, width=32, depth=1, codebook_size=32).eval()
    tok.save(home/'tokenizer')
    torch.manual_seed(0)
    save_model(ARGenerator(ARCfg(tok.spec.shape[0], 32, 2, 32, 1)), home/'generator')
    return home

def test_metric_on_a_folder(own, tmp_path, capsys):
    words = ['--device', 'cpu', 'metric', 'pfid', '--tokenizer', str(own/'tokenizer'), '--data',
             str(own/'images'), '--deltas', '2,4', '--alphas', '.5,1', '--json', str(tmp_path/'card.json')]
    assert main(words) == 0
    card = json.loads((tmp_path/'card.json').read_text())
    assert card['metric'] == 'pFID' and card['n'] == 120 and len(card['cells']) == 4 and card['se'] > 0
    said = capsys.readouterr().out.splitlines()
    assert (said[0].startswith('pFID[') and said[1].startswith('95% intervals: ')
            and 'prediction, for another seed' in said[1])
    assert (main(['metric', 'rfid', '--tokenizer', str(own/'tokenizer'), '--data', str(own/'images'),
                  '--deltas', '2']) == 2)
    assert '--deltas belong to pfid' in capsys.readouterr().err
    assert main(['metric', 'rfid', '--tokenizer', str(own/'tokenizer'), '--data', str(own/'nowhere')]) == 2
    assert capsys.readouterr().err.count('\n') == 1

@pytest.mark.slow
def test_every_metric_on_a_folder(own, tmp_path, capsys):
    from tokkit.data import load_images
    from tokkit.features import default_extractor, extract
    from tokkit.features import FeatureStats
    from tokkit.metrics import save_stats
    def said(metric, *more, n=60):
        words = ['--device', 'cpu', 'metric', metric, '--tokenizer', own/'tokenizer', '--data', own/'images',
                 '-n', n, '--bootstrap', 0, *more]
        code = main([*map(str, words)])
        out = capsys.readouterr()
        return out.out.splitlines() if code == 0 else out.err
    (first,), (again,), (other,) = said('rfid'), said('rfid'), said('rfid', '--seed', 1)
    assert first == again != other and 'n=60' in first
    assert 'no train and test parts, and 0 images beside the 120 measured' in said('ifid', n=120)
    # the other half are the neighbours
    near, = said('ifid', '--top-k', 1)
    assert near.split()[1] != first.split()[1]
    assert 'are among the training images' in said('ifid', '--train', own/'images'/'class0', '--top-k', 3)
    table = said('all', '--deltas', '2,4', '--alphas', '.5', '--json', tmp_path/'all.json')
    cards = [c['metric'] for c in json.loads((tmp_path/'all.json').read_text())]
    assert (len(table) == len(cards)
            and {'rFID', 'pFID', 'KID', 'coverage', 'SSIM', 'perplexity'} <= set(cards) and 'iFID' in cards)
    table = said('all', '--deltas', '2', '--alphas', '.5', n=120)
    assert not any(l.startswith('iFID') for l in table) and len(table) == 12  # nobody left to be a neighbour
    x = load_images(own/'images', size=28)
    stats = FeatureStats.from_features(extract(default_extractor(28), x, 'cpu'), default_extractor(28).name)
    save_stats(tmp_path/'reference.npz', stats)
    (line,) = said('rfid', '--reference', tmp_path/'reference.npz')
    assert 'statistics' in line
    assert '--top-k belong to ifid; got rfid' in said('rfid', '--top-k', 2)

def test_posttrain_on_a_folder(own, tmp_path, capsys, monkeypatch):
    from tokkit.core import mark
    def killed(*args, **kwargs): raise KeyboardInterrupt
    words = ['--device', 'cpu', 'posttrain', '--tokenizer', str(own/'tokenizer'), '--generator',
             str(own/'generator'), '--data', str(own/'images'),
             '-n', '64', '--epochs', '1', '--out', str(tmp_path/'healed')]
    assert (main([*words, '--sigma', '90']) == 2
            and 'sigma must be in [0, 1], got 90' in capsys.readouterr().err)
    for wrong, message in (('--lora -1', 'lora must be in'), ('--lora 5000', 'lora must be in'),
                           ('--freeze official --lora 2', 'knows no lora'),
                           ('--freeze official --source reencode', "give pairs with source='tokens'"),
                           ('--mode unpaired --distribution 0', 'got --distribution 0'),
                           ('--mode unpaired --consistency -1', 'consistency must be in')):
        assert main([*words, *wrong.split()]) == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "refused before a pair is made"
    with monkeypatch.context() as m:                                        # a call killed while it trains
        m.setattr('tokkit.recipes.posttraining.posttrain_decoder', killed)
        assert main(words) == 130
    assert ({p.name[:13] for p in tmp_path.iterdir()} == {'.work-healed-'}
            and len(list(tmp_path.glob('.work-*/pairs/part*'))) == 1)
    mark(tmp_path/'.healed.99999999-170000000000.tokkit-tmp')                # `kill -9` leaves one
    assert main(words) == 0 and [p.name
                                 for p in tmp_path.iterdir()] == ['healed'], ("nothing is left, the pairs of "
                                                                              "the killed call neither")
    from tokkit.tokenizers import Tokenizer
    before = Tokenizer.load(own/'tokenizer').state_dict()
    after = Tokenizer.load(tmp_path/'healed').state_dict()
    moved = {k.split('.')[0] for k in before if not before[k].equal(after[k])}
    assert moved == {'decoder'}, moved
    capsys.readouterr()
    assert main(words) == 0                                       # found again, and not made again
    told = capsys.readouterr().err
    assert 'was there already, made by the same recipe' in told
    gain = r'against the control: gFID\[efficientnet_lite0.* -> .*%\); gFID\[spectrum\]'
    assert re.search(gain, told), told
    assert main([*words, '--lr', '1e-4']) == 2
    assert 'training.lr is 0.001 there and 0.0001 here; choose another --out' in capsys.readouterr().err

@pytest.mark.slow
def test_the_control_saw_clean_tokens(own, tmp_path, capsys):
    from tokkit.tokenizers import Tokenizer
    words = ['--device', 'cpu', 'posttrain', '--tokenizer', str(own/'tokenizer'), '--generator',
             str(own/'generator'), '--data', str(own/'images'), '--epochs', '2']
    assert main([*words, '--out', str(tmp_path/'one')]) == 0
    assert main([*words, '--sigma', '.5', '--out', str(tmp_path/'other')]) == 0
    one, other = (Tokenizer.load(tmp_path/name/'control').state_dict() for name in ('one', 'other'))
    assert all(one[k].equal(other[k]) for k in one), "the generator's tokens are nothing to the control"
    healed = Tokenizer.load(tmp_path/'one').state_dict()
    assert any(not healed[k].equal(one[k]) for k in one)
    cards = {p.stem for p in (tmp_path/'one'/'cards').iterdir()}
    assert cards == {'before', 'control', 'healed'}
    assert main([*words, '--no-control', '--out', str(tmp_path/'alone')]) == 0
    assert 'against the untouched decoder: gFID' in capsys.readouterr().err
    assert not (tmp_path/'alone'/'control').exists()

@pytest.mark.slow
def test_posttrain_takes_the_loss_of_the_tokenizers_recipe(own, tmp_path, capsys):
    from tokkit.recipes import preset, read_recipe, with_changes, write_recipe
    tok = tmp_path/'tok'
    shutil.copytree(own/'tokenizer', tok)
    losses = dict(distribution=.5, reconstruction_kind='l1')
    base = with_changes(preset('laptop-plain'), dict(training=losses))
    write_recipe(base, tok/'recipe.yaml')
    words = ['--device', 'cpu', 'posttrain', '--tokenizer', str(tok), '--generator', str(own/'generator'),
             '--data', str(own/'images'), '--epochs', '1']
    assert main([*words, '--out', str(tmp_path/'healed')]) == 0
    assert 'the loss: l1 1, efficientnet_lite2 0.1, frechet 0.5' in capsys.readouterr().err
    made = read_recipe(tmp_path/'healed'/'recipe.yaml', 'decoder')
    assert (made.training.distribution, made.training.reconstruction_kind) == (.5, 'l1')
    assert (made.training.epochs, made.training.lr) == (1, 1e-3)
    # the recipe that is written makes the same again
    assert main([*words[:-4], '--config', str(tmp_path/'healed'/'recipe.yaml'), '--out',
                 str(tmp_path/'again')]) == 0
    weights = [(tmp_path/name/'model.safetensors').read_bytes() for name in ('healed', 'again')]
    assert weights[0] == weights[1]

@pytest.mark.slow
def test_a_healed_tokenizer_is_healed_again(own, tmp_path, capsys):
    words = ['--device', 'cpu', 'posttrain', '--generator', str(own/'generator'), '--data', str(own/'images'),
             '--epochs', '1']
    first = [*words, '--tokenizer', str(own/'tokenizer'), '--out', str(tmp_path/'one'), '--no-control',
             '--set', 'perceptual_size=48', '--set', 'perceptual=.2']
    assert main(first) == 0
    capsys.readouterr()
    assert main([*words, '--tokenizer', str(tmp_path/'one'), '--out', str(tmp_path/'two')]) == 0
    said = capsys.readouterr().err
    assert 'efficientnet_lite2 0.2' in said and 'measured on images that the decoders learned from' in said
    from tokkit.recipes import read_recipe
    assert read_recipe(tmp_path/'two'/'recipe.yaml').training.perceptual_size == 48, "the loss is not changed"
    for wrong, message in ((['begin_discriminator=nowhere'], 'no file nowhere'),
                           (['images=/data'], 'images is a group of settings'),
                           (['images.augment=true'], 'belongs to the training of a tokenizer')):
        assert main([*words, '--tokenizer', str(own/'tokenizer'), '--out', str(tmp_path/'three'),
                     '--set', *wrong]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob('*three*'))

@pytest.mark.parametrize('words',
                         [['metric', 'rfid'],
                          ['posttrain', '--generator', '{own}/generator', '--out', '{out}/healed']])
def test_grey_images_for_a_tokenizer_of_colours(own, tmp_path, capsys, words):
    words = [w.format(own=own, out=tmp_path) for w in words]
    assert main(['--device', 'cpu', *words, '--tokenizer', str(own/'tokenizer')]) == 2
    assert ('is grey; this tokenizer takes 3 channels: give a folder' in capsys.readouterr().err
            and not list(tmp_path.iterdir()))

def test_posttrain_refuses_classes_the_generator_does_not_know(own, tmp_path, capsys):
    more = tmp_path/'more'
    shutil.copytree(own/'images', more)
    shutil.copytree(more/'class1', more/'class2')
    assert main(['--device', 'cpu', 'posttrain', '--tokenizer', str(own/'tokenizer'), '--generator',
                 str(own/'generator'), '--data', str(more),
                 '-n', '64', '--out', str(tmp_path/'healed')]) == 2
    assert (f'{more} has 3 classes, the generator knows 2; give --data' in capsys.readouterr().err
            and list(tmp_path.iterdir()) == [more])

@pytest.mark.parametrize('choice',
                         [['--source', 'tokens'], ['--freeze', 'official'], ['--distribution', '1'],
                          ['--mode', 'unpaired', '--distribution', '.1']], ids=' '.join)
def test_every_way_of_posttrain(own, tmp_path, choice):
    # two steps: the last layer of the head starts at zero, so those before it move in the second
    from tokkit.posttraining import robustok_trainable
    from tokkit.tokenizers import Tokenizer
    assert main(['--device', 'cpu', 'posttrain', '--tokenizer', str(own/'tokenizer'), '--generator',
                 str(own/'generator'), '--data', str(own/'images'),
                 '-n', '64', '--epochs', '2', '--out', str(tmp_path/'healed'), *choice]) == 0
    tok = Tokenizer.load(own/'tokenizer')
    before = tok.state_dict()
    after = Tokenizer.load(tmp_path/'healed').state_dict()
    learn = ({k for k, _ in tok.named_parameters() if k.startswith('decoder.')} if 'official' not in choice
             else set(robustok_trainable(tok)))
    moved = {k for k, _ in tok.named_parameters() if not before[k].equal(after[k])}
    assert moved and moved <= learn and len(moved) > .9*len(learn), moved ^ learn


@pytest.mark.parametrize('shell', ['bash', 'zsh'])
def test_the_tab_key_knows_every_command(shell, capsys):
    assert main(['completion', shell]) == 0
    said = capsys.readouterr().out
    for command in COMMANDS: assert command.__name__.rstrip('_') in said
    assert '--preset' in said

def test_short_names_stand_for_folders(own, tmp_path, capsys, monkeypatch):
    from tokkit.core import write_json
    runs = tmp_path/'runs'
    for kind in ('tokenizer', 'generator'): shutil.copytree(own/kind, runs/kind/'mine-plain-0a1b2c3d4e')
    places = {kind: dict(plain=f'{kind}/mine-plain-0a1b2c3d4e') for kind in ('tokenizer', 'generator')}
    write_json(runs/'demo'/'models.json', places)
    monkeypatch.setenv('TOKKIT_RUNS', str(runs))
    assert main(['list', 'models', '--format', 'csv']) == 0
    assert 'plain@demo' in capsys.readouterr().out
    out = str(tmp_path/'s.npz')
    for tok,gen in (('plain@demo', 'plain@demo'), ('mine-plain@0a', 'mine-plain@0a1b2c')):
        assert main(['--device', 'cpu', 'sample', '--tokenizer', tok, '--generator', gen, '-n', '2', '--out',
                     out]) == 0
        os.remove(out)
    assert main(['metric', 'rfid', '--tokenizer', 'robust@demo']) == 2
    assert "no tokenizer 'robust'; it has plain" in capsys.readouterr().err

@pytest.mark.parametrize('format, reads', [('json', json.loads), ('csv', lambda text: text.splitlines()[1:]),
                                           ('md', lambda text: text.splitlines()[2:])])
def test_tables_in_other_forms(own, capsys, format, reads):
    words = ['--device', 'cpu', 'metric', 'rfid', '--tokenizer', str(own/'tokenizer'), '--data',
             str(own/'images'), '-n', '32', '--bootstrap', '4', '--format', format]
    assert main(words) == 0
    assert len(reads(capsys.readouterr().out)) == 1
    assert main(['list', 'recipes', '--format', format]) == 0
    assert len(reads(capsys.readouterr().out)) > 5


# leftovers, lab
def test_clean_leaves_what_is_in_use(tmp_path, capsys):
    from tokkit.core import locked, mark
    for name in ('idle/.work-1', 'idle/.a-1.99999999-170000000000.tokkit-tmp', 'idle/b-2.failed', 'idle/c-3',
                 'busy/.work-4'):
        mark(tmp_path/name)
    with locked(tmp_path/'busy'/'d-4', 'run d-4'):
        assert main(['clean', str(tmp_path), '--yes']) == 0
        assert f'left alone: busy: process {os.getpid()} is at work' in capsys.readouterr().err
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.glob('*/*')) == ['busy/.work-4', 'idle/c-3']

def test_lab_answers_on_this_machine_alone(tmp_path):
    import socket
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    lab = subprocess.Popen([*SHELL, 'lab', '--port', str(port), '--no-browser'], stderr=subprocess.PIPE,
                           stdout=subprocess.PIPE, text=True,
                           env=os.environ
                           | dict(JUPYTER_TOKEN='for-this-test', JUPYTER_RUNTIME_DIR=str(tmp_path)))
    def answers():
        try: return json.load(urllib.request.urlopen(f'http://127.0.0.1:{port}/api', timeout=2))
        except OSError:
            assert lab.poll() is None, lab.stderr.read()
            return None
    try:
        assert wait_for(answers, 90)['version']
        names = json.load(urllib.request.urlopen(f'http://127.0.0.1:{port}/api/contents?token=for-this-test',
                                                 timeout=10))['content']
        assert any(o['name'].startswith('x1') for o in names)
        addresses = ([line.split()[1] for line in Path('/proc/net/tcp').read_text().splitlines()[1:]
                      if line.split()[1].endswith(f':{port:04X}')] if sys.platform == 'linux' else [])
        assert all(a.startswith('0100007F') for a in addresses)
    finally:
        lab.terminate()
        lab.wait(20)

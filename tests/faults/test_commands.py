"""What a command line can get wrong: a table of words, the exit code, and what the one line must say

`{own}` is a folder with images, a tokenizer and a generator; `{tmp}` an empty folder of the case; `{tiny}`
a notebook for tests.
"""
import shutil
from pathlib import Path

import pytest
from conftest_faults import TINY, make_images

TOK = '--tokenizer {own}/tokenizer'
GEN = '--generator {own}/generator'
METRIC = f'metric rfid {TOK} --data {{own}}/images'
HEAL = f'posttrain {TOK} {GEN} --data {{own}}/images --out {{tmp}}/healed'

TABLE = [ # words, exit code, what is said
    # runs
    ('sweep', 2, 'required: notebook'), ('run {tmp}', 2, 'no notebook'),
         ('run {tmp}/no.ipynb', 2, 'no notebook'), ('run e99', 2, "no notebook 'e99'; there are"),
    ('run {tiny} -p', 2, 'expected 2 arguments'), ('run {tiny} -p seed', 2, 'expected 2 arguments'),
         ('run {tiny} -p seed x', 2, "parameter seed must be int"),
    ('run {tiny} -p seed 1.5', 2, 'parameter seed must be int'),
         ('run {tiny} -p seed true', 2, 'parameter seed must be int'),
         ('run {tiny} -p seed [1]', 2, 'parameter seed must be int'),
    ('run {tiny} -p seed {{[1]:2}}', 2, 'parameter seed must be int'),
         ('run {tiny} -p alpha {{[1]:2}}', 2, 'parameter alpha must be float'),
    ('run {tiny} -p alpha nan', 2, 'parameter alpha must be float'),
         ('run {tiny} -p alpha None', 2, 'parameter alpha must be float'),
         ('run {tiny} -p deltas 1,x', 2, 'parameter deltas[1] must be int'),
    ('run {tiny} -p sed 1', 2, 'tiny has no parameter sed; it has: alpha'),
         ('run {tiny} -p seed 1 -p seed 2', 2, '-p seed is given 2 times'),
    ('run {tiny} --threads 0', 2, 'threads must be a whole number in 1..4096, got 0'),
         ('run {tiny} --threads -1', 2, 'threads must be'),
         ('run {tiny} --threads x', 2, "invalid int value: 'x'"),
    ('run {tiny} --device gpu', 2, "device must be cpu, cuda, cuda:N or mps, got 'gpu'"),
         ('run {tiny} --device -1', 2, 'device must be'), ('run {tiny} --device cpu:3x', 2, 'device must be'),
    ('run {tiny} --out {tiny}', 2, 'cannot write below'),
         ('run {tiny} --colour', 2, 'unrecognized arguments'), ('fly', 2, 'invalid choice'),
         ('', 2, 'required: COMMAND'),
    # sweeps
    ('sweep {tiny}', 2, 'needs a grid'), ('sweep {tiny} -g seed', 2, '-g expects NAME=VALUE,VALUE'),
         ('sweep {tiny} -g =1', 2, '-g expects'), ('sweep {tiny} -g seed=', 2, 'no values for seed'),
    ('sweep {tiny} -g seed=1,1', 2, "seed has the value '1' twice"),
         ('sweep {tiny} -g seed=1 -g seed=2', 2, '-g seed is given twice'), ('sweep {tiny} -g seed=1 -p '
                                                                             'alpha 1 -p alpha 2', 2,
                                                                             '-p alpha is given 2 times'),
    ('sweep {tiny} -g deltas=[1,2', 2, "cannot read '[1,2'"),
         ('sweep {tiny} -g deltas=[{{[1]:2}}]', 2, 'cannot read'),
         ('sweep {tiny} -g sed=1', 2, 'no parameter sed'), ('sweep {tiny} -g seed=x', 2, 'seed must be int'),
    ('sweep {tiny} -g seed=1 --workers 0', 2, 'workers must be a whole number in 1..1000, got 0'),
         ('sweep {tiny} -g seed=1 --workers -3', 2, 'got -3'),
         ('sweep {tiny} -g seed=1 --workers 1e9', 2, 'invalid int value'),
    ('sweep {tiny} -g seed=1 --minutes nan', 2, 'minutes must be in [0, 1e+06], got nan'),
         ('sweep {tiny} -g seed=1 --minutes -1', 2, 'minutes must be in'), ('sweep {tiny} -g seed=1 '
                                                                            '--threads -1', 2,
                                                                            'threads must be'),
    ('sweep {tiny} -g seed=1 --devices ,', 2, 'comma-separated'),
         ('sweep {tiny} -g seed=1 --devices gpu', 2, 'device must be'),
         ('sweep {tmp}/no.yaml', 2, 'No such file'),
    # tables, cleaning, pages
    ('results {tmp}/no', 2, 'no folder'), ('verify {tmp}/no', 2, 'no folder'),
         ('clean {tmp}/no', 2, 'no folder'), ('results {tiny}', 2, 'no folder'),
         ('results {tmp} --csv {own}', 2, 'is a folder; give the name of a file'),
    ('results {tmp}', 0, 'no finished runs below'), ('clean {tmp}', 0, 'nothing to clean'),
         ('clean {tmp} --all --yes', 0, 'nothing to clean'),
         ('verify {tmp}', 0, '0 folders compared, 0 damaged, 0 without checksums'),
    ('lab --port 99999', 2, 'port must be a whole number in 1..65535, got 99999'),
         ('lab --port 0', 2, 'port must be'), ('lab --port -1', 2, 'port must be'),
         ('lab --port x', 2, 'invalid int value'),
    ('docs --out {tiny}', 2, 'not built'),
    # the demo: everything is checked before the first stage
    ('demo --preset huge', 2, 'preset must be one of smoke, default'),
         ('demo --generator gan', 2, 'invalid choice'),
         ('demo --preset smoke -p delta 0 --out {tmp}', 2, 'delta must be a whole number'),
    ('demo -p preset smoke', 2, '-p preset has an option of its own'),
         ('demo -p generator ar', 2, '-p generator has an option'),
    *((f'demo --preset smoke --out {{tmp}} -p {name} {value}', 2, said) for name, value, said in [
        ('extractor', 'foo', 'extractor must be'), ('n_pfid', '0', 'n_pfid must be'), ('n_pfid', '1',
                                                                                       'n_pfid must be'),
                                                                                                  ('n', '1',
                                                                                                   'n must be'), ('n', '-3', 'n must be'), ('bootstrap', '-1', 'bootstrap must be'),
        ('delta', '-5', 'delta must be'), ('delta', '2.5', 'delta must be int'), ('delta', '513', 'delta must be a whole number in 1..512'), ('alpha', '2', 'alpha must be in [0, 1], got 2'), ('alpha', '-0.1', 'alpha must be'),
        ('beta', '25', 'beta must be in [0, 1], got 25'), ('sigma', '0', 'sigma 0 keeps nothing'), ('sigma', '90', 'sigma must be in [0, 1], got 90'), ('source', 'x', 'source must be one of'), ('pairs', '10', 'post-training takes 64 pairs'),
        ('pairs', '0', 'pairs must be'), ('batch', '0', 'batch must be'), ('batch', '5000', 'post-training takes 5000 pairs'), ('branch_epochs', '0', 'branch_epochs must be'), ('generator_epochs', '-1', 'generator_epochs must be'),
        ('base_epochs', '-1', 'base_epochs must be'), ('post_epochs', '0', 'post_epochs must be'), ('width', '7', 'heads must divide'), ('width', '0', 'width must be'), ('depth', '0', 'depth must be'), ('depth', '1000000000', 'depth must be'),
        ('codebook_size', '-4', 'codebook_size must be'), ('codebook_size', '100000000000', 'codebook_size must be'), ('tokenizer', 'mine', 'mine'), ('tokenizer', 'tiny-kl', 'ar makes ids'), ('guidance', '-1', 'guidance must be'),
        ('power', '0', 'power must be > 0'), ('temperature', '0', 'temperature must be'), ('generator_lr', '0', 'generator_lr must be'), ('perceptual', '-1', 'perceptual must be'), ('adversarial', '-1', 'adversarial must be'),
        ('perceptual_every', '0', 'perceptual_every must be'), ('train_images', '0', 'train_images must be'), ('strength', '-1', 'strength must be'), ('size', '20', 'size must be at least 28'), ('data', '{tmp}/no', 'no data'),
        ('data', '{own}/generator', 'no images in'), ('seed', 'x', 'seed must be int'), ('nothing', '1', 'has no parameter nothing')]),
    # measuring
    (METRIC.replace('rfid', 'fid'), 2, 'invalid choice'), ('metric rfid', 2, 'required: --tokenizer'), ('metric rfid --tokenizer {tmp}/no', 2, 'holds no saved Tokenizer'), ('metric rfid --tokenizer {own}', 2, 'below it are generator, tokenizer'),
    ('metric rfid --tokenizer {own}/generator --data {own}/images', 2, 'holds a ARGenerator, expected a Tokenizer'), (f'metric rfid {TOK}', 2, 'is grey; this tokenizer takes 3 channels'), (f'metric rfid {TOK} --data {{tmp}}/no', 2, 'no data'),
    (f'metric rfid {TOK} --data {{tmp}}', 2, 'no images in'), (f'metric rfid {TOK} --data {{tiny}}', 2, 'no data'), (f'{METRIC} -n 1', 2, 'n must be in 2..64'), (f'{METRIC} -n 0', 2, 'n must be in'), (f'{METRIC} -n 65', 2, 'n must be in 2..64'),
    (f'{METRIC} -n x', 2, 'invalid int value'), (f'{METRIC} --bootstrap -1', 2, 'bootstrap must be a whole number in 0..100000, got -1'), (f'{METRIC} --bootstrap 1000000000', 2, 'bootstrap must be'), (f'{METRIC} --extractor foo', 2, 'extractor must be'),
    (f'{METRIC} --extractor inception', 2, 'tokkit-lab[pretrained]'), (f'{METRIC} --split dev', 2, 'invalid choice'), (f'{METRIC} --reference {{tmp}}/no.npz', 2, 'no file'), (f'{METRIC} --reference {{tiny}}', 2, 'tiny.ipynb'),
    (f'{METRIC} --reference {{own}}', 2, 'no file'), (f'{METRIC} --deltas 2', 2, '--deltas belong to pfid'), (f'{METRIC} --top-k 2', 2, '--top-k belong to ifid'), (f'{METRIC} --json {{own}}', 2, 'is a folder; give the name of a file'),
    (f'{METRIC} --device mps', 2, "device 'mps' was asked for"), *((METRIC.replace('rfid', 'pfid')+f' --bootstrap 0 {more}', 2, said) for more, said in [
        ('', "needs at least 256 codes, got 32"), ('--deltas ,', 'comma-separated int'), ('--deltas 0', 'delta must be a whole number in 1..32'), ('--deltas 33', 'delta must be a whole number in 1..32, got 33'), ('--deltas -1', 'delta must be'),
        ('--deltas 2.5', 'invalid comma-separated int'), ('--deltas 2 --alphas 1.5', 'alpha must be in [0, 1], got 1.5'), ('--deltas 2 --alphas nan', 'alpha must be in'), ('--deltas 2 --alphas ,', 'comma-separated float')]),
    (METRIC.replace('rfid', 'ifid')+' -n 60', 2, 'no train and test parts'), (METRIC.replace('rfid', 'ifid')+' -n 20 --train {own}/images/class0 --top-k 0', 2, 'top_k must be'), (METRIC.replace('rfid', 'all')+' -n 4', 2, 'needs 6 images'),
    # post-training
    ('posttrain', 2, 'required: --tokenizer, --generator'), (f'posttrain {TOK} {GEN} --out {{own}}', 2, 'is there already; choose another --out'), (HEAL.replace('{own}/generator', '{own}/tokenizer'), 2, 'holds a Tokenizer, expected a generator'),
    (HEAL.replace('{own}/tokenizer', '{own}/generator'), 2, 'expected a Tokenizer'), (HEAL.replace('{own}/generator', '{tmp}'), 2, 'holds no saved'), *((f'{HEAL} {more}', 2, said) for more, said in [
        ('--sigma 0', 'sigma 0 keeps nothing'), ('--sigma 90', 'sigma must be in [0, 1], got 90'), ('--sigma ,', 'comma-separated float'), ('--sigma .9,.9', 'each sigma once'), ('--clean 2', 'clean must be in'), ('--distribution -1', 'weight distribution must be in'),
        ('--lora -1', 'lora must be in'), ('--lora 2.5', 'invalid int'), ('--consistency -1', 'consistency must be in'), ('--epochs 0', 'epochs must be a whole number in 1..100000, got 0'), ('--epochs -1', 'epochs must be'), ('--guidance -1', 'guidance must be in'),
        ('--guidance nan', 'guidance must be in'), ('-n 0', 'n must be a whole number'), ('--set lrr=1', 'did you mean lr?'), ('--preset laptop-ar', 'no recipe of a decoder'), ('--mode other', 'invalid choice'), ('--mode unpaired --sigma .9', '--sigma belong to --mode paired'),
        ('--mode unpaired --distribution 0', 'got --distribution 0'), ('--freeze official --lora 2', 'knows no lora'), ('--freeze official --source reencode', "give pairs with source='tokens'"), ('--source made', 'invalid choice'), ('--device tpu', 'device must be')]),
]

def spell(words, own, tmp):
    "The words of a case, with its folders put in"
    return [w.format(own=own, tmp=tmp, tiny=TINY) for w in words.split()]

@pytest.mark.parametrize('words, code, said', TABLE,
                         ids=[f"{i}-{words.split(' ')[0]}" for i,(words,_,_) in enumerate(TABLE)])
def test_one_line_and_nothing_done(words, code, said, own, tmp_path, tokkit, monkeypatch):
    monkeypatch.chdir(tmp_path)
    got, out, err = tokkit(*spell(words, own, tmp_path))
    told = err.strip().splitlines()
    assert got == code and said in err, f'exit {got}: {out}{err}'
    assert 'Traceback' not in err and (told[-1].startswith('tokkit') or code == 0), err
    assert 'usage:' in err or words.startswith(('clean', 'results', 'verify', 'docs')) or len(told) == 1, err
    left = [p for p in tmp_path.rglob('*') if p.name != 'tiny']
    assert not left, f'left behind: {left}'


# words that a shell hands over and a table cannot hold
@pytest.mark.parametrize('words, said', [
    (['metric', 'rfid', '--tokenizer', '{own}/tokenizer', '--data', ''],
     "data must be 'fashion_mnist' or a folder of images, got nothing"),
    (['run', ''], "no notebook ''"), (['run', '{tiny}', '-p', '', '1'], 'has no parameter'),
                                         (['run', '{tiny}', '-p', 'seed', ''], 'seed must be int'),
    (['sweep', '{tiny}', '-g', ''], '-g expects'),
                                         (['sweep', '{tiny}', '-g', 'seed=1', '--devices', ''],
                                          'comma-separated'), (['results', 'a\0b'], 'no folder'),
    (['run', 'a\0b.ipynb'], 'no notebook'), (['run', '{tiny}', '--out', 'x'*300], 'File name too long'),
                                         (['metric', 'pfid', '--tokenizer', '{own}/tokenizer', '--deltas',
                                           ''], 'comma-separated int'),
    (['demo', '--preset', 'smoke', '-p', 'data', '', '--out', '{tmp}/runs'], 'got nothing')], ids=lambda v: v
                         if isinstance(v, str) else '')
def test_empty_and_odd_words(words, said, own, tmp_path, tokkit):
    code, out, err = tokkit(*[w.format(own=own, tmp=tmp_path, tiny=TINY) for w in words])
    assert code == 2 and said in err and 'Traceback' not in err, err
    assert not list(tmp_path.iterdir())


# paths with characters that mean something to somebody
@pytest.mark.parametrize('name', ["a{b}/{}/{0}/a b/ä€/it's/[1]/a*/$HOME/%s/-x/#/a;b&c"])
def test_odd_folders_work(name, tmp_path, tokkit):
    code, out, err = tokkit('run', TINY, '--out', tmp_path/name)
    assert code == 0 and Path(out.splitlines()[-1]).is_relative_to(tmp_path/name), err
    code, out, err = tokkit('results', tmp_path/name)
    assert code == 0 and '1 runs, 1 values' in err


# an error that nobody expected
def test_a_bug_is_one_line_and_a_report(tokkit, monkeypatch, tmp_path):
    def broken(*args, **kwargs): raise KeyError('a bug')
    monkeypatch.setattr('tokkit.runs.collect', broken)
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    code, out, err = tokkit('results', tmp_path)
    report, = tmp_path.glob('tokkit-error-*.txt')
    assert (code == 70 and err.count('\n') == 1 and f'written in {report}' in err
            and "KeyError: 'a bug'" in err)
    assert 'Traceback' in report.read_text() and 'results' in report.read_text()

def test_a_bug_on_a_full_disk(tokkit, monkeypatch, tmp_path):
    def broken(*args, **kwargs): raise KeyError('a bug')
    monkeypatch.setattr('tokkit.runs.collect', broken)
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path/'gone'))
    code, out, err = tokkit('results', tmp_path)
    assert code == 70 and 'written in nowhere, since there is no room for it' in err

def test_the_number_is_printed_before_it_is_written(own, tmp_path, tokkit, monkeypatch):
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('tokkit.core.write_json', full)
    code, out, err = tokkit('--device', 'cpu', 'metric', 'rfid', '--tokenizer', own/'tokenizer', '--data',
                            own/'images', '--bootstrap', 0, '--json', tmp_path/'card.json')
    assert code == 2 and out.startswith('rFID[') and 'No space left' in err


# images
def test_images_of_another_kind_are_counted(own, tmp_path, tokkit):
    shutil.copytree(own/'images', tmp_path/'images')
    for i in range(3): (tmp_path/'images'/'class0'/f'{i}.gif').write_bytes(b'GIF89a')
    code, out, err = tokkit('metric', 'rfid', '--tokenizer', own/'tokenizer', '--data', tmp_path/'images',
                            '--bootstrap', 0)
    assert code == 0 and '3 images of kinds that are not read are left out: 3 .gif' in err and 'n=64' in out

def test_a_class_of_the_name_of_a_part(own, tmp_path, tokkit):
    shutil.copytree(own/'images', tmp_path/'images')
    (tmp_path/'images'/'class1').rename(tmp_path/'images'/'test')
    code, out, err = tokkit('metric', 'rfid', '--tokenizer', own/'tokenizer', '--data', tmp_path/'images')
    assert code == 2 and 'holds test beside class0: is test a part of the data, or a class?' in err

def test_skip_broken_and_upscale(own, tmp_path, tokkit):
    make_images(tmp_path/'images', 40, side=20)
    words = 'metric', 'rfid', '--tokenizer', own/'tokenizer', '--data', tmp_path/'images', '--bootstrap', 0
    code, _, err = tokkit(*words)
    assert code == 2 and 'smaller than size=28' in err and '--upscale' in err
    assert tokkit(*words, '--upscale')[0] == 0
    (tmp_path/'images'/'class0'/'000.png').write_bytes(b'broken')
    code, _, err = tokkit(*words, '--upscale')
    assert code == 2 and '1 of ' in err and '--skip-broken' in err
    code, out, err = tokkit(*words, '--upscale', '--skip-broken')
    assert code == 0 and 'n=39' in out and 'left out' in err

"""Faults that once ended in a wrong number, in somebody's files deleted, or in no end at all: each was
seen, each is refused now

The numbers are those under which they were reported.
"""
import json, os, shutil, signal, stat, subprocess, sys, threading, warnings
from pathlib import Path

import nbformat, numpy as np, pytest, torch
from conftest_faults import SHELL, TINY, make_images, says, start
from waiting import wait_for

from tokkit.core import atomic_dir, damage, read_json, write_json
from tokkit.data import ImageFolder, ImageSet, fashion_mnist
from tokkit.tokenizers import Tokenizer, make_tokenizer


# 1. a run is named by what is in its data, not by where they lie
@pytest.fixture
def weigh(tmp_path):
    "A notebook whose number is the sum of the bytes of the images in a folder"
    v4 = nbformat.v4
    nb = v4.new_notebook(metadata=dict(kernelspec=dict(name='python3', display_name='python3',
                                                       language='python')), cells=[
        v4.new_code_cell("data = 'fashion_mnist' # folder of images", metadata=dict(tags=['parameters'])),
        v4.new_code_cell("from pathlib import Path\nfrom tokkit.runs import Run\nrun = Run.here('weigh')"),
        v4.new_code_cell("run.finish(dict(metric='bytes', value=sum(sum(p.read_bytes()) for p in "
                         "sorted(Path(data).rglob('*.png')))))")])
    nbformat.write(nb, tmp_path/'weigh.ipynb')
    return tmp_path/'weigh.ipynb'

@pytest.mark.slow
def test_1_changed_images_are_another_run(weigh, tmp_path, monkeypatch):
    from tokkit.runs import Run, run_experiment
    def value(folder):
        return Run(run_experiment(weigh, dict(data=folder), tmp_path/'runs'), 'weigh').frame().value[0]
    for name in ('a', 'b'): make_images(tmp_path/name/'images', 4, seed=ord(name))
    monkeypatch.chdir(tmp_path/'a')
    first = value('images')
    assert value('images') == first
    monkeypatch.chdir(tmp_path/'b')
    other = value('images')                                           # the same words, other images
    assert other != first
    one = next((tmp_path/'b'/'images').rglob('*.png'))
    dates = os.stat(one)
    one.write_bytes(one.read_bytes()[:-1]+b'\0')
    os.utime(one, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    assert value('images') not in (first, other)                      # of the same size and date

def test_1_a_reused_run_says_so(weigh, tmp_path, tokkit, monkeypatch):
    monkeypatch.delenv('TOKKIT_QUIET')
    make_images(tmp_path/'images', 2)
    words = 'run', weigh, '-p', 'data', tmp_path/'images', '--out', tmp_path/'runs'
    assert 'reused' not in tokkit(*words)[2]
    assert 'reused: weigh/' in (told := tokkit(*words)[2]) and ', made at 20' in told

def test_1_data_that_change_meanwhile_are_no_run(tmp_path):
    from tokkit.runs import RunError, run_experiment
    make_images(tmp_path/'images', 2)
    v4 = nbformat.v4
    one = tmp_path/'images'/'class0'/'000.png'
    nb = v4.new_notebook(cells=[v4.new_code_cell("data = ''", metadata=dict(tags=['parameters'])),
                                v4.new_code_cell(
        "from pathlib import Path\nfrom tokkit.runs import "
        f"Run\nPath({str(one)!r}).write_bytes(b'other')\nRun.here('x').finish(dict(metric='m', value=1))")])
    nb.metadata.kernelspec = dict(name='python3', display_name='python3', language='python')
    nbformat.write(nb, tmp_path/'x.ipynb')
    with pytest.raises(RunError, match='data of run x/.* changed while it was at work'):
        run_experiment(tmp_path/'x.ipynb', dict(data=str(tmp_path/'images')), tmp_path/'runs')


# 2. the site takes no folder that holds anything else
def test_2_docs_into_a_folder_of_somebody(tmp_path, root):
    (tmp_path/'thesis.tex').write_text('three years')
    done = subprocess.run([sys.executable, root/'tools'/'build_site.py', tmp_path], capture_output=True,
                          text=True, cwd=root)
    assert (done.returncode and f'{tmp_path} holds' in done.stderr
            and 'tokkit did not put there' in done.stderr and 'Traceback' not in done.stderr)
    assert (tmp_path/'thesis.tex').read_text() == 'three years' and len(list(tmp_path.iterdir())) == 1

def test_2_a_site_is_replaced_whole_or_not_at_all(tmp_path):
    from tokkit.core import replaced_dir
    site = tmp_path/'site'
    for text in ('first', 'second'):
        with replaced_dir(site) as new: (new/'index.html').write_text(text)
    with pytest.raises(OSError), replaced_dir(site) as new:
        (new/'index.html').write_text('third')
        raise OSError('disk')
    assert (site/'index.html').read_text() == 'second' and list(tmp_path.iterdir()) == [site]
    (site/'CNAME').write_text('mine')
    says(FileExistsError, lambda: replaced_dir(site).__enter__(), 'holds CNAME that tokkit did not put there')
    (site/'CNAME').unlink()
    (site/'index.html').write_text('edited')
    says(FileExistsError, lambda: replaced_dir(site).__enter__(),
         'was changed by hand: index.html has changed')
    (site/'index.html').write_text('second')
    (tmp_path/'file').write_text('mine')
    says(NotADirectoryError, lambda: replaced_dir(tmp_path/'file').__enter__(),
         'is a file; give the name of a folder')
    assert (tmp_path/'file').read_text() == 'mine'
    (tmp_path/'link').symlink_to(site)
    with replaced_dir(tmp_path/'link') as new: (new/'index.html').write_text('fourth')
    assert (tmp_path/'link').is_symlink() and (site/'index.html').read_text() == 'fourth'


# 3. cleaning touches what tokkit made, and nothing else
def test_3_clean_leaves_what_is_not_ours(tmp_path, tokkit):
    from tokkit.core import mark
    outside = tmp_path/'outside'
    home = tmp_path/'runs'
    for name in ('.work-thesis', 'draft.failed', '.a.lock'): (outside/name).mkdir(parents=True)
    foreign = ['mine/.venv.lock', 'mine/.poetry.1-2.tmp', 'mine/.work-thesis/a', 'mine/chapter.failed/b',
               'mine/study/params.json', 'mine/.x.99-170000000000000.tokkit-tmp/c']
    for name in foreign:
        (home/name).parent.mkdir(parents=True, exist_ok=True)
        (home/name).write_text('{}')
    (home/'link').symlink_to(outside)
    (home/'mine'/'link.failed').symlink_to(outside/'draft.failed')
    mark(home/'tiny'/'seed1-0a.failed')
    mark(outside/'draft.failed')
    code, out, err = tokkit('clean', home)
    assert (code == 0 and 'seed1-0a.failed' in out and 'nothing is deleted yet' in err
            and (home/'tiny'/'seed1-0a.failed').exists())
    assert tokkit('clean', home, '--all', '--yes')[0] == 0
    assert not (home/'tiny'/'seed1-0a.failed').exists()
    assert (all((home/name).exists() for name in foreign) and len(list(outside.iterdir())) == 3
            and (home/'mine'/'link.failed').is_symlink())

def test_3_notes_in_a_run_are_kept(tmp_path, tokkit):
    from tokkit.runs import run_experiment
    folder = run_experiment(TINY, {}, tmp_path)
    (folder/'notes.md').write_text('mine')
    code, out, err = tokkit('clean', tmp_path, '--all', '--yes')
    assert (f'left alone: {folder}: it holds notes.md, which tokkit did not put there' in err
            and (folder/'notes.md').exists())

def test_3_one_at_work_protects_what_it_may_read(tmp_path, tokkit):
    from tokkit.core import locked
    from tokkit.runs import artifact
    made = artifact('tokenizer', {}, lambda tmp: (tmp/'x').write_text('x'), tmp_path)
    with locked(tmp_path/'e02'/'seed1', 'a run'): code, out, err = tokkit('clean', tmp_path, '--all', '--yes')
    assert made.exists() and 'finished runs and artifacts: they may be in use' in err

def test_3_a_name_that_begins_alike_is_another(tmp_path):
    from tokkit.core import clear_unfinished, mark
    mark(tmp_path/'.healed.v2.99999999-170000000000.tokkit-tmp')
    mark(tmp_path/'.healed.99999999-170000000000.tokkit-tmp')
    clear_unfinished(tmp_path/'healed')
    assert [p.name for p in tmp_path.iterdir()] == ['.healed.v2.99999999-170000000000.tokkit-tmp']

def test_3_a_result_is_kept_where_its_place_was_taken(tmp_path):
    from tokkit.core import atomic_dir
    with pytest.raises(FileExistsError,
                       match='the result is kept as healed.kept'), atomic_dir(tmp_path/'healed') as p:
        (p/'model').write_text('weights')
        (tmp_path/'healed').mkdir()
        (tmp_path/'healed'/'mine').write_text('mine')
    assert (tmp_path/'healed.kept'/'model').read_text() == 'weights' and (tmp_path/'healed'/'mine').exists()

def test_3_a_link_in_a_folder_of_ours_goes_what_it_points_to_stays(tmp_path, tokkit):
    from tokkit.core import mark
    (tmp_path/'outside').mkdir()
    (tmp_path/'outside'/'data').write_text('mine')
    mark(tmp_path/'runs'/'tiny'/'.work-1')
    (tmp_path/'runs'/'tiny'/'.work-1'/'data').symlink_to(tmp_path/'outside')
    tokkit('clean', tmp_path/'runs', '--yes')
    assert (not (tmp_path/'runs'/'tiny'/'.work-1').exists()
            and (tmp_path/'outside'/'data').read_text() == 'mine')


# 4. and 5. one post-training at a time, and cleaning waits for it
@pytest.fixture
def healing(own, tmp_path):
    "The words of a post-training into runs/healed/one, which takes some seconds"
    def words(*more):
        return ['posttrain', '--tokenizer', own/'tokenizer', '--generator', own/'generator', '--data',
                own/'images',
                              '--out', tmp_path/'runs'/'healed'/'one', '--epochs', '40', *more]
    return words

@pytest.mark.slow
def test_4_5_posttrain_is_alone(healing, tmp_path, tokkit):
    folder = tmp_path/'runs'/'healed'
    first = start(*healing('--seed', '0'))
    try:
        wait_for(lambda: list(folder.glob('.work-*/pairs/part*')))
        code, _, err = tokkit(*healing('--seed', '1'))
        assert code == 2 and f'is being made by process {first.pid}' in err and err.count('\n') == 1, err
        before = sorted(p.name for p in folder.iterdir())
        code, out, err = tokkit('clean', tmp_path/'runs', '--all', '--yes')
        assert code == 0 and f'left alone: healed: process {first.pid} is at work' in err and out == ''
        now = {p.name for p in folder.iterdir()} | {'one'}
        assert set(before) <= now and first.poll() is None, "too quick to be a test: more epochs"
        said = first.communicate(timeout=240)
        assert first.returncode == 0, said[1]
    finally: first.kill()
    assert [p.name for p in folder.iterdir()] == ['one']


# 6. a flipped bit, and files that were exchanged
def flip(path:Path, at:float = .5):
    "Change one bit in a file"
    bits = bytearray(path.read_bytes())
    bits[int(len(bits)*at)] ^= 4
    path.write_bytes(bits)

def trained(own, work, epochs=3, stop_after=None):
    "A tokenizer's decoder, trained for some epochs in a working folder; what comes out of it"
    from tokkit.posttraining import clean_pairs
    from tokkit.posttraining import posttrain_decoder
    from tokkit.training import ImageTraining
    tok = Tokenizer.load(own/'tokenizer')
    images = ImageFolder(own/'images', 28).load(32)
    def preview(learner):
        if learner.epoch == stop_after: raise KeyboardInterrupt
    how = ImageTraining(epochs=epochs, batch=16, lr=1e-3, perceptual=0.)
    healed, _ = posttrain_decoder(tok, clean_pairs(tok, images), how, work=work, preview=preview,
                                  device='cpu')
    return healed.state_dict()

def checkpoint(work) -> Path:
    "The only one there"
    return next(work.glob('checkpoint-*.pt'))

@pytest.mark.parametrize('at', [.2, .5, .8])
def test_6_a_flipped_bit_in_a_checkpoint(own, tmp_path, at):
    whole = trained(own, tmp_path/'whole')
    with pytest.raises(KeyboardInterrupt): trained(own, tmp_path/'cut', stop_after=1)
    flip(checkpoint(tmp_path/'cut'), at)
    with pytest.warns(UserWarning, match='checkpoint-2.pt is damaged.*training begins anew'):
        again = trained(own, tmp_path/'cut')
    assert all(again[k].equal(whole[k]) for k in whole)

def test_6_nan_in_a_checkpoint(own, tmp_path):
    with pytest.raises(KeyboardInterrupt): trained(own, tmp_path/'cut', stop_after=1)
    saved = torch.load(checkpoint(tmp_path/'cut'), weights_only=True)
    next(t for t in saved['model'].values() if t.is_floating_point()).fill_(torch.nan)
    torch.save(saved, checkpoint(tmp_path/'cut'))
    with pytest.warns(UserWarning, match='is damaged'): again = trained(own, tmp_path/'cut')
    assert all(t.isfinite().all() for t in again.values())

@pytest.fixture(scope='module')
def small_demo(tmp_path_factory):
    "The stages of a very small demo, and the words that ask for them again"
    from tokkit.demo import Demo, demo_cfg
    root = tmp_path_factory.mktemp('demo')
    def make():
        return Demo(demo_cfg('smoke', train_images=128, n=64, n_pfid=64, pairs=64, bootstrap=2, width=32,
                             depth=1), root, 'cpu')
    d = make()
    d.samples('plain')
    d.classifier()
    d.pairs('plain')
    d.cards('plain', 'before')
    return root, make

@pytest.mark.parametrize('what, file',
                         [('samples', 'samples.pt'), ('classifier', 'classifier.safetensors'),
                          ('tokens', 'tokens.npy'),
                                        ('tokenizer', 'model.safetensors'),
                          ('generator', 'model.safetensors'), ('pairs', 'part-00000.safetensors'),
                                        ('cards', 'cards.json'), ('cards', 'params.json'),
                          ('tokens', 'cache.json'), ('generator', 'config.json')])
def test_6_a_flipped_bit_in_an_artifact(small_demo, what, file):
    root, make = small_demo
    path = sorted((root/what).glob(f'*/**/{file}'))[0]
    before = path.read_bytes()
    folder = next(p for p in path.parents if p.parent == root/what)
    flip(path)
    def ask(d):
        return dict(samples=lambda: d.samples('plain'), classifier=d.classifier,
                    tokens=lambda: d.tokens('plain'), tokenizer=lambda: d.tokenizer('base'),
                            generator=lambda: d.generator('plain'), pairs=lambda: d.pairs('plain'),
                    cards=lambda: d.cards('plain', 'before'))[what]()
    name = folder.name
    # whichever came first
    if what == 'tokenizer': ask = lambda d: d.tokenizer('base' if '-base-' in name else 'plain')
    says = f'{what} {name} is damaged: .*{file}.* has changed; it is made again'
    with pytest.warns(UserWarning, match=says):
        ask(make())
    if file != 'params.json': assert path.read_bytes() == before, "what is made again is what was there"
    shutil.rmtree(folder.with_name(name+'.damaged'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ask(make())

def test_6_features_on_the_disk(tmp_path):
    from tokkit.metrics import FeatureBank
    from tokkit.features import default_extractor
    def features():
        return FeatureBank(disk=tmp_path)(fashion_mnist('test', 20), default_extractor(28), 'cpu').features
    first = features()
    path, = tmp_path.glob('*.npz')
    with np.load(path) as z: found = dict(z)
    # a whole file of other numbers
    np.savez(path.open('wb'), **found|dict(features=found['features']+1))
    with pytest.warns(UserWarning, match='were damaged; they are made again'): assert features().equal(first)
    for at in (.1, .5, .9):
        flip(path, at)
        with pytest.warns(UserWarning, match='were damaged; they are made again'):
            assert features().equal(first)

def test_6_exchanged_parts_of_pairs(own, tmp_path):
    from tokkit.generators import load_generator
    from tokkit.posttraining import open_pairs, write_pairs
    tok = Tokenizer.load(own/'tokenizer')
    gen = load_generator(own/'generator')
    images = ImageFolder(own/'images', 28).load(32)
    def write(): return write_pairs(tmp_path, gen, tok, images, part=8)
    write()
    whole = open_pairs(tmp_path, images).latents
    a = tmp_path/'part-00000.safetensors'
    b = tmp_path/'part-00001.safetensors'
    a.rename(tmp_path/'c')
    b.rename(a)
    (tmp_path/'c').rename(b)
    says(ValueError, lambda: open_pairs(tmp_path, images), 'is a file of another place or of other pairs')
    with pytest.warns(UserWarning, match='part-00000.safetensors is a file of another place.*made again'):
        write()
    assert open_pairs(tmp_path, images).latents.equal(whole)

def test_6_a_token_cache_without_checksums(tmp_path):
    from tokkit.data import to_uint8
    from tokkit.data import TokenCache
    TokenCache.build(tmp_path/'c', fashion_mnist('test', 20), lambda x: to_uint8(x).flatten(1)[:,::49].long())
    write_json(tmp_path/'c'/'cache.json', read_json(tmp_path/'c'/'cache.json')|dict(sha256=[]))
    flip(tmp_path/'c'/'tokens.npy')
    says(ValueError, lambda: TokenCache.open(tmp_path/'c'), 'is damaged', 'build it again')
    says(ValueError, lambda: TokenCache.open(tmp_path/'c', verify=False), 'sha256')

def test_6_results_of_a_changed_run(tmp_path, tokkit):
    from tokkit.runs import run_experiment
    folder = run_experiment(TINY, {}, tmp_path)
    text = (folder/'metrics.json').read_text()
    (folder/'metrics.json').write_text(text.replace('"value": 0.5', '"value": 0.4'))
    code, out, err = tokkit('results', tmp_path)
    assert 'damaged, metrics.json has changed' in err and '0.4' not in out
    code, out, err = tokkit('verify', tmp_path)
    assert code == 1 and f'{folder}: metrics.json has changed' in out and '1 damaged' in err
    with pytest.warns(UserWarning, match='is damaged: metrics.json has changed; it is made again'):
        run_experiment(TINY, {}, tmp_path)
    assert tokkit('verify', folder)[0] == 0
    assert '0.5' in tokkit('results', tmp_path)[1]


def test_6_a_seal_that_was_lost(tmp_path, tokkit):
    "A copy without hidden files is not called damaged, and can be taken as it is"
    from tokkit.runs import run_experiment
    folder = run_experiment(TINY, {}, tmp_path)
    (folder/'.tokkit').unlink()
    says(ValueError, lambda: run_experiment(TINY, {}, tmp_path), 'carries no checksums', '--seal')
    assert 'no checksums to compare' in tokkit('results', tmp_path)[2]
    code, out, err = tokkit('verify', tmp_path)
    assert code == 1 and f'{folder}: no checksums to compare' in out
    assert tokkit('verify', tmp_path, '--seal')[0] == 0 and run_experiment(TINY, {}, tmp_path) == folder

def test_6_saved_models_are_verified(own, tmp_path, tokkit):
    shutil.copytree(own/'tokenizer', tmp_path/'t')
    assert tokkit('verify', tmp_path)[0] == 0
    flip(tmp_path/'t'/'model.safetensors', .9)
    code, out, err = tokkit('verify', tmp_path)
    assert code == 1 and 'damaged' in out

def test_6_a_training_on_other_data_is_another(own, tmp_path):
    from tokkit.generators import make_generator
    from tokkit.training import GeneratorTraining, TensorPairs, train_generator
    from tokkit.core import tensors_hash
    spec = make_tokenizer('tiny').spec
    labels = torch.zeros(32, dtype=torch.long)
    how = GeneratorTraining(epochs=1, batch=16)
    def train(value):
        g = make_generator('ar', spec, width=32, depth=1)
        train_generator(g, TensorPairs(torch.full((32, 49), value), labels), how, work=tmp_path, device='cpu')
        return tensors_hash(g.state_dict())
    first = train(3)
    with pytest.raises(ValueError, match='of a training with other settings'): train(5)
    assert train(3) == first

def test_6_a_cache_of_other_images(tmp_path):
    from tokkit.data import TokenCache
    def encode(x): return x.flatten(1)[:,:4].mul(100).round().long().abs()
    TokenCache.build(tmp_path/'c', fashion_mnist('test', 20), encode)
    says(ValueError, lambda: TokenCache.build(tmp_path/'c', fashion_mnist('train', 20), encode),
         'holds tokens of other images')

# 7. a configuration that was changed by hand
@pytest.mark.parametrize('change, says_', [
    (lambda c: c['cfg'].update(heads=2), 'cfg.heads is 2, the weights were saved with 4'),
    (lambda c: c['cfg'].update(l2_norm=False),
     'cfg.l2_norm is False, the weights were saved with True; write true there again'),
    (lambda c: c.update(more=1), 'remove more'),
    (lambda c: c['spec'].update(std=2.), 'spec.std is 2.0, the weights were saved with 1.0'),
    (lambda c: c['spec'].update(mean=1), 'spec.mean is 1, the weights were saved with 0.0'),
    (lambda c: c.update(kind='ARGenerator'), 'holds a ARGenerator, expected a Tokenizer'),
    (lambda c: c.pop('spec'), 'spec is None, the weights were saved with')])
def test_7_a_changed_configuration(own, tmp_path, change, says_):
    folder = shutil.copytree(own/'tokenizer', tmp_path/'t')
    config = read_json(folder/'config.json')
    change(config)
    write_json(folder/'config.json', config)
    says(ValueError, lambda: Tokenizer.load(folder), says_)

def test_7_the_fingerprint_knows_the_measured_scale(own):
    from dataclasses import replace
    tok = Tokenizer.load(own/'tokenizer')
    before = tok.fingerprint
    tok.spec = replace(tok.spec, std=2.)
    assert tok.fingerprint != before


# 8. NaN is no number and no code
def broken(**where):
    "A tokenizer of which one weight is NaN"
    tok = make_tokenizer('tiny', width=16, depth=1).eval()
    tok.get_parameter(next(iter(where.values()))).data.flatten()[0] = torch.nan
    return tok

@pytest.mark.parametrize('call', ['tokenize', 'to_latents', 'reconstruct'])
def test_8_an_encoder_that_gives_nan(call):
    tok = broken(at='encoder.out.weight')
    says(ValueError, lambda: getattr(tok, call)(fashion_mnist('test', 4)[:][0]),
         'the latents of image 0 must be finite', '4 of 4')

def test_8_nan_has_no_pfid():
    from tokkit.metrics import pfid
    says(ValueError, lambda: pfid(broken(at='encoder.out.weight'), fashion_mnist('test', 20), bootstrap=0),
         'must be finite')

def test_8_an_image_of_nan_is_named(tmp_path):
    from tokkit.posttraining import clean_pairs
    from tokkit.data import TokenCache
    tok = make_tokenizer('tiny', width=16, depth=1).eval()
    x = fashion_mnist('test', 4)[:][0].clone()
    x[2, 0, 5, 5] = torch.nan
    says(ValueError, lambda: tok.tokenize(x), 'image 2', '1 of 4')
    class Images(ImageSet):
        def _batch(self, positions): return x[positions], self.labels[positions]
        def subset(self, i): return self
    images = Images(torch.zeros(4, 1, 28, 28, dtype=torch.uint8))
    says(ValueError, lambda: TokenCache.build(tmp_path/'c', images, tok.tokenize), 'image 2')
    says(ValueError, lambda: clean_pairs(tok, images), 'image 2')
    assert not (tmp_path/'c').exists()

@pytest.mark.parametrize('kind',
                         ['tiny', 'tiny-fsq', 'tiny-lfq', 'tiny-rq', 'tiny-pq', 'tiny-msrq', 'tiny-kl',
                          'tiny-kl0'])
def test_8_every_quantizer_refuses_nan(kind):
    tok = make_tokenizer(kind).eval()
    z = torch.randn(3, tok.cfg.tokens, tok.quantizer.in_dim or tok.cfg.code_dim)
    z[1,0,0] = torch.inf
    says(ValueError, lambda: tok.quantize(z), 'latents of image 1', '1 of 3')


# 9. numbers out of range
def test_9_a_demo_that_would_perturb_nothing(tokkit, tmp_path):
    for delta in ('0', '-5'):
        code, _, err = tokkit('demo', '--preset', 'smoke', '--out', tmp_path, '-p', 'delta', delta)
        assert (code == 2 and f'delta must be a whole number at least 1, got {delta}' in err
                and not list(tmp_path.iterdir()))

def test_9_numbers_that_would_become_others():
    from tokkit.metrics import pfid
    from tokkit.perturbation import LatentPerturbation, perturb_codes
    book = torch.randn(300, 4)
    ids = torch.zeros(2, 9, dtype=torch.long)
    says(ValueError, lambda: LatentPerturbation(delta=0), 'got 0')
    says(ValueError, lambda: pfid(make_tokenizer('tiny'), fashion_mnist('test', 8), deltas=()),
         'at least one alpha and one delta')
    says(ValueError, lambda: perturb_codes(ids-300, book, .5, 4), 'ids must be in 0..299', '-300')
    says(ValueError, lambda: perturb_codes(ids+300, book, .5, 4), 'ids must be in 0..299', '300')
    book[7,1] = torch.nan
    says(ValueError, lambda: perturb_codes(ids, book, .5, 4), 'code 7 must be finite', 'codebook is damaged')


# 10. a device that is not here
@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU here')
@pytest.mark.parametrize('device', ['cuda:0', 'cuda', '5', '0'])
def test_10_a_gpu_that_is_not_here(device, tokkit, tmp_path):
    code, _, err = tokkit('run', TINY, '--out', tmp_path, '--device', device)
    assert code == 2 and 'sees none here; use cpu' in err and not list(tmp_path.iterdir())
    code, _, err = tokkit('sweep', TINY, '-g', 'seed=1,2', '--out', tmp_path, '--devices', device)
    assert code == 2 and 'sees none here; use cpu' in err and not list(tmp_path.iterdir())

def test_10_one_gpu_too_many(monkeypatch):
    from tokkit.runs import run_device
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert run_device('1') == run_device('cuda:1') == 'cuda:1'
    says(ValueError, lambda: run_device('5'), 'there are 2 GPUs here; use cuda:0 to cuda:1')

def test_10_what_was_used_is_recorded(tmp_path):
    from tokkit.runs import run_experiment
    assert read_json(run_experiment(TINY, {}, tmp_path, 'cpu')/'params.json')['device'] == 'cpu'


# 11. devices and pipes are written to, not replaced
def test_11_a_pipe_stays_a_pipe(tmp_path, tokkit):
    from tokkit.runs import run_experiment
    run_experiment(TINY, {}, tmp_path/'runs')
    os.mkfifo(tmp_path/'pipe')
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path/'pipe').read_text()))
    reader.start()
    assert tokkit('results', tmp_path/'runs', '--csv', tmp_path/'pipe')[0] == 0
    reader.join(10)
    assert ('rFID' in got[0] and stat.S_ISFIFO(os.stat(tmp_path/'pipe').st_mode)
            and sorted(p.name for p in tmp_path.iterdir()) == ['pipe', 'runs'])

def test_11_the_null_device_stays(tokkit, tmp_path):
    from tokkit.runs import run_experiment
    run_experiment(TINY, {}, tmp_path)
    assert tokkit('results', tmp_path, '--csv', '/dev/null')[0] == 0
    assert stat.S_ISCHR(os.stat('/dev/null').st_mode)

def test_11_a_link_stays_a_link(tmp_path):
    (tmp_path/'real.json').write_text('old')
    (tmp_path/'link.json').symlink_to(tmp_path/'real.json')
    write_json(tmp_path/'link.json', dict(a=1))
    assert (tmp_path/'link.json').is_symlink() and read_json(tmp_path/'real.json') == dict(a=1)


# 12. no hang, no memory that runs full
def test_12_pipes_and_devices_are_no_images(tmp_path):
    make_images(tmp_path, 4)
    os.mkfifo(tmp_path/'class0'/'pipe.png')
    (tmp_path/'class1'/'zero.png').symlink_to('/dev/zero')
    ds = ImageFolder(tmp_path, 28)
    says(OSError, lambda: ds[:], '2 of 6 images cannot be read', 'class0/pipe.png (no regular file)',
         'class1/zero.png (no regular file)', '--skip-broken')
    says(OSError, lambda: ds.hash, 'pipe.png is no regular file')
    with pytest.warns(UserWarning, match='2 of 6'):
        assert len(ImageFolder(tmp_path, 28, skip_broken=True)) == 4

@pytest.mark.parametrize('field, value',
                         [('depth', 10**9), ('width', 10**7), ('codebook_size', 10**10), ('size', 2**14),
                          ('depth', 900), ('latents', 10**8)])
def test_12_sizes_that_fill_the_memory(own, tmp_path, field, value):
    "Also where config.json and the weights' file agree"
    from safetensors.torch import load_file, save_file
    folder = shutil.copytree(own/'tokenizer', tmp_path/'t')
    config = read_json(folder/'config.json')
    config['cfg'][field] = value
    write_json(folder/'config.json', config)
    says(ValueError, lambda: Tokenizer.load(folder), f'cfg.{field} is {value}')
    save_file(load_file(folder/'model.safetensors'), folder/'model.safetensors',
              dict(tokkit=json.dumps(dict(config=json.dumps(config)))))
    says(ValueError, lambda: Tokenizer.load(folder), 'config.json')

def test_12_workers_without_end(tokkit, tmp_path):
    code, _, err = tokkit('sweep', TINY, '-g', 'seed=1', '--workers', '1000000000', '--out', tmp_path)
    assert code == 2 and 'workers must be a whole number in 1..1000, got 1000000000' in err

def test_12_pairs_without_end(own, tmp_path):
    from tokkit.core import stable_hash
    from tokkit.posttraining import open_pairs, write_pairs
    tok = Tokenizer.load(own/'tokenizer')
    images = ImageFolder(own/'images', 28).load(8)
    write_pairs(tmp_path, None, tok, images)
    r = read_json(tmp_path/'pairs.json')
    r['n'] = 10**12
    write_json(tmp_path/'pairs.json', r)
    says(ValueError, lambda: open_pairs(tmp_path, images), 'pairs.json was changed after it was written')
    r.pop('hash')
    write_json(tmp_path/'pairs.json', r|dict(hash=stable_hash(r, 64)))
    says(ValueError, lambda: open_pairs(tmp_path, images), 'holds 1000000000000 pairs for 8 images')


# 13. done means that every cell ran
@pytest.mark.parametrize('where', ['before', 'after', 'last'])
def test_13_a_notebook_that_exits(tmp_path, where):
    from tokkit.runs import RunError, run_experiment
    v4 = nbformat.v4
    cells = dict(finish="from tokkit.runs import Run\nRun.here('x').finish(dict(metric='m', value=1))",
                 exit='import sys; sys.exit(0)', fail="raise ValueError('wrong')")
    order = dict(before=('exit', 'finish'), after=('finish', 'exit', 'fail'), last=('finish', 'exit'))[where]
    nb = v4.new_notebook(cells=[v4.new_code_cell('a = 1', metadata=dict(tags=['parameters'])),
                                *[v4.new_code_cell(cells[o]) for o in order]])
    nb.metadata.kernelspec = dict(name='python3', display_name='python3', language='python')
    nbformat.write(nb, tmp_path/'x.ipynb')
    with pytest.raises(RunError, match='SystemExit'): run_experiment(tmp_path/'x.ipynb', {}, tmp_path/'runs')


# 14. an interrupt is heard, also where the shell had it ignored
def test_14_a_sweep_started_in_the_background_can_be_interrupted(tmp_path):
    gate = tmp_path/'gate'
    def ignore(): signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen([*SHELL, 'sweep', str(TINY), '-g', 'seed=1', '-p', 'mode', 'wait', '-p', 'gate',
                              str(gate), '--out', str(tmp_path/'runs')],
                             stderr=subprocess.PIPE, text=True, env=os.environ | dict(TOKKIT_QUIET='1'),
                             preexec_fn=ignore)
    try:
        wait_for(lambda: gate.with_suffix('.pids').exists())
        child.send_signal(signal.SIGINT)
        said = child.communicate(timeout=30)[1]
        assert child.returncode == 130 and 'interrupted; the same command goes on from here' in said
    finally: child.kill()


# 15. names lead nowhere else
@pytest.mark.parametrize('name', ['../../x', '..', '.', '', '/tmp/x', 'a/b', 'a\0b', '.hidden', 'x'*300])
def test_15_names_that_lead_elsewhere(tmp_path, monkeypatch, name):
    from tokkit.runs import Run, artifact
    monkeypatch.setenv('TOKKIT_RUNS', str(tmp_path/'a'/'b'))
    monkeypatch.delenv('TOKKIT_RUN_DIR', raising=False)
    says(ValueError, lambda: artifact(name, {}, lambda tmp: (tmp/'f').write_text('x')), 'names a folder')
    says(ValueError, lambda: Run.here(name), 'names a folder')
    assert not list(tmp_path.rglob('*'))


CHANGED = [('tokkit 0', 'tokkit 8'), ('tokkit', 'tokjit'), ('sha256', 'sha25v')]


@pytest.mark.parametrize('before, after', CHANGED)
def test_6_a_bit_of_the_seal_itself(tmp_path, before, after):
    "Not only what is sealed: also a version, a maker and a key of the seal"
    with atomic_dir(tmp_path/'run') as p: (p/'value.txt').write_text('503')
    seal = tmp_path/'run'/'.tokkit'
    assert damage(tmp_path/'run') is None
    seal.write_text(seal.read_text().replace(before, after, 1))
    assert 'the file of its checksums, is damaged' in damage(tmp_path/'run')


def test_6_a_report_whose_seal_changed_is_put_aside(tmp_path):
    "It is tokkit's place all the same: the new report takes it, the old one is kept"
    from tokkit.cli.commands import _check_place, _publish
    run = tmp_path/'run'
    run.mkdir()
    nbformat.write(nbformat.v4.new_notebook(), run/'notebook.ipynb')
    (run/'metrics.json').write_text('{}')
    _publish(run, tmp_path/'demo', {})
    seal = tmp_path/'demo'/'.tokkit'
    seal.write_text(seal.read_text().replace('tokkit 0', 'tokjit 0', 1))
    _check_place(tmp_path/'demo')
    with pytest.warns(UserWarning, match='it is kept as demo.damaged'): _publish(run, tmp_path/'demo', {})
    assert damage(tmp_path/'demo') is None

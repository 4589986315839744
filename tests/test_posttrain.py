"""Post-training: what is frozen stays, whatever the quantizer; pairs and training survive a kill;
the released code's list of what learns"""
import copy, json, signal, subprocess, sys, time
from dataclasses import replace

import numpy as np
import pytest
import torch

from tokkit.generators import ARCfg, ARGenerator
from tokkit.data import fashion_mnist
from tokkit.metrics import Card
from tokkit.generators import FlowCfg, FlowGenerator
from tokkit.generators import MaskedCfg, MaskedGenerator
from tokkit.training import MomentLoss
from tokkit.zoo_tokenizers import robustok_names
from tokkit.posttraining import (LatentPairs, check_fit, check_decodable, check_same, clean_pairs,
                                 latent_pairs, open_pairs, row_sigmas, write_pairs)
from tokkit.tokenizers import decode_all, encode_all
from tokkit.posttraining import PostTraining, Probe, robustok_trainable, posttrain_decoder
from tokkit.tokenizers import TOKENIZERS, Tokenizer, make_tokenizer
from tokkit.training import ImageTraining
from tokkit.posttraining import match_distribution

BRIEF = ImageTraining(epochs=1, batch=25, perceptual=0, lr=5e-3)
QUANTIZERS = ['tiny', 'tiny-pq', 'tiny-rq', 'tiny-fsq', 'tiny-lfq', 'tiny-bsq', 'tiny-kl', 'tiny-msrq']


@pytest.fixture(scope='module')
def images(): return fashion_mnist('train', 50)


def small(preset, **changes): return make_tokenizer(preset, width=32, depth=1, **changes).eval()

def kept(tok): return {k: v.clone() for k, v in tok.state_dict().items() if not k.startswith('decoder.')}


@pytest.mark.parametrize('preset', QUANTIZERS)
@pytest.mark.parametrize('how', ['plain', 'lora', 'consistency', 'distribution', 'unpaired'])
def test_frozen_means_frozen(preset, how, images):
    tok = small(preset)
    before = kept(tok)
    decoder = [v.clone() for k, v in tok.state_dict().items() if k.startswith('decoder.')]
    cfg = replace(BRIEF, distribution=1.) if how in ('distribution', 'unpaired') else BRIEF
    if how == 'unpaired':
        healed, _ = match_distribution(tok, encode_all(tok, images).flip(0), images, cfg, device='cpu')
    else:
        healed, _ = posttrain_decoder(tok, clean_pairs(tok, images), cfg, device='cpu',
                                      **({how: 2} if how in ('lora', 'consistency') else {}))
    for t in (tok, healed):
        assert list(kept(t)) == list(before) and all(torch.equal(v, before[k]) for k, v in kept(t).items())
    after = [v for k, v in healed.state_dict().items() if k.startswith('decoder.')]
    assert any(not torch.equal(a, b) for a, b in zip(after, decoder)), 'the decoder did not learn'
    assert all(torch.equal(v, d) for v,
               d in zip([v for k, v in tok.state_dict().items() if k.startswith('decoder.')],
                        decoder)), ('the given tokenizer moved')
    assert not healed.training and all(p.requires_grad for p in healed.decoder.parameters())


def test_official_list_of_what_learns(fixtures):
    with torch.device('meta'): tok = Tokenizer(TOKENIZERS['base'])
    theirs = {ours: name for name, ours in robustok_names(tok).items()}
    got = sorted(theirs[n] for n in robustok_trainable(tok))
    recorded = json.loads((fixtures/'state_dict_shapes.json').read_text())
    assert got == sorted(recorded['post_training_trainable_names'])


def test_official_trains_exactly_its_list(images):
    tok = small('tiny')
    gen = ARGenerator(ARCfg(codebook_size=512, width=32, depth=1)).eval()
    pairs = latent_pairs(gen, tok, images, .5, source='tokens')
    healed, _ = posttrain_decoder(tok, pairs, BRIEF, device='cpu',
                                  freeze='official')
    moved = {n for n, p in healed.named_parameters() if not torch.equal(p, dict(tok.named_parameters())[n])}
    assert (moved <= set(robustok_trainable(tok))
            and {'quantizer.embedding.weight', 'encoder.out.weight'} <= moved)


def test_all_kept_is_plain_training(images):
    tok = small('tiny')
    gen = ARGenerator(ARCfg(codebook_size=512, width=32, depth=1)).eval()
    a, b = (posttrain_decoder(tok, p, BRIEF, device='cpu')[0]
            for p in (latent_pairs(gen, tok, images, 1., source='tokens'), clean_pairs(tok, images)))
    assert a.fingerprint == b.fingerprint


def test_nothing_kept_is_refused(images):
    with pytest.raises(ValueError, match='nothing ties the two of a pair together'): row_sigmas(9, [.5, 0.])


@pytest.mark.parametrize('preset,make', [
    ('tiny', lambda s: MaskedGenerator(MaskedCfg(codebook_size=512, width=32, depth=1))),
    ('tiny-kl', lambda s: FlowGenerator(FlowCfg(dim=s.shape[1], width=32, depth=1)))])
def test_pairs_of_other_generators(preset, make, images, tmp_path):
    tok = small(preset)
    gen = make(tok.spec).eval()
    little, much = (latent_pairs(gen, tok, images, s, source='tokens', steps=3) for s in (.2, .9))
    assert little.about['drawn_differ'] > much.about['drawn_differ'] > 0
    stored = latent_pairs(gen, tok, images, .9, source='tokens', steps=3, folder=tmp_path/'pairs')
    assert torch.equal(stored.latents, much.latents)


def test_bfloat16_halves_continuous_pairs(images, tmp_path):
    tok = small('tiny-kl')
    write_pairs(tmp_path/'a', None, tok, images)
    write_pairs(tmp_path/'b', None, tok, images, latents='bfloat16')
    a, b = (open_pairs(tmp_path/k, images, tok) for k in 'ab')
    assert b.parts[0].dtype == torch.bfloat16 and torch.allclose(a.latents, b.latents, rtol=.01)
    sizes = [sum(f.stat().st_size for f in (tmp_path/k).glob('*.safetensors')) for k in 'ab']
    assert sizes[1] < .6*sizes[0]


@pytest.mark.parametrize('preset', ['tiny-pq', 'tiny-kl'])
def test_what_does_not_fit_is_named(preset, images):
    gen = ARGenerator(ARCfg(codebook_size=512, width=32, depth=1)).eval()
    with pytest.raises(ValueError, match=r'the generator draws ids \(49,\) of 512 codes, the tokenizer '
                                         r'decodes'):
        check_fit(gen, small(preset))


def test_a_scale_that_does_not_fit_is_named(images):
    tok = small('tiny-kl')
    tok.spec = replace(tok.spec, std=2.)
    with pytest.raises(ValueError, match='standard deviation of 0.5, the tokenizer'):
        check_fit(FlowGenerator(FlowCfg(dim=8, width=32, depth=1, std=.5)), tok)


def test_store_of_other_checkpoints_is_refused(images, tmp_path):
    tok = small('tiny')
    gen = ARGenerator(ARCfg(codebook_size=512, width=32, depth=1)).eval()
    write_pairs(tmp_path, gen, tok, images, .5, source='tokens')
    other = small('tiny', seed=1)
    with pytest.raises(ValueError, match='was made with tokenizer'): open_pairs(tmp_path, images, other)
    with pytest.raises(ValueError, match='holds pairs with tokenizer'):
        write_pairs(tmp_path, gen, other, images, .5, source='tokens')
    with torch.no_grad(): next(gen.parameters()).add_(1)
    with pytest.raises(ValueError, match='was made with generator'): open_pairs(tmp_path, images, tok, gen)


def test_a_full_disk_leaves_what_is_whole(images, tmp_path, monkeypatch):
    tok = small('tiny')
    writes = []
    import tokkit.posttraining.pair_store as pairs
    def full(*args, **kwargs):
        writes.append(1)
        if len(writes) == 3: raise OSError(28, 'No space left on device')
        return save(*args, **kwargs)
    save = pairs.save_file
    monkeypatch.setattr(pairs, 'save_file', full)
    with pytest.raises(OSError, match=r'No space left.*2 of 5 parts are whole and stay: make room and call '
                                      r'again'):
        write_pairs(tmp_path, None, tok, images, part=10)
    monkeypatch.setattr(pairs, 'save_file', save)
    assert (write_pairs(tmp_path, None, tok, images, part=10) == 0
            and torch.equal(open_pairs(tmp_path, images).latents, encode_all(tok, images)))

def test_latents_of_another_tokenizer_are_refused(images):
    how = ImageTraining(epochs=1, batch=10, perceptual=0)
    tok = small('tiny')
    kl = small('tiny-kl')
    few = images.subset(20)
    for other, says in ((kl, 'decodes ids .* of 512 codes, got continuous latents'),
                        (small('tiny-16'), 'decodes ids .*, got ids')):
        with pytest.raises(ValueError, match=f'{says}.*give latents of this tokenizer'):
            posttrain_decoder(tok, clean_pairs(other, few), how, device='cpu')
        with pytest.raises(ValueError, match=f'{says}.*give latents of this tokenizer'):
            match_distribution(tok, encode_all(other, few), few, replace(how, distribution=1.), device='cpu')
    with pytest.raises(ValueError, match='decodes continuous latents .* got ids'):
        posttrain_decoder(kl, clean_pairs(tok, few), how, device='cpu')
    with pytest.raises(ValueError, match='ids must be in 0..511 for 512 codes.*of another tokenizer'):
        posttrain_decoder(tok, clean_pairs(small('tiny', codebook_size=4096), few), how, device='cpu')
    with pytest.raises(ValueError, match=r'makes images \(3, 28, 28\), got images \(1, 28, 28\)'):
        posttrain_decoder(small('tiny', channels=3), clean_pairs(tok, few), how, device='cpu')

def test_settings_of_the_quantizer_are_compared():
    with pytest.raises(ValueError, match='first in quantizer'):
        check_same(small('tiny-lfq'), small('tiny-bsq'))

def test_moments_of_pairs(images, tmp_path):
    """Pictures of the pairs come nearer to the images by their moments;
    a killed training goes on with the same running moments, and under the same loss alone"""
    tok = small('tiny')
    look = MomentLoss().fit(images)
    gen = ARGenerator(ARCfg(codebook_size=512, width=32, depth=1)).eval()
    pairs = latent_pairs(gen, tok, images, .7, source='tokens')
    how = replace(BRIEF, epochs=4)
    def far(t): return copy.deepcopy(look).forget().eval()(decode_all(t, pairs.latents)).item()
    def play(work, preview=None, **more):
        sets = replace(how, **dict(distribution=1.) | more)
        return posttrain_decoder(tok, pairs, sets, work=work, preview=preview, device='cpu')
    def stop(learner):
        if learner.epoch: raise KeyboardInterrupt
    healed, history = play(tmp_path/'whole')
    assert far(healed) < .9*far(posttrain_decoder(tok, pairs, how, device='cpu')[0])
    assert history.moments.iloc[-1] < history.moments.iloc[0]
    with pytest.raises(KeyboardInterrupt): play(tmp_path/'killed', stop)
    with pytest.raises(ValueError, match='training with other settings'):
        play(tmp_path/'killed', distribution_kind='frechet')
    assert play(tmp_path/'killed')[0].fingerprint == healed.fingerprint == play(None)[0].fingerprint

def test_wrong_options_are_named(images, tmp_path):
    tok = small('tiny')
    gen = ARGenerator(ARCfg(codebook_size=512, width=32, depth=1)).eval()
    pairs = clean_pairs(tok, images)
    with pytest.raises(ValueError, match='weight distribution must be in'): replace(BRIEF, distribution=-1.)
    with pytest.raises(ValueError, match="give pairs with source='tokens'"):
        posttrain_decoder(tok, latent_pairs(gen, tok, images, .7), freeze='official')
    game = replace(BRIEF, adversarial=.1, adversarial_start=0., adaptive=False)
    with pytest.raises(OSError, match='no file'):
        posttrain_decoder(tok, pairs, game, discriminator=tmp_path/'none.safetensors')

def test_official_knows_no_consistency(images):
    tok = small('tiny')
    with pytest.raises(ValueError, match='no lora and no consistency'):
        posttrain_decoder(tok, clean_pairs(tok, images), BRIEF, freeze='official', consistency=1.)

def test_another_probe_is_not_gone_on_with(tmp_path, images):
    """A training that was ended under one judge is refused under another,
    whose numbers would be compared with the first's"""
    tok = small('tiny')
    how = ImageTraining(epochs=2, batch=25, perceptual=0, lr=5e-3)
    a, b = (Probe(torch.randint(512, (40, 49), generator=torch.Generator().manual_seed(s)), images,
                  bootstrap=2) for s in (1, 2))
    assert a.hash != b.hash and a.hash == replace(a).hash and a.hash != replace(a, seed=1).hash
    def stop(learner):
        if learner.epoch: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        posttrain_decoder(tok, clean_pairs(tok, images), how, work=tmp_path, preview=stop, device='cpu',
                          probe=a)
    with pytest.raises(ValueError, match='training with other settings; delete it'):
        posttrain_decoder(tok, clean_pairs(tok, images), how, work=tmp_path, device='cpu', probe=b)
    _, history = posttrain_decoder(tok, clean_pairs(tok, images), how, work=tmp_path, device='cpu', probe=a)
    assert len(history) > 1

@pytest.mark.parametrize('sigma', [{.5, .9}, (.5, .9), np.array([.5, .9])], ids=['set', 'tuple', 'array'])
def test_a_mixture_in_any_container(sigma):
    assert row_sigmas(10, sigma).sort().values.tolist() == pytest.approx([.5]*5+[.9]*5)

def test_each_sigma_once():
    with pytest.raises(ValueError, match='each sigma once'): row_sigmas(10, [.5, .5, .9])

@pytest.mark.parametrize('sigma, says', [([], 'at least one'), ({.9: 1, .9000001: 3}, 'each sigma once'),
                                         ([.9, 1.5], r'sigma must be in \[0, 1\], got 1.5'),
                                         (0., 'nothing ties the two')])
def test_a_wrong_sigma_is_named(sigma, says):
    with pytest.raises(ValueError, match=says): row_sigmas(9, sigma)

def test_a_wrong_option_leaves_the_folder_free(tmp_path, images):
    tok = small('tiny')
    gen = ARGenerator(ARCfg(codebook_size=512, width=32, depth=1)).eval()
    with pytest.raises(ValueError, match='temperature'):
        latent_pairs(gen, tok, images.subset(20), folder=tmp_path, temperature=0.)
    assert (not list(tmp_path.iterdir())
            and len(latent_pairs(gen, tok, images.subset(20), folder=tmp_path, temperature=1.)) == 20)
    with pytest.raises(ValueError, match='asked for is'):
        latent_pairs(gen, tok, images.subset(20), folder=tmp_path, temperature=0.)
    assert len(list(tmp_path.iterdir())) == 2, "what is whole stays"

def damaged_store(folder, images):
    "A whole store of two parts, and the second part's file"
    write_pairs(folder, None, small('tiny'), images.subset(30), part=20)
    return folder/'part-00001.safetensors'

@pytest.mark.parametrize('says, metadata',
                         [('does not say what it holds', m)
                          for m in (None, dict(a='1'), dict(about='x'), dict(about='{}'))])
def test_a_part_of_another_version_is_named(tmp_path, images, says, metadata):
    from safetensors.torch import load_file, save_file
    part = damaged_store(tmp_path, images)
    save_file(load_file(part), part, metadata)
    with pytest.raises(ValueError, match=f'part-00001.safetensors {says}.*call write_pairs again'):
        open_pairs(tmp_path, images.subset(30))

def test_a_part_of_another_place_is_named(tmp_path, images):
    part = damaged_store(tmp_path, images)
    part.write_bytes((tmp_path/'part-00000.safetensors').read_bytes())
    with pytest.raises(ValueError, match='part-00001.safetensors is a file of another place or of other '
                                         'pairs; call write_pairs again'):
        open_pairs(tmp_path, images.subset(30))

@pytest.mark.parametrize('text, lacks',
                         [('[]', 'Expected object, got array'),
                          ('{"n": 30, "part": 20}', 'Object missing required field images')])
def test_a_recipe_of_another_version_is_named(tmp_path, images, text, lacks):
    damaged_store(tmp_path, images)
    (tmp_path/'pairs.json').write_text(text)
    with pytest.raises(ValueError, match=f'pairs.json does not hold what it should: {lacks}.*; delete'):
        open_pairs(tmp_path, images.subset(30))
    with pytest.raises(ValueError, match=f'pairs.json does not hold what it should: {lacks}.*; delete'):
        damaged_store(tmp_path, images)

def test_wrong_pairs_are_named(images, tmp_path):
    tok = small('tiny')
    gen = ARGenerator(ARCfg(codebook_size=512, width=32, depth=1)).eval()
    with pytest.raises(ValueError, match="source must be 'reencode' or 'tokens'"):
        latent_pairs(gen, tok, images, .5, source='png')
    with pytest.raises(ValueError, match='got no latents at all'):
        check_decodable(tok, encode_all(tok, images)[:0], images)
    write_pairs(tmp_path, None, tok, images)
    with pytest.raises(ValueError, match='was made with images'):
        open_pairs(tmp_path, fashion_mnist('test', 50))

def test_rows_of_a_store_are_those_in_memory(images, tmp_path):
    tok = small('tiny')
    gen = ARGenerator(ARCfg(codebook_size=512, width=32, depth=1)).eval()
    memory = latent_pairs(gen, tok, images, .5, source='tokens')
    write_pairs(tmp_path, gen, tok, images, .5, source='tokens', part=20)
    stored = open_pairs(tmp_path, images, tok, gen)
    rows = [49, 3, 20, 3]
    assert stored.hash != memory.hash and stored.about == memory.about
    assert torch.equal(stored.__getitems__(rows)[0], memory.latents[rows])
    assert torch.equal(stored[25][0], memory.latents[25])

def test_rows_from_the_end(tmp_path, images):
    damaged_store(tmp_path, images)
    pairs = open_pairs(tmp_path, images.subset(30))
    assert all(a.equal(b) for a, b in zip(pairs[-2], pairs[28]))
    with pytest.raises(IndexError): pairs[30]

@pytest.mark.parametrize('name, options',
                         [('tiny', {}), ('tiny', dict(quantizer_options=dict(update='ema')))])
def test_healing_leaves_a_tokenizer_in_training_mode_as_it_is(images, name, options):
    tok = make_tokenizer(name, width=32, depth=1, **options)
    before = copy.deepcopy(tok.state_dict())
    how = ImageTraining(epochs=1, batch=10, perceptual=0)
    drawn = torch.randint(512, (20, 49), generator=torch.Generator().manual_seed(0))
    healed, _ = match_distribution(tok, drawn, images.subset(20), replace(how, distribution=1.), device='cpu')
    assert tok.training and all(v.equal(before[k]) for k, v in tok.state_dict().items())
    assert all(v.equal(before[k]) for k, v in healed.state_dict().items() if not k.startswith('decoder.'))


KILLED = '''
import sys, torch
from tokkit.generators import ARCfg, ARGenerator
from tokkit.data import fashion_mnist
from tokkit.posttraining import latent_pairs
from tokkit.posttraining import posttrain_decoder
from tokkit.tokenizers import make_tokenizer
from tokkit.training import ImageTraining
torch.manual_seed(0)
tok = make_tokenizer('tiny', width=32, depth=1).eval()
gen = ARGenerator(ARCfg(codebook_size=512, width=32, depth=1)).eval()
images = fashion_mnist('train', 200)
from tokkit.posttraining.pair_store import open_pairs, write_pairs
write_pairs(f'{sys.argv[1]}/pairs', gen, tok, images, .7, part=20)
pairs = open_pairs(f'{sys.argv[1]}/pairs', images, tok, gen)
brief = ImageTraining(epochs=6, batch=25, perceptual=0, lr=2e-3)
healed, _ = posttrain_decoder(tok, pairs, brief, work=sys.argv[1], device='cpu')
print(pairs.hash, healed.fingerprint)
'''

def test_killed_and_taken_up_again(tmp_path):
    "SIGKILL once while pairs are made and once while the decoder learns: the same bits as without"
    def start(name):
        return subprocess.Popen([sys.executable, '-c', KILLED, str(tmp_path/name)], stdout=subprocess.PIPE,
                                text=True)
    def kill_when(process, there):
        while process.poll() is None and not there(): time.sleep(.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        return process.returncode == -9
    for name in ('whole', 'killed'): (tmp_path/name).mkdir()
    process = start('whole')
    whole = process.communicate(timeout=300)[0]
    parts = lambda: len(list((tmp_path/'killed'/'pairs').glob('part-*')))
    assert kill_when(start('killed'), lambda: parts() >= 3) and 3 <= parts() < 10
    assert kill_when(start('killed'), lambda: any((tmp_path/'killed').glob('checkpoint-*.pt')))
    process = start('killed')
    again = process.communicate(timeout=300)[0]
    assert whole and again == whole


class Spoilt(LatentPairs):
    "One latent turns to NaN in the third epoch: no learning rate overflows on every machine"
    def set_epoch(self, epoch):
        if epoch == 2: self.parts[0][7] = float('nan')


def test_probe_keeps_the_best_and_says_when_it_went_astray(images):
    tok = small('tiny-kl')
    latents = encode_all(tok, images)
    probe = Probe(latents.clone(), fashion_mnist('test', 50), bootstrap=5)
    with pytest.warns(UserWarning, match='went astray .*the best weights before that are kept, of epoch'):
        back, history = posttrain_decoder(tok, Spoilt(latents, images), replace(BRIEF, epochs=30),
                                          device='cpu', probe=probe, patience=99)
    assert history.epoch.iloc[0] == -1 and probe(back).value == history.probe.min()
    assert history.epoch.tolist() == [-1, 0, 1]
    assert history.recon.notna().tolist() == [False, True, True], "finished epochs keep their losses"


def test_lora_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match='lora needs a decoder with linear layers'):
        PostTraining(lora=2).check(make_tokenizer('tiny-cnn'))


def test_probe_stops_in_time(images):
    tok = small('tiny')
    values = iter([10., 8., 9., 9., 9., 7., 7.])
    def probe(t): return Card('gFID', next(values), .1, 50, 'own', 'none')
    healed, history = posttrain_decoder(tok, clean_pairs(tok, images), replace(BRIEF, epochs=6), device='cpu',
                                        probe=probe, patience=1)
    assert history.probe.tolist() == [10., 8., 9., 9.] and healed.fingerprint != tok.fingerprint

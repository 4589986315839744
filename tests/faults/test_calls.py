"""What a caller of the Python interface can get wrong: a table of expressions, and what the one line must
say

The expressions are evaluated in a process of their own, where nobody checks types: with the checks of the
other tests a wrong type would not reach the code that must refuse it.
"""
import json, subprocess, sys

import pytest

BEFORE = """
import os, tempfile, warnings; from pathlib import Path; from dataclasses import replace
import numpy as np, torch
from tokkit.core import *
from tokkit.data import *
from tokkit.demo import DemoCfg, Demo, demo_cfg
from tokkit.metrics import *
from tokkit.generators import *
from tokkit.posttraining import *
from tokkit.perturbation import *
from tokkit.runs import *
from tokkit.quantizers import *
from tokkit.tokenizers import *
from tokkit.training import *
warnings.simplefilter('ignore')
tmp = Path(tempfile.mkdtemp()); nan = float('nan')
images = fashion_mnist('test', 16); x = images[:][0]
tok = make_tokenizer('tiny', width=16, depth=1).eval(); kl = make_tokenizer('tiny-kl', width=16, depth=1).eval()
gen = make_generator('ar', tok.spec, width=32, depth=1).eval()
ids = tok.tokenize(x); book = torch.randn(300, 4)
"""

TABLE = [ # expression, what is said
    # tokenizers: what goes in
    ('tok.encode((x*127+128).to(torch.uint8))', 'takes images in [-1,1] as floats, got torch.uint8'),
         ('tok.tokenize(x.long())', 'got torch.int64'),
         ('tok.encode(x[:,:,:20])', 'takes images (b, 1, 28, 28)'),
    ('tok.encode(x.expand(-1,3,-1,-1))', 'takes images (b, 1, 28, 28)'),
         ('tok.encode(x[0])', 'takes images (b, 1, 28, 28)'),
         ('tok.tokenize(x*nan)', 'latents of image 0 must be finite'),
         ('tok.tokenize(x*float("inf"))', 'must be finite'),
    ('tok.detokenize(ids.float())', 'ids must be whole numbers, got torch.float32'),
         ('tok.detokenize(ids-1000)', 'ids must be in 0..511'),
         ('tok.detokenize(ids+1000)', 'ids must be in 0..511'),
         ('tok.detokenize(ids > 3)', 'ids must be whole numbers, got torch.bool'),
    ('kl.tokenize(x)', 'continuous latents and no ids'), ('kl.to_latents(x*nan)', 'must be finite'),
         ('Tokenizer.load(tmp)', 'holds no saved Tokenizer'),
         ('Tokenizer.load(tmp/"no")', 'holds no saved Tokenizer'),
    # sizes
    *((f'make_tokenizer("tiny", {name}={value})', f'{name} must be a whole number')
      for name in ('width', 'depth', 'heads', 'channels', 'size', 'patch', 'code_dim')
      for value in ('0', '-4', '2.5', '10**9', 'True')),
    *((f'make_tokenizer("tiny", {name}={value})', f'{name} must be a whole number')
      for name in ('latents', 'codebook_size', 'refine') for value in ('-4', '2.5', '10**12')),
    ('make_tokenizer("tiny", size=2**14, patch=1)', 'do not fit into any memory'),
         ('make_tokenizer("tiny", kind="mamba")', 'kind must be one of'), ('make_tokenizer("tiny", '
                                                                           'quantizer="x")',
                                                                           'quantizer must be one of'),
         ('make_tokenizer("huge")', 'huge'),
    *((f'{cfg}({name}={value})', f'{name} must be a whole number')
      for cfg in ('ARCfg', 'MaskedCfg', 'FlowCfg') for name in ('width', 'depth', 'heads', 'n', 'classes')
      for value in ('0', '1.5', '10**9')),
    # perturbation
    *((f'LatentPerturbation({text})', said) for text,
      said in [('delta=2.5', 'delta must be a whole number'), ('delta=0', 'delta must be'),
               ('delta=-1', 'delta must be'), ('delta=True', 'delta must be'),
               ('alpha=2', 'alpha must be in'), ('alpha=nan', 'alpha must be in'),
        ('beta=-.1', 'beta must be in'), ('beta="x"', 'beta must be in'),
               ('strength=-1', 'strength must be in'), ('strength=float("inf")', 'strength must be in'),
               ('kind="x"', 'kind must be one of'), ('annealing=.5', 'annealing must be a function')]),
    *((f'perturb_codes({text})', said) for text,
      said in [('ids-300, book, .5, 4', 'ids must be in 0..299'), ('ids+300, book, .5, 4', 'ids must be in'),
               ('ids.float(), book, .5, 4', 'ids must be whole numbers'),
               ('ids%300, book, 1.5, 4', 'alpha must be in'),
        ('ids%300, book, .5, 0', 'delta must be a whole number in 1..300'),
               ('ids%300, book, .5, 2.5', 'delta must be'), ('ids%300, book, .5, 301', 'delta must be'),
               ('ids%300, book*nan, .5, 4', 'code 0 must be finite'),
               ('ids%300, book, .5, 4, 2.', 'beta must be in'),
        ('ids%300, book, .5, 4, kind="x"', 'kind must be one of'), ('ids%300, book, .5, 4, '
                                                                    'neighbours="latent"',
                                                                    'pass them as z')]),
    ('perturb_latents(torch.randn(2,3,4), -1.)', 'strength must be in'),
         ('perturb_latents(torch.randn(2,3,4), nan)', 'strength must be in'),
         ('perturb_latents(torch.randn(2,3,4), float("inf"))', 'strength must be in'),
    # numbers
    *((f'rfid(tok, images, {text})', said) for text,
      said in [('n=1', 'n must be in 2..16'), ('n=17', 'n must be in'), ('n=2.5', 'n must be in'),
               ('bootstrap=-1', 'bootstrap must be a whole number'), ('bootstrap=2.5', 'bootstrap must be'),
               ('bootstrap=10**9', 'bootstrap must be'),
        ('"foo"', 'extractor must be'), ('device="tpu"', 'device must be')]),
    *((f'pfid(tok, images, bootstrap=0, {text})', said) for text,
      said in [('deltas=(2.7,)', 'delta must be a whole number in 1..512'),
               ('deltas=()', 'at least one alpha'), ('deltas=(0,)', 'delta must be'),
               ('deltas=(513,)', 'delta must be'), ('alphas=()', 'at least one alpha'),
        ('alphas=(1.5,)', 'alpha must be in'), ('kind="gaussian"', 'kind and strengths are for continuous')]),
    ('pfid(kl, images)', 'defined for codes'),
         ('pfid(kl, images, kind="gaussian", strengths=(-1.,))', 'strength must be in'),
         ('pfid(kl, images, kind="gaussian", strengths=(nan,))', 'strength must be in'),
    ('rfid(tok, x*nan)', 'got NaN or infinity'),
         ('rfid(tok, (x*127+128).to(torch.uint8))', 'expected images in [-1,1]'),
         ('rfid(tok, x*100)', 'got numbers from'), ('gfid(x*nan, images)', 'NaN'),
         ('gfid(x, images, bootstrap=-1)', 'bootstrap must be'),
    ('Card.from_dict([])', 'not a card: expected its fields by name'), ('Card.from_dict(None)', 'not a card'),
         ('Card.from_dict({})', 'it lacks'), ('Card.from_dict(rfid(tok, images, '
                                              'bootstrap=0).to_dict()|dict(n="x"))',
                                              'a card does not hold what it should'),
    ('Card.from_dict(rfid(tok, images, bootstrap=0).to_dict()|dict(value=None))', 'a card does not hold'),
         ('Card.from_dict(rfid(tok, images, bootstrap=0).to_dict()|dict(more=1))',
          'not a card of this version'),
    # generators
    *((f'sample_batches(gen, {text})', said) for text, said in [('-5', 'labels must be a whole number at '
                                                                       'least 0, got -5'),
                                                                ('torch.tensor([10])',
                                                                 'labels must be in 0..9'),
                                                                ('torch.tensor([-1])', 'labels must be in'),
        ('torch.tensor([1.5])', 'labels must be a vector of whole numbers'),
                                                                ('2, temperature=0',
                                                                 'temperature must be > 0'),
                                                                ('2, temperature=nan', 'temperature must be'),
                                                                ('2, guidance=-1', 'guidance must be in'),
                                                                ('2, top_k=0', 'top_k must be'),
                                                                ('2, top_k=2.5', 'top_k must be'),
        ('2, top_p=0', 'top_p must be'), ('2, batch=0', 'batch must be'),
                                                                ('2, keep=(ids[:2], 2.)', 'sigma must be in'),
                                                                ('2, keep=(ids[:2]-600, .5)',
                                                                 'keep must hold ids in'),
                                                                ('2, keep=(ids[:2].float(), .5)',
                                                                 'keep must be ids')]),
    # pairs and post-training
    *((f'latent_pairs(gen, tok, images, {text})', said) for text,
      said in [('0', 'sigma 0 keeps nothing'), ('2.', 'sigma must be in'), ('nan', 'sigma must be in'),
               ('[]', 'at least one fraction'), ('.9, source="x"', 'source must be'),
               ('.9, clean=2', 'clean must be in')]),
    ('latent_pairs(gen, kl, images)', 'the generator draws ids'), ('posttrain_decoder(tok, '
                                                                   'LatentPairs(ids-1000, images))',
                                                                   'ids must be in 0..511'),
         ('posttrain_decoder(kl, LatentPairs(kl.to_latents(x).detach()*nan, images))',
          'latents of image 0 must be finite'),
    ('posttrain_decoder(tok, LatentPairs(ids, images), lora=-1)', 'lora must be in'),
         ('write_pairs(tmp/"p", None, tok, images, part=0)', 'part must be in'),
         ('write_pairs(tmp/"p", None, tok, images, shard=(2,2))', 'shard must be'),
         ('open_pairs(tmp/"no", images)', 'no pairs in'),
    # data
    ('load_images("")', 'got nothing'), ('load_images("no such")', 'no data'),
         ('load_images("fashion_mnist", "dev")', "split must be 'train' or 'test'"),
         ('fashion_mnist(n=0)', 'n must be in'), ('ImageFolder(tmp, 0)', 'size must be'),
         ('ImageFolder(tmp, 10**9)', 'size must be'),
    ('ImageFolder(tmp, 28.5)', 'size must be'), ('ImageFolder(tmp, channels=2)', 'channels must be'),
         ('ImageSet(x)', 'must be uint8'), ('loader(images, 17)', 'leaves no batch'),
         ('TokenCache.open(tmp/"no")', 'no token cache'),
    ('TokenCache.build(tmp/"c", images, lambda x: x.flatten(2)*nan)', 'latents must be in'),
         ('TokenCache.build(tmp/"c", images, tok.tokenize, codebook_size=8)', 'ids must be in'),
    # runs, grids, folders
    ('artifact("../x", {}, lambda tmp: None, tmp)', 'names a folder'), ('artifact(None, {}, lambda tmp: '
                                                                        'None, tmp)', 'names a folder'),
         ('artifact(3, {}, lambda tmp: None, tmp)', 'names a folder'),
         ('Run.here("../../x")', 'names a folder'), ('Run.here(None)', 'names a folder'),
    ('grid_points(5)', 'a grid is names with values, got int'),
         ('grid_points([5])', 'a grid is names with values'), ('grid_points(dict(a=[]))', 'no values for a'),
         ('grid_points(dict(a=[1,1]))', 'the value 1 twice'),
         ('grid_points({k: range(100) for k in "abcd"})', '100,000,000 points'),
    ('sweep_experiment("e02_dose_response", dict(seed=[1]), workers=0, root=tmp)', 'workers must be'),
         ('sweep_experiment("e02_dose_response", dict(seed=[1]), workers=1.5, root=tmp)', 'workers must be'),
         ('sweep_experiment("e02_dose_response", dict(seed=[1]), minutes=nan, root=tmp)', 'minutes must be'),
    ('write_json(tmp, {})', 'is a folder'), ('read_json(tmp/"no.json")', 'no file'),
         ('read_json(tmp)', 'Is a directory'), ('file_sha256("/dev/zero")', 'is no regular file'),
         ('default_device("tpu")', 'device must be'), ('default_device("cuda:99")', 'use cpu'),
    # settings
    *((f'Demo(DemoCfg({text}), tmp)', said) for text,
      said in [('n_pfid=0', 'n_pfid must be'), ('n=2.5', 'n must be'), ('sigma=nan', 'sigma must be in'),
               ('delta=0', 'delta must be'), ('bootstrap=-1', 'bootstrap must be'),
               ('extractor="foo"', 'extractor must be'), ('end_ratio=2', 'end_ratio must be')]),
    *((f'ImageTraining({text})', said) for text,
      said in [('epochs=0', 'epochs'), ('batch=0', 'batch'), ('lr=-1', 'lr'),
               ('perceptual=-1', 'perceptual')]),
         *((f'GeneratorTraining({text})', said) for text,
           said in [('epochs=0', 'epochs'), ('ema=2', 'ema'), ('warmup=2', 'warmup')]),
]

RUN = BEFORE+"""
import json, sys
def told(expression):
    try: eval(expression)
    except Exception as e: return f'{type(e).__name__}: {e}'
    return 'nothing was raised'
print(json.dumps([told(e) for e in json.load(sys.stdin)]))
"""

@pytest.fixture(scope='module')
def told() -> list[str]:
    "What each expression of the table raised"
    done = subprocess.run([sys.executable, '-c', RUN], input=json.dumps([e for e,_ in TABLE]),
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])

@pytest.mark.parametrize('i', range(len(TABLE)), ids=[e[:50] for e,_ in TABLE])
def test_one_line_says_it(told, i):
    kind = told[i].split(':')[0]
    assert TABLE[i][1] in told[i] and '\n' not in told[i], f'{TABLE[i][0]} said: {told[i]}'
    assert kind in ('ValueError', 'FileNotFoundError', 'NotADirectoryError', 'IsADirectoryError',
                    'FloatingPointError', 'OSError'), told[i]

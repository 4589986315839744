"Commands that measure, and measures by hand, in one or several processes; called by test_processes_metrics"
import contextlib, io, json, sys
from pathlib import Path

import numpy as np
import torch

from tokkit.cli import main
from tokkit.core import write_json
from tokkit.data import fashion_mnist
from tokkit.features import default_extractor, extract, held
from tokkit.generators import load_generator
from tokkit.metrics import Card, evaluate_generator, FeatureBank, fd_infinity, gfid, ifid, Sampler
from tokkit.processes import is_main, joined
from tokkit.protocols import evaluate_protocol
from tokkit.recipes.posttraining import _judged
from tokkit.tokenizers import load_tokenizer

models, out = map(Path, sys.argv[1:3])
commands = json.loads(sys.argv[3])


def told(name:str, words:list[str]):
    "One command: its cards and what it printed, in files"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed): code = main([*words, '--json', str(out/f'{name}.json')])
    assert code == 0, name
    if is_main(): (out/f'{name}.txt').write_text(printed.getvalue())

def one_after_the_other():
    "A function that remembers what it drew, gives fewer than it is asked for, and is asked by one process"
    draws = np.random.default_rng(0)
    def draw(n):
        assert is_main()
        return torch.from_numpy(draws.uniform(-1, 1, (min(n, 50), 1, 28, 28)).astype(np.float32))
    return draw

def by_hand() -> dict[str,list[Card]]:
    "Measures that no command makes"
    tok, gen = load_tokenizer(models/'tok'), load_generator(models/'gen')
    images, real = fashion_mnist('test', 150), fashion_mnist('train', 130)
    how = dict(device='cpu', bootstrap=2, bank=FeatureBank())
    sampler = Sampler(gen, tok, seed=2, batch=24)       # which fills no chunk of 64 images
    samples = gen.sample(torch.arange(60)%10, rng=torch.arange(60))
    return dict(
        function=[gfid(one_after_the_other(), real, n=140, **how)],
        sampler=evaluate_generator(sampler, real, n=140, **how),
        tensor=evaluate_generator(sampler(70), real[:][0], **how),
        protocol=evaluate_protocol(sampler, real, 'quick', n=140, **how),
        neighbours=[ifid(tok, images, train=real, same_class=True, top_k=3, **how)],
        **_judged(dict(posttrained=tok), samples, real, dict(seed=0, device='cpu')))

def in_files() -> dict[str,list[Card]]:
    "The same, with features in files, as those of many images are"
    room, held.ROOM = held.ROOM, 4*112*64
    try: return by_hand()
    finally: held.ROOM = room

def limits() -> list:
    "A distance of endlessly many images, whose replicates are shared out"
    f = extract(default_extractor(28), fashion_mnist('test', 150), 'cpu')
    return [*fd_infinity(f, f[:80]+.1, parts=(1, 2), bootstrap=3)]


with joined():
    for name, words in commands.items(): told(name, words)
    found = dict(hand=by_hand(), file=in_files())
    plain = {where: {name: [c.to_dict() for c in cards] for name,cards in some.items()}
             for where,some in found.items()}|dict(limits=limits())
    if is_main(): write_json(out/'by_hand.json', plain)

"""Train a small generator, its weights spread over the processes or not, to the end or until a step in which
all processes vanish; called by test_spread.py"""
import json, os, sys
from pathlib import Path

import torch

from tokkit.core import tensors_hash
from tokkit.data import fashion_mnist
from tokkit.generators import make_generator
from tokkit.processes import is_main, joined
from tokkit.tokenizers import encode_all, make_tokenizer
from tokkit.training import GeneratorTraining, Learner, TensorPairs, train_generator

out, work, fsdp, last = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == 'fsdp', int(sys.argv[4])
one_batch = Learner._batch

def until_the_last(learner):
    if learner.step == last: os._exit(9)
    one_batch(learner)

Learner._batch = until_the_last
with joined():
    garments = fashion_mnist('train', 128)
    tok = make_tokenizer('tiny-16', width=16, depth=1).eval()
    ids = TensorPairs(encode_all(tok, garments), garments.labels)
    gen = make_generator('rar', tok.spec, 10, 0, width=32, depth=2, heads=2)
    cfg = GeneratorTraining(epochs=3, batch=32, gradient_checkpointing=True)
    history = train_generator(gen, ids, cfg, work=work, device='cpu', fsdp=fsdp)
    if is_main():
        told = dict(history=history.to_dict('list'), hash=tensors_hash(gen.state_dict()),
                    kinds=sorted({type(p).__name__ for p in gen.parameters()}))
        torch.save(gen.state_dict(), out.with_suffix('.pt'))
        out.write_text(json.dumps(told))

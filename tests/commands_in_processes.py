"Commands in one of several processes, one after the other, then pairs; called by test_processes_data.py"
import json, sys
from pathlib import Path

from safetensors.torch import save_file
from tokkit.cli import main
from tokkit.data import fashion_mnist
from tokkit.generators import load_generator, sample_batches
from tokkit.posttraining import latent_pairs
from tokkit.processes import is_main, joined
from tokkit.tokenizers import load_tokenizer

models, out = map(Path, sys.argv[1:3])
commands = json.loads(sys.argv[3])


def pairs_and_samples(folder:Path):
    "Pairs in a folder and in memory, and samples; the main process writes down what it got"
    tok, gen = load_tokenizer(models/'tok'), load_generator(models/'gen')
    images = fashion_mnist('train', 700)
    how = dict(sigma=.5, clean=.2, seed=3)
    kept = latent_pairs(gen, tok, images, folder=folder/'pairs', part=150, **how)
    memory = latent_pairs(gen, tok, images, **how)
    samples, _ = sample_batches(gen, 700, seed=4)
    assert kept.about == memory.about
    if is_main():
        save_file(dict(memory=memory.latents, kept=kept.latents, samples=samples), folder/'got.safetensors')


with joined():
    for words in commands: assert main(words) == 0, words
    pairs_and_samples(out)

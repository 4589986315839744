"Train a small tokenizer, alone or as one of several processes, and write its losses; called by test_train.py"
import json, os, sys
from pathlib import Path

from tokkit.data import fashion_mnist
from tokkit.perturbation import LatentPerturbation
from tokkit.tokenizers import make_tokenizer
from tokkit.training import ImageTraining, train_tokenizer

out = Path(sys.argv[1])
changes = json.loads(sys.argv[2])
cfg = ImageTraining(**dict(epochs=2, batch=32, lr=1e-3, perceptual=0, adversarial=.1, adversarial_start=.3,
                           revive=0) | changes)
tok = make_tokenizer('tiny-16', width=16, depth=1)
history = train_tokenizer(tok, fashion_mnist('train', 128), cfg, LatentPerturbation(.7, .5, 20),
                          work=out.parent/'work', device='cpu')
if os.environ.get('RANK', '0') == '0': out.write_text(json.dumps(history.to_dict('list')))

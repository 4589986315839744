"What tests of published models share: outputs of modules on the way, and files of full size without memory"
import json, re
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def outputs(**parts:torch.nn.Module):
    "The last output of each module while the block runs, by the name it is given here"
    found = {}
    def keep(name):
        def hook(_, __, result): found[name] = result
        return hook
    hooks = [module.register_forward_hook(keep(name)) for name, module in parts.items()]
    yield found
    for hook in hooks: hook.remove()


def encoded(tok, close, given:dict, out:dict) -> torch.Tensor:
    "Latents of the recorded images, seen to be the recorded ones at every step of an encoder with a sequence"
    sequence = tok.encoder.sequence(given['images'])
    close(sequence, out['enc_sequence'])
    close(tok.encoder.body(sequence, front=1, behind=8)[:,-8:], out['encoder'])
    z = tok.encode(given['images'])
    close(z, out['pre_quant'])
    return z


def check_full_size(fixtures:Path, table:str, key:str, entry) -> tuple[dict, dict, torch.nn.Module]:
    "Shapes of a published file, its tensors without memory, and the network that they were seen to fit"
    shapes = json.loads((fixtures/'zoo'/table).read_text())[key]
    with torch.device('meta'):
        theirs = {name: torch.empty(shape, dtype=getattr(torch, dtype))
                  for name, (shape, dtype) in shapes.items()
                  if not any(re.search(pattern, name) for pattern in entry.ignored)}
        model = entry.build()
    ours = entry.rename(model, theirs)      # strict: raises where a name is missing or too many
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in model.state_dict().items()}
    return shapes, theirs, model

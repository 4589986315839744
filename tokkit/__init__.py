__version__ = "0.1.0"

_NAMES = dict(    # what a newcomer meets first; each is imported from its folder when it is first asked for
    core='LatentSpec make_rng set_seed',
    data='fashion_mnist ImageFolder load_images',
    quantizers='Quantized VectorQuantizer',
    tokenizers='Tokenizer make_tokenizer',
    generators='Guidance LatentGenerator make_generator load_generator',
    perturbation='perturb_codes perturb_latents Annealing LatentPerturbation',
    features='FeatureExtractor',
    metrics='Card rfid pfid gfid',
    training='Learner train_tokenizer train_generator',
    posttraining='latent_pairs posttrain_decoder match_distribution',
    runs='Run')
_MODULE = {name:module for module,names in _NAMES.items() for name in names.split()}
__all__ = list(_MODULE)

def __getattr__(name):
    "Import a name of `__all__` when it is first used, so that `import tokkit` costs nothing"
    if name not in _MODULE: raise AttributeError(f"module 'tokkit' has no attribute {name!r}")
    from importlib import import_module
    globals()[name] = value = getattr(import_module(f'.{_MODULE[name]}', __name__), name)
    return value

def __dir__(): return sorted([*globals(), *__all__])

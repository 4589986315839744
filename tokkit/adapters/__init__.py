"Tokenizers and generators of other people, behind our contracts"
from .wrapping import *
from .wrapped_tokenizer import *
from .wrapped_generator import *
from .diffusers import *

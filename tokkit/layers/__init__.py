"The blocks that tokenizers and generators are built from"
from .attention import *
from .transformer import *
from .convolution import *
from .llama import *

"Images to latents and back: codebooks, quantizers, networks and the tokenizer"
from .codebook import *
from .quantizer import *
from .residual_quantizers import *
from .scalar_quantizers import *
from .quantizer_registry import *
from .config import *
from .transformers import *
from .convolutional import *
from .protocol import *
from .tokenizer import *
from .latents import *
from .maetok import *

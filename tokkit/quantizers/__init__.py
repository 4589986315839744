"Latents to codes and back: codebooks, quantizers, and who is near whom"
from .codebook import *
from .quantizer import *
from .residual_quantizers import *
from .scalar_quantizers import *
from .whole_codebook import *
from .soft import *
from .registry import *
from .rotation import *

"Images to latents and back: networks and the tokenizer"
from .config import *
from .transformers import *
from .convolutional import *
from .protocol import *
from .tokenizer import *
from .latents import *
from .maetok import *
from .titok import *
from .detok import *
from .magvit2 import *
from .gigatok import *

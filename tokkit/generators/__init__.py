"Labels to latents: autoregressive, masked and flow generators behind one contract"
from .base import *
from .inference import *
from .token_orders import *
from .autoregressive_sampler import *
from .autoregressive import *
from .masked import *
from .flow import *
from .registry import *

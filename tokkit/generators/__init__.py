"Labels to latents: autoregressive, masked and flow generators behind one contract"
from .sampling import *
from .base import *
from .token_orders import *
from .autoregressive_sampler import *
from .autoregressive import *
from .masked import *
from .flow import *
from .registry import *
from .gpt import *
from .sit import *
from .titok_maskgit import *
from .sit_2d import *

"Published tokenizers and generators by name"
from .checkpoints import *
from .published import *
from .robustok import *
from .llamagen import *
from .taef2 import *
from .hub import *
from .vqgan import *
from .maskgit_vqgan import *
from .rar import *
from .maetok_sit import *
from .titok import *
from .var import *

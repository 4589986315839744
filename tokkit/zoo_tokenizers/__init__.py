"Published tokenizers, an entry or more a page"
from .robustok import *
from .llamagen import *
from .taef2 import *
from .vqgan import *
from .maskgit_vqgan import *
from .maetok import *
from .titok import *
from .var import *
from .gigatok import *
from .magvit2 import *
from .softvq import *
from .detok import *

"Networks that look at images: judges, teachers and rulers"
from .extractor import *
from .efficientnet import *
from .vision_transformers import *
from .extractors import *
from .lpips import *
from .power_spectrum import *
from .statistics import *
from .held import *
from .passing import *

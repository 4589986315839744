"Published generators, an entry or more a page"
from .rar import *
from .llamagen_gpt import *
from .maetok_sit import *
from .gigatok_gpt import *
from .titok_maskgit import *
from .sit_2d import *

"Real images in [-1,1], and their tokens"
from .images import *
from .files import *
from .image_folder import *
from .loader import *
from .augment import *
from .kept_parts import *
from .token_cache import *
from .shards import *
from .shard_images import *
from .stream import *
from .sources import *
from .streamed import *

"Healing the decoder: pairs, low rank, distribution matching and the choice of sigma"
from .preservation import *
from .pairs import *
from .pair_store import *
from .low_rank import *
from .decoder import *
from .distribution_matching import *
from .sigma import *
from .positive_control import *

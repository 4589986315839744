"Why a generator's latents are hard to decode, and which metric says so"
from .generator_errors import *
from .token_use import *
from .feature_shift import *
from .mmd_plane import *
from .calibration import *
from .predictors import *
from .decoder_sensitivity import *
from .decoded_power import *
from .arms import *
from .rank_power import *
from .convergence import *

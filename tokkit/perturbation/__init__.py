"Controlled errors in latents: which tokens, what happens to them, when, and in whose model"
from .masks import *
from .levels import *
from .kinds import *
from .codes import *
from .latents import *
from .schedule import *
from .module import *
from .foreign import *
from .attach import *

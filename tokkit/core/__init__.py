"What everything else stands on: seeds, checks, files, folders and saved models"
from .randomness import *
from .checks import *
from .machine import *
from .files import *
from .hashes import *
from .models import *
from .folders import *
from .locks import *
from .bundles import *
from .registry import *
from .evaluation import *
from .references import *

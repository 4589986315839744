"Distances between sets of images, as cards with an error"
from .frechet import *
from .pixel import *
from .exchange import *
from .mmd import *
from .precision_recall import *
from .card import *
from .reference import *
from .evaluator import *
from .reconstruction import *
from .ifid import *
from .generation import *
from .scorecard import *

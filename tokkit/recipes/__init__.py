"What decides a training, in one object: recipes, presets, the training that follows one, and samples drawn to files"
from .recipe import *
from .presets import *
from .files import *
from .making import *
from .following import *
from .estimate import *
from .posttraining import *
from .drawing import *

"What decides a training, in one object: recipes, presets, and the training that follows one"
from .recipe import *
from .presets import *
from .files import *
from .making import *
from .following import *
from .estimate import *
from .posttraining import *

"The whole story as stages"
from .settings import *
from .demo import *
from .trainings import *
from .cards import *
from .story import *

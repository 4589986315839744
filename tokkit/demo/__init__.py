"The whole story as stages"
from .settings import *
from .demo import *
from .trainings import *
from .arms import *
from .cards import *
from .helper import *
from .story import *

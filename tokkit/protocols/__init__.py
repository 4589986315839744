"How the field measures, as registered settings"
from .settings import *
from .sight import *
from .measuring import *

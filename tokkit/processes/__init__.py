"Several processes that do one job: who they are, and how they share it out"
from .group import *
from .shares import *
from .sharded_weights import *
from .parts import *
from .stopping import *
from .steps import *

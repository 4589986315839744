"Experiments are notebooks, runs are folders: parameters, artifacts, sweeps and tables"
from .parameters import *
from .grid import *
from .artifacts import *
from .run import *
from .execute import *
from .collect import *
from .engine import *
from .tracking import *
from .schedulers import *
from .workers import *
from .cluster import *

"The `tokkit` command"
from .options import *
from .models import *
from .posttraining import *
from .training import *
from .commands import *

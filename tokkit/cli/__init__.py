"The `tokkit` command"
from .options import *
from .models import *
from .posttraining import *
from .commands import *

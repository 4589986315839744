"The `tokkit` command"
from .options import *
from .models import *
from .commands import *

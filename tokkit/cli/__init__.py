"The `tokkit` command"
from .options import *
from .models import *
from .posttraining import *
from .training import *
from .sampling import *
from .comparing import *
from .running import *
from .listing import *
from .joining import *
from .commands import *

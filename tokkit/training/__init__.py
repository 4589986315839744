"One loop, the losses, and a function that trains each kind of model"
from .schedules import *
from .learner import *
from .checkpoint import *
from .losses import *
from .discriminators import *
from .semantic import *
from .adversarial import *
from .distribution_losses import *
from .watching import *
from .settings import *
from .image_loss import *
from .train import *

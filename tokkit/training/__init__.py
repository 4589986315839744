"One loop, the losses, and a function that trains each kind of model"
from .schedules import *
from .learner import *
from .checkpoint import *
from .losses import *
from .discriminators import *
from .semantic import *
from .adversarial import *
from .feature_moments import *
from .frechet_loss import *
from .settings import *
from .image_loss import *
from .train import *

"What a published model is: its file, its names, its licence"
from .checkpoints import *
from .entries import *

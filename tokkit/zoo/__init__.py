"Published tokenizers and generators by name"
from .load import *
from .hub import *

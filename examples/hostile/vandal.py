"""Writes all over the file system, replaces programs, and fills the disk.

Args: two that it does not use, and a name for the files it writes.
"""

import contextlib
import errno
import glob
import sys

mark = sys.argv[3]
# The sandbox's own, gone with it: the grader looks whether the host's were written to.
own = ("/box", "/tmp", "/dev/shm")
targets = [f"{place}/{mark}" for place in ["", *glob.glob("/*"), *glob.glob("/*/*")]]
targets += ["/usr/bin/env", "/etc/passwd", "/proc/sys/kernel/core_pattern"]
for target in targets:
    with contextlib.suppress(OSError), open(target, "w") as file:
        file.write("owned")
        if not target.startswith(own):
            print(target)
try:
    with open("fill", "wb") as file:
        while True:
            file.write(bytes(1 << 20))
except OSError as error:
    sys.exit(3 if error.errno == errno.ENOSPC else 1)

"""Attacks by files that all share: seeing who opens them, making others wait, flushing them all."""

import errno
import fcntl
import os
import select
import signal
import tempfile
import time

from attacker import (
    FILTERED,
    NUMBERS,
    denied,
    escaped,
    main,
    ready,
    refused,
    say,
    stopped,
    syscall,
)

PLACE = "/usr/bin"
FILE = f"{PLACE}/env"
IN_OPEN, DN_ACCESS = 0x20, 0x1
F_SETLEASE, F_GETLEASE, F_NOTIFY = 1024, 1025, 1026
FAN_REPORT_FID = 0x200
# linux/btrfs.h, linux/fscrypt.h.
BTRFS_SYNC, ADD_KEY, REMOVE_KEY = 0x9408, 0xC0506617, 0xC0406618
STEP = 0.02


def watch_files():
    """Watches a directory of the host's while somebody reads a file there: itself."""
    refused("inotify_init")
    refused("fanotify_init", FAN_REPORT_FID, 0)
    _watch(_read)


def watch_jobs():
    """The same while another job does."""
    _watch(lambda: None)


def _watch(meanwhile):
    ears = dict(filter(None, (_inotify(), _dnotify())))
    for _ in range(200):
        if not ears:
            return
        meanwhile()
        time.sleep(STEP)
        for name in [name for name, hears in ears.items() if hears()]:
            del ears[name]
            escaped(f"{name}: sees that {FILE} is used")
    stopped("mount", f"{sorted(ears)}: what others do is not seen in {PLACE}")


def _inotify():
    watcher, number = syscall("inotify_init1", os.O_NONBLOCK)
    if watcher < 0:
        denied("inotify", number, "seccomp" if "inotify_init1" in FILTERED else None)
        return None
    watch, number = syscall("inotify_add_watch", watcher, PLACE.encode(), IN_OPEN)
    if watch < 0:
        denied(f"inotify of {PLACE}", number)
        return None

    def hears():
        readable = select.select([watcher], [], [], 0)[0]
        return readable and os.path.basename(FILE).encode() in os.read(watcher, 65536)

    return "inotify", hears


def _dnotify():
    signals = []
    signal.signal(signal.SIGIO, lambda number, _: signals.append(number))
    directory = os.open(PLACE, os.O_RDONLY)
    try:
        fcntl.fcntl(directory, F_NOTIFY, DN_ACCESS)
    except OSError as error:
        denied("dnotify", error.errno, "seccomp" if error.errno == errno.EINVAL else None)
        return None
    return "dnotify", lambda: bool(signals)


def _read():
    with open(FILE, "rb", buffering=0) as file:
        file.read(1)


def use_a_file():
    """What the other job is to see."""
    ready()
    while True:
        _read()
        time.sleep(STEP)


def leases():
    """Leases: whoever opens the file, on the host too, waits until they are given back."""
    with tempfile.TemporaryDirectory() as directory:
        own = f"{directory}/file"
        for path, flags, kind in (
            (own, os.O_RDWR | os.O_CREAT, fcntl.F_WRLCK),
            (own, os.O_RDONLY, fcntl.F_RDLCK),
            (FILE, os.O_RDONLY, fcntl.F_RDLCK),
        ):
            descriptor = os.open(path, flags)
            what = f"lease {kind} on {'a shared file' if path == FILE else 'its own file'}"
            try:
                fcntl.fcntl(descriptor, F_SETLEASE, kind)
            except OSError as error:
                denied(what, error.errno, "seccomp" if error.errno == errno.EINVAL else None)
            else:
                if fcntl.fcntl(descriptor, F_GETLEASE) == kind:
                    escaped(what)
            os.close(descriptor)


def flush_disks():
    """Has the kernel write out all that it holds for the host; without doing it."""
    if "sync" not in NUMBERS:
        say("NOTE", "the number of sync is not known here")
    elif "sync" in FILTERED:
        stopped("seccomp", "sync")
    else:
        escaped("surface: sync reaches the kernel")
    # The answer to a call that is not made is 0, whatever its descriptor.
    got, number = syscall("syncfs", -1)
    if got == 0 or number == errno.ENOSYS:
        stopped("seccomp", "syncfs is not made")
    elif number == errno.EBADF:
        escaped("surface: syncfs reached the kernel")
    else:
        denied("syncfs", number)
    _request("BTRFS_IOC_SYNC", BTRFS_SYNC)


def file_system_keys():
    """Has a file system that all share keep a key, or forget one; one that nobody can use."""
    _request("FS_IOC_ADD_ENCRYPTION_KEY", ADD_KEY, bytes(80))
    _request("FS_IOC_REMOVE_ENCRYPTION_KEY", REMOVE_KEY, bytes(64))


def _request(what, number, *argument):
    """An ioctl on a shared file, which other file systems answer with ENOTTY."""
    with open(FILE, "rb") as file:
        try:
            fcntl.ioctl(file, number, *argument)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EACCES):
                denied(what, error.errno, "seccomp")
                return
        escaped(f"surface: {what} reached the kernel")


if __name__ == "__main__":
    main(globals())

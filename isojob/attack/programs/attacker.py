"""What the programs have in common. They run inside the sandbox: standard library alone.

A line ``ESCAPED what`` says that something was reached that must not be; ``STOPPED layer: how``
what an attempt met; ``NOTE text`` what a reader may want to know; ``READY`` that the attack which
runs beside this may begin.
"""

import ctypes
import errno
import os
import platform
import sys

LAYERS = {
    "ENOSYS": "seccomp",
    "EROFS": "mount",
    "EXDEV": "mount",
    "ENOSPC": "mount",
    "ETXTBSY": "mount",
    "ENOENT": "namespace",
    "ESRCH": "namespace",
    "ENETUNREACH": "namespace",
    "ECONNREFUSED": "namespace",
    "ENODEV": "namespace",
    "ENXIO": "namespace",
    "EPERM": "privileges",
    "EACCES": "privileges",
    "EAGAIN": "cgroup",
    "ENOMEM": "cgroup",
    "EMFILE": "rlimit",
    "EFBIG": "rlimit",
    "EAFNOSUPPORT": "seccomp",
    "EPROTONOSUPPORT": "seccomp",
}
FILTERED = frozenset(os.environ.pop("ISOJOB_FILTERED", "").split(","))
"""What the filter refuses whatever the arguments; the host has asked the filter itself."""
SAY = int(os.environ.pop("ISOJOB_SAY", "1"))
"""Where to: stdout, but for a job whose stdout goes to another job."""
_libc = ctypes.CDLL(None, use_errno=True)

X86_64 = {
    "ptrace": 101, "syslog": 103, "personality": 135, "modify_ldt": 154, "pivot_root": 155,
    "adjtimex": 159, "chroot": 161, "acct": 163, "settimeofday": 164, "mount": 165, "umount2": 166,
    "swapon": 167, "swapoff": 168, "reboot": 169, "sethostname": 170, "iopl": 172, "ioperm": 173,
    "init_module": 175, "delete_module": 176, "quotactl": 179, "clock_settime": 227,
    "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272,
    "perf_event_open": 298, "fanotify_init": 300, "prlimit64": 302, "name_to_handle_at": 303,
    "open_by_handle_at": 304, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311,
    "kcmp": 312, "finit_module": 313, "bpf": 321, "userfaultfd": 323, "io_uring_setup": 425,
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "pidfd_open": 434, "clone3": 435,
    "pidfd_getfd": 438, "mount_setattr": 442, "vhangup": 153, "socket": 41, "seccomp": 317,
    "memfd_create": 319, "inotify_init1": 294, "timer_create": 222, "kexec_file_load": 320,
    "lookup_dcookie": 212, "mq_open": 240, "shmget": 29, "shmat": 30, "msgget": 68, "semget": 64,
    "clone": 56, "inotify_init": 253, "inotify_add_watch": 254, "mbind": 237, "mq_unlink": 241,
    "setsockopt": 54, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "setxattrat": 463,
    "sync": 162, "syncfs": 306, "pipe2": 293, "prctl": 157,
}  # fmt: skip
AARCH64 = {
    "ptrace": 117, "syslog": 116, "personality": 92, "pivot_root": 41, "adjtimex": 171,
    "chroot": 51, "acct": 89, "settimeofday": 170, "mount": 40, "umount2": 39, "swapon": 224,
    "swapoff": 225, "reboot": 142, "sethostname": 161, "init_module": 105, "delete_module": 106,
    "quotactl": 60, "clock_settime": 112, "kexec_load": 104, "add_key": 217, "request_key": 218,
    "keyctl": 219, "unshare": 97, "perf_event_open": 241, "fanotify_init": 262, "prlimit64": 261,
    "name_to_handle_at": 264, "open_by_handle_at": 265, "setns": 268, "process_vm_readv": 270,
    "process_vm_writev": 271, "kcmp": 272, "finit_module": 273, "bpf": 280, "userfaultfd": 282,
    "io_uring_setup": 425, "open_tree": 428, "move_mount": 429, "fsopen": 430, "pidfd_open": 434,
    "clone3": 435, "pidfd_getfd": 438, "mount_setattr": 442, "vhangup": 58, "socket": 198,
    "seccomp": 277, "memfd_create": 279, "inotify_init1": 26, "timer_create": 107,
    "kexec_file_load": 294, "lookup_dcookie": 18, "mq_open": 180, "shmget": 194, "shmat": 196,
    "msgget": 186, "semget": 190, "clone": 220, "inotify_add_watch": 27, "mbind": 235,
    "mq_unlink": 181, "setsockopt": 208, "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7,
    "setxattrat": 463, "sync": 81, "syncfs": 267, "pipe2": 59, "prctl": 167,
}  # fmt: skip
NUMBERS = {"x86_64": X86_64, "aarch64": AARCH64}.get(platform.machine(), {})


def say(*words):
    """Prints a line at once: the next thing may kill us."""
    os.write(SAY, (" ".join(map(str, words)) + "\n").encode("utf-8", "replace"))


def ready():
    """What another attack is to find is there."""
    say("READY")


def escaped(what):
    """Something was reached."""
    say("ESCAPED", what)


def stopped(layer, how):
    """An attempt met this layer."""
    say("STOPPED", f"{layer}: {how}")


def denied(what, number, layer=None):
    """An attempt ended with an error number."""
    name = errno.errorcode.get(number, str(number))
    stopped(layer or LAYERS.get(name, "kernel"), f"{what}: {name}")


def attempt(what, function, *arguments, layer=None, harmless=False):
    """Calls something that must raise OSError; its value if it did not."""
    try:
        value = function(*arguments)
    except OSError as error:
        denied(what, error.errno, layer)
        return None
    if not harmless:
        escaped(what)
    return value


def syscall(name, *arguments):
    """A raw system call: its value and error number."""
    number = NUMBERS[name] if isinstance(name, str) else name
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    ctypes.set_errno(0)
    value = _libc.syscall(ctypes.c_long(number), *words)
    return value, ctypes.get_errno() if value == -1 else 0


def refused(name, *arguments, also=(), what=None):
    """A system call that must fail; numbers in `also` mean that the call itself was reached."""
    if name not in NUMBERS:
        say("NOTE", f"{name} does not exist on {platform.machine()}")
        return
    value, number = syscall(name, *arguments)
    if value != -1 or number in also:
        escaped(
            f"surface: {what or name} reached the kernel ({errno.errorcode.get(number, value)})"
        )
    else:
        denied(what or name, number, "seccomp" if name in FILTERED else None)


def main(programs):
    """Runs the program that argv names; what follows its name only marks the process."""
    programs[sys.argv[1]](*sys.argv[3:])

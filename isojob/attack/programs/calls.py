"""Attacks by system calls: what reaches deep into the kernel, and ways round the filter."""

import ctypes
import errno
import mmap
import os
import platform

from attacker import denied, escaped, main, refused, say, stopped, syscall

EINVAL, EFAULT, EBADF, ENOENT = 22, 14, 9, 2
REACHED = (EINVAL, EFAULT, EBADF, ENOENT)


def dangerous():
    """Calls that no ordinary program makes."""
    for name, arguments in {
        "bpf": (0, 0, 0), "userfaultfd": (0,), "perf_event_open": (0, 0, -1, -1, 0),
        "kexec_load": (0, 0, 0, 0), "kexec_file_load": (-1, -1, 0, 0, 0), "init_module": (0, 0, 0),
        "finit_module": (-1, 0, 0), "delete_module": (0, 0), "swapon": (0, 0), "swapoff": (0,),
        "acct": (0,), "quotactl": (0, 0, 0, 0), "open_by_handle_at": (-1, 0, 0),
        "lookup_dcookie": (0, 0, 0), "iopl": (3,), "ioperm": (0, 1, 1), "reboot": (0, 0, 0, 0),
        "vhangup": (), "fanotify_init": (0, 0), "kcmp": (1, 1, 0, 0, 0), "syslog": (3, 0, 0),
        "process_vm_writev": (1, 0, 0, 0, 0, 0), "keyctl": (0, 0, 0),
    }.items():  # fmt: skip
        refused(name, *arguments, also=REACHED)


def io_uring():
    """Files and sockets that the filter does not see."""
    refused("io_uring_setup", 1, ctypes.create_string_buffer(120), also=REACHED)


def foreign_numbers():
    """The numbers of x32, and numbers that do not exist."""
    if platform.machine() == "x86_64":
        for name, number in (("getpid", 39), ("openat", 257), ("ptrace", 521)):
            value, error = syscall(0x40000000 | number, 0, 0, 0, 0)
            if value != -1 or error in REACHED:
                escaped(f"surface: x32 {name} reached the kernel")
            else:
                denied(f"x32 {name}", error)
    for number in (0x3FFF, 600, 1 << 20):
        value, error = syscall(number)
        if value != -1 or error != 38:
            escaped(f"unknown call {number}: {error}")
    stopped("seccomp", "unknown numbers: ENOSYS")


def int80():
    """The calls of a 32-bit program."""
    if platform.machine() != "x86_64":
        say("NOTE", "only on x86_64")
        return
    # mov eax, 20 (getpid); int 0x80; ret
    code = b"\xb8\x14\x00\x00\x00\xcd\x80\xc3"
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    value = ctypes.CFUNCTYPE(ctypes.c_int)(address)()
    if value == os.getpid():
        escaped("surface: int 0x80 reached the kernel")
    else:
        denied("int 0x80", -value)


def second_filter():
    """A second filter that allows all."""
    program = (ctypes.c_uint64 * 1)(0x7FFF000000000006)  # ret ALLOW
    holder = (ctypes.c_uint64 * 2)(1, ctypes.addressof(program))
    value, error = syscall("seccomp", 1, 0, ctypes.byref(holder))
    say("NOTE", f"second filter: {value} {error}")
    refused("bpf", 0, 0, 0, also=REACHED, what="bpf after a second filter")


def personalities():
    """Old behaviour of the kernel, and segments."""
    for value in (0x0040000, 0x0100000, 0x0400000, 0x8000000):
        result, error = syscall("personality", value)
        if result != -1:
            escaped(f"surface: personality {value:#x}")
        else:
            denied(f"personality {value:#x}", error, "seccomp")
    refused("modify_ldt", 1, ctypes.create_string_buffer(16), 16, also=REACHED)


# linux/sockios.h, linux/if_bridge.h: each has the kernel load a module, bridge or 8021q, before it
# looks at anything else.
MODULE_REQUESTS = {
    "SIOCGIFBR": 0x8940, "SIOCSIFBR": 0x8941, "SIOCGIFVLAN": 0x8982, "SIOCSIFVLAN": 0x8983,
    "SIOCBRADDBR": 0x89A0, "SIOCBRDELBR": 0x89A1, "SIOCBRADDIF": 0x89A2, "SIOCBRDELIF": 0x89A3,
}  # fmt: skip


def module_requests():
    """Requests that load modules; to what is no socket, so that none is loaded."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open("/dev/null", os.O_RDONLY)
    for name, request in MODULE_REQUESTS.items():
        for high in (0, 1 << 32):  # the kernel reads an int
            libc.ioctl(descriptor, ctypes.c_ulong(request | high), None)
            if ctypes.get_errno() == errno.ENOTTY:
                escaped(f"surface: {name} reached the kernel")
                break
        else:
            denied(name, ctypes.get_errno(), "seccomp")


if __name__ == "__main__":
    main(globals())

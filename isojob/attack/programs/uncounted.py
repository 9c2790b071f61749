"""Attacks on what is counted for nobody, or for the host: kernel memory, its pools and counters.

Each takes little: whether it is got at all tells.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import signal
import socket
import struct
import tempfile

from attacker import FILTERED, attempt, denied, escaped, main, stopped, syscall

_libc = ctypes.CDLL(None, use_errno=True)
_UNMADE = (errno.ENOPROTOOPT, errno.EPERM, errno.EACCES, errno.ENOSYS)
"""What an option that is refused as a whole is answered with, whatever its value."""
TCP4, UDP4 = (socket.AF_INET, socket.SOCK_STREAM), (socket.AF_INET, socket.SOCK_DGRAM)
UDP6 = (socket.AF_INET6, socket.SOCK_DGRAM)
_LOOPBACK = 1
"""The number of the interface lo."""


def uncounted_sockets():
    """What hangs on sockets: answers that nobody reads, keys, memberships, filters."""
    _netlink()
    address = struct.pack("=H2x4s120x", socket.AF_INET, socket.inet_aton("10.0.0.1"))
    group4, group6 = socket.inet_aton("239.1.2.3"), socket.inet_pton(socket.AF_INET6, "ff05::1:1")
    storage4 = struct.pack("=H2x4s120x", socket.AF_INET, group4)
    storage6 = struct.pack("=H6x16s104x", socket.AF_INET6, group6)
    source6 = struct.pack("=H6x16s104x", socket.AF_INET6, b"\xfd" + bytes(14) + b"\1")
    index = struct.pack("@i4x", _LOOPBACK)
    member6 = group6 + struct.pack("@i", _LOOPBACK)
    allow = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0xFFFFFFFF))
    program = struct.pack("@HP", 1, ctypes.addressof(allow))
    label = struct.pack("@16sIBBHHHI", bytes(15) + b"\1", 0, 0, 1, 1, 0, 6, 0)
    # The numbers: asm-generic/socket.h, linux/tcp.h, linux/in.h, linux/in6.h.
    for what, kind, level, option, value in (
        ("TCP_MD5SIG", TCP4, 6, 14, address + struct.pack("@BBHi80s", 0, 0, 80, 0, b"key")),
        ("TCP_MD5SIG_EXT", TCP4, 6, 32, address + struct.pack("@BBHi80s", 1, 32, 80, 0, b"key")),
        ("TCP_AO_ADD_KEY", TCP4, 6, 38, bytes(8)),
        ("IP_ADD_MEMBERSHIP", UDP4, 0, 35, group4 + struct.pack("@4xi", _LOOPBACK)),
        ("IP_ADD_SOURCE_MEMBERSHIP", UDP4, 0, 39, group4 + b"\x7f\0\0\1\x0a\0\0\1"),
        ("MCAST_JOIN_GROUP", UDP4, 0, 42, index + storage4),
        ("MCAST_JOIN_SOURCE_GROUP", UDP4, 0, 46, index + storage4 + address),
        ("IPV6_2292PKTOPTIONS", UDP6, 41, 6, struct.pack("@Qii", 4096, 99, 0).ljust(4096, b"\0")),
        ("IPV6_RTHDR", UDP6, 41, 57, bytes((59, 2, 4, 0, 0, 0, 0, 0)) + b"\xfd".ljust(16, b"\1")),
        ("IPV6_JOIN_GROUP", UDP6, 41, 20, member6),
        ("IPV6_JOIN_ANYCAST", UDP6, 41, 27, member6),
        ("IPV6_FLOWLABEL_MGR", UDP6, 41, 32, label),
        ("MCAST_JOIN_GROUP of IPv6", UDP6, 41, 42, index + storage6),
        ("MCAST_JOIN_SOURCE_GROUP of IPv6", UDP6, 41, 46, index + storage6 + source6),
        ("SO_ATTACH_FILTER", UDP4, 1, 26, program),
        ("SO_ATTACH_REUSEPORT_CBPF", UDP4, 1, 51, program),
        ("SO_REUSEPORT", UDP4, 1, 15, struct.pack("@i", 1)),
        ("SO_RESERVE_MEM", TCP4, 1, 73, struct.pack("@i", 1 << 20)),
    ):
        _option(what, kind, level, option, value)


def _netlink():
    """Asks for the interfaces and leaves the answer in the queue."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
            netlink.send(struct.pack("=IHHIIB3x", 20, 18, 0x301, 1, 0, 0))
            queued = struct.unpack_from("=I", netlink.getsockopt(socket.SOL_SOCKET, 55, 36))[0]
    except OSError as error:
        denied("a netlink socket", error.errno)
    else:
        escaped(f"a netlink socket with {queued} bytes that no limit counts")


def _option(what, kind, level, option, value):
    for high in (0, 1 << 32):  # the kernel reads an int
        try:
            one = socket.socket(*kind)
        except OSError as error:
            denied(f"a socket for {what}", error.errno)
            return
        with one:
            with contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            arguments = (one.fileno(), level | high, option | high, value, len(value))
            got, number = syscall("setsockopt", *arguments)
        if got == 0:
            escaped(f"{what}, which no limit counts")
            return
        if number not in _UNMADE:
            escaped(f"surface: {what} reached the kernel ({errno.errorcode.get(number, number)})")
            return
    denied(what, number, "seccomp" if number == errno.ENOPROTOOPT else None)


ACL = "system.posix_acl_access"
# linux/prctl.h, linux/watch_queue.h.
SET_VMA, NOTIFICATION_PIPE = 0x53564D41, 0x80


def uncounted_inodes():
    """What hangs on inodes, mappings and pipes: access lists, policies, names, notifications."""
    entries = [(1, 7, -1), *[(2, 7, os.getuid())] * 500, *((tag, 7, -1) for tag in (4, 16, 32))]
    value = struct.pack("=I", 2) + b"".join(struct.pack("=HHi", *entry) for entry in entries)
    with tempfile.NamedTemporaryFile() as file:
        path = file.name
        for name, call in (
            ("setxattr", lambda: os.setxattr(path, ACL, value)),
            ("lsetxattr", lambda: os.setxattr(path, ACL, value, follow_symlinks=False)),
            ("fsetxattr", lambda: os.setxattr(file.fileno(), ACL, value)),
            ("setxattrat", lambda: _setxattrat(path, value)),
        ):
            what = f"an access list of {len(value)} bytes by {name}"
            attempt(what, call, layer="seccomp" if name in FILTERED else None, harmless=True)
            try:
                kept = len(os.getxattr(path, ACL))
                os.removexattr(path, ACL)
            except OSError:
                continue
            escaped(f"{what}: {kept} are kept, which no limit counts")
    with mmap.mmap(-1, mmap.PAGESIZE) as area:
        pages = ctypes.c_char.from_buffer(area)
        mask = ctypes.c_ulong(1)
        arguments = (ctypes.addressof(pages), mmap.PAGESIZE, 2, ctypes.byref(mask), 64, 0)
        got, number = syscall("mbind", *arguments)
        named = syscall("prctl", SET_VMA, 0, ctypes.addressof(pages), mmap.PAGESIZE, b"x" * 79)
        del pages
    if got == 0:
        escaped("a policy for shared memory by mbind, which no limit counts")
    else:
        denied("mbind", number, "seccomp" if "mbind" in FILTERED else None)
    _is_refused("a name for a mapping", *named)
    ends = (ctypes.c_int * 2)()
    _is_refused("a notification pipe", *syscall("pipe2", ends, NOTIFICATION_PIPE))


def _is_refused(what, got, number):
    """Many kernels do without, and answer as the filter does."""
    if got == 0:
        escaped(f"{what}, which no limit counts")
    else:
        denied(what, number)


def _setxattrat(path, value):
    kept = ctypes.create_string_buffer(value, len(value))
    arguments = struct.pack("=QII", ctypes.addressof(kept), len(value), 0)
    got, number = syscall("setxattrat", -100, path.encode(), 0, ACL.encode(), arguments, 16)
    if got != 0:
        raise OSError(number, "setxattrat")


HUGE, NO_RESERVE, MFD_HUGETLB, SHM_HUGETLB, SHM_NORESERVE = 0x40000, 0x4000, 4, 0o4000, 0o10000
HUGE_SIZE = 2 << 20


def huge_pages():
    """Huge pages: of a pool of the host's, and beside the memory limit."""
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    for what, call in (
        ("a huge page", lambda: mmap.mmap(-1, HUGE_SIZE, flags=anonymous | HUGE)),
        # A pool without pages gives this all the same.
        ("room for one", lambda: mmap.mmap(-1, HUGE_SIZE, flags=anonymous | HUGE | NO_RESERVE)),
        ("a file of huge pages", lambda: os.memfd_create("x", MFD_HUGETLB)),
        ("a segment of huge pages", _huge_segment),
    ):
        try:
            kept = call()
        except OSError as error:
            denied(what, error.errno, "seccomp" if error.errno == errno.ENOMEM else None)
        else:
            escaped(f"{what}, outside the memory limit")
            del kept


def _huge_segment():
    handle, number = syscall("shmget", 0, HUGE_SIZE, 0o1600 | SHM_HUGETLB | SHM_NORESERVE)
    if handle < 0:
        raise OSError(number, "shmget")
    _libc.shmctl(handle, 0, None)


PENDING = 1000


def counted_for_root():
    """What the kernel counts for whoever made the user namespace, and refuses to others then."""
    attributes = struct.pack("@8q", 0, 1, 1, 0, 0, 0, 0, 0)
    queue, number = syscall("mq_open", b"isojob-attack", os.O_CREAT | os.O_RDWR, 0o600, attributes)
    if queue >= 0:
        syscall("mq_unlink", b"isojob-attack")
        escaped("a message queue, counted for the host's user")
    else:
        denied("a message queue", number)
    last = signal.SIGRTMAX
    signal.pthread_sigmask(signal.SIG_BLOCK, {last})
    for count in range(PENDING):
        if _libc.sigqueue(os.getpid(), last, None) != 0:
            stopped("rlimit", f"pending signal number {count}")
            return
    escaped(f"{PENDING} pending signals, counted for the host's user")


if __name__ == "__main__":
    main(globals())

"""What isojob refuses beside a profile: calls that no namespace, limit or capability answers."""

from __future__ import annotations

import errno

from isojob.seccomp._answers import ENOSYS, ERRNO, Answer, Condition

__all__ = ["GUARDS", "INIT_GUARDS", "SYNCED"]


def _refusal(error: int, *comparisons: tuple[int, str, int]) -> Answer:
    """An error if all comparisons hold: position, operator, value, each of 32 bits."""
    conditions = (Condition(index, 32, op, value) for index, op, value in comparisons)
    return Answer(ERRNO | error, tuple(conditions))


def _masked(error: int, index: int, mask: int, value: int) -> Answer:
    return Answer(ERRNO | error, (Condition(index, 32, "MASKED_EQ", mask, value),))


def _flags(error: int, index: int, flag: int) -> Answer:
    return _masked(error, index, flag, flag)


def _values(error: int, index: int, *values: int) -> tuple[Answer, ...]:
    return tuple(_refusal(error, (index, "EQ", value)) for value in values)


# A job that changes the limits of process 1 takes the sandbox's init apart; no other protection of
# the kernel stands before prlimit(2) where both have one uid.
INIT_GUARDS: dict[str, tuple[Answer, ...]] = {"prlimit64": _values(errno.EPERM, 0, 1)}

_UNIX, _INET, _INET6 = 1, 2, 10
_TCP, _UDP = 6, 17


def _unless_unix(error: int, *more: Condition) -> Answer:
    return Answer(ERRNO | error, (Condition(0, 32, "NE", _UNIX), *more))


def _kind(mask: int, value: int) -> Condition:
    return Condition(1, 32, "MASKED_EQ", mask, value)


_SOCKET = (
    # Each other family, protocol and type, and each that do not match, has the kernel look for a
    # module, and so does a raw socket of protocol 0. What NETLINK queues is memory of the kernel's
    # that no cgroup is charged with, AF_ALG shares the host's page cache (CVE-2026-31431), AF_VSOCK
    # passes network namespaces by.
    _refusal(errno.EAFNOSUPPORT, *((0, "NE", family) for family in (_UNIX, _INET, _INET6))),
    _unless_unix(errno.EPERM, _kind(15, 3)),
    _unless_unix(
        errno.EPROTONOSUPPORT,
        *(Condition(2, 32, "NE", protocol) for protocol in (0, _TCP, _UDP)),
    ),
    _unless_unix(errno.EPROTONOSUPPORT, _kind(15, 1), Condition(2, 32, "EQ", _UDP)),
    _unless_unix(errno.EPROTONOSUPPORT, _kind(15, 2), Condition(2, 32, "EQ", _TCP)),
    *(_unless_unix(errno.ESOCKTNOSUPPORT, _kind(*kind)) for kind in ((15, 0), (12, 4), (8, 8))),
)
_IOCTL = _values(
    errno.EPERM,
    1,
    # asm-generic/ioctls.h. TIOCSTI and TIOCLINUX type into a terminal (CVE-2017-5226); TIOCSETD
    # loads line disciplines, a row of kernel holes (CVE-2017-2636, CVE-2023-6546).
    *(0x5412, 0x541C, 0x5423),
    # linux/sockios.h: SIOC[GS]IFBR, SIOC[GS]IFVLAN, SIOCBR(ADD|DEL)(BR|IF) load modules on any
    # socket; the last two since Linux 6.14, which looks at capabilities later.
    *(0x8940, 0x8941, 0x8982, 0x8983, 0x89A0, 0x89A1, 0x89A2, 0x89A3),
    # linux/btrfs.h: BTRFS_IOC_SYNC, BTRFS_IOC_START_SYNC write out a file system, whoever asks.
    *(0x9408, 0x80089418),
    # linux/fscrypt.h, of any file that can be read. FS_IOC_ADD_ENCRYPTION_KEY: the key stays in the
    # kernel as long as the file system is mounted. FS_IOC_REMOVE_ENCRYPTION_KEY(_ALL_USERS): takes
    # the caller's own away from a job of the same id, and writes out the file system.
    *(0xC0506617, 0xC0406618, 0xC0406619),
)
_OPTIONS = {
    # SO_ATTACH_FILTER, SO_ATTACH_REUSEPORT_CBPF: code of the machine-wide bpf_jit_limit.
    # SO_RESERVE_MEM: of the machine-wide tcp_mem. SO_REUSEPORT: 2 KiB a bound socket, charged to
    # nobody.
    1: (15, 26, 51, 73),
    # TCP_MD5SIG, TCP_MD5SIG_EXT, TCP_AO_ADD_KEY, TCP_AO_INFO: no cgroup is charged with the keys.
    6: (14, 32, 38, 40),
    # Memberships, likewise: IP_ADD_(SOURCE_)MEMBERSHIP, MCAST_JOIN_(SOURCE_)GROUP; of IPv6 also
    # IPV6_JOIN_ANYCAST; IPV6_2292PKTOPTIONS, of 64 KiB, and IPV6_RTHDR. IPV6_FLOWLABEL_MGR: the
    # table is the machine's.
    0: (35, 39, 42, 46),
    41: (6, 20, 27, 32, 42, 46, 57),
}
_NO_SUCH_CALL = (Answer(ENOSYS),)
_NO_ATTRIBUTES = (Answer(ERRNO | errno.EOPNOTSUPP),)
SYNCED = (Answer(ERRNO),)
GUARDS: dict[str, tuple[Answer, ...]] = {
    **INIT_GUARDS,
    "socket": _SOCKET,
    # The kernel makes the sockets before it says that only UNIX has pairs.
    "socketpair": (_unless_unix(errno.EAFNOSUPPORT),),
    "ioctl": _IOCTL,
    "setsockopt": tuple(
        _refusal(errno.ENOPROTOOPT, (1, "EQ", level), (2, "EQ", option))
        for level, options in _OPTIONS.items()
        for option in options
    ),
    # Access control lists: up to 64 KiB an inode that no cgroup is charged with. Their names are
    # in memory, where no filter sees them.
    **dict.fromkeys(("setxattr", "lsetxattr", "fsetxattr", "setxattrat"), _NO_ATTRIBUTES),
    # A policy for each range of a mapping, of shared memory for as long as that lasts, charged to
    # nobody.
    "mbind": _NO_SUCH_CALL,
    # Watches of bound directories tell what the host and other jobs open; the instances count for
    # who made the user namespace, up to the host's root (ucounts), and so does fanotify.
    **dict.fromkeys(("inotify_init", "inotify_init1", "fanotify_init"), _NO_SUCH_CALL),
    # It makes these calls where no filter sees them.
    "io_uring_setup": _NO_SUCH_CALL,
    # F_SETLEASE and F_SETDELEG (Linux 6.19) make the host's next open wait for the job, F_NOTIFY
    # watches.
    "fcntl": _values(errno.EINVAL, 1, 1024, 1026, 1040),
    # O_NOTIFICATION_PIPE: pages that no cgroup is charged with. As of a kernel without them.
    "pipe2": (_flags(errno.ENOPKG, 1, 0x80),),
    # PR_SCHED_CORE takes the other threads of its cores from everybody else, beside any quota;
    # PR_SET_VMA takes a name for each mapping, charged to nobody. As of older kernels.
    # PR_SET_MEMORY_MERGE, MADV_MERGEABLE: pages shared with virtual machines and other jobs tell by
    # the time of a write what they hold, and each takes 64 bytes.
    "prctl": _values(errno.EINVAL, 0, 62, 67, 0x53564D41),
    "madvise": _values(errno.EINVAL, 2, 12),
    "process_madvise": _values(errno.EINVAL, 3, 12),
    # MAP_HUGETLB, MFD_HUGETLB, SHM_HUGETLB: the host's own pool, outside of the memory limit.
    "mmap": (_flags(errno.ENOMEM, 3, 0x40000),),
    "memfd_create": (_flags(errno.ENOMEM, 1, 4),),
    "shmget": (_flags(errno.ENOMEM, 2, 0o4000),),
    # They flush the whole host. Said to be done: neither promises what fsync(2) does.
    **dict.fromkeys(("sync", "syncfs"), SYNCED),
    # Q_SYNC flushes too, and needs no capability; the lowest byte is the kind of quota
    # (linux/quota.h).
    "quotactl": (_masked(errno.EPERM, 0, 0xFFFFFF00, 0x80000100),),
    "quotactl_fd": (_masked(errno.EPERM, 1, 0xFFFFFF00, 0x80000100),),
}

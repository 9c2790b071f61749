"""What the filters made from profiles answer, rule by rule of the rules that they follow."""

from __future__ import annotations

import errno
import itertools
from functools import cache
from typing import Any

import pytest

from isojob.errors import ProfileError
from isojob.seccomp import SETUP_SYSCALLS, SeccompProfile, libseccomp_filter, syscall_name
from isojob.seccomp.evaluator import Call, check, describe, run

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
I386, ARM = 0x40000003, 0x40000028
KERNEL = (6, 1)
ENOSYS = 0x50000 | errno.ENOSYS
EPERM = 0x50000 | errno.EPERM
ALLOW, LOG, NOTIFY = 0x7FFF0000, 0x7FFC0000, 0x7FC00000
EXECVE = {"names": ["execve"], "action": "SCMP_ACT_ALLOW"}
ARGUMENT = range(6)


NAMES = [
    *("read", "lseek", "socket", "socketpair", "ioctl", "prlimit64", "clone", "clone3", "openat"),
    *("personality", "mmap", "chmod", "kill", "mseal", "listns"),
]


def profile(*rules: dict[str, Any], default: str = "SCMP_ACT_ERRNO", **more: Any) -> SeccompProfile:
    return SeccompProfile.model_validate(
        {"name": "test", "defaultAction": default, "syscalls": [EXECVE, *rules], **more}
    )


def rule(*names: str, action: str = "ALLOW", args: Any = (), **more: Any) -> dict[str, Any]:
    keys = ("index", "op", "value", "valueTwo")
    full = [dict(zip(keys, (a[0], f"SCMP_CMP_{a[1]}", *a[2:]), strict=False)) for a in args]
    return {"names": list(names), "action": f"SCMP_ACT_{action}", "args": full, **more}


@cache
def number(name: str, arch: int = MACHINES["x86_64"]) -> int:
    # 600 is no call anywhere: aarch64 has no chmod.
    return next((nr for nr in range(600) if syscall_name(arch, nr) == name), 600)


def answer(filter_: SeccompProfile, name: str, *args: int) -> int:
    padded = (*args, *[0] * (6 - len(args)))
    bpf = filter_.compile("x86_64", KERNEL).bpf
    return run(bpf, Call(number(name), padded))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "rules",
    [
        (rule("lseek", args=[(1, "GE", 5), (1, "LE", 9)]),),
        (rule("read"), rule("read", action="ERRNO", args=[(2, "EQ", 5)], errnoRet=22)),
    ],
)
def test_second_opinion_knows_its_limits(rules: tuple[dict[str, Any], ...]) -> None:
    """What libseccomp cannot express or would decide otherwise, it is not asked."""
    with pytest.raises(ProfileError, match="libseccomp"):
        libseccomp_filter(profile(*rules), "x86_64")


def test_and_inside_or_between() -> None:
    """All conditions of a rule must hold, of several rules one is enough (CVE-2017-18367)."""
    both = profile(rule("kill", args=[(0, "EQ", 5), (1, "EQ", 9)]))
    assert answer(both, "kill", 5, 9) == ALLOW
    assert answer(both, "kill", 5, 8) == answer(both, "kill", 4, 9) == EPERM
    either = profile(rule("kill", args=[(0, "EQ", 5)]), rule("kill", args=[(1, "EQ", 9)]))
    assert answer(either, "kill", 5, 8) == answer(either, "kill", 4, 9) == ALLOW
    assert answer(either, "kill", 4, 8) == EPERM
    between = profile(rule("kill", args=[(1, "GE", 5), (1, "LT", 9), (1, "NE", 7)]))
    allowed = [signal for signal in range(12) if answer(between, "kill", 0, signal) == ALLOW]
    assert allowed == [5, 6, 8]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_restrictive_rules_win(order: tuple[int, ...]) -> None:
    """Where rules overlap, the most restrictive one counts, wherever the profile has it."""
    overlapping = [
        rule("kill"),
        rule("kill", action="LOG", args=[(1, "GE", 1)]),
        rule("kill", action="ERRNO", args=[(1, "GE", 2)], errnoRet=22),
        rule("kill", action="KILL", args=[(1, "GE", 3)]),
    ]
    mixed = profile(*(overlapping[i] for i in order))
    answers = [answer(mixed, "kill", 0, signal) for signal in range(4)]
    assert answers == [ALLOW, LOG, 0x50000 | 22, NOTIFY]


def test_first_of_equals_wins() -> None:
    """Of two matching rules that return errors, the profile's first one counts."""
    two = [
        rule("kill", action="ERRNO", args=[(0, "EQ", 5)], errnoRet=22),
        rule("kill", action="ERRNO", errnoRet=5),
    ]
    assert answer(profile(*two), "kill", 5) == 0x50000 | 22
    assert answer(profile(*reversed(two)), "kill", 5) == 0x50000 | 5


@pytest.mark.parametrize("op", ["EQ", "NE"])
def test_int_arguments_by_their_low_half(op: str) -> None:
    """Bits that the kernel does not read make no difference; those of a pointer or offset do."""
    action = "ALLOW" if op == "EQ" else "ERRNO"
    hit = ALLOW if op == "EQ" else EPERM
    default = "SCMP_ACT_ERRNO" if op == "EQ" else "SCMP_ACT_ALLOW"

    def made(name: str, index: int, value: int) -> SeccompProfile:
        # NE says it the other way round: denied unless equal, asked with what is not equal.
        wanted = value if op == "EQ" else value + 1
        return profile(rule(name, action=action, args=[(index, op, wanted)]), default=default)

    for high in (0, 1 << 32, 2**64 - 2**32):
        assert answer(made("kill", 0, 5), "kill", 5 | high) == hit
        assert answer(made("chmod", 1, 0o755), "chmod", 0, 0o755 | 1 << 16 | high) == hit
    assert answer(made("lseek", 1, 5), "lseek", 0, 5) == hit
    if op == "EQ":
        assert answer(made("lseek", 1, 5), "lseek", 0, 5 | 1 << 32) == EPERM


def test_profile_values_are_cut_like_arguments() -> None:
    """A profile that writes -1 in 64 bits means the -1 that an int argument can be."""
    minus_one = profile(rule("kill", args=[(0, "EQ", 2**64 - 1)]))
    assert answer(minus_one, "kill", 2**32 - 1) == ALLOW
    assert answer(minus_one, "kill", 2**64 - 1) == ALLOW


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("quotactl", (0x80000100,), EPERM),  # QCMD(Q_SYNC, USRQUOTA)
        ("quotactl", (0x80000101 | 1 << 40,), EPERM),
        ("quotactl", (0x80000200,), ALLOW),
        ("quotactl_fd", (3, 0x80000102), EPERM),
        ("quotactl_fd", (0x80000100, 0), ALLOW),
        ("ioctl", (3, 0xC0406618), EPERM),
        ("ioctl", (3, 0xC0406619), EPERM),
        ("ioctl", (3, 0xC0406617), ALLOW),
    ],
)
def test_guards_of_file_systems(name: str, args: tuple[int, ...], expected: int) -> None:
    """They stand before a profile that allows all."""
    assert answer(profile(default="SCMP_ACT_ALLOW"), name, *args) == expected


def test_masked_equality() -> None:
    """The value is the mask and valueTwo what is wanted, at 64 bits across both halves."""
    wide = profile(rule("lseek", args=[(1, "MASKED_EQ", 0xF0000000F0, 0x5000000050)]))
    assert answer(wide, "lseek", 0, 0x5F0000005F) == ALLOW
    assert answer(wide, "lseek", 0, 0x5F0000004F) == EPERM
    assert answer(wide, "lseek", 0, 0x4F0000005F) == EPERM
    # What is wanted outside of the mask does not count, as for libseccomp.
    beyond = profile(rule("lseek", args=[(1, "MASKED_EQ", 0xF0, 0x150)]))
    for value, expected in ((0x50, ALLOW), (0x15F, ALLOW), (0x100, EPERM), (0x140, EPERM)):
        assert answer(beyond, "lseek", 0, value) == expected


@pytest.mark.parametrize(
    ("clone", "clone3", "expected"),
    [
        (rule("clone"), rule("clone3"), ALLOW),
        (rule("clone", args=[(0, "MASKED_EQ", 0x7E020000, 0)]), rule("clone3"), ENOSYS),
        (rule("clone"), rule("clone3", args=[(1, "EQ", 88)]), ENOSYS),
        (rule("clone"), rule("read"), ENOSYS),
        (rule("clone"), rule("clone3", action="ERRNO", errnoRet=1), ENOSYS),
        (rule("clone"), rule("clone3", action="KILL"), NOTIFY),
    ],
)
def test_clone3(clone: dict[str, Any], clone3: dict[str, Any], expected: int) -> None:
    """clone3 hides its flags from filters: ENOSYS, unless it and clone are allowed without ifs."""
    late = rule("mseal")
    assert answer(profile(clone, clone3, late), "clone3", 0, 88) == expected


def test_clone3_with_an_open_default() -> None:
    """Where the default allows, one rule about clone's flags is enough to close clone3."""
    assert answer(profile(default="SCMP_ACT_ALLOW"), "clone3") == ALLOW
    checked = rule("clone", action="ERRNO", args=[(0, "MASKED_EQ", 0x10000000, 0x10000000)])
    assert answer(profile(checked, default="SCMP_ACT_ALLOW"), "clone3") == ENOSYS


def test_calls_newer_than_the_profile() -> None:
    """Above the highest number a profile names, a denial is ENOSYS; below, and if open, not."""
    assert answer(profile(rule("openat")), "mkdirat") == ENOSYS
    assert answer(profile(rule("openat")), "kexec_load") == EPERM
    assert answer(profile(rule("openat"), default="SCMP_ACT_ALLOW"), "mkdirat") == ALLOW
    assert answer(profile(rule("openat"), default="SCMP_ACT_KILL"), "mkdirat") == ENOSYS
    assert answer(profile(rule("openat"), default="SCMP_ACT_KILL"), "kexec_load") == NOTIFY


REFUSED = [
    *(("socket", errno.EAFNOSUPPORT, (family, 1, 0)) for family in (0, 9, 16, 17, 38, 40)),
    *(("socketpair", errno.EAFNOSUPPORT, (family, 5, 132)) for family in (0, 2, 10, 16, 38)),
    *(("socket", errno.EPROTONOSUPPORT, (10, 1, protocol)) for protocol in (1, 17, 33, 132, 262)),
    ("socket", errno.EPROTONOSUPPORT, (2, 0x802, 6)),
    *(("socket", errno.ESOCKTNOSUPPORT, (2, kind | 0x80000, 0)) for kind in (0, 4, 5, 6, 10)),
    *(("ioctl", errno.EPERM, (0, n)) for n in (0x5412, 0x541C, 0x5423, 0x8941, 0x8982)),
    *(("ioctl", errno.EPERM, (0, n)) for n in (0x89A1, 0x89A2, 0x89A3)),
    *(("ioctl", errno.EPERM, (0, n)) for n in (0x9408, 0x80089418, 0xC0506617)),
    *(("pipe2", errno.ENOPKG, (0, flags)) for flags in (0x80, 0x80880)),
    *(("prctl", errno.EINVAL, (option, 0)) for option in (62, 67, 0x53564D41)),
    ("madvise", errno.EINVAL, (0, 4096, 12)),
    ("process_madvise", errno.EINVAL, (3, 0, 1, 12)),
    *(("socket", errno.EPERM, (family, 3, n)) for family in (2, 10) for n in (0, 1, 6, 255)),
    ("prlimit64", errno.EPERM, (1,)),
    *(("setsockopt", errno.ENOPROTOOPT, (3, 1, option)) for option in (15, 26, 51, 73)),
    *(("setsockopt", errno.ENOPROTOOPT, (3, 6, option)) for option in (14, 32, 38, 40)),
    *(("setsockopt", errno.ENOPROTOOPT, (3, 0, option)) for option in (35, 39, 42, 46)),
    *(("setsockopt", errno.ENOPROTOOPT, (3, 41, option)) for option in (6, 20, 27, 32, 42, 46, 57)),
    *(
        (name, errno.EOPNOTSUPP, ())
        for name in ("setxattr", "lsetxattr", "fsetxattr", "setxattrat")
    ),
    *((name, errno.ENOSYS, ()) for name in ("inotify_init", "inotify_init1", "fanotify_init")),
    ("io_uring_setup", errno.ENOSYS, ()),
    ("mbind", errno.ENOSYS, ()),
    ("fcntl", errno.EINVAL, (3, 1024)),
    ("fcntl", errno.EINVAL, (3, 1026)),
    ("fcntl", errno.EINVAL, (3, 1040)),
    ("mmap", errno.ENOMEM, (0, 4096, 3, 0x40022)),
    ("memfd_create", errno.ENOMEM, (0, 5)),
    ("shmget", errno.ENOMEM, (0, 4096, 0o4600)),
    ("sync", 0, ()),
    ("syncfs", 0, ()),
]
NOT_REFUSED = [
    *(("socket", (family, kind, 0)) for family in (1, 2, 10) for kind in (1, 2, 0x80802)),
    *(("socket", (1, 3, 0)), ("socket", (10, 2, 17)), ("socket", (1, 5, 0))),
    ("socketpair", (1, 5, 0)),
    *(("ioctl", (0, n)) for n in (0x5413, 0x9409, 0x40049409)),
    *(("pipe2", (0, flags)) for flags in (0, 0x84800)),
    *(("prctl", (option, 0)) for option in (15, 22, 38, 63, 68)),
    *(("madvise", (0, 4096, advice)) for advice in (4, 8, 13, 14)),
    ("prlimit64", (0,)),
    *(("setsockopt", (3, level, option)) for level, option in ((1, 7), (6, 1), (41, 26), (0, 26))),
    *(("fcntl", (3, command)) for command in (3, 1025, 1031)),
    ("mmap", (0, 4096, 3, 0x22)),
    ("memfd_create", (0, 3)),
    ("shmget", (0, 4096, 0o1600)),
]


@pytest.mark.parametrize("high", [0, 1 << 32, 2**64 - 2**32])
def test_guards(high: int) -> None:
    """What no limit sees, or would reach the host, is refused whatever a profile allows."""
    names = sorted({name for name, *_ in REFUSED})
    for each in (profile(default="SCMP_ACT_ALLOW"), profile(rule(*NAMES, *names))):
        for name, error, arguments in REFUSED:
            got = answer(each, name, *(value | high for value in arguments))
            assert got == 0x50000 | error, (name, arguments)
        for name, arguments in NOT_REFUSED:
            got = answer(each, name, *(value | high for value in arguments))
            assert got == ALLOW, (name, arguments)


def test_guards_do_not_loosen() -> None:
    """A rule that ends the job does so before a guard could answer with an error."""
    deadly = profile(rule("socket", action="KILL", args=[(0, "NE", 1)]))
    assert answer(deadly, "socket", 40) == NOTIFY
    unix = rule("socket", args=[(0, "EQ", 1)])
    deadly = profile(unix, rule("listns"), default="SCMP_ACT_KILL")
    assert answer(deadly, "socket", 16) == answer(deadly, "mbind") == NOTIFY
    assert answer(deadly, "sync") == NOTIFY
    assert answer(deadly, "socket", 1) == ALLOW


def test_sync_is_refused_where_the_profile_does() -> None:
    """Nobody is told that it is done who may not ask for it."""
    assert answer(profile(rule("listns")), "sync") == EPERM
    refused = rule("sync", action="ERRNO", errnoRet=errno.EACCES)
    assert answer(profile(refused, default="SCMP_ACT_ALLOW"), "sync") == 0x50000 | errno.EACCES
    assert answer(profile(rule("sync")), "sync") == 0x50000


def test_unconfined() -> None:
    """Unconfined allows all that it is asked, but the limits of init."""
    unconfined = SeccompProfile.unconfined()
    assert answer(unconfined, "prlimit64", 1) == EPERM
    for call in ("socket", "mount", "clone3", "ptrace", "listns"):
        assert answer(unconfined, call, 40) == ALLOW
    assert unconfined.compile().preload


@pytest.mark.parametrize("action", ["KILL", "KILL_THREAD", "KILL_PROCESS", "TRAP"])
def test_deadly_actions_notify(action: str) -> None:
    """Each action that ends a process becomes a notification, so that init can name the call."""
    assert not profile(rule("read")).compile().notify
    deadly = profile(rule("read", action=action))
    assert deadly.compile().notify
    assert answer(deadly, "read") == NOTIFY
    assert profile(default=f"SCMP_ACT_{action}").compile().notify


@pytest.mark.parametrize("action", ["ERRNO", "KILL", "LOG"])
@pytest.mark.parametrize("name", [*SETUP_SYSCALLS, "fcntl"])
def test_preload(name: str, action: str) -> None:
    """One call of the launcher that is not always let through forbids loading the filter early."""
    full = rule(*SETUP_SYSCALLS, "fcntl")
    assert profile(full).compile().preload
    some = rule(name, action=action, args=[(0, "EQ", 12345)])
    assert not profile(full, some).compile().preload
    less = rule(*(other for other in (*SETUP_SYSCALLS, "fcntl") if other != name))
    without = SeccompProfile.model_validate(
        {"name": "test", "defaultAction": "SCMP_ACT_ERRNO", "syscalls": [less]}
    )
    if name != "execve":
        assert not without.compile().preload


@pytest.mark.parametrize(
    ("args", "early"),
    [
        (((1, "LE", 5), (1, "EQ", 1030)), True),
        (((1, "LE", 4), (1, "MASKED_EQ", 0xFFFE, 1030)), True),
        (((1, "LE", 4),), False),
        (((1, "LE", 3), (1, "EQ", 1030)), False),
        (((0, "NE", 7),), False),
    ],
)
def test_preload_with_commands_of_fcntl(args: tuple[tuple[Any, ...], ...], early: bool) -> None:
    """Of fcntl the launcher needs some commands only: none that locks."""
    some = [rule("fcntl", args=[each]) for each in args]
    assert profile(rule(*SETUP_SYSCALLS), *some).compile().preload is early
    logged = rule("fcntl", action="LOG", args=[(1, "EQ", 6)])
    assert profile(rule(*SETUP_SYSCALLS), *some, logged).compile().preload is early


def test_conditions_on_the_host() -> None:
    """Rules count or not by the job's capabilities (none), its architecture and its kernel."""

    def read(**more: Any) -> int:
        return answer(profile(rule("read", **more)), "read")

    assert read(includes={"caps": ["CAP_SYS_ADMIN"]}) == EPERM
    assert read(excludes={"caps": ["CAP_SYS_ADMIN"]}) == ALLOW
    assert read(includes={"arches": ["arm64", "amd64"]}) == ALLOW
    assert read(includes={"arches": ["arm64", "x32"]}) == EPERM
    assert read(excludes={"arches": ["x86_64"]}) == EPERM
    assert read(includes={"minKernel": "6.1"}) == ALLOW
    assert read(includes={"minKernel": "6.2"}) == EPERM
    assert read(excludes={"minKernel": "5.10"}) == EPERM
    assert read(includes={"minKernel": "6.1", "arches": ["s390x"]}) == EPERM


def test_long_jumps() -> None:
    """Filters whose jumps do not fit into eight bits are bridged, to the last rule."""
    count = 400
    many = [rule("lseek", args=[(1, "EQ", k << 32 | k), (2, "NE", k)]) for k in range(1, count)]
    long = profile(*many, rule("read", action="ERRNO", args=[(2, "EQ", 7)], errnoRet=5))
    assert check(long.compile("x86_64", KERNEL).bpf) > 1000
    for k in (1, 2, 127, 128, 255, 256, 300, count - 1):
        assert answer(long, "lseek", 0, k << 32 | k, 0) == ALLOW
        assert answer(long, "lseek", 0, k << 32 | k, k) == EPERM
        assert answer(long, "lseek", 0, k << 32 | k + 1, 0) == EPERM
    assert answer(long, "lseek", 0, count << 32 | count, 0) == EPERM
    assert answer(long, "read", 0, 0, 7) == 0x50000 | 5


def test_too_long() -> None:
    """What would not fit into the kernel's 4096 instructions is refused."""
    many = [rule("lseek", args=[(1, "EQ", k << 32 | k)]) for k in range(1, 3000)]
    with pytest.raises(ProfileError, match="4096"):
        profile(*many).compile()


@pytest.mark.parametrize(
    ("value", "text"),
    [(ALLOW, "allow"), (EPERM, "errno EPERM"), (NOTIFY, "kill"), (0x50000 | 4000, "errno 4000")],
)
def test_describe(value: int, text: str) -> None:
    """Return values have readable names."""
    assert describe(value) == text


@pytest.mark.parametrize(
    "bpf",
    [
        b"",
        b"\0" * 7,
        bytes.fromhex("2000000000000000"),
        bytes.fromhex("0600000000000000") * 4097,
        bytes.fromhex("1500020000000000" + "0600000000000000"),
        bytes.fromhex("0500000001000000" + "0600000000000000"),
        bytes.fromhex("2000000002000000" + "0600000000000000"),
        bytes.fromhex("2000000040000000" + "0600000000000000"),
        bytes.fromhex("ff00000000000000" + "0600000000000000"),
    ],
)
def test_check_refuses_what_the_kernel_would(bpf: bytes) -> None:
    """Programs that are empty, too long, jump or load outside, or do not return are no filters."""
    with pytest.raises(ValueError, match="instruction"):
        check(bpf)

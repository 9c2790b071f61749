"""Compiled filters against a plain reading of the profiles, call by call, and against libseccomp.

Docker's and Podman's profiles are as those projects publish them, and how wide an argument is comes
from the kernel's prototypes, not from isojob's table (tests/data/README.md).
"""

from __future__ import annotations

import errno
import json
import random
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from environment import DATA, declared_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from isojob.seccomp import SeccompProfile, libseccomp_filter, syscall_name
from isojob.seccomp._profile import shipped_text
from isojob.seccomp.evaluator import Call, Reference, check, run

if TYPE_CHECKING:
    from collections.abc import Iterator

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
I386, ARM = 0x40000003, 0x40000028
KERNEL = (6, 1)
ENOSYS = 0x50000 | errno.ENOSYS
EPERM = 0x50000 | errno.EPERM
ALLOW, LOG, NOTIFY = 0x7FFF0000, 0x7FFC0000, 0x7FC00000
EXECVE = {"names": ["execve"], "action": "SCMP_ACT_ALLOW"}
ARGUMENT = range(6)


@cache
def source(name: str) -> tuple[SeccompProfile, dict[str, Any]]:
    if name in ("default", "compute"):
        return getattr(SeccompProfile, name)(), json.loads(shipped_text(name))
    path = DATA / f"{name}-default-seccomp.json"
    return SeccompProfile.load(path), json.loads(path.read_bytes())


@pytest.fixture(params=["default", "compute", "docker", "podman"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def rule(*names: str, action: str = "ALLOW", args: Any = (), **more: Any) -> dict[str, Any]:
    keys = ("index", "op", "value", "valueTwo")
    full = [dict(zip(keys, (a[0], f"SCMP_CMP_{a[1]}", *a[2:]), strict=False)) for a in args]
    return {"names": list(names), "action": f"SCMP_ACT_{action}", "args": full, **more}


@cache
def number(name: str, arch: int = MACHINES["x86_64"]) -> int:
    # 600 is no call anywhere: aarch64 has no chmod.
    return next((nr for nr in range(600) if syscall_name(arch, nr) == name), 600)


GUARDED = {
    "ioctl": [(1, n) for n in (0x5412, 0x541C, 0x5423, 0x8940, 0x8982, 0x89A0, 0x89A3)]
    + [(1, n) for n in (0x9408, 0x80089418, 0xC0506617, 0xC0406618, 0xC0406619)],
    "quotactl": [(0, n) for n in (0x80000100, 0x80000101, 0x800001FF, 0x80000200)],
    "quotactl_fd": [(1, n) for n in (0x80000100, 0x80000101, 0x800001FF, 0x80000200)],
    "prlimit64": [(0, 1)],
    "socket": [(0, n) for n in (1, 2, 10, 16, 38, 40)]
    + [(1, n) for n in (1, 3, 5, 10)]
    + [(2, n) for n in (1, 6, 17, 58, 132)],
    "socketpair": [(0, n) for n in (1, 2, 10, 16, 38, 40)],
    "setsockopt": [(1, n) for n in (0, 1, 6, 41)]
    + [(2, n) for n in (6, 14, 15, 20, 26, 27, 32, 35, 38, 39, 40, 42, 46, 51, 57, 73)],
    "fcntl": [(1, 1024), (1, 1026), (1, 1040)],
    "pipe2": [(1, 0x80), (1, 0x80880)],
    "prctl": [(0, 62), (0, 67), (0, 0x53564D41)],
    "madvise": [(2, 12), (2, 4)],
    "process_madvise": [(3, 12), (3, 4)],
    "mmap": [(3, 0x40000), (3, 0x40022)],
    "memfd_create": [(1, 4)],
    "shmget": [(2, 0o4000)],
}


def samples(reference: Reference, nr: int, rng: random.Random) -> Iterator[tuple[int, ...]]:
    """Arguments at, beside and far above every number that a profile or a guard compares with."""
    yield (0,) * 6
    yield (2**64 - 1,) * 6
    yield tuple(rng.getrandbits(64) for _ in ARGUMENT)
    name = syscall_name(reference.arch, nr)
    points: dict[int, set[int]] = {index: {0, 1, 2**31, 2**32 - 1, 2**63} for index in ARGUMENT}
    for index, value in [*reference.constants(name), *GUARDED.get(name, [])]:
        near = {value, value - 1, value + 1, value ^ 0x80000}
        points[index] |= {n % 2**64 for n in near} | {(n + (1 << 32)) % 2**64 for n in near}
    compared = [index for index in ARGUMENT if len(points[index]) > 5]
    for index in compared:
        for value in sorted(points[index]):
            args = [0] * 6
            args[index] = value
            yield tuple(args)
    for _ in range(150 * len(compared)):
        yield tuple(
            rng.choice(sorted(points[index])) + rng.choice([0, 0, 1 << 32]) & 2**64 - 1
            for index in ARGUMENT
        )


@pytest.mark.parametrize("arch", list(MACHINES))
def test_every_call_as_the_profile_says(name: str, arch: str) -> None:
    """For each number to 600 and arguments around all constants, filter and profile agree."""
    filter_, document = source(name)
    bpf = filter_.compile(arch, KERNEL).bpf
    reference = Reference(document, arch=MACHINES[arch], kernel=KERNEL, bits=declared_bits)
    rng = random.Random(1)
    for nr in [*range(601), 1000, 2**30 - 1, 2**31, 2**32 - 1]:
        for args in samples(reference, nr, rng):
            call = Call(nr, args, MACHINES[arch])  # type: ignore[arg-type]
            expected = reference.answer(call)
            assert run(bpf, call) == expected, (syscall_name(call.arch, nr), call)


@pytest.mark.parametrize("name", ["default", "compute", "unconfined"])
def test_other_abis_are_closed(name: str) -> None:
    """Every number under i386 and x32, and under an architecture nobody knows, is ENOSYS."""
    bpf = getattr(SeccompProfile, name)().compile("x86_64").bpf
    for nr in range(601):
        assert run(bpf, Call(nr, arch=I386)) == ENOSYS
        assert run(bpf, Call(nr | 0x40000000)) == ENOSYS
        assert run(bpf, Call(nr, arch=0xDEADBEEF)) == ENOSYS
    bpf = getattr(SeccompProfile, name)().compile("aarch64").bpf
    assert {run(bpf, Call(nr, arch=ARM)) for nr in range(601)} == {ENOSYS}


def test_size_and_validity(name: str) -> None:
    """The kernel's own checks pass, and filters stay small, since every job pays for loading."""
    filter_, _ = source(name)
    assert check(filter_.compile("x86_64").bpf) < 250
    assert check(filter_.compile("aarch64").bpf) < 250


def test_same_filter_every_time(name: str) -> None:
    """Compiling anew gives the same bytes."""
    filter_, _ = source(name)
    copy = SeccompProfile.model_validate(filter_.model_dump() | {"name": "copy"})
    assert copy.compile("x86_64", KERNEL).bpf == filter_.compile("x86_64", KERNEL).bpf


def test_libseccomp_agrees(name: str) -> None:
    """The filter of libseccomp answers each number alike, where it can and isojob adds nothing."""
    filter_, document = source(name)
    ours, theirs = filter_.compile("x86_64").bpf, libseccomp_filter(filter_, "x86_64")
    check(theirs)
    reference = Reference(document, bits=declared_bits)
    guarded = {number(name) for name in reference.guards}
    rng = random.Random(2)
    killed = {0x80000000: NOTIFY}
    for nr in range(reference.highest + 1):
        if nr in guarded:
            continue
        for args in samples(reference, nr, rng):
            call = Call(nr, tuple(value % 2**32 for value in args))  # type: ignore[arg-type]
            theirs_says = run(theirs, call)
            assert run(ours, call) == killed.get(theirs_says, theirs_says), call


COMPARED = ["EQ", "NE", "LT", "LE", "GT", "GE", "MASKED_EQ"]
NAMES = [
    *("read", "lseek", "socket", "socketpair", "ioctl", "prlimit64", "clone", "clone3", "openat"),
    *("personality", "mmap", "chmod", "kill", "mseal", "listns"),
]
VALUES = [0, 1, 2, 38, 40, 0x5412, 0x1FFFF, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1]


@st.composite
def comparisons(draw: st.DrawFn, name: str) -> tuple[Any, ...]:
    index = draw(st.integers(0, 5))
    op = draw(st.sampled_from(COMPARED))
    value = draw(st.sampled_from(VALUES) | st.integers(0, 2**64 - 1))
    if op in ("LT", "LE", "GT", "GE"):
        # Larger numbers are refused, which has a test of its own.
        value %= 2 ** declared_bits(name, index)
    return index, op, value, draw(st.sampled_from(VALUES))


@st.composite
def rules(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3))
    action = draw(st.sampled_from(["ALLOW", "ALLOW", "ERRNO", "LOG", "KILL", "TRAP"]))
    more: dict[str, Any] = {}
    if action == "ERRNO":
        more["errnoRet"] = draw(st.sampled_from([0, 1, 22, 38, 4095]))
    args = draw(st.lists(comparisons(names[0]), max_size=3))
    # Other calls of the rule may have narrower arguments.
    if any(a[1] in ("LT", "LE", "GT", "GE") for a in args):
        names = names[:1]
    return rule(*names, action=action, args=args, **more)


@settings(max_examples=300, deadline=None)
@given(
    chosen=st.lists(rules(), max_size=6),
    default=st.sampled_from(["ERRNO", "ALLOW", "LOG", "KILL_PROCESS"]),
    arch=st.sampled_from(sorted(MACHINES)),
    seed=st.integers(0, 2**32),
)
def test_any_profile(chosen: list[dict[str, Any]], default: str, arch: str, seed: int) -> None:
    """Whatever a profile consists of, its filter is valid and says what the profile says."""
    document = {"defaultAction": f"SCMP_ACT_{default}", "syscalls": [EXECVE, *chosen]}
    compiled = SeccompProfile.model_validate({"name": "any", **document}).compile(arch, KERNEL)
    check(compiled.bpf)
    reference = Reference(document, arch=MACHINES[arch], kernel=KERNEL, bits=declared_bits)
    rng = random.Random(seed)
    pool = sorted({(v + d) % 2**64 for v in VALUES for d in (-1, 0, 1)})
    for each in chosen:
        pool += [a[key] for a in each["args"] for key in ("value", "valueTwo")]
    returned = set()
    for nr in [*{number(n, MACHINES[arch]) for n in [*NAMES, "execve"]}, 1, 471, 2**30]:
        for _ in range(12):
            args = [rng.choice(pool) for _ in ARGUMENT]
            call = Call(nr, tuple(args), MACHINES[arch])  # type: ignore[arg-type]
            found = run(compiled.bpf, call)
            returned.add(found)
            assert found == reference.answer(call), call
    assert compiled.notify or NOTIFY not in returned

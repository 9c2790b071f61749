"""Filters from profiles: one decision tree over the numbers of the calls, arguments at its leaves.

libseccomp resolves the names, but does not write the filter: it compares all 64 bits of arguments
of which the kernel reads 32 (libseccomp issue 383), and takes no two comparisons of one argument in
one rule.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

from isojob.errors import HostNotSupportedError, ProfileError
from isojob.seccomp._answers import ENOSYS, USER_NOTIF
from isojob.seccomp._architectures import X32_BIT, Architecture, architecture
from isojob.seccomp._bpf import ARCH, NR, Graph, argument
from isojob.seccomp._names import Unnumbered, number
from isojob.seccomp._policy import build_policy

if TYPE_CHECKING:
    from collections.abc import Callable

    from isojob.seccomp._answers import Answer, Condition
    from isojob.seccomp._policy import Policy
    from isojob.seccomp._profile import SeccompProfile

__all__ = ["SETUP_SYSCALLS", "CompiledProfile", "compile_profile", "running_kernel"]

# What the launcher still calls between the loading of a filter ahead of time and execve.
SETUP_SYSCALLS = (
    *("read", "write", "close", "close_range", "recvmsg", "sendmsg", "dup3", "prlimit64"),
    *(
        "openat",
        "mkdirat",
        "unlinkat",
        "fchmod",
        "fchmodat",
        "fstat",
        "newfstatat",
        "sendfile",
        "mmap",
        "munmap",
    ),
    *("madvise", "clock_gettime", "timerfd_settime", "chdir", "umask", "execve", "exit_group"),
    *("exit", "rt_sigprocmask", "rt_sigaction", "sched_yield", "brk", "mprotect"),
)
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC: it locks nothing.
_COMMANDS = (0, 1, 2, 3, 4, 1030)

# Exceptions that one range of the tree tests one by one: a comparison each instead of two, for a
# path through the tree that is at most this much longer.
_EXCEPTIONS = 3


@dataclass(frozen=True, slots=True)
class CompiledProfile:
    """A filter, ready to be loaded with seccomp(2).

    Attributes:
        bpf: ``struct sock_filter[]`` in native byte order, 8 bytes an instruction.
        notify: Whether it can return SECCOMP_RET_USER_NOTIF, and so must be loaded with a
            listener (seccomp_unotify(2)).
        preload: Whether it lets `SETUP_SYSCALLS` through whatever their arguments, and fcntl with
            what the launcher asks of it, so that it can be loaded ahead of time; isojob's own
            guards do not count.
        unresolved: Calls that the profile allows, that nobody knows here, and that stay denied.
    """

    bpf: bytes
    notify: bool
    preload: bool
    unresolved: tuple[str, ...]


def compile_profile(
    profile: SeccompProfile, arch: str | None = None, kernel: tuple[int, int] | None = None
) -> CompiledProfile:
    """Makes the filter of a profile; see `SeccompProfile.compile`."""
    return _compile(profile, architecture(arch), running_kernel() if kernel is None else kernel)


def running_kernel() -> tuple[int, int]:
    """Major and minor version of the running kernel.

    Raises:
        HostNotSupportedError: It is not Linux's.
    """
    release = os.uname().release if hasattr(os, "uname") else ""
    match = re.match(r"(\d+)\.(\d+)", release)
    if match is None:
        raise HostNotSupportedError("a Linux kernel", "run isojob on Linux")
    return int(match[1]), int(match[2])


@lru_cache(maxsize=64)
def _compile(
    profile: SeccompProfile, arch: Architecture, kernel: tuple[int, int]
) -> CompiledProfile:
    where = f"seccomp profile {profile.name!r}"
    guards = "init" if profile == type(profile).unconfined() else "all"
    policy = build_policy(profile, arch, kernel, guards=guards)
    setup = {name: number(name, arch) for name in SETUP_SYSCALLS}
    if not policy.ever_allows(_present(setup["execve"])):
        raise ProfileError(f"{where}: no rule allows execve, so no program could ever start")
    try:
        bpf = _assemble(policy)
    except ValueError as error:
        raise ProfileError(f"{where}: {error}; the kernel takes no more") from error
    fcntl = _present(number("fcntl", arch))
    returned = {answer.value for nr in policy.numbers() for answer in policy.answers(nr)}
    return CompiledProfile(
        bpf=bpf,
        notify=USER_NOTIF in {*returned, policy.default},
        preload=all(policy.always_allows(_present(nr)) for nr in setup.values())
        and all(policy.always_allows(fcntl, (1, command)) for command in _COMMANDS),
        unresolved=policy.unresolved,
    )


def _present(nr: int | Unnumbered) -> int:
    # -1 is no call and gets what an unknown call gets.
    return nr if isinstance(nr, int) else -1


def _assemble(policy: Policy) -> bytes:
    graph = Graph()
    ranges: list[tuple[int, int]] = []

    def add(start: int, node: int) -> None:
        if not ranges or ranges[-1][1] != node:
            ranges.append((start, node))

    expected = 0
    for nr in policy.numbers():
        _add_unnamed(policy, graph, add, expected, nr)
        add(nr, _leaf(graph, policy.answers(nr)))
        expected = nr + 1
    end = X32_BIT if policy.arch.x32 else 2**32
    _add_unnamed(policy, graph, add, expected, end)
    if policy.arch.x32:
        add(X32_BIT, graph.answer(ENOSYS))
    tree = _tree(graph, ranges)
    # First of all: the same number is another call under another ABI.
    return graph.assemble(graph.equal(ARCH, policy.arch.audit, tree, graph.answer(ENOSYS)))


def _add_unnamed(
    policy: Policy, graph: Graph, add: Callable[[int, int], None], start: int, end: int
) -> None:
    """Adds the calls from `start` on and before `end`, which the profile does not name."""
    for first in sorted({start, max(start, policy.top + 1)}):
        if first < end:
            add(first, graph.answer(policy.background(first)))


def _tree(graph: Graph, ranges: list[tuple[int, int]]) -> int:
    """A binary search over ranges of numbers, each with the node that answers it."""
    blocks: list[tuple[int, int]] = []
    at = 0
    while at < len(ranges):
        start, base = ranges[at]
        node = base
        exceptions: list[tuple[int, int]] = []
        while (
            at + 2 < len(ranges)
            and len(exceptions) < _EXCEPTIONS
            and ranges[at + 2] == (ranges[at + 1][0] + 1, base)
        ):
            exceptions.append(ranges[at + 1])
            at += 2
        for nr, other in reversed(exceptions):
            node = graph.equal(NR, nr, other, node)
        blocks.append((start, node))
        at += 1

    def search(low: int, high: int) -> int:
        if high - low == 1:
            return blocks[low][1]
        middle = (low + high) // 2
        right = search(middle, high)
        return graph.greater(NR, blocks[middle][0], right, search(low, middle), equal=True)

    return search(0, len(blocks))


def _leaf(graph: Graph, answers: tuple[Answer, ...]) -> int:
    """The node that finds the answer to one call."""
    try:
        return _Informed(graph, answers).node(0, 0, ())
    except _TooLargeError:
        pass
    node = graph.answer(answers[-1].value)
    for answer in reversed(answers[:-1]):
        hit, miss = graph.answer(answer.value), node
        node = hit
        for condition in reversed(answer.conditions):
            node = _compare(graph, condition, node, miss)
    return node


# In the order they were found out, so that the same profile gives the same filter everywhere.
_Facts: TypeAlias = "tuple[tuple[Condition, bool], ...]"


class _TooLargeError(Exception):
    pass


class _Informed:
    """Builds a leaf that asks nothing twice: every node knows the outcomes on the way to it.

    Rules about one call mostly tell the values of one argument apart. A rule after the other, each
    starts over; told what is known, the rules of one value become one branch. What is known may
    multiply, so there is a bound, beyond which the plain chain of rules does.
    """

    _BOUND = 400

    def __init__(self, graph: Graph, answers: tuple[Answer, ...]) -> None:
        self._graph = graph
        self._answers = answers
        self._steps = 0

    def node(self, rule: int, place: int, known: _Facts) -> int:
        """The node for a rule from one of its conditions on."""
        answer = self._answers[rule]
        if place == len(answer.conditions):
            return self._graph.answer(answer.value)
        self._steps += 1
        if self._steps > self._BOUND:
            raise _TooLargeError
        condition = answer.conditions[place]
        outcome = _known_outcome(condition, known)
        if outcome is True:
            return self.node(rule, place + 1, known)
        no = self.node(rule + 1, 0, (*known, (condition, False)))
        if outcome is False:
            return no
        yes = self.node(rule, place + 1, (*known, (condition, True)))
        return _compare(self._graph, condition, yes, no)


def _known_outcome(condition: Condition, known: _Facts) -> bool | None:
    for fact in known:
        outcome = _follows(condition, fact)
        if outcome is not None:
            return outcome
    return None


def _follows(condition: Condition, fact: tuple[Condition, bool]) -> bool | None:
    """Whether a condition holds, if a fact alone decides it."""
    other, outcome = fact
    if condition == other:
        return outcome
    if (condition.index, condition.bits) != (other.index, other.bits):
        return None
    if other.op == ("EQ" if outcome else "NE"):
        return condition.holds(other.value)
    if {condition.op, other.op} == {"EQ", "NE"} and condition.value == other.value:
        return not outcome
    if outcome and other.op == condition.op == "MASKED_EQ" and other.value == condition.value:
        return False
    return None


def _compare(graph: Graph, condition: Condition, yes: int, no: int) -> int:
    if condition.op in ("NE", "LT", "LE"):
        yes, no = no, yes
    value, low = condition.value, argument(condition.index)
    wanted, mask = (
        (condition.second, value) if condition.op == "MASKED_EQ" else (value, (1 << 64) - 1)
    )
    if condition.bits < 64:
        width = (1 << condition.bits) - 1
        if condition.op in ("EQ", "NE", "MASKED_EQ"):
            return graph.equal(low, wanted, yes, no, mask & width)
        return graph.greater(low, value, yes, no, width, equal=condition.op in ("GE", "LT"))
    high = argument(condition.index, high=True)
    top, bottom = value >> 32, value & 0xFFFFFFFF
    if condition.op in ("EQ", "NE", "MASKED_EQ"):
        rest = graph.equal(low, wanted & 0xFFFFFFFF, yes, no, mask & 0xFFFFFFFF)
        return graph.equal(high, wanted >> 32, rest, no, mask >> 32)
    rest = graph.greater(low, bottom, yes, no, equal=condition.op in ("GE", "LT"))
    return graph.greater(high, top, yes, graph.equal(high, top, rest, no))

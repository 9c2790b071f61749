"""What a filter answers to a system call, and on which conditions."""

from __future__ import annotations

import errno
from dataclasses import dataclass

__all__ = ["ALLOW", "ENOSYS", "ERRNO", "LOG", "USER_NOTIF", "Answer", "Condition", "severity"]

# SECCOMP_RET constants of linux/seccomp.h.
ALLOW = 0x7FFF0000
LOG = 0x7FFC0000
USER_NOTIF = 0x7FC00000
ERRNO = 0x00050000
ENOSYS = ERRNO | errno.ENOSYS


@dataclass(frozen=True, slots=True)
class Condition:
    """One comparison, with the width at which it is made.

    Attributes:
        index: Position of the argument.
        bits: How many of its low bits are compared: 16, 32 or 64.
        op: EQ, NE, LT, LE, GT, GE or MASKED_EQ.
        value: What with; the mask of MASKED_EQ.
        second: What the masked argument must be.
    """

    index: int
    bits: int
    op: str
    value: int
    second: int = 0

    def holds(self, argument: int) -> bool:
        """Whether an argument, already cut to its width, meets the condition."""
        match self.op:
            case "EQ":
                return argument == self.value
            case "NE":
                return argument != self.value
            case "LT":
                return argument < self.value
            case "LE":
                return argument <= self.value
            case "GT":
                return argument > self.value
            case "GE":
                return argument >= self.value
        return argument & self.value == self.second


@dataclass(frozen=True, slots=True)
class Answer:
    """What the filter returns if all conditions hold."""

    value: int
    conditions: tuple[Condition, ...] = ()


def severity(value: int) -> int:
    """How restrictive a return value is."""
    return [ALLOW, LOG, ERRNO, USER_NOTIF].index(value if value & 0xFFFF == 0 else ERRNO)

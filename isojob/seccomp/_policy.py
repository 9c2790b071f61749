"""What a profile means on one machine: for each system call, answers in the order they count."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from isojob.errors import ProfileError
from isojob.seccomp._answers import (
    ALLOW,
    ENOSYS,
    ERRNO,
    LOG,
    USER_NOTIF,
    Answer,
    Condition,
    severity,
)
from isojob.seccomp._arguments import argument_bits
from isojob.seccomp._guards import GUARDS, INIT_GUARDS, SYNCED
from isojob.seccomp._names import Unnumbered, number

if TYPE_CHECKING:
    from isojob.seccomp._architectures import Architecture
    from isojob.seccomp._format import Comparison, Rule
    from isojob.seccomp._profile import SeccompProfile

__all__ = ["Policy", "build_policy"]

# All that ends a process ends the job, by init, which hears of the call and can name it: waitid(2)
# does not tell a filter's SIGSYS from one that the job raised.
_RETURNS = {
    "SCMP_ACT_KILL": USER_NOTIF,
    "SCMP_ACT_KILL_THREAD": USER_NOTIF,
    "SCMP_ACT_KILL_PROCESS": USER_NOTIF,
    "SCMP_ACT_TRAP": USER_NOTIF,
    "SCMP_ACT_ERRNO": ERRNO,
    "SCMP_ACT_LOG": LOG,
    "SCMP_ACT_ALLOW": ALLOW,
}


@dataclass
class Policy:
    """A profile's meaning on one machine.

    Attributes:
        arch: The machine.
        default: What is returned where nothing else is said.
        unresolved: Names of allowed calls that are known nowhere.
        top: The highest number that the profile names.
    """

    arch: Architecture
    default: int
    unresolved: tuple[str, ...] = ()
    top: int = -1
    _rules: dict[int, list[Answer]] = field(default_factory=dict)
    _guards: dict[int, tuple[Answer, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._clone = _own_number("clone", self.arch)
        self._clone3 = _own_number("clone3", self.arch)

    def background(self, nr: int) -> int:
        """What a call gets that no rule matches.

        A number above the highest that the profile names is newer than the profile. Programs try
        new calls and fall back on ENOSYS, but not on EPERM; runc does the same.
        """
        denies = severity(self.default) >= severity(ERRNO)
        return ENOSYS if denies and nr > self.top else self.default

    def numbers(self) -> list[int]:
        """The calls for which more than `background` may count, in order."""
        return sorted({*self._rules, *self._guards, self._clone3})

    def answers(self, nr: int, *, guarded: bool = True) -> tuple[Answer, ...]:
        """The answers to a call, in the order they count; the last has no condition.

        Among rules the most restrictive counts first, and of equally restrictive ones that which
        the profile has first. A guard refuses what the profile answers, but for what ends the job.

        Args:
            nr: The call.
            guarded: With isojob's own guards.
        """
        rules = self._rules_of(nr)
        deadly = [rule for rule in rules if rule.value == USER_NOTIF]
        others = [rule for rule in rules if rule.value != USER_NOTIF]
        if nr == self._clone3 and not (
            _lets_all(self._plain(self._clone)) and _lets_all(self._plain(nr))
        ):
            # Its flags lie in memory, where no filter sees them. Only ENOSYS makes C libraries
            # fall back to clone(2), whose flags can be checked.
            others = [Answer(ENOSYS)]
        others.append(Answer(self.background(nr)))
        if guarded and nr in self._guards:
            others = _refuse(self._guards[nr], others)
        return _shorten([*deadly, *others])

    def _rules_of(self, nr: int) -> list[Answer]:
        return sorted(self._rules.get(nr, ()), key=lambda rule: -severity(rule.value))

    def _plain(self, nr: int) -> tuple[Answer, ...]:
        return _shorten([*self._rules_of(nr), Answer(self.background(nr))])

    def always_allows(self, nr: int, known: tuple[int, int] | None = None) -> bool:
        """Whether a call is let through whatever its arguments, guards aside.

        Args:
            nr: The call.
            known: An argument's position and value, if it is always that one.
        """
        for answer in self.answers(nr, guarded=False):
            met = [
                condition.holds(known[1])
                for condition in answer.conditions
                if known is not None and condition.index == known[0]
            ]
            if all(met):
                if answer.value != ALLOW:
                    return False
                if len(met) == len(answer.conditions):
                    break
        return True

    def ever_allows(self, nr: int) -> bool:
        """Whether a call is let through with some arguments."""
        return any(answer.value in (ALLOW, LOG) for answer in self.answers(nr))


def _refuse(guards: tuple[Answer, ...], answers: list[Answer]) -> list[Answer]:
    """Puts guards before answers, but before none that ends the job.

    A guard that says to have done what it was asked counts only for what is allowed.
    """
    if answers[-1].value != USER_NOTIF and SYNCED[0] not in guards:
        return [*guards, *answers]
    found: list[Answer] = []
    for answer in answers:
        for guard in guards:
            allowed = answer.value in (ALLOW, LOG)
            if allowed or (answer.value != USER_NOTIF and guard not in SYNCED):
                found.append(Answer(guard.value, (*answer.conditions, *guard.conditions)))
        found.append(answer)
    return found


def _lets_all(answers: tuple[Answer, ...]) -> bool:
    return all(answer.value in (ALLOW, LOG) for answer in answers)


def _shorten(answers: list[Answer]) -> tuple[Answer, ...]:
    """Drops what can never count, or changes nothing."""
    last = next(at for at, answer in enumerate(answers) if not answer.conditions)
    *some, end = answers[: last + 1]
    kept = [*dict.fromkeys(some), end]
    while len(kept) > 1 and kept[-2].value == kept[-1].value:
        del kept[-2]
    return tuple(kept)


def _own_number(name: str, arch: Architecture) -> int:
    """The number of a call that every supported architecture has."""
    found = number(name, arch)
    if isinstance(found, Unnumbered):
        raise AssertionError(f"{name} has no number on {arch.name}")  # noqa: TRY004
    return found


def build_policy(
    profile: SeccompProfile, arch: Architecture, kernel: tuple[int, int], *, guards: str = "all"
) -> Policy:
    """Works out what a profile means on a machine.

    Args:
        profile: The profile.
        arch: The machine.
        kernel: Its kernel's major and minor version.
        guards: Which of isojob's own to add: ``all``, ``init`` (those that protect process 1) or
            ``none``.

    Raises:
        ProfileError: A rule cannot be enforced.
        HostNotSupportedError: libseccomp is missing.
    """
    choices = {"all": GUARDS, "init": INIT_GUARDS, "none": {}}
    rules: dict[int, list[Answer]] = {}
    unresolved: dict[str, None] = {}
    default = _return_value(profile.default_action, profile.default_errno)
    for index, rule in enumerate(profile.rules):
        if not rule.counts(arch, kernel):
            continue
        value = _return_value(rule.action, rule.errno_ret)
        for name in rule.names:
            found = number(name, arch)
            where = f"seccomp profile {profile.name!r}: rule {index}: {name}"
            if found is Unnumbered.UNKNOWN:
                if severity(value) > severity(default):
                    raise ProfileError(
                        f"{where}: no such system call is known, and a rule that denies one "
                        f"is not dropped"
                    )
                unresolved[name] = None
            elif not isinstance(found, Unnumbered):
                answer = Answer(value, _conditions(rule, name, where))
                rules.setdefault(found, []).append(answer)
    return Policy(
        arch=arch,
        default=default,
        unresolved=tuple(unresolved),
        top=max(rules, default=-1),
        _rules=rules,
        _guards={
            found: answers
            for name, answers in choices[guards].items()
            if not isinstance(found := number(name, arch), Unnumbered)
        },
    )


def _return_value(action: str, error: int | None) -> int:
    if action == "SCMP_ACT_ERRNO":
        return ERRNO | (errno.EPERM if error is None else error)
    return _RETURNS[action]


def _conditions(rule: Rule, name: str, where: str) -> tuple[Condition, ...]:
    return tuple(_condition(arg, argument_bits(name, arg.index), where) for arg in rule.args)


def _condition(arg: Comparison, bits: int, where: str) -> Condition:
    op = arg.op.removeprefix("SCMP_CMP_")
    mask = (1 << bits) - 1
    if (
        op in ("LT", "LE", "GT", "GE")
        and arg.value > mask
        and arg.value >> (bits - 1) != ((1 << (65 - bits)) - 1)
    ):
        # Cut down, the number would mean another range; a sign-extended one stays what it was.
        raise ProfileError(
            f"{where}: argument {arg.index} has {bits} bits, and {arg.op} with {arg.value} "
            f"cannot be made at that width"
        )
    wanted = arg.value_two & mask
    if op == "MASKED_EQ":  # what is outside of the mask does not count (libseccomp)
        wanted &= arg.value
    return Condition(arg.index, bits, op, arg.value & mask, wanted)

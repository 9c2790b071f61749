"""What a profile means on one machine: for each system call, answers in the order they count."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from isojob.errors import ProfileError
from isojob.seccomp._arguments import argument_bits
from isojob.seccomp._names import Unnumbered, number

if TYPE_CHECKING:
    from isojob.seccomp._architectures import Architecture
    from isojob.seccomp._format import Comparison, Rule
    from isojob.seccomp._profile import SeccompProfile

__all__ = ["ALLOW", "ENOSYS", "USER_NOTIF", "Answer", "Condition", "Policy", "build_policy"]

# SECCOMP_RET constants of linux/seccomp.h.
ALLOW = 0x7FFF0000
LOG = 0x7FFC0000
USER_NOTIF = 0x7FC00000
ERRNO = 0x00050000
ENOSYS = ERRNO | errno.ENOSYS

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


def _refusal(error: int, *comparisons: tuple[int, str, int]) -> Answer:
    """An error if all comparisons hold: position, operator, value, each of 32 bits."""
    conditions = (Condition(index, 32, op, value) for index, op, value in comparisons)
    return Answer(ERRNO | error, tuple(conditions))


def _flag(index: int, flag: int) -> Answer:
    return Answer(ERRNO | errno.ENOMEM, (Condition(index, 32, "MASKED_EQ", flag, flag),))


def _values(error: int, index: int, *values: int) -> tuple[Answer, ...]:
    return tuple(_refusal(error, (index, "EQ", value)) for value in values)


# A job that changes the limits of process 1 takes the sandbox's init apart; no other protection of
# the kernel stands before prlimit(2) where both have one uid.
_INIT_GUARDS: dict[str, tuple[Answer, ...]] = {"prlimit64": _values(errno.EPERM, 0, 1)}

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
)
_OPTIONS = {
    # SO_ATTACH_FILTER, SO_ATTACH_REUSEPORT_CBPF: code of the machine-wide bpf_jit_limit.
    # SO_RESERVE_MEM: of the machine-wide tcp_mem.
    1: (26, 51, 73),
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
_SYNCED = (Answer(ERRNO),)
_GUARDS: dict[str, tuple[Answer, ...]] = {
    **_INIT_GUARDS,
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
    # MAP_HUGETLB, MFD_HUGETLB, SHM_HUGETLB: the host's own pool, outside of the memory limit.
    "mmap": (_flag(3, 0x40000),),
    "memfd_create": (_flag(1, 4),),
    "shmget": (_flag(2, 0o4000),),
    # They flush the whole host. Said to be done: neither promises what fsync(2) does.
    **dict.fromkeys(("sync", "syncfs"), _SYNCED),
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
    if answers[-1].value != USER_NOTIF and _SYNCED[0] not in guards:
        return [*guards, *answers]
    found: list[Answer] = []
    for answer in answers:
        for guard in guards:
            allowed = answer.value in (ALLOW, LOG)
            if allowed or (answer.value != USER_NOTIF and guard not in _SYNCED):
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
    choices = {"all": _GUARDS, "init": _INIT_GUARDS, "none": {}}
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
    return Condition(arg.index, bits, op, arg.value & mask, arg.value_two & mask)

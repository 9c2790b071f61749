"""The rules of a profile, as the OCI runtime specification, Docker and Podman write them in JSON.

Docker's format is the OCI's (runtime-spec, config-linux.md#seccomp) with conditions under which a
rule counts and with ``archMap``; Podman's is Docker's with error numbers by name. All three are
read by the same models, which forbid what none of them knows.
"""

from __future__ import annotations

import errno as errno_names
import re
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from isojob._models import Model

if TYPE_CHECKING:
    from isojob.seccomp._architectures import Architecture

__all__ = [
    "Action",
    "ArchMap",
    "Architectures",
    "Comparison",
    "Errno",
    "Flags",
    "Rule",
    "check_action",
    "merge_errno",
    "sequence",
    "shown",
]

# The kernel cuts a larger one down to MAX_ERRNO (seccomp(2), SECCOMP_RET_ERRNO).
MAX_ERRNO = 4095
NAMES_SHOWN = 4

Action: TypeAlias = Literal[
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_TRAP",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_LOG",
    "SCMP_ACT_ALLOW",
    # Known, so that the refusal can say why.
    "SCMP_ACT_TRACE",
    "SCMP_ACT_NOTIFY",
]
_REFUSED: Final = {
    "SCMP_ACT_TRACE": "a job has no tracer",
    "SCMP_ACT_NOTIFY": "nobody could answer: the filter's one listener is isojob's own",
}

# Names of architectures as Go, and so `includes.arches`, spells them, and as others may.
_ARCHES: Final = frozenset(
    {
        *("386", "amd64", "x86", "x86_64", "x32", "arm", "arm64", "aarch64", "riscv64"),
        *("loong64", "loongarch64", "ppc", "ppc64", "ppc64le", "s390", "s390x"),
        *("mips", "mips64", "mips64n32", "mipsle", "mips64le", "mipsel", "mipsel64", "mipsel64n32"),
        *("parisc", "parisc64", "m68k", "sh", "sheb"),
    }
)
_ARCH_ALIASES: Final = {"x86_64": "amd64", "aarch64": "arm64"}


def sequence(value: object) -> object:
    """JSON has lists, the models have tuples, and Go's encoder writes null for an empty list."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else value


def _object(value: object) -> object:
    return {} if value is None else value


def check_action(action: str) -> str:
    """Refuses the actions that isojob cannot carry out."""
    if action in _REFUSED:
        raise ValueError(f"{action} is not supported: {_REFUSED[action]}")
    return action


def merge_errno(data: object, number: str, name: str) -> object:
    """Turns Podman's error by name into Docker's error by number.

    Args:
        data: The JSON object.
        number: The key of the number.
        name: The key of the name, which is taken out.
    """
    if not isinstance(data, dict) or name not in data:
        return data
    merged: dict[str, Any] = dict(data)
    text = merged.pop(name)
    if text in (None, ""):
        return merged
    known = getattr(errno_names, text, None) if isinstance(text, str) else None
    if not isinstance(known, int) or not text.startswith("E"):
        raise ValueError(f"{name}: {text!r} is no error number's name (errno(3))")
    if merged.get(number) not in (None, known):
        raise ValueError(f"{name} is {text} ({known}), but {number} is {merged[number]}")
    merged[number] = known
    return merged


_SyscallName: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
_Capability: TypeAlias = Annotated[str, Field(pattern=r"^CAP_[A-Z_]+$")]
_Unsigned64: TypeAlias = Annotated[int, Field(ge=0, lt=2**64)]
_Text: TypeAlias = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]
Errno: TypeAlias = Annotated[int, Field(ge=0, le=MAX_ERRNO)]

_SECCOMP_ARCH = (
    r"^SCMP_ARCH_(X86|X86_64|X32|ARM|AARCH64|MIPS|MIPS64|MIPS64N32|MIPSEL|MIPSEL64|MIPSEL64N32"
    r"|PPC|PPC64|PPC64LE|S390|S390X|PARISC|PARISC64|RISCV64|LOONGARCH64|M68K|SH|SHEB)$"
)
_SeccompArch: TypeAlias = Annotated[str, Field(pattern=_SECCOMP_ARCH)]
Architectures: TypeAlias = Annotated[tuple[_SeccompArch, ...], BeforeValidator(sequence)]
Flags: TypeAlias = Annotated[
    tuple[
        Literal[
            "SECCOMP_FILTER_FLAG_TSYNC",
            "SECCOMP_FILTER_FLAG_LOG",
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
            "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
        ],
        ...,
    ],
    BeforeValidator(sequence),
]


class ArchMapEntry(Model, frozen=True, populate_by_name=True):
    """An architecture and those whose calls its processes can also make.

    Attributes:
        architecture: The native one.
        sub_architectures: The others.
    """

    architecture: _SeccompArch
    sub_architectures: Architectures = Field(default=(), alias="subArchitectures")


ArchMap: TypeAlias = Annotated[tuple[ArchMapEntry, ...], BeforeValidator(sequence)]


class Comparison(Model, frozen=True, populate_by_name=True):
    """One condition on one argument; those of a rule must all hold.

    Attributes:
        index: Position of the argument, 0 to 5.
        value: What it is compared with; the mask for ``SCMP_CMP_MASKED_EQ``.
        value_two: What the masked argument must be; unused by the other operators.
        op: The comparison; unsigned.
    """

    index: Annotated[int, Field(ge=0, le=5)]
    value: _Unsigned64
    value_two: _Unsigned64 = Field(default=0, alias="valueTwo")
    op: Literal[
        "SCMP_CMP_EQ",
        "SCMP_CMP_NE",
        "SCMP_CMP_LT",
        "SCMP_CMP_LE",
        "SCMP_CMP_GT",
        "SCMP_CMP_GE",
        "SCMP_CMP_MASKED_EQ",
    ]


class Conditions(Model, frozen=True, populate_by_name=True):
    """Where a rule counts, or does not.

    Attributes:
        caps: Capabilities of the job. A job of isojob never has any.
        arches: Architectures, as Go names them.
        min_kernel: ``major.minor`` of a kernel release.
    """

    caps: Annotated[tuple[_Capability, ...], BeforeValidator(sequence)] = ()
    arches: Annotated[tuple[str, ...], BeforeValidator(sequence)] = ()
    min_kernel: Annotated[str, Field(pattern=r"^(|[0-9]{1,4}\.[0-9]{1,4})$")] = Field(
        default="", alias="minKernel"
    )

    @model_validator(mode="after")
    def _known_arches(self) -> Self:
        for arch in self.arches:
            if arch not in _ARCHES:
                # A misspelt one would silently switch the rule off.
                raise ValueError(f"arches: {arch!r} is not known")
        return self

    def names_arch(self, arch: Architecture) -> bool:
        """Whether `arch` is among the architectures."""
        return any(_ARCH_ALIASES.get(name, name) == arch.profile_name for name in self.arches)

    def reached(self, kernel: tuple[int, int]) -> bool:
        """Whether a kernel is at least `min_kernel`."""
        major, minor = self.min_kernel.split(".")
        return kernel >= (int(major), int(minor))


class Rule(Model, frozen=True, populate_by_name=True):
    """What a profile answers to some system calls.

    Attributes:
        names: The calls.
        action: The answer.
        errno_ret: Error number that ``SCMP_ACT_ERRNO`` returns; EPERM by default.
        args: Conditions, all of which must hold.
        comment: For people.
        includes: The rule counts only where all of this is so.
        excludes: The rule does not count where any of this is so.
    """

    names: Annotated[tuple[_SyscallName, ...], BeforeValidator(sequence), Field(min_length=1)]
    action: Action
    errno_ret: Errno | None = Field(default=None, alias="errnoRet")
    args: Annotated[tuple[Comparison, ...], BeforeValidator(sequence)] = ()
    comment: _Text = ""
    includes: Annotated[Conditions, BeforeValidator(_object)] = Conditions()
    excludes: Annotated[Conditions, BeforeValidator(_object)] = Conditions()

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, data: object) -> object:
        data = merge_errno(data, "errnoRet", "errno")
        if not isinstance(data, dict) or "name" not in data:
            return data
        rest: dict[str, Any] = dict(data)
        name = rest.pop("name")
        if name in (None, ""):
            return rest
        if rest.get("names"):
            raise ValueError("use either name or names")
        return {**rest, "names": [name]}

    @model_validator(mode="after")
    def _can_be_done(self) -> Self:
        check_action(self.action)
        if self.errno_ret is not None and self.action != "SCMP_ACT_ERRNO":
            raise ValueError(f"errnoRet has no meaning with {self.action}")
        return self

    def counts(self, arch: Architecture, kernel: tuple[int, int]) -> bool:
        """Whether the rule is in force for a job, which has no capability, on some host."""
        included = (
            not self.includes.caps
            and (not self.includes.arches or self.includes.names_arch(arch))
            and (not self.includes.min_kernel or self.includes.reached(kernel))
        )
        excluded = self.excludes.names_arch(arch) or (
            bool(self.excludes.min_kernel) and self.excludes.reached(kernel)
        )
        return included and not excluded


def shown(names: object) -> str:
    """Names of a rule's calls for a message, even of a rule that could not be read."""
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, (list, tuple)):
        return "no system call"
    texts = [str(name) if re.fullmatch(r"\w{1,64}", str(name)) else "?" for name in names]
    more = f" and {len(texts) - NAMES_SHOWN} more" if len(texts) > NAMES_SHOWN else ""
    return (", ".join(texts[:NAMES_SHOWN]) or "no system call") + more

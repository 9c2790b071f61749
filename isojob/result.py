"""What a job leaves behind."""

from __future__ import annotations

import signal as _signal
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar, cast

from pydantic import Field
from typing_extensions import override

from isojob._models import Evidence, Model, Name, Status, Usage
from isojob.errors import JobFailedError
from isojob.verdict import explain, signal_name, usage

__all__ = ["Evidence", "Posture", "Result", "Status", "Usage", "pending"]

_R = TypeVar("_R", bound="Result")
_MIB = 2**20
_SHOWN = 64


class _Short:
    """Stands for bytes in a repr."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    @override
    def __repr__(self) -> str:
        if len(self._content) <= _SHOWN:
            return repr(self._content)
        return f"<{len(self._content)} bytes: {self._content[:_SHOWN]!r}...>"


class Posture(Model, frozen=True):
    """Which protections held while the job ran.

    Attributes:
        cgroup: The kind of cgroups in force; ``none`` only if the caller allowed it.
        privilege: Who set the cell up: ``root``, an ordinary ``user`` with one id, or one with
            subordinate ids (``user+ranges``, subuid(5)).
        kernel: Release of the kernel, as uname(2) tells it.
        namespaces: The kinds of namespaces that were fresh (namespaces(7)).
        seccomp: Name of the seccomp profile; ``none``: it was accepted that there is no filter.
        missing: Protections that did not hold; all of them were in `Sandbox.allow_missing`.
        notes: What else an auditor would want to know.
    """

    cgroup: Literal["v2", "v1", "none"]
    privilege: Literal["root", "user", "user+ranges"]
    kernel: str
    namespaces: tuple[str, ...]
    seccomp: str
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Result(Model, frozen=True):
    """How one job ended, what it wrote and what it used. Survives JSON and pickle.

    `str()` of it is one line for a log. In JSON, bytes are base64 with the URL-safe alphabet, and
    a byte of a name that is not UTF-8 is written as U+FFFD and two hexadecimal digits.

    Attributes:
        args: The command as it was asked for. Arguments given as bytes are decoded as
            `os.fsdecode` does (UTF-8, surrogateescape); `os.fsencode` gives the bytes back.
        status: How the job ended.
        returncode: Exit status of the main process, or -N if signal N ended it. Under a limit it
            is whatever the main process made of it: trust `status`.
        stdout: What the job wrote, at most `Limits.output` bytes; None if it was not captured.
        stderr: The same for stderr; None also if it was merged into stdout.
        stdout_truncated: Whether the job wrote more than `stdout` holds.
        stderr_truncated: The same for stderr.
        usage: What the job used.
        files: Collected files, by path relative to the working directory.
        uncollected: Files that were asked for and not collected, with the reason; a pattern itself,
            where more of what fits it was not collected than is told.
        evidence: The raw counters that `status` and `usage` were made from.
        posture: Which protections held.
        index: Position among the jobs given to `Pool.map`; else None.
    """

    args: tuple[Name, ...]
    status: Status
    returncode: int
    stdout: bytes | None = None
    stderr: bytes | None = None
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    usage: Usage
    files: dict[Name, bytes] = Field(default_factory=dict)
    uncollected: dict[Name, str] = Field(default_factory=dict)
    evidence: Evidence
    posture: Posture
    index: int | None = None

    @property
    def ok(self) -> bool:
        """Whether the job ended by itself with exit status 0, within all its limits."""
        return self.status is Status.OK

    @property
    def exit_code(self) -> int | None:
        """The exit status of the main process, or None if a signal ended it."""
        return self.returncode if self.returncode >= 0 else None

    @property
    def signal(self) -> _signal.Signals | int | None:
        """The signal that ended the main process, or None if it exited.

        A plain int for a signal that this Python has no name for, such as a real-time one.
        """
        if self.returncode >= 0:
            return None
        try:
            return _signal.Signals(-self.returncode)
        except ValueError:
            return -self.returncode

    @property
    def stdout_text(self) -> str:
        """`stdout` as UTF-8, with U+FFFD for what is not; empty if it was not captured."""
        return (self.stdout or b"").decode("utf-8", "replace")

    @property
    def stderr_text(self) -> str:
        """`stderr` as UTF-8, with U+FFFD for what is not; empty if it was not captured."""
        return (self.stderr or b"").decode("utf-8", "replace")

    @override
    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        # asyncio and debuggers print results by the way: a gigabyte of output must not become
        # four, as text.
        for name, value in super().__repr_args__():
            if isinstance(value, bytes):
                yield name, _Short(value)
            elif name == "files" and isinstance(value, dict):
                yield name, {file: _Short(content) for file, content in value.items()}
            else:
                yield name, value

    def check_returncode(self) -> None:
        """Raises if the job was not `ok`; named as in `subprocess.CompletedProcess`.

        Raises:
            JobFailedError: The status is not ``ok``, even where the exit status is 0.
        """
        if not self.ok:
            raise JobFailedError(self)

    @override
    def __str__(self) -> str:
        code = self.exit_code
        end = signal_name(-self.returncode) if code is None else f"exit {code}"
        spent = []
        if self.usage.cpu_time is not None:
            spent.append(f"cpu {self.usage.cpu_time:.2f} s")
        if self.usage.memory_peak is not None:
            limit = self.evidence.memory_limit
            of = "" if limit is None else f" of {limit / _MIB:.1f} MiB"
            spent.append(f"peak {self.usage.memory_peak / _MIB:.1f} MiB{of}")
        line = f"{self.status}: {end} after {self.usage.wall_time:.2f} s"
        if spent:
            line += f" ({', '.join(spent)})"
        # "ok: exit 0" already says everything.
        return line if self.ok else f"{line}: {explain(self.evidence, self.status)}"


_PROMPT = frozenset(
    {"args", "status", "returncode", "stdout", "stderr", "files", "index"}
    | {"ok", "exit_code", "signal", "stdout_text", "stderr_text"}
)


def pending_kind(kind: type[Result], prompt: frozenset[str] = frozenset()) -> Any:
    """A subclass whose account is still to be written: it is, when anybody asks for more.

    That takes a fifth of the time that a short job costs its caller, and few callers look at every
    account. Then the object is of `kind` and nothing else, so no method of pydantic meets half of
    one: all of them begin by asking for ``__class__`` or ``__dict__``.

    Args:
        kind: What it will be: `Result` or a subclass.
        prompt: Names beside those of `Result` that can be told without the account.
    """
    known = _PROMPT | prompt

    class Pending(kind, frozen=True):  # type: ignore[valid-type,misc,call-arg]
        __slots__ = ()

        @override
        def __getattribute__(self, name: str) -> Any:
            if name not in known:
                _complete(self, kind)
            return object.__getattribute__(self, name)

    return Pending


def _complete(result: Result, kind: type[Result]) -> None:
    values = object.__getattribute__(result, "__dict__")
    account: Callable[[], Evidence] | None = values.get("account")
    if account is not None:  # else another thread was faster
        evidence = account()
        known = {**values, "evidence": evidence, "usage": usage(evidence)}
        whole = {name: known[name] for name in kind.model_fields}
        object.__setattr__(result, "__dict__", whole)
    object.__setattr__(result, "__class__", kind)


_Pending = pending_kind(Result)


def extended(result: Result, kind: type[_R], later: Any, **more: Any) -> _R:
    """The same result as a subclass of `Result`, with its further fields.

    What is still to be written of it stays so.

    Args:
        result: The result.
        kind: Of what it becomes.
        later: ``pending_kind(kind)``.
        **more: The further fields.
    """
    values = object.__getattribute__(result, "__dict__")
    chosen: Any = later if "account" in values else kind
    return cast("_R", chosen.trusted(**values, **more))


def pending(account: Callable[[], Evidence], **values: Any) -> Result:
    """A result with everything but `usage` and `evidence`.

    Args:
        account: Makes the evidence, the same each time, and never raises.
        **values: The other fields.
    """
    return cast("Result", _Pending.trusted(account=account, **values))

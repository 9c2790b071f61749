"""Everything isojob raises.

A job that fails is data (`Result.status`); an exception means that isojob itself could not do its
part, or that the caller asked for one with ``check=True``::

    IsojobError
    ├── SandboxSetupError          (OSError)             the sandbox could not be set up
    ├── CommandNotFoundError       (FileNotFoundError)   no such program inside the sandbox
    ├── CommandNotExecutableError  (PermissionError)     the program cannot be executed
    ├── HostNotSupportedError                            the host lacks a protection
    ├── PoolClosedError                                  the pool is not, or no longer, open
    ├── PoolBrokenError                                  the zygote or a cell's init died
    ├── PreloadError                                     a warm interpreter could not be made ready
    ├── QueueFullError                                   too many jobs are waiting
    ├── ProfileError               (ValueError)          a seccomp profile was refused
    ├── ImageError                 (ValueError)          a container image was refused
    └── JobFailedError             (CalledProcessError)  check=True, and the job did not succeed

All of them survive pickling, so they may cross a process boundary.
"""

from __future__ import annotations

import errno as _errno
import os
from subprocess import CalledProcessError
from typing import TYPE_CHECKING, Any

from typing_extensions import override

if TYPE_CHECKING:
    from isojob.result import Result

__all__ = [
    "CommandNotExecutableError",
    "CommandNotFoundError",
    "HostNotSupportedError",
    "ImageError",
    "IsojobError",
    "JobFailedError",
    "PoolBrokenError",
    "PoolClosedError",
    "PreloadError",
    "ProfileError",
    "QueueFullError",
    "SandboxSetupError",
]

_COMMAND_SHOWN = 200


class IsojobError(Exception):
    """Superclass of every isojob exception; never raised itself.

    Catch it to tell isojob's own faults from those of the code around it.
    """


def _strerror(error: int, detail: str) -> str:
    """Describes an errno; 0 stands for a failure that the kernel gave no number for."""
    if error == 0:
        return detail or "failed"
    return f"{os.strerror(error)} ({detail})" if detail else os.strerror(error)


class SandboxSetupError(IsojobError, OSError):
    """The sandbox could not be set up; the job never ran.

    What to do: `stage` names the step and `errno` the kernel's answer. ``isojob doctor`` checks
    the same steps one by one. Running the job again is safe: not one instruction of it ran.

    Args:
        stage: The step that failed, for example ``"pivot_root"`` or ``"seccomp"``.
        errno: The error number of the system call (errno(3)); 0 if there was none.
        detail: What the step worked on, such as a path.
    """

    def __init__(self, stage: str, errno: int, detail: str = "") -> None:
        super().__init__(errno, _strerror(errno, detail))
        self.stage = stage
        self.detail = detail

    @override
    def __str__(self) -> str:
        return f"{self.stage}: {self.strerror}"

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        # OSError would be rebuilt from (errno, strerror), which is not our signature.
        return type(self), (self.stage, self.errno, self.detail), self.__dict__


class CommandNotFoundError(IsojobError, FileNotFoundError):
    """The program does not exist inside the sandbox; the job never ran.

    Also raised when the interpreter or the dynamic loader that the program asks for is missing,
    since execve(2) answers ENOENT to both. What to do: check that the path exists inside the
    sandbox (not on the host), that a mount brings it in, and the ``PATH`` the job gets.

    Args:
        command: The program as the caller wrote it; kept as `filename`.
        detail: More about it, such as the directories that were searched.
    """

    def __init__(self, command: str | bytes, detail: str = "") -> None:
        super().__init__(_errno.ENOENT, os.strerror(_errno.ENOENT), command)
        self.detail = detail

    @override
    def __str__(self) -> str:
        more = f" ({self.detail})" if self.detail else ""
        return f"command not found in the sandbox: {self.filename!r}{more}"

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.filename, self.detail), self.__dict__


class CommandNotExecutableError(IsojobError, PermissionError):
    """The program exists inside the sandbox but cannot be executed; the job never ran.

    What to do: give the file its execute bits, check that the mount it is on allows execution and
    that the directories above can be searched by the sandbox's uid. With ENOEXEC the file is no
    program of this machine: wrong architecture, or a script without ``#!``.

    Args:
        command: The program as the caller wrote it; kept as `filename`.
        detail: More about it.
        errno: What execve(2) answered, EACCES if not said otherwise.
    """

    def __init__(self, command: str | bytes, detail: str = "", errno: int = _errno.EACCES) -> None:
        super().__init__(errno, os.strerror(errno), command)
        self.detail = detail

    @override
    def __str__(self) -> str:
        return (
            f"command cannot be executed in the sandbox: {self.filename!r}: "
            f"{_strerror(self.errno or 0, self.detail)}"
        )

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.filename, self.detail, self.errno), self.__dict__


class HostNotSupportedError(IsojobError):
    """The host lacks something that the sandbox needs and that the caller did not give up.

    Raised when a pool starts or a profile is compiled, before any job; and by what takes the
    accounts of a running job (`IsolatedProcess.send_signal`). What to do: apply `cure`, or accept
    the weaker sandbox by naming the protection in ``Sandbox.allow_missing``.

    Args:
        missing: What the host lacks.
        cure: What would provide it.
    """

    def __init__(self, missing: str, cure: str) -> None:
        super().__init__(missing, cure)
        self.missing = missing
        self.cure = cure

    @override
    def __str__(self) -> str:
        return f"{self.missing}; cure: {self.cure}"


class PoolClosedError(IsojobError):
    """The pool or session was used before it was entered or after it was closed.

    What to do: keep every use inside ``async with Pool(...)``, and ``pool.session(...)``.
    """

    def __init__(self, message: str = "the pool is not open") -> None:
        super().__init__(message)


class PoolBrokenError(IsojobError):
    """The zygote or a cell's init died under the job, so nothing true can be said about the job.

    Raised for every job that was in flight, and for every later use of a session, whose directory
    went with its zygote. The pool starts another for its next job. What to do: run the job again
    only if running it twice does no harm; open a new session.
    """

    def __init__(self, message: str = "the pool's zygote died") -> None:
        super().__init__(message)


class QueueFullError(IsojobError):
    """The pool's bounded queue is full; the job was not accepted and never ran.

    What to do: come back later (a server answers 503), or raise the pool's bounds.
    """

    def __init__(self, message: str = "too many jobs are waiting for this pool") -> None:
        super().__init__(message)


class ProfileError(IsojobError, ValueError):
    """A seccomp profile is malformed or asks for something that cannot be enforced.

    Raised when the profile is loaded or compiled. What to do: the message names the profile, the
    rule and the system call; correct that rule. A rule is never dropped in silence.
    """


class ImageError(IsojobError, ValueError):
    """A container image was refused: broken, hostile, or of a kind that isojob does not read."""


class PreloadError(IsojobError):
    """A warm interpreter could not be made ready: a preload failed, hung, or took too much.

    What to do: import the module in a plain process of that interpreter; then look at what the
    sandbox does not have (network, files) and at the limits of the template.

    Args:
        module: The module that was being imported; else the interpreter.
        why: What happened, in words.
        traceback: Of the import, if it ended with an exception.
    """

    def __init__(self, module: str, why: str, traceback: str = "") -> None:
        super().__init__(module, why, traceback)
        self.module = module
        self.why = why
        self.traceback = traceback

    @override
    def __str__(self) -> str:
        return f"preload {self.module}: {self.why}"


class JobFailedError(IsojobError, CalledProcessError):
    """The job did not end with the status ``ok``, and the caller asked for an exception.

    Raised by ``check=True`` and by `Result.check_returncode`. A `subprocess.CalledProcessError`,
    so that handlers written for subprocess go on working; `returncode` may be 0 if the job was
    over a limit (such as its output) and exited well. What to do: look at ``result.status``.

    Args:
        result: The whole result of the job; `cmd`, `stdout`, `stderr` are taken from it.
    """

    def __init__(self, result: Result) -> None:
        super().__init__(result.returncode, list(result.args), result.stdout, result.stderr)
        self.result = result

    @override
    def __str__(self) -> str:
        # repr keeps newlines and undecodable bytes of the arguments from spoiling a log line.
        command = repr(self.cmd)
        if len(command) > _COMMAND_SHOWN:
            command = f"{command[:_COMMAND_SHOWN]}…"
        return f"{command}: {self.result}"

    @override
    def __repr__(self) -> str:
        # The default shows the whole result, with megabytes of output, in somebody's log.
        return f"{type(self).__name__}({str(self)!r})"

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.result,), self.__dict__

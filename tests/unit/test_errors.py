"""What isojob raises fits into Python's own exceptions and crosses process boundaries."""

from __future__ import annotations

import errno
import pickle
from subprocess import CalledProcessError

import pytest

from isojob import errors
from isojob._models import Evidence, Status, Usage
from isojob.host.failures import to_exception
from isojob.result import Posture, Result
from isojob.wire import Failure

RESULT = Result(
    args=("sh", "-c", "exit 3\n"),
    status=Status.NONZERO_EXIT,
    returncode=3,
    stdout=b"out",
    stderr=b"err",
    usage=Usage(wall_time=0.5),
    evidence=Evidence(si_code="exited", si_status=3, wall_ns=500_000_000),
    posture=Posture(
        cgroup="v2", privilege="root", kernel="6.12", namespaces=("pid",), seccomp="default"
    ),
)

EVERY_ERROR = [
    errors.SandboxSetupError("pivot_root", errno.EPERM, "/srv/root"),
    errors.CommandNotFoundError("prog", "PATH=/bin"),
    errors.CommandNotFoundError(b"\xffprog"),
    errors.CommandNotExecutableError("prog"),
    errors.CommandNotExecutableError("prog", "wrong machine", errno.ENOEXEC),
    errors.HostNotSupportedError("no cgroup", "delegate one"),
    errors.PoolClosedError(),
    errors.PoolBrokenError("init died"),
    errors.PreloadError("numpy", "it hung", "Traceback ..."),
    errors.QueueFullError(),
    errors.ProfileError("rule 3: unknown action"),
    errors.ImageError("a layer has another digest"),
    errors.JobFailedError(RESULT),
]


@pytest.mark.parametrize("error", EVERY_ERROR, ids=lambda error: type(error).__name__)
def test_every_error_survives_pickling(error: errors.IsojobError) -> None:
    """A pickled error comes back with its type, text, notes and attributes."""
    error.add_note("while testing")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert back.__dict__ == error.__dict__
    assert back.__notes__ == error.__notes__
    assert getattr(back, "errno", None) == getattr(error, "errno", None)
    assert getattr(back, "filename", None) == getattr(error, "filename", None)


def test_the_list_above_is_complete() -> None:
    """Every exported error is tested here and is an IsojobError."""
    public = {getattr(errors, name) for name in errors.__all__}
    assert public == {type(error) for error in EVERY_ERROR} | {errors.IsojobError}
    assert all(issubclass(kind, errors.IsojobError) for kind in public)


def test_setup_error_is_an_oserror_that_names_the_stage() -> None:
    """The kernel's number, the stage and the detail are attributes and make up the text."""
    error = errors.SandboxSetupError("pivot_root", errno.EPERM, "/srv/root")
    assert isinstance(error, OSError)
    assert (error.errno, error.stage, error.detail) == (errno.EPERM, "pivot_root", "/srv/root")
    assert str(error) == "pivot_root: Operation not permitted (/srv/root)"
    assert str(errors.SandboxSetupError("mount", errno.EPERM)) == "mount: Operation not permitted"


def test_setup_error_without_an_errno_does_not_say_success() -> None:
    """A failure without an error number reads as one, not as strerror(0)."""
    assert str(errors.SandboxSetupError("handshake", 0)) == "handshake: failed"
    assert str(errors.SandboxSetupError("handshake", 0, "short read")) == "handshake: short read"


def test_setup_error_is_not_turned_into_another_oserror() -> None:
    """ENOENT during set-up is no missing command: a FileNotFoundError handler must not see it."""
    assert not isinstance(errors.SandboxSetupError("mount", errno.ENOENT), FileNotFoundError)


def test_missing_command_is_a_file_not_found_error() -> None:
    """Handlers written for subprocess see a FileNotFoundError with the command as filename."""
    error = errors.CommandNotFoundError("prog", "PATH=/bin")
    assert isinstance(error, FileNotFoundError)
    assert not isinstance(error, errors.SandboxSetupError)
    assert (error.errno, error.filename) == (errno.ENOENT, "prog")
    assert str(error) == "command not found in the sandbox: 'prog' (PATH=/bin)"


def test_unexecutable_command_is_a_permission_error() -> None:
    """EACCES and ENOEXEC both raise a PermissionError that keeps the kernel's number."""
    error = errors.CommandNotExecutableError("prog")
    assert isinstance(error, PermissionError)
    assert (error.errno, error.filename) == (errno.EACCES, "prog")
    assert str(error).endswith("'prog': Permission denied")
    wrong = errors.CommandNotExecutableError("prog", errno=errno.ENOEXEC)
    assert wrong.errno == errno.ENOEXEC
    assert str(wrong).endswith("'prog': Exec format error")


def test_unsupported_host_names_what_is_missing_and_the_cure() -> None:
    """Both halves are attributes and both are in the text."""
    error = errors.HostNotSupportedError("no cgroup", "delegate one")
    assert (error.missing, error.cure) == ("no cgroup", "delegate one")
    assert str(error) == "no cgroup; cure: delegate one"


def test_profile_error_is_a_value_error() -> None:
    """A refused profile is caught by handlers for bad values."""
    assert isinstance(errors.ProfileError("x"), ValueError)


def test_failed_job_is_a_called_process_error() -> None:
    """Handlers written for subprocess find the exit status, the command and the output."""
    error = errors.JobFailedError(RESULT)
    assert isinstance(error, CalledProcessError)
    assert error.result is RESULT
    assert (error.returncode, error.cmd) == (3, ["sh", "-c", "exit 3\n"])
    assert (error.stdout, error.output, error.stderr) == (b"out", b"out", b"err")


def test_failed_job_says_its_status_in_one_bounded_line() -> None:
    """Neither a newline in an argument nor a huge one nor the output spoils the log line."""
    error = errors.JobFailedError(RESULT)
    assert str(error).startswith("['sh', '-c', 'exit 3\\n']: nonzero_exit: exit 3 after 0.50 s")
    huge = RESULT.model_copy(update={"args": ("sh", "\udcff" * 9999), "stdout": b"x" * 9999})
    for text in (str(errors.JobFailedError(huge)), repr(errors.JobFailedError(huge))):
        assert "\n" not in text
        assert len(text) < 500
        text.encode()


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (Failure("launcher", errno.ECHILD), "seccomp filter around this process"),
        (Failure("seccomp listener thread", errno.EAGAIN), "limits.processes of at least 2"),
        (Failure("user namespace", errno.ENOSPC), "user namespaces cannot be made"),
        (Failure("user namespace", errno.ENOMEM), "raise memory.max"),
        (Failure("start of the zygote", errno.EAGAIN), "raise pids.max"),
        (Failure("mount /proc", errno.EPERM), "cannot mount its own /proc"),
        (Failure("open_tree", errno.ENOSYS), "lacks the system call"),
        (Failure("mkdir", errno.EACCES), "Permission denied"),
        (Failure("map layer", errno.EINVAL), "keep the layers of a writable root on ext4"),
        (Failure("overlay of the root", errno.EINVAL), "overlayfs"),
        (Failure("bind of the layers", errno.EINVAL), "mounted below a layer"),
        (Failure("owner of the layers", errno.EAGAIN), "raise pids.max"),
        (Failure("overlay of the root", errno.ENODEV), "modprobe overlay"),
    ],
)
def test_a_failed_stage_says_what_to_look_at(failure: Failure, words: str) -> None:
    """Each stage that fails on well-known hosts has its explanation."""
    assert words in str(to_exception(failure))

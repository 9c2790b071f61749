"""What this host can do for isojob, tried for real: every primitive by itself, then a whole job.

Nothing is concluded from version numbers alone. What has side effects happens in processes that
end with the attempt (`doctor_probes`), or in cgroups and cells that are removed.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from isojob import _zygote
from isojob._descriptors import sealed_memfd
from isojob.errors import HostNotSupportedError, IsojobError
from isojob.host import failures, ids, kernel
from isojob.host.doctor_cgroups import examine_cgroups
from isojob.host.doctor_check import Check, container_cure, surroundings
from isojob.host.doctor_job import POSTURE, examine_job
from isojob.seccomp import SeccompProfile
from isojob.wire import Failure

__all__ = ["POSTURE", "Check", "examine", "holds", "summary"]

_HOST, _NAMESPACES, _CALLS, _IDS = "this host", "namespaces and mounts", "system calls", "ids"
_PROBE_SECONDS = 20.0
_SHOWN = 4
_DEFAULT_IDS = 2 * _zygote.SLOTS


def examine() -> list[Check]:
    """Tries everything a sandbox is made of. Takes about a second and leaves nothing behind.

    As a pool does, it moves the processes of its own delegated cgroup v2 into a leaf there.

    Returns:
        The checks in the order they are to be read; the whole job comes last.
    """
    checks: list[Check] = []
    try:
        kernel.check()
    except HostNotSupportedError as error:
        return [_check(_HOST, "kernel", False, error.missing, "everything", error.cure)]
    checks += _host()
    checks += examine_cgroups(_probe)
    checks += _sysctls()
    checks += _namespaces()
    checks += _calls()
    checks += _ids()
    checks += examine_job()
    return checks


def holds(checks: list[Check]) -> bool:
    """Whether jobs can run here with the default settings and every protection in force."""
    return all(check.ok is not False for check in checks)


def summary(checks: list[Check]) -> str:
    """The last line of the doctor's report."""
    if holds(checks):
        posture = next((check.found for check in checks if check.name == POSTURE), "unknown")
        return f"isojob can run jobs here: posture {posture}"
    failed = [check.name for check in checks if check.ok is False]
    shown = ", ".join(failed[:_SHOWN])
    more = f" and {len(failed) - _SHOWN} more" if len(failed) > _SHOWN else ""
    return f"isojob cannot run jobs here with its default protections; failed: {shown}{more}"


def _check(section: str, name: str, ok: bool | None, found: str, needed: str, *cure: str) -> Check:
    return Check(
        section=section, name=name, found=found, needed_for=needed, ok=ok, cure="".join(cure)
    )


def _probe(
    group: str, *arguments: str, pass_fds: tuple[int, ...] = ()
) -> dict[str, tuple[int, str]]:
    """Runs a group of `doctor_probes`; what is missing in the answer ended early."""
    source = files("isojob.host").joinpath("doctor_probes.py").read_text("utf-8")
    mode = "root" if _zygote.privilege() == "root" else "user"
    base = str(ids.DEFAULT_RANGE.start)
    command = [sys.executable, "-I", "-S", "-c", source, group, mode, base, *arguments]
    output = b""
    # Exceptions carry what came until then.
    try:
        output = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_PROBE_SECONDS,
            check=False,
            pass_fds=pass_fds,
            start_new_session=True,
        ).stdout
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
    except OSError as error:
        return {"": (error.errno or -1, "no process could be started")}
    answers: dict[str, tuple[int, str]] = {}
    for line in output.decode("utf-8", "replace").splitlines():
        with suppress(ValueError):
            name, number, detail = json.loads(line)
            answers[name] = (number, detail)
    return answers


def _answer(answers: dict[str, tuple[int, str]], name: str) -> tuple[int, str]:
    return answers.get(name, answers.get("", (-1, "the attempt ended early")))


def _said(answer: tuple[int, str]) -> str:
    number, detail = answer
    if number > 0:
        detail = f"{os.strerror(number)} ({detail})" if detail else os.strerror(number)
    return detail


def _host() -> Iterator[Check]:
    release = os.uname().release
    minimum = ".".join(map(str, kernel.MINIMUM))
    yield _check(_HOST, "kernel", True, f"Linux {release}", f"{minimum} or newer")
    who = "root" if os.geteuid() == 0 else f"uid {os.geteuid()}"
    yield _check(_HOST, "surroundings", True, f"{surroundings()[1]}, as {who}", "the cures")
    yield _executable()
    yield _core_pattern()
    try:
        compiled = SeccompProfile.default().compile()
    except IsojobError as error:
        cure = error.cure if isinstance(error, HostNotSupportedError) else "reinstall isojob"
        yield _check(_HOST, "libseccomp", False, str(error).split("; cure")[0], "filters", cure)
    else:
        found = f"{_libseccomp_version()}, default profile: {len(compiled.bpf) // 8} instructions"
        yield _check(_HOST, "libseccomp", True, found, "compiling seccomp profiles")


def _core_pattern() -> Check:
    """A pipe there starts a program as root of the host on what a crashed process leaves (core(5)).

    Jobs start with the limit that keeps it from starting, but they may set another (RLIMIT_CORE 0).
    """
    name, needed = "core dumps", "keeping jobs from the host's core dump handler"
    try:
        pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    except OSError as error:
        return _check(_HOST, name, None, f"core_pattern: {error.strerror}", needed, "mount proc")
    if pattern.startswith("@"):  # a socket (Linux 6.16), which no limit of the job's keeps from
        found = f"sent to the socket {pattern.lstrip('@')}"
    elif pattern.startswith("|"):
        found = f"piped to {pattern[1:].split()[0] if pattern[1:].split() else 'nothing'}"
    else:
        return _check(_HOST, name, True, f"written to files ({pattern})", needed)
    return _check(_HOST, name, None, found, needed, "sysctl kernel.core_pattern=core")


def _executable() -> Check:
    """Starts the zygote's executable from a sealed memfd; without arguments it only complains."""
    name, needed = "isojob-zygote", "making cells"
    try:
        fd = sealed_memfd("isojob-zygote", _zygote._program())
    except HostNotSupportedError as error:
        return _check(_HOST, name, False, error.missing, needed, error.cure)
    except OSError as error:
        return _check(_HOST, name, False, f"memfd_create: {error.strerror}", needed, _memfd_cure())
    try:
        subprocess.run(
            ["isojob-zygote"],
            executable=f"/proc/self/fd/{fd}",
            pass_fds=(fd,),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason, cure = "it does not end", _memfd_cure()
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            if error.errno == errno.ENOEXEC:
                cure = "it is of another architecture: pip install --force-reinstall isojob"
            elif error.errno in (errno.EAGAIN, errno.ENOMEM):
                cure = _cure("fork", error.errno)
        return _check(_HOST, name, False, f"cannot be executed: {reason}", needed, cure)
    finally:
        os.close(fd)
    return _check(_HOST, name, True, "starts from a sealed memfd", needed)


def _memfd_cure() -> str:
    value = kernel.sysctl("vm/memfd_noexec")
    if value not in ("", "0"):
        return f"sysctl vm.memfd_noexec=0 (it is {value})"
    return container_cure("allow memfd_create and execve of a memfd (SELinux, AppArmor, IMA?)")


def _libseccomp_version() -> str:
    class Version(ctypes.Structure):
        _fields_ = (("major", ctypes.c_uint), ("minor", ctypes.c_uint), ("micro", ctypes.c_uint))

    try:
        function = ctypes.CDLL("libseccomp.so.2").seccomp_version
        function.restype = ctypes.POINTER(Version)
        version = function().contents
    except (OSError, AttributeError):
        return "of unknown version"
    return f"{version.major}.{version.minor}.{version.micro}"


_APPARMOR = (
    "an AppArmor profile with `userns,` for this program, or sysctl "
    "kernel.apparmor_restrict_unprivileged_userns=0"
)


def _sysctls() -> Iterator[Check]:
    needed = "a user namespace for each job"
    for path, bad, cure, of_users in (
        ("user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=15000", False),
        (
            "kernel/unprivileged_userns_clone",
            "0",
            "sysctl kernel.unprivileged_userns_clone=1",
            True,
        ),
        (
            "kernel/apparmor_restrict_unprivileged_userns",
            "1",
            _APPARMOR,
            True,
        ),
    ):
        name = path.rpartition("/")[2]
        value = kernel.sysctl(path)
        if not value:
            continue  # a kernel without the switch
        if value != bad:
            yield _check(_NAMESPACES, name, True, value, needed)
        elif of_users and os.geteuid() == 0:
            yield _check(_NAMESPACES, name, None, f"{value}, which root may ignore", needed)
        else:
            # An AppArmor profile may let us through: what counts is the attempt below.
            ok = None if "apparmor" in name else False
            yield _check(_NAMESPACES, name, ok, value, needed, cure)


def _namespaces() -> Iterator[Check]:
    answers = _probe("namespaces")
    for name, title, stage, needed in (
        ("user", "user namespace", "user namespace", "a job's root is nobody outside"),
        ("mnt", "mount namespace", "mount namespace", "a root of its own"),
        ("pid", "pid namespace", "clone", "sees and signals no other process"),
        ("net", "network namespace", "clone", "no network"),
        ("ipc", "IPC namespace", "clone", "no shared memory with others"),
        ("uts", "UTS namespace", "clone", "a host name of its own"),
        ("cgroup", "cgroup namespace", "clone", "does not see the host's cgroups"),
        ("proc", "proc, mounted inside", "mount /proc", "a /proc of its own"),
        ("tmpfs", "tmpfs", "mount root tmpfs", "/, /box and /tmp"),
        ("mount api", "open_tree, mount_setattr", "mount namespace", "read-only binds"),
        ("pivot_root", "pivot_root", "pivot_root", "the host's root is gone"),
    ):
        answer = _answer(answers, name)
        if answer[0] == 0:
            yield _check(_NAMESPACES, title, True, answer[1] or "works", needed)
            continue
        cure = _cure(stage, answer[0])
        yield _check(_NAMESPACES, title, False, _said(answer), needed, cure)
    answer = _answer(answers, "overlay")
    found, cure = "works", ""
    if answer[0] != 0:
        found, cure = _said(answer), "modprobe overlay (Linux 5.11 or newer)"
    elif os.geteuid() == 0 and kernel.release() < (5, 19):
        found, cure = "read-only: it takes no layers with mapped owners", "upgrade to Linux 5.19"
    needed = "Root.layers, writable roots, private runs of sessions"
    yield _check(_NAMESPACES, "overlayfs", None if cure else True, found, needed, cure)


def _cure(stage: str, number: int) -> str:
    """What to do about an attempt that failed; for the rest what a pool would say of that stage."""
    if number in (-1, errno.EAGAIN, errno.ENOMEM):
        return "raise the limits of this process: ulimit -u, pids.max and memory.max of its cgroup"
    if number == errno.ENOSPC:
        return (
            "sysctl user.max_user_namespaces=15000, and the same for the other user.max_*; on the "
            "host, where this is a container"
        )
    error = failures.to_exception(Failure(stage, number))
    known = error.cure if isinstance(error, HostNotSupportedError) else "upgrade the kernel"
    return container_cure(known)


def _calls() -> Iterator[Check]:
    answers = _probe("calls")
    for name, title, needed, required in (
        ("openat2", "openat2", "files in and out", True),
        ("close_range", "close_range", "no descriptor left open", True),
        ("pidfd_open", "pidfd_open", "seeing that we died", True),
        ("clone3", "clone3", "making cells", True),
        ("filter", "seccomp filter", "every profile", True),
        ("notify", "seccomp user notification", "profiles with rules that kill", False),
        ("landlock", "Landlock", "nothing yet: a second wall around files", False),
    ):
        answer = _answer(answers, name)
        if answer[0] == 0:
            yield _check(_CALLS, title, True, answer[1] or "works", needed)
            continue
        cure = "boot with landlock in the lsm= list (Linux 5.13 or newer)"
        if name != "landlock":
            cure = _cure(name, answer[0])
        yield _check(_CALLS, title, False if required else None, _said(answer), needed, cure)
    if actions := kernel.sysctl("kernel/seccomp/actions_logged").split():
        # What a filter of the job's own can have written for each call it makes, with
        # SECCOMP_RET_LOG or SECCOMP_FILTER_FLAG_LOG; the other two end whoever made the call.
        often = [action for action in actions if not action.startswith("kill_")]
        needed = "an audit log that hostile jobs cannot flood"
        found, cure = "only what is killed", ""
        if often:
            found = f"jobs choose: {', '.join(often)}"
            cure = 'sysctl kernel.seccomp.actions_logged="kill_process kill_thread"'
        yield _check(_CALLS, "actions_logged", None if often else True, found, needed, cure)
    failed, version = _answer(answers, "landlock")
    if failed == 0 and int(version.removeprefix("ABI ")) >= 7:  # Linux 6.15
        yield _check(
            _CALLS,
            "denials of Landlock",
            None,
            "audit has each that a job brings about, where it is on",
            "an audit log that hostile jobs cannot flood",
            "auditctl -a always,exclude -F msgtype=1423; the same for 1424",
        )


def _ids() -> Iterator[Check]:
    who = _zygote.privilege()
    if who == "root":
        needed = "host ids that no other job has"
        try:
            block = ids.claim(_DEFAULT_IDS)
        except HostNotSupportedError as error:
            yield _check(_IDS, f"block in {ids.LOCKS}", False, error.missing, needed, error.cure)
        else:
            block.release()
            found = f"{block.first} to {block.first + block.count - 1}"
            yield _check(_IDS, f"block in {ids.LOCKS}", True, found, needed)
        return
    if who == "user":
        needed = "jobs run as it, seen from outside"
        try:
            ids.check_not_root()
        except HostNotSupportedError as error:
            yield _check(_IDS, "our own uid", False, error.missing, needed, error.cure)
        else:
            yield _check(_IDS, "our own uid", True, f"{os.geteuid()}, not root's", needed)
    subordinate = ids.subordinate()
    needed = "host ids that are not this user's (else every cell has the caller's)"
    if subordinate is not None:
        found = f"{subordinate.count} from uid {subordinate.uid}, gid {subordinate.gid}"
        yield _check(_IDS, "subordinate ids", True, found, needed)
        return
    with suppress(KeyError):
        name = pwd.getpwuid(os.getuid()).pw_name
        cure = (
            f"install newuidmap (package uidmap or shadow-utils) and run as root: usermod "
            f"--add-subuids 100000-165535 --add-subgids 100000-165535 {name}"
        )
        yield _check(_IDS, "subordinate ids", None, "none, or no newuidmap", needed, cure)
        return
    cure = "give this uid an account and subordinate ids (/etc/subuid, /etc/subgid), and newuidmap"
    yield _check(_IDS, "subordinate ids", None, "none: this uid has no account", needed, cure)

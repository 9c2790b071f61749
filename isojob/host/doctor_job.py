"""The doctor's last check: a whole job, looked at from inside, and one that is over its limit."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import anyio

from isojob._pool import Pool
from isojob.errors import HostNotSupportedError
from isojob.host.doctor_check import Check
from isojob.limits import Limits
from isojob.result import Posture, Result, Status

__all__ = ["POSTURE", "describe_posture", "examine_job"]

SECTION = "a whole job"
POSTURE = "posture"
"""The check whose finding is the posture that held."""
# One line a fact: "fd 0", "pid 2", "ns pid:[4026531836]", and the lines of /proc/self/status.
_LOOK = """
for i in /proc/$$/fd/*; do test -e "$i" && echo "fd ${i##*/}"; done
for i in /proc/[0-9]*; do echo "pid ${i##*/}"; done
for i in user pid net mnt ipc uts cgroup; do echo "ns $(readlink /proc/$$/ns/$i)"; done
while read -r line; do echo "$line"; done </proc/$$/status
"""
_HOG = "x=x; while :; do x=$x$x; done"
_HOG_MEMORY = "16MiB"
# The shell, and what it runs at that moment; init, where it cannot be hidden.
_MOST_PROCESSES = 3


def describe_posture(posture: Posture) -> str:
    """Which protections held, in one line without a full stop."""
    parts = [
        "no cgroup" if posture.cgroup == "none" else f"cgroup {posture.cgroup}",
        {
            "root": "set up by root",
            "user": "set up by an ordinary user with a single id",
            "user+ranges": "set up by an ordinary user with subordinate ids",
        }[posture.privilege],
        f"{len(posture.namespaces)} namespaces",
        f"seccomp {posture.seccomp}",
        f"Linux {posture.kernel}",
    ]
    if posture.missing:
        parts.append(f"WITHOUT {', '.join(posture.missing)}")
    return ", ".join(parts)


def examine_job() -> Iterator[Check]:
    """Runs two jobs as any caller would, with the default sandbox."""

    def check(name: str, ok: bool, found: str, needed: str, cure: str = "") -> Check:
        return Check(section=SECTION, name=name, found=found, needed_for=needed, ok=ok, cure=cure)

    try:
        look, hog = _run_in_thread()
    except HostNotSupportedError as error:
        yield check("runs", False, error.missing, "anything", error.cure)
        return
    except Exception as error:  # noqa: BLE001 - the doctor tells, whatever it is
        yield check(
            "runs",
            False,
            f"{type(error).__name__}: {error}",
            "anything",
            "the failed checks above; if there are none, this is a fault of isojob: report it",
        )
        return
    ours = "this is a fault of isojob: report it with the output of isojob doctor --json"
    if not look.ok:
        yield check("runs", False, f"{look}; {look.stderr_text.strip()!r}", "anything", ours)
        return
    yield check("runs", True, f"ended well after {look.usage.wall_time * 1000:.0f} ms", "anything")
    for name, found, wrong, needed in _findings(look):
        yield check(name, not wrong, wrong or found, needed, ours if wrong else "")
    ended = hog.status is Status.MEMORY_LIMIT
    found = f"{hog.status} at {_HOG_MEMORY}" if ended else str(hog)
    yield check("a hog is ended", ended, found, "limits.memory", "" if ended else ours)
    yield check(POSTURE, True, describe_posture(look.posture), "knowing what held")


def _run_in_thread() -> tuple[Result, Result]:
    """In a thread of its own: the caller may be inside an event loop."""
    results: list[tuple[Result, Result]] = []
    errors: list[BaseException] = []

    async def both() -> tuple[Result, Result]:
        async with Pool(max_jobs=1, parked=0) as pool:
            look = await pool.run(["/bin/sh", "-c", _LOOK])
            hog = await pool.run(["/bin/sh", "-c", _HOG], limits=Limits(memory=_HOG_MEMORY))
            return look, hog

    def body() -> None:
        try:
            results.append(anyio.run(both))
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            errors.append(error)

    thread = threading.Thread(target=body, name="isojob-doctor")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _findings(look: Result) -> Iterator[tuple[str, str, str, str]]:
    """Name, what is found where all is well, what is wrong, what it is needed for."""
    lines = look.stdout_text.splitlines()
    status = dict(line.split(":", 1) for line in lines if ":" in line and line[:3] != "ns ")
    status = {name: value.strip() for name, value in status.items()}
    listed = {
        kind: [line.split(" ", 1)[1] for line in lines if line.startswith(f"{kind} ")]
        for kind in ("fd", "pid", "ns")
    }
    uid = (status.get("Uid") or "unknown").split()[0]
    yield ("uid", f"{uid} inside", "" if uid == "1000" else f"it is {uid}", "not being root")
    ours = {os.readlink(f"/proc/self/ns/{kind}") for kind in os.listdir("/proc/self/ns")}
    shared = sorted(ours.intersection(listed["ns"]))
    fresh = len(set(listed["ns"]))
    yield (
        "namespaces",
        f"{fresh} of its own",
        f"shared with us: {', '.join(shared)}" if shared else "" if fresh == 7 else f"only {fresh}",
        "seeing nothing of the host",
    )
    for name, field, wanted, needed in (
        ("capabilities", "CapEff", "0000000000000000", "no power over the sandbox"),
        ("no_new_privs", "NoNewPrivs", "1", "no power from set-user-ID programs"),
        ("seccomp mode", "Seccomp", "2", "the profile being in force"),
    ):
        value = status.get(field, "unknown")
        wrong = "" if value == wanted else f"{field} is {value}, not {wanted}"
        yield name, f"{field} {value}", wrong, needed
    fds = sorted(listed["fd"])
    yield (
        "descriptors",
        f"only {', '.join(fds)}",
        "" if fds == ["0", "1", "2"] else f"open: {', '.join(fds)}",
        "no way out through an open file",
    )
    pids = listed["pid"]
    yield (
        "processes in sight",
        f"{len(pids)}: {', '.join(pids)}",
        "" if 0 < len(pids) <= _MOST_PROCESSES else f"{len(pids)} of them",
        "not seeing the host's",
    )

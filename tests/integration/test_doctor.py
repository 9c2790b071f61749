"""The doctor on this host, and where something was taken away."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import anyio.lowlevel
import pytest
from environment import SLOW, cgroup_version

from isojob.host import doctor, kernel
from isojob.host.doctor import examine, holds, summary

PATIENCE = 120 * SLOW
DOCTOR = (sys.executable, "-m", "isojob.cli", "doctor")


def report(*before: str) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of the doctor, run by another program."""
    done = subprocess.run(
        [*before, *DOCTOR, "--json"], capture_output=True, timeout=PATIENCE, check=False
    )
    assert done.stdout, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, document


def failed(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The checks that failed, by name."""
    return {check["name"]: check for check in document["checks"] if check["ok"] is False}


def test_this_host_passes() -> None:
    """Where these tests run, the doctor finds nothing missing."""
    checks = examine()
    assert holds(checks), [check for check in checks if check.ok is False]
    assert summary(checks).startswith(
        f"isojob can run jobs here: posture cgroup v{cgroup_version()}"
    )
    names = [check.name for check in checks]
    assert len({(check.section, check.name) for check in checks}) == len(names)
    for check in checks:
        assert check.found
        assert check.needed_for
        # What works needs no cure; what is only optional may have none.
        assert not (check.ok and check.cure)


def test_every_primitive_is_tried() -> None:
    """The doctor tries every namespace and controller, and looks at a job from inside."""
    found = {check.name: check.found for check in examine()}
    assert {f"{name} controller" for name in ("memory", "pids", "cpu", "cpuset", "io")} <= set(
        found
    )
    for kind in ("user", "mount", "pid", "network", "IPC", "UTS", "cgroup"):
        assert f"{kind} namespace" in found
    assert found["capabilities"] == "CapEff 0000000000000000"
    assert found["descriptors"] == "only 0, 1, 2"
    assert found["namespaces"] == "7 of its own"
    assert found["a hog is ended"] == "memory_limit at 16MiB"


async def test_inside_an_event_loop() -> None:
    """examine() may be called where an event loop runs already."""
    await anyio.lowlevel.checkpoint()
    assert holds(examine())


def test_report_for_people() -> None:
    """The table has its sections and ends with what an operator wants to know."""
    done = subprocess.run(DOCTOR, capture_output=True, timeout=PATIENCE, check=False)
    text = done.stdout.decode()
    assert done.returncode == 0, text
    assert "FAILED" not in text
    for section in ("this host", "cgroup", "namespaces and mounts", "system calls", "ids"):
        assert f" {section} " in text
    assert text.splitlines()[-1].startswith("isojob can run jobs here: posture cgroup v")


def test_report_for_programs() -> None:
    """--json prints one document and nothing else."""
    status, document = report()
    assert (status, document["ok"], failed(document)) == (0, True, {})
    assert {"section", "name", "found", "needed_for", "ok", "cure"} == set(document["checks"][0])


@pytest.mark.parametrize(
    ("logged", "ok"),
    [
        ("kill_process kill_thread trap errno user_notif trace log", None),
        ("kill_process kill_thread errno", None),
        ("kill_process kill_thread", True),
    ],
)
def test_an_audit_log_that_jobs_can_fill(
    logged: str, ok: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's own filter may have its calls logged: the doctor says whether the kernel does it."""
    monkeypatch.setattr(kernel, "sysctl", lambda name: logged if "seccomp" in name else "")
    (check,) = [check for check in doctor._calls() if check.name == "actions_logged"]
    assert check.ok is ok
    assert bool(check.cure) is (ok is None)


@pytest.mark.parametrize(("abi", "told"), [(6, False), (7, True), (10, True)])
def test_denials_of_landlock(abi: int, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Audit has them since Linux 6.15, whatever seccomp's sysctl says."""
    monkeypatch.setattr(doctor, "_probe", lambda group: {"landlock": [0, f"ABI {abi}"]})
    found = [check for check in doctor._calls() if check.name == "denials of Landlock"]
    assert [check.ok for check in found] == [None] * told


@pytest.mark.parametrize(
    ("uid", "release", "ok"), [(0, (5, 18), None), (0, (5, 19), True), (1000, (5, 14), True)]
)
def test_layers_with_mapped_owners(
    uid: int, release: tuple[int, int], ok: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To root a writable root needs more of overlayfs than that it can be mounted."""
    monkeypatch.setattr(doctor, "_probe", lambda group: {"overlay": [0, ""]})
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(kernel, "release", lambda: release)
    (check,) = [check for check in doctor._namespaces() if check.name == "overlayfs"]
    assert (check.ok, bool(check.cure)) == (ok, ok is None)


def needs(*programs: str) -> None:
    """The helpers of util-linux; every distribution has them."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")


def test_without_user_namespaces() -> None:
    """Where no user namespace can be made, the doctor fails and names the sysctl."""
    needs("unshare")
    script = 'echo 0 >/proc/sys/user/max_user_namespaces && exec "$@"'
    status, document = report("unshare", "--user", "--map-root-user", "sh", "-c", script, "-")
    assert (status, document["ok"]) == (1, False)
    lost = failed(document)
    assert "user.max_user_namespaces" in lost["max_user_namespaces"]["cure"]
    assert "No space left" in lost["user namespace"]["found"]
    assert lost["runs"]["cure"]
    assert all(check["cure"] for check in lost.values())


def test_as_root_of_a_nested_namespace() -> None:
    """Where the only uid there is would be root's outside, jobs are not run as it."""
    needs("unshare")
    if os.geteuid() != 0:
        pytest.skip("only for root is it root's")
    status, document = report("unshare", "--user", "--map-root-user")
    lost = failed(document)
    assert (status, set(lost)) == (1, {"our own uid", "runs"})
    assert "ordinary user" in lost["our own uid"]["cure"]


def as_uid(uid: int) -> tuple[str, ...]:
    """The beginning of a command that runs as another user, from a shell that has lost root."""
    needs("setpriv")
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    ids = (f"--reuid={uid}", f"--regid={uid}", "--clear-groups")
    become = ("setpriv", *ids, "sh", "-c", 'exec "$@"', "-")
    attempt = [*become, sys.executable, "-c", ""]
    if subprocess.run(attempt, capture_output=True, check=False).returncode != 0:
        pytest.skip("this interpreter is not there for others")
    return become


def test_without_a_cgroup() -> None:
    """A user who may not divide its cgroup is told so; namespaces are still found to work."""
    status, document = report(*as_uid(65534))
    lost = failed(document)
    assert (status, set(lost)) == (1, {"delegated to us", "runs"})
    assert lost["delegated to us"]["cure"]
    assert "Permission denied" in lost["delegated to us"]["found"]


def test_with_too_few_processes() -> None:
    """Where nothing can be forked the doctor still reports, with the limit as the cure."""
    needs("prlimit")
    become = as_uid(65533)
    status, document = report("prlimit", "--nproc=1", *become)
    lost = failed(document)
    assert status == 1
    assert "ulimit -u" in lost["user namespace"]["cure"]
    assert "ulimit -u" in lost["clone3"]["cure"]


def test_without_a_visible_cgroup() -> None:
    """Where /sys/fs/cgroup is covered, the doctor says that there is none, and how to get one."""
    needs("unshare")
    if os.geteuid() != 0:
        pytest.skip("only root can cover it")
    status, document = report(
        *("unshare", "--mount", "sh", "-c"),
        *('mount -t tmpfs none /sys/fs/cgroup && exec "$@"', "-"),
    )
    lost = failed(document)
    assert (status, set(lost)) == (1, {"version", "runs"})
    assert "allow_missing" in lost["runs"]["cure"]

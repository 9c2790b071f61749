"""Our own attacks on our own sandbox; and with a protection taken away, to see that they tell."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from environment import SLOW, cgroup_version

from isojob import HostNotSupportedError, Pool, Sandbox, SeccompProfile
from isojob.attack import ATTACKS, Attack, Finding, Outcome, attack
from isojob.attack._attack import LIMITS
from isojob.cgroups import discovery, v1, v2
from isojob.cgroups.v2 import V2
from isojob.cli import main
from isojob.sandbox import PROTECTIONS
from isojob.seccomp import _compile, _names

PATIENCE = max(1, SLOW / 4)
AT_ONCE = 8 if SLOW == 1 else 3


def named(*names: str) -> list[Attack]:
    found = [one for one in ATTACKS if one.name in names]
    assert len(found) == len(names)
    return found


FILTERED = named(
    *("io_uring", "dangerous", "families", "module_requests"),
    *("uncounted_sockets", "uncounted_inodes", "huge_pages"),
    *("watch_files", "watch_jobs", "leases", "flush_disks", "file_system_keys"),
)
"""Those that nothing but the filter stops."""


def reading(path: str) -> list[Attack]:
    """The attack on a disk, on a file that is certainly on one."""
    return [replace(one, program=(*one.program, path)) for one in named("read_fast")]


@pytest.fixture
def readable(disk: Sandbox) -> Sandbox:
    """A sandbox with a file on a disk, /disk/x."""
    (source,) = (mount.source for mount in disk.mounts)
    Path(str(source), "x").write_bytes(b"x" * (8 << 20))
    return disk


def not_contained(findings: Iterable[Finding]) -> dict[str, tuple[str, ...]]:
    return {f.name: (f.outcome, *f.problems) for f in findings if f.outcome != Outcome.CONTAINED}


@pytest.mark.slow
async def test_all_are_contained(anyio_backend_name: str) -> None:
    """Every attack ends as it has to, eight at once, and something is named that stopped it."""
    attacks = ATTACKS
    if SLOW > 1 and anyio_backend_name == "trio":  # as a user: what may differ from root's run
        kinds = ("calls", "identity", "between jobs", "composed")
        attacks = tuple(one for one in ATTACKS if one.kind in kinds)
    findings = await attack(attacks, at_once=AT_ONCE, patience=PATIENCE)
    assert not_contained(findings) == {}
    assert len(findings) == len(attacks) + 1
    assert [f.name for f in findings if not f.stopped_by] == []


async def test_compute_contains_them_too() -> None:
    """Under the stricter profile, too; what needs a call that it kills for is not among these."""
    sandbox = Sandbox(seccomp=SeccompProfile.compute())
    findings = await attack(
        named("touch", "climb", "ids", "deaf_loop"), sandbox=sandbox, patience=PATIENCE
    )
    assert not_contained(findings) == {}


async def test_without_the_filter_they_tell() -> None:
    """Unconfined, calls reach the kernel that the default profile refuses; nothing else gives way."""
    sandbox = Sandbox(seccomp=SeccompProfile.unconfined())
    attacks = [one for one in ATTACKS if SLOW == 1 or one.kind in ("calls", "namespaces")]
    findings = await attack(attacks, sandbox=sandbox, at_once=AT_ONCE, patience=PATIENCE)
    bad = not_contained(findings)
    alone = {one.name for one in FILTERED if one in attacks}
    assert alone <= set(bad)
    assert {name: why for name, why in bad.items() if why[0] != Outcome.ESCAPED} == {}
    others = [problem for name, why in bad.items() if name not in alone for problem in why[1:]]
    assert [problem for problem in others if not problem.startswith("surface")] == []


def no_cgroups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that shows us none."""
    monkeypatch.setattr(discovery, "_locate_own", lambda: (None, {}))


def no_controller(v1: str, v2: str = "") -> Callable[[pytest.MonkeyPatch], None]:
    """A host whose cgroups lack one: not mounted on v1, not delegated on v2."""

    def lose(monkeypatch: pytest.MonkeyPatch) -> None:
        locate, read = discovery._locate_own, V2._read

        def located() -> tuple[Path | None, dict[str, Path]]:
            unified, legacy = locate()
            return unified, {name: path for name, path in legacy.items() if name != v1}

        def without(driver: V2, name: str) -> str:
            text = read(driver, name)
            if name == "cgroup.controllers":
                return " ".join(word for word in text.split() if word != v2)
            return text

        monkeypatch.setattr(discovery, "_locate_own", located)
        monkeypatch.setattr(V2, "_read", without)

    return lose


def no_swap_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with swap whose kernel does not count it."""
    for module in (v1, v2):
        monkeypatch.setattr(module, "host_has_swap", lambda: True)
    monkeypatch.setattr(v1.V1, "_has", lambda *_: False)
    monkeypatch.setattr(V2, "_look_for_swap", lambda v2, _: v2.missing.update(swap_limit="it"))


def no_libseccomp(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host where no filter can be made."""
    monkeypatch.setattr(_names, "_SONAME", "libseccomp-absent.so.9")
    for cached in (_names.library, _names.number, _compile._compile):
        cached.cache_clear()


def quick(*attacks: Attack) -> tuple[Attack, ...]:
    """Those that burn, with less time to do so: nothing else ends them."""
    times = {"cpu_time": 0.5, "wall_time": 2.0}
    return tuple(replace(one, limits=one.limits | times) for one in attacks)


LOST: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Sequence[Attack]]] = {
    "cgroup": (
        no_cgroups,
        # Each process still has RLIMIT_AS and RLIMIT_CPU, and RLIMIT_NPROC is the job's alone: what
        # one process does, and forks, are bounded by these.
        [*named("many_processes", "memfds"), *quick(*named("burning_children"))],
    ),
    "memory_limit": (
        no_controller("memory", "memory"),
        named("touch", "populate", "many_processes", "memfds", "system_v"),
    ),
    # No attack can tell. v1: the pool's memory.swappiness is 0, and its memory is not swapped out.
    # v2: the kernel has the file, and the driver does not fail to write it.
    "swap_limit": (no_swap_limit, []),
    "process_limit": (
        no_controller("pids", "pids"),
        named("fork_bomb", "fork_doubling", "thread_bomb"),
    ),
    "cpu_accounting": (
        no_controller("cpuacct"),
        quick(*named("deaf_loop", "burning_children", "burning_threads", "leader_gone")),
    ),
    "cpus": (no_controller("cpu", "cpu"), named("more_cpus")),
    "cpuset": (no_controller("cpuset", "cpuset"), named("other_cpus")),
    "io_limit": (no_controller("blkio", "io"), reading("/disk/x")),
    "seccomp": (no_libseccomp, FILTERED),
}
"""For each protection: what takes it away alone, and the attacks that nothing else stops."""


def test_every_protection_has_its_attacks() -> None:
    """A protection that nobody attacks may be gone unseen."""
    assert set(LOST) == set(PROTECTIONS)


@pytest.mark.parametrize("name", LOST)
async def test_without_a_protection_they_tell(
    name: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """A host that lacks it is refused; where that is accepted by name, attacks get through."""
    if name == "cpu_accounting" and cgroup_version() == 2:
        pytest.skip("every cgroup of v2 has this account, with or without a controller")
    if name == "cpuset" and len(os.sched_getaffinity(0)) == 1:
        pytest.skip("there is no other processor")
    lose, attacks = LOST[name]
    sandbox = request.getfixturevalue("readable") if name == "io_limit" else Sandbox()
    limits = LIMITS.model_copy(update=attacks[0].limits if attacks else {})
    lose(monkeypatch)
    with pytest.raises(HostNotSupportedError, match=rf"\b{name}\b") as refused:
        await Pool(sandbox, limits).__aenter__()
    assert f"allow_missing={{{name!r}}}" in refused.value.cure
    if name in ("cpus", "cpuset", "io_limit"):  # only jobs that ask for it are refused
        findings = await attack(attacks, sandbox=sandbox)
        assert not_contained(findings) == {}
        assert name in findings[0].stopped_by[0]
    sandbox = sandbox.model_copy(update={"allow_missing": frozenset({name})})
    async with Pool(sandbox, limits) as pool:
        missing = (await pool.run(["true"])).posture.missing
    assert name in missing
    assert missing == (name,) or name == "cgroup"
    others = named("daemon", "climb")  # nothing else gives way
    told = not_contained(await attack([*attacks, *others], sandbox=sandbox, patience=PATIENCE))
    assert set(told) == {one.name for one in attacks}
    assert {why[0] for why in told.values()} <= {Outcome.ESCAPED, Outcome.WRONG_VERDICT}


async def test_a_disk_is_read_no_faster(readable: Sandbox) -> None:
    """With its limit in force, the attack on the disk itself is contained."""
    findings = await attack(reading("/disk/x"), sandbox=readable, patience=PATIENCE)
    assert not_contained(findings) == {}
    assert findings[0].stopped_by[0].startswith("cgroup")


@pytest.mark.slow
async def test_warm_interpreters_contain_them() -> None:
    """All that a program can try, tried by forks of a warm interpreter."""
    kinds = ("calls", "identity", "files", "namespaces", "between jobs")
    attacks = [a for a in ATTACKS if a.door == "alone" and (SLOW == 1 or a.kind in kinds[:2])]
    findings = await attack(attacks, at_once=AT_ONCE, patience=max(2, PATIENCE), warm=True)
    assert not_contained(findings) == {}


async def test_without_private_views_they_tell() -> None:
    """Run one after the other on one directory, jobs of a session do find each other's files."""
    attacks = [replace(one, keep=True) for one in named("private_view", "session_after")]
    findings = await attack(attacks, patience=PATIENCE)
    assert [f.outcome for f in findings[:2]] == [Outcome.ESCAPED] * 2


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    """``isojob attack``: a table, JSON, and the exit status."""
    assert main(["attack", "--only", "^(climb|ids)$", "--patience", str(PATIENCE)]) == 0
    out = capsys.readouterr().out
    assert "3 contained, 0 escaped" in out
    assert "above the root" in out
    arguments = ["attack", "--json", "--only", "^io_uring$"]
    assert main([*arguments, "--security-opt", "seccomp=unconfined"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is False
    assert [f["outcome"] for f in document["findings"]] == ["escaped", "contained"]


@pytest.mark.parametrize(
    "arguments", [["--only", "("], ["--only", "no such attack"], ["--at-once", "0"]]
)
def test_bad_flags(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake is said in a line, and nothing runs."""
    assert main(["attack", *arguments]) == 125
    assert capsys.readouterr().out == ""

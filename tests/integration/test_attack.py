"""Our own attacks on our own sandbox; and with a protection taken away, to see that they tell."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

import pytest
from environment import SLOW

from isojob import Sandbox, SeccompProfile
from isojob.attack import ATTACKS, Attack, Finding, Outcome, attack
from isojob.cgroups.discovery import NoCgroups
from isojob.cli import main
from isojob.host import posture
from isojob.sandbox import PROTECTIONS

PATIENCE = max(1, SLOW / 4)
AT_ONCE = 8 if SLOW == 1 else 3


def named(*names: str) -> list[Attack]:
    found = [one for one in ATTACKS if one.name in names]
    assert len(found) == len(names)
    return found


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
    assert {"io_uring", "families", "dangerous"} <= set(bad)
    assert {name: why for name, why in bad.items() if why[0] != Outcome.ESCAPED} == {}
    assert all(problem.startswith("surface") for why in bad.values() for problem in why[1:])


async def test_without_cgroups_they_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every protection given up that can be, memory in many processes passes the limit."""
    monkeypatch.setattr(posture, "find", lambda: NoCgroups("switched off", "a test"))
    sandbox = Sandbox(allow_missing=PROTECTIONS)
    findings = await attack(
        named("many_processes", "memfds", "dead_child", "daemon", "climb"),
        sandbox=sandbox,
        patience=PATIENCE,
    )
    outcome = {f.name: f.outcome for f in findings}
    assert outcome["many_processes"] == Outcome.ESCAPED
    assert outcome["memfds"] == Outcome.ESCAPED
    assert outcome["daemon"] == outcome["climb"] == Outcome.CONTAINED


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

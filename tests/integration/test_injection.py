"""Every system call of zygote, template, init and launcher made to fail in turn: nothing runs half isolated.

strace injects the error (its -e inject), into the code as it is shipped. Needs strace.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import anyio
import pytest
from environment import PYTHON, SLOW, WHOLE, cgroup_version, children_of, seeded, settle
from injection import (
    HOG,
    KINDS,
    SHOW,
    STARTS,
    Kind,
    Run,
    calls,
    executing,
    makers,
    program,
    stages,
    told,
    traced,
    traced_from_birth,
)

from isojob import (
    HostNotSupportedError,
    IsojobError,
    PoolBrokenError,
    PythonPool,
    Sandbox,
    Status,
)
from isojob.errors import SandboxSetupError
from isojob.wire import Failure

pytestmark = pytest.mark.slow

NATIVE = Path(__file__).parents[2] / "isojob/native"
SHARE = 12
"""Calls of each kind that fail in an ordinary run; all, some 200 to 700, with ISOJOB_TEST_WHOLE=1."""
MEMORY = Status.MEMORY_LIMIT
BAD = {Status.NONZERO_EXIT, Status.SIGNALED, MEMORY}
OUTSIDE = {
    os.readlink(f"/proc/self/ns/{name}")
    for name in os.listdir("/proc/self/ns")
    if not name.startswith("time")
}
OTHER_ERRNO: dict[str, tuple[set[int], str]] = {
    "cell": ({errno.EOWNERDEAD}, "the zygote ended, or took nothing: only the socket's end tells"),
    **dict.fromkeys(
        ("launcher", "write files"), ({0}, "it ended where it has nothing to say it with")
    ),
    "owner of the layers": ({errno.ECHILD}, "a process of its own: only its end is seen"),
    "fork of the template": ({errno.ECHILD}, "what a template's process says is not read"),
    "template": ({errno.ECHILD, errno.EPIPE}, "the same"),
    "clone template": ({errno.ENOMEM}, "in a pid namespace whose first process has failed"),
    "read-only /proc": ({errno.EBUSY}, "a close that was not made leaves a writer"),
    "read-only root": ({errno.EBUSY}, "the same"),
}
"""Stages that cannot tell the error of the call, and why."""
_V1, _V2 = ("clone launcher", "cgroup cgroup.event_control"), ("clone into cgroup",)
NOT_REACHED: dict[str, str] = {
    **dict.fromkeys(_V2 if cgroup_version() == 1 else _V1, "of the other version of cgroups"),
    **dict.fromkeys(("newuidmap", "user namespace"), "an ordinary user's"),
    **dict.fromkeys(
        ("branch", "cell", "cgroup settings", "make", "session", "slots"),
        "for messages that none sends",
    ),
    **dict.fromkeys(
        ("setresgid", "setresuid", "seccomp listener"), "init's call of that number fails first"
    ),
    **dict.fromkeys(
        (
            "execute",
            "template's /proc",
            "template's /tmp",
            "template's namespaces",
            "template's working directory",
        ),
        "the zygote's call of that number fails first",
    ),
    "proc of the template": "two calls would have to fail",
    "receive cell": "it has not got the lease to say so; its end is heard",
    "threads that a preload starts in forks": "init's call of that number fails first; "
    "test_python has a preload that starts one",
    "zygote": "of cells that are parked when it ends; test_kills has them",
}
"""Stages that no failing call leads to here, and why: strace counts each process's calls for itself."""
SOMETIMES = {
    "job message": "the host lets go of a parked cell that fails, unless its job is on the way by then"
}
"""Stages that are hit in some runs only, and why."""

_hit: set[str] = set()


def normal(text: str) -> list[str]:
    """What a job sees, without what differs from cell to cell, and what its programs complain of."""
    text = re.sub(r"^(Uid|Gid|uid|\w+: ).*\n", "", text, flags=re.MULTILINE)
    return sorted(re.sub(r":\[\d+\]|[ug]id=\d+|self/fd/\d+", "", text).splitlines())


def spaces(text: str) -> set[str]:
    return set(re.findall(r"\w+:\[\d+\]", text))


def check(failure: Failure, inject: str) -> None:
    """The error is the one that was injected, as far as the stage can know."""
    others, _ = OTHER_ERRNO.get(failure.stage, (set(), ""))
    assert failure.errno in {errno.EIO, *others}, (inject, failure)


def refused(error: IsojobError, inject: str) -> None:
    """A job or a pool that is not to be."""
    assert not isinstance(error, HostNotSupportedError), inject
    if isinstance(error, SandboxSetupError):
        check(Failure(error.stage, error.errno or 0), inject)


def heard(said: list[Failure], inject: str) -> None:
    """What the native code has said of its failures."""
    for failure in said:
        _hit.add(failure.stage)
        check(failure, inject)


async def runs(run: Run, script: str, expected: list[str], inject: str) -> bool:
    """Runs it under failing calls: in a whole sandbox; False: not at all, for a reason given."""
    try:
        with anyio.fail_after(50 * SLOW):
            status, text = await run(script)
    except IsojobError as error:
        refused(error, inject)
        return False
    # Calls of the job itself fail, too: that is no limit's fault. To init waitid says nothing but
    # ECHILD: else it sees no end, and the time limit does.
    allowed = BAD if script == HOG else {Status.OK, *BAD} - {MEMORY}
    late = {Status.WALL_TIME_LIMIT} if "=waitid:" in inject else set()
    assert status in allowed | late, (inject, status)
    if script == SHOW:
        seen = normal(text)
        if "=close:" in inject:  # the job's own fail, too: its descriptors have other numbers
            seen, expected = ([s for s in lines if not s.isdigit()] for lines in (seen, expected))
        assert set(seen) <= set(expected), inject
        if status is Status.OK:
            assert seen == expected, inject
        assert not spaces(text) & OUTSIDE, inject
    return True


@contextmanager
def noting(inject: str, wrong: list[str]) -> Iterator[None]:
    """What is wrong with one call shall not hide what is with the next."""
    try:
        yield
    except (AssertionError, TimeoutError) as error:
        wrong.append(f"{inject}: {type(error).__name__} {error}")
        print(wrong[-1])


async def goes_on(run: Run) -> Status:
    """The next job; the one after it, if the zygote has its failing call only now, and ends."""
    with suppress(PoolBrokenError):
        return (await run("true"))[0]
    return (await run("true"))[0]


async def prepared(kind: Kind, directory: Path, disk: Sandbox) -> tuple[Sandbox, list[str], Path]:
    """The sandbox, what an undisturbed job sees there, and a directory for traces."""
    assert shutil.which("strace"), "this test needs strace"
    sandbox = kind.sandbox(directory, disk)
    async with kind.opened(sandbox) as (_, run):
        status, text = await run(SHOW)
    assert status is Status.OK
    traces = directory / "traces"
    traces.mkdir()
    return sandbox, normal(text), traces


def chosen(traces: Path) -> list[str]:
    """What strace is told, for a share of the calls that it has seen, or for all."""
    found = calls(traces)
    assert len(found) > 20
    if not WHOLE:
        print(f"a share of {len(found)}")
        # Nothing goes on without it: of the others none need be fatal.
        sure = max(one for one in found if one in {("execve", 1), ("execveat", 1)})
        found = [sure, *seeded().sample(found, max(2, SHARE // SLOW))]
    return [f"inject={name}:error=EIO:when={number}" for name, number in found]


@pytest.mark.parametrize("name", KINDS)
async def test_each_call_fails_in_turn(
    anyio_backend_name: str, tmp_path: Path, disk: Sandbox, name: str
) -> None:
    """A job runs in a whole sandbox or not at all; the next one runs in any case."""
    kind = KINDS[name]
    sandbox, expected, traces = await prepared(kind, tmp_path, disk)
    async with kind.opened(sandbox) as (stock, run):
        with traced(*makers(stock), options=("-ff", "-o", str(traces / "of"))):
            for script in (SHOW, HOG):
                await run(script)
            await anyio.sleep(0.2 * SLOW)  # until the cell is gone
    ran = failed = 0
    wrong: list[str] = []
    with told() as said:
        for inject in chosen(traces):
            said.clear()
            with noting(inject, wrong):
                async with kind.opened(sandbox) as (stock, run):
                    made = makers(stock)
                    assert stock.zygote is not None
                    programs = {program(stock.zygote.pid)}
                    with traced(*made, options=("-f", "-o", "/dev/null", "-e", inject)):
                        for script in (SHOW, HOG):
                            if await runs(run, script, expected, inject):
                                ran += 1
                            else:
                                failed += 1
                    with anyio.fail_after(60 * SLOW):
                        assert await goes_on(run) is Status.OK, inject
                assert not settle(partial(executing, programs)), inject
                heard(said, inject)
    print(f"{ran} jobs ran, {failed} failed; stages so far: {sorted(_hit)}")
    assert not wrong
    assert failed > (ran + failed) // 8, "no failure was hit: is strace at work?"


async def test_zygote_that_dies_while_its_template_starts() -> None:
    """Before that, and its pid 1, have asked for a signal then: nothing of them is left."""
    delay = 1.5 * max(1, SLOW / 4)
    held_up = f"inject=prctl:delay_enter={round(delay * 1e6)}:when=1"

    async def open_it() -> None:
        with pytest.raises(PoolBrokenError):
            async with PythonPool(python=PYTHON, parked=0):
                pass

    with traced_from_birth("-f", "-o", "/dev/null", "-e", held_up) as programs:
        with anyio.fail_after(30 * SLOW):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(open_it)
                found: list[int] = []
                while len(found) < 3 or len(children_of(found[0])) != 2:
                    await anyio.sleep(0.1)  # the second process of its namespace is gone then
                    found = sorted(executing(programs))
                os.kill(found[0], signal.SIGKILL)
        await anyio.sleep(3 * delay)
        assert not settle(partial(executing, programs))


@pytest.mark.parametrize("name", STARTS)
async def test_each_call_of_the_start_fails_in_turn(
    anyio_backend_name: str, tmp_path: Path, disk: Sandbox, name: str
) -> None:
    """A pool opens with whole sandboxes, or it says why not; nothing of it is left."""
    kind = STARTS[name]
    sandbox, expected, traces = await prepared(kind, tmp_path, disk)
    with traced_from_birth("-ff", "-o", str(traces / "of")):
        async with kind.opened(sandbox):
            pass
    opened = failed = 0
    wrong: list[str] = []
    with told() as said:
        for inject in chosen(traces):
            said.clear()
            with noting(inject, wrong):
                with traced_from_birth("-f", "-o", "/dev/null", "-e", inject) as programs:
                    try:
                        with anyio.fail_after(60 * SLOW):
                            async with kind.opened(sandbox) as (_, run):
                                opened += 1
                                await runs(run, SHOW, expected, inject)
                    except IsojobError as error:
                        refused(error, inject)
                        failed += 1
                assert programs
                assert not settle(partial(executing, programs)), inject
                heard(said, inject)
    print(f"{opened} pools opened, {failed} did not; stages so far: {sorted(_hit)}")
    assert not wrong
    assert failed > (opened + failed) // 8, "no failure was hit: is strace at work?"


@pytest.mark.skipif(os.geteuid() != 0, reason="the list is that of root's runs")
def test_stages() -> None:
    """In a whole run each stage that the sources name was hit, or it is said why it cannot be."""
    there = stages(NATIVE)
    hit = set()
    for name in _hit:
        named = [s for s in there if name == s or (there[s] and name.startswith(f"{s} "))]
        assert named, f"a stage that the sources do not name: {name}"
        hit.add(max(named, key=len))
    print(f"{len(hit)} of {len(there)} stages hit; not: {sorted(there.keys() - hit)}")
    assert NOT_REACHED.keys() | SOMETIMES.keys() <= there.keys()
    if WHOLE:
        assert there.keys() - hit - SOMETIMES.keys() == NOT_REACHED.keys()

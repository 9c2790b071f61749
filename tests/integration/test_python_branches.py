"""Several sets of preloads: a tree of templates, within a budget."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import anyio
import pytest
from environment import CHILD_USES_THE_POOL, PATIENT, PYTHON, SLOW, run_python

from isojob import Limits, Mount, PoolClosedError, PythonResult, Sandbox, _python_statistics
from isojob._python import PythonPool
from isojob.errors import IsojobError, PreloadError, QueueFullError

LOADED = "import sys; result = [n for n in ('decimal', 'fractions', 'bz2') if n in sys.modules]"


@pytest.fixture
async def pool() -> AsyncIterator[PythonPool]:
    async with PythonPool(
        ["random"], python=PYTHON, limits=PATIENT, preload_time=60, parked=1
    ) as pool:
        yield pool


async def test_sets(pool: PythonPool) -> None:
    """Each job has what it asked for, in the order asked for, and nothing else."""
    assert (await pool.run_python(LOADED)).value == []
    for _ in range(2):
        for names in (["decimal"], ["decimal", "fractions"], ["bz2"], ["random", "bz2", "bz2"]):
            expected = sorted({*names} - {"random"})
            value = (await pool.run_python(LOADED, preload=names)).value
            # What fractions imports by itself is there, too.
            assert set(expected) <= set(value)
            assert ("bz2" in value) == ("bz2" in names)
    assert (await pool.call_python("decimal:Decimal", "1", preload=["decimal"])).value_problem
    templates = pool.statistics().templates
    assert templates[0].preload == ("random",)
    assert {t.preload[1:] for t in templates[1:]} == {
        ("decimal",),
        ("decimal", "fractions"),
        ("bz2",),
    }
    assert len({t.pid for t in templates}) == 4
    for template in templates:
        assert template.jobs == 0
        assert template.rss is not None and template.pss is not None
        # A fork of another shares most of what it has.
        assert 0 < template.pss < template.rss


async def test_one_template_for_all(pool: PythonPool) -> None:
    """Calls that ask for a set at once make its template once."""
    values = []

    async def one() -> None:
        values.append((await pool.run_python(LOADED, preload=["bz2"])).value)

    async with anyio.create_task_group() as tasks:
        for _ in range(6):
            tasks.start_soon(one)
    assert values == [["bz2"]] * 6
    assert len(pool.statistics().templates) == 2


async def test_budget() -> None:
    """The longest unused set goes when memory is short, and comes again when it is asked for."""
    async with PythonPool(
        python=PYTHON, limits=PATIENT, preload_time=60, branch_memory=1, parked=0
    ) as pool:
        for _ in range(2):
            for names in (["decimal"], ["bz2"]):
                assert (await pool.run_python("result = 1", preload=names)).value == 1
                assert len(pool.statistics().templates) <= 2


@pytest.fixture
def heavy(tmp_path: Path) -> Sandbox:
    """Sees modules of 24 MiB each, and small ones."""
    tmp_path.chmod(0o755)
    folder = tmp_path / "modules"
    folder.mkdir()
    for name in ("heavy1", "heavy2", "heavy3"):
        (folder / f"{name}.py").write_text("x = b'x' * (24 << 20)")
    for name in ("light1", "light2"):
        (folder / f"{name}.py").write_text("")
    return Sandbox(mounts=[Mount.bind(folder, "/modules")], env={"PYTHONPATH": "/modules"})


def bounded(sandbox: Sandbox, memory: str, parked: int) -> PythonPool:
    """A pool whose branches may have so much memory."""
    return PythonPool(
        python=PYTHON,
        sandbox=sandbox,
        limits=PATIENT,
        preload_time=60,
        parked=parked,
        branch_memory=memory,
    )


def sets(pool: PythonPool) -> list[tuple[str, ...]]:
    """What is warm beside the first template, the longest unused first."""
    return [template.preload for template in pool.statistics().templates[1:]]


@pytest.mark.parametrize("told", [True, False])
async def test_budget_by_size(told: bool, heavy: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as fit; what a set shares with its parent is the parent's.

    Also where the kernel does not tell us what is a template's own (no CAP_SYS_PTRACE).
    """

    def closed(pid: int) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    if not told:
        monkeypatch.setattr(_python_statistics, "_rollup", closed)
    async with bounded(heavy, "64MiB", parked=1) as pool:
        for names in (["heavy1"], ["heavy2"], ["heavy2", "light1"], ["heavy1"], ["heavy3"]):
            assert (await pool.run_python("result = 1", preload=names)).value == 1
        # heavy2 alone would have gone for nothing while a fork of it stayed.
        assert sets(pool) == [("heavy1",), ("heavy3",)]
        for names in (["heavy1", "light1"], ["heavy1", "light2"]):
            assert (await pool.run_python("result = 1", preload=names)).value == 1
        assert len(sets(pool)) == 4
        first = pool.statistics().templates[0]
        assert first.rss is not None and first.rss > 1 << 20
        assert told or first.pss is None


async def test_budget_of_what_nobody_tells(heavy: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of unknown size is as large as may be: it stays while nothing else is asked for."""
    monkeypatch.setattr(_python_statistics, "_rollup", lambda pid: "")
    monkeypatch.setattr(_python_statistics, "_anonymous", lambda pid: None)
    async with bounded(heavy, "64MiB", parked=0) as pool:
        for names in (["light1"], ["light2"], ["light1"]):
            assert (await pool.run_python("result = 1", preload=names)).value == 1
            assert len(sets(pool)) == 1


async def test_budget_when_all_are_in_use(heavy: Sandbox) -> None:
    """More than fits may be in use at once, and goes when it is not any more."""
    code = "import time; time.sleep(600)"
    async with bounded(heavy, "64MiB", parked=0) as pool:
        names = ["heavy1", "heavy2", "heavy3"]
        async with anyio.create_task_group() as tasks:
            for name in names:
                tasks.start_soon(partial(pool.run_python, code, preload=[name]))
                with anyio.fail_after(60 * SLOW):
                    while not any(name in names for names in sets(pool)):  # noqa: ASYNC110
                        await anyio.sleep(0.01)
            assert len(sets(pool)) == 3
            tasks.cancel_scope.cancel()
        assert len(sets(pool)) == 2
        await pool.run_python("result = 1", preload=["heavy1"])
        await pool.run_python("result = 1", preload=["heavy2"])
        assert sets(pool) == [("heavy1",), ("heavy2",)]


async def test_parked_interpreters_of_all_sets() -> None:
    """They count; and those of a set that is not used are given up again, too."""
    async with PythonPool(python=PYTHON, limits=PATIENT, preload_time=60, max_jobs=8) as pool:
        first = pool.statistics().parked_target
        await pool.run_python("result = 1", preload=["decimal"])
        (stock,) = pool._branches._stocks.values()
        assert stock._shelf is not None
        level = stock._shelf.level
        before = level.wanted
        assert pool.statistics().parked_target == first + before
        long_ago = time.monotonic_ns() - (60 << 30)
        for _ in range(3):
            level.lacked(long_ago)
        assert pool.statistics().parked_target == first + level.wanted > first + before
        with anyio.fail_after(20 * SLOW):
            while level.wanted > before:
                await pool.run_python("result = 1")


async def test_budget_counts_what_a_dead_parent_left(heavy: Sandbox) -> None:
    """Its forks keep its memory, and in use they are not ended for it."""
    async with bounded(heavy, "40MiB", parked=0) as pool:
        for names in (["heavy1"], ["heavy1", "light1"]):
            assert (await pool.run_python("result = 1", preload=names)).value == 1
        os.kill(pool.statistics().templates[1].pid, signal.SIGKILL)
        read, write = os.pipe()
        async with anyio.create_task_group() as tasks:

            async def hold() -> None:
                with open(read, "rb") as stdin:
                    code = "import sys; sys.stdin.read()"
                    await pool.run_python(code, preload=["heavy1", "light1"], stdin=stdin)

            tasks.start_soon(hold)
            while pool.statistics().running < 1:  # noqa: ASYNC110 - nobody tells
                await anyio.sleep(0.01)
            assert (await pool.run_python("result = 1", preload=["heavy2"])).value == 1
            assert sets(pool) == [("heavy1", "light1"), ("heavy2",)]
            os.close(write)
        assert (await pool.run_python("result = 1", preload=["light2"])).value == 1
        assert sets(pool) == [("heavy2",), ("light2",)]


async def test_more_sets_than_templates() -> None:
    """At most fifteen besides the first; those in use stay, and then it is said."""
    names = [
        "bz2", "csv", "decimal", "fractions", "glob", "hashlib", "heapq", "html", "lzma", "pprint",
        "queue", "shlex", "statistics", "string", "uuid", "zlib",
    ]  # fmt: skip
    if SLOW > 1:
        pytest.skip("takes minutes on an emulated CPU")
    async with PythonPool(python=PYTHON, limits=PATIENT, parked=0, max_jobs=20) as pool:
        refused = []
        found = anyio.Event()

        async def hold(name: str) -> None:
            try:
                await pool.run_python("import time; time.sleep(600)", preload=[name])
            except QueueFullError:
                refused.append(name)
                found.set()

        async with anyio.create_task_group() as tasks:
            for name in names:
                tasks.start_soon(hold, name)
            with anyio.fail_after(60):
                await found.wait()
                while pool.statistics().running < 15:  # noqa: ASYNC110 - nobody tells
                    await anyio.sleep(0.05)
            tasks.cancel_scope.cancel()
        assert len(refused) == 1
        assert (await pool.run_python("result = 1", preload=refused)).value == 1
        assert len(pool.statistics().templates) == 16


async def test_dead_branch_and_dead_zygote(pool: PythonPool) -> None:
    """Either is made anew."""
    for what in ("branch", "branch", "zygote"):
        assert (await pool.run_python("result = 1", preload=["bz2"])).value == 1
        zygote = pool._pool.stock.zygote
        assert zygote is not None
        pid = pool.statistics().templates[-1].pid if what == "branch" else zygote.pid
        os.kill(pid, signal.SIGKILL)
        await anyio.sleep(0.2)
        for _ in range(20):  # whoever noticed it first may have been told
            try:
                assert (await pool.run_python("result = 2", preload=["bz2"])).value == 2
                break
            except IsojobError:
                await anyio.sleep(0.05)
        else:
            pytest.fail("the pool does not mend itself")


async def test_bad_branches(tmp_path: Path) -> None:
    """The error names the module; what there was stays."""
    tmp_path.chmod(0o755)
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "broken.py").write_text("1/0")
    (folder / "ending.py").write_text("import os; os._exit(0)")
    (folder / "hanging.py").write_text("import time; time.sleep(600)")
    sandbox = Sandbox(mounts=[Mount.bind(folder, "/modules")], env={"PYTHONPATH": "/modules"})
    async with PythonPool(
        python=PYTHON, sandbox=sandbox, limits=PATIENT, preload_time=3 * max(1, SLOW / 2), parked=0
    ) as pool:
        for module, words in (
            ("broken", "ZeroDivisionError"),
            ("ending", "died while it imported"),
            ("hanging", "were not done after"),
            ("nowhere", "ModuleNotFoundError"),
        ):
            with pytest.raises(PreloadError, match=words) as caught:
                await pool.run_python("1", preload=["bz2", module])
            assert caught.value.module == module
        assert (await pool.run_python("result = 3")).value == 3
        assert (await pool.run_python(LOADED, preload=["bz2"])).value == ["bz2"]
        assert pool.statistics().zygotes == 1
        for bad in ("bz2", ["a b"], [5]):
            with pytest.raises((TypeError, ValueError)):
                await pool.run_python("1", preload=bad)  # type: ignore[arg-type]
    with pytest.raises(PoolClosedError):
        await pool.run_python("1", preload=["bz2"])


async def test_rotation_lets_jobs_end() -> None:
    """A new template takes over; a job on a branch of the old one runs to its end."""
    async with PythonPool(
        python=PYTHON, limits=PATIENT, preload_time=60, parked=0, rotate_jobs=1
    ) as pool:
        results: list[PythonResult] = []
        first = None

        async def slow() -> None:
            code = f"import time; time.sleep({3 * SLOW}); result = 5"
            results.append(await pool.run_python(code, preload=["bz2"]))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(slow)
            await anyio.sleep(0.5 * max(1, SLOW / 4))
            first = pool._pool.stock.zygote
            while pool._pool.stock.zygote is first:
                assert (await pool.run_python("result = 1")).value == 1
            assert (await pool.run_python(LOADED, preload=["bz2"])).value == ["bz2"]
        assert results[0].value == 5
        assert first is not None
        with anyio.fail_after(30 * SLOW):
            while first.alive:
                await pool.run_python("1")


def test_forked_host() -> None:
    """A child of the host has templates of its own; the parent's jobs do not notice."""
    done = run_python(
        "import asyncio, os, time, warnings, isojob",
        "warnings.simplefilter('ignore', DeprecationWarning)  # 3.12 on: a fork beside threads",
        "async def main():",
        f"    async with isojob.PythonPool(python={PYTHON!r}, preload_time=60, parked=1) as pool:",
        "        async def slow():",
        f"            code = 'import time; time.sleep({2 * SLOW}); result = 7'",
        f"            limits = isojob.Limits(wall_time={60 * SLOW}, cpu_time={10 * SLOW})",
        "            return await pool.run_python(code, preload=['bz2'], limits=limits)",
        "        task = asyncio.create_task(slow())",
        f"        await asyncio.sleep({SLOW})",
        "        pid = os.fork()",
        "        if pid == 0:",
        *CHILD_USES_THE_POOL,
        "        print((await task).value, os.waitpid(pid, 0)[1])",
        "asyncio.run(main())",
    )
    assert (done.stdout, done.stderr) == ("7 0\n", "")


async def test_hungry_branch(tmp_path: Path) -> None:
    """One that meets the memory limit of the templates ends alone; running jobs do not notice."""
    tmp_path.chmod(0o755)
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "hungry.py").write_text("x = bytearray(400 << 20)")
    sandbox = Sandbox(mounts=[Mount.bind(folder, "/modules")], env={"PYTHONPATH": "/modules"})
    async with PythonPool(
        python=PYTHON,
        sandbox=sandbox,
        limits=PATIENT,
        preload_time=60,
        preload_limits=Limits(memory="192MiB", processes=200, cpu_time=None, wall_time=None),
        parked=1,
    ) as pool:
        values = []

        async def slow() -> None:
            code = f"import time; time.sleep({2 * SLOW}); result = 6"
            values.append((await pool.run_python(code)).value)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(slow)
            await anyio.sleep(0.5 * SLOW)
            with pytest.raises(PreloadError, match="died while it imported") as caught:
                await pool.run_python("1", preload=["hungry"])
            assert caught.value.module == "hungry"
        assert values == [6]
        assert (await pool.run_python("result = 4")).value == 4


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_cancelled_by_the_task(anyio_backend: str, tmp_path: Path) -> None:
    """A cancel of asyncio's own while a template is made leaves nobody behind who holds it."""
    tmp_path.chmod(0o755)
    folder = tmp_path / "modules"
    folder.mkdir()
    for name in ("slow1", "slow2"):
        (folder / f"{name}.py").write_text("import time; time.sleep(60)")
    sandbox = Sandbox(mounts=[Mount.bind(folder, "/modules")], env={"PYTHONPATH": "/modules"})
    async with PythonPool(
        python=PYTHON, sandbox=sandbox, limits=PATIENT, preload_time=90, parked=0
    ) as pool:
        for name in ("slow1", "slow2"):
            task = asyncio.ensure_future(pool.run_python("1", preload=[name]))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert all(stock.pins == 0 for stock in pool._branches._stocks.values())
        assert (await pool.run_python("result = 1", preload=["bz2"])).value == 1


async def test_cancelled_while_a_template_is_made(pool: PythonPool) -> None:
    """The next call makes it."""
    with anyio.move_on_after(0.01):
        await pool.run_python("1", preload=["decimal", "fractions"])
    value = (await pool.run_python(LOADED, preload=["decimal", "fractions"])).value
    assert value[:2] == ["decimal", "fractions"]


@pytest.mark.parametrize("preload", [(), ("decimal",)])
async def test_closing_a_pool_ends_jobs_by_name(preload: tuple[str, ...]) -> None:
    """On the first template and on others: the pool was closed, and nothing broke."""
    errors: list[Exception] = []
    pool = PythonPool(python=PYTHON, limits=PATIENT, parked=1, max_jobs=4)

    async def job() -> None:
        try:
            await pool.run_python("while True: pass", preload=preload)
        except IsojobError as error:
            errors.append(error)

    async with pool:
        await pool.run_python("", preload=preload)
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(job)
            with anyio.fail_after(60):
                while pool.statistics().running < 4:  # noqa: ASYNC110 - a figure, and no event
                    await anyio.sleep(0.01)
            await pool.aclose()
    assert [type(error) for error in errors] == [PoolClosedError] * 4

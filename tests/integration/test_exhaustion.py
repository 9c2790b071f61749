"""Pools in want of processes, memory, cgroup directories, descriptors: an error, then recovery."""

from __future__ import annotations

import ast
import os
import re
import resource
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import anyio
import pytest
from environment import SLOW, cgroup_version, run_python

from isojob import IsojobError, Pool, Sandbox
from isojob.cgroups import find
from isojob.cgroups.base import LEAF


@pytest.fixture
def outer() -> Iterator[list[Path]]:
    """A cgroup around a host process, one directory in each hierarchy; hosts enter by themselves."""
    subtree = find().create()
    made = [directory / "outer" for directory in subtree.directories]
    for directory in made:
        directory.mkdir()
        if (directory / "cpuset.cpus").exists() and cgroup_version() == 1:
            for name in ("cpuset.cpus", "cpuset.mems"):  # are empty in a new one
                (directory / name).write_text((directory.parent / name).read_text())
    yield made
    for directory in made:
        with suppress(FileNotFoundError):
            (directory / LEAF).rmdir()
        directory.rmdir()
    subtree.release()
    subtree.remove()


def inside(outer: list[Path], *lines: str) -> tuple[str, ...]:
    """A program for a host process in that cgroup."""
    return (
        "import os, pathlib, functools, sys, anyio, isojob",
        "def run(*a, **k): return anyio.run(functools.partial(isojob.run_isolated, *a, **k))",
        f"outer = {[str(directory) for directory in outer]}",
        "for d in outer: pathlib.Path(d, 'cgroup.procs').write_text('0')",
        "def limit(name, value):",
        "    for d in outer:",
        "        file = pathlib.Path(d, name)",
        "        if file.exists(): file.write_text(str(value)); return",
        "    raise LookupError(name)",
        *lines,
    )


def host(outer: list[Path], *lines: str) -> str:
    """What it prints."""
    done = run_python(*inside(outer, *lines))
    assert (done.returncode, done.stderr) == (0, ""), (done.stdout, done.stderr)
    return done.stdout


def test_outer_memory_limit(outer: list[Path]) -> None:
    """What dies of somebody else's limit is not charged with its own."""
    name = "memory.max" if cgroup_version() == 2 else "memory.limit_in_bytes"
    printed = host(
        outer,
        f"limit({name!r}, 150 << 20)",
        "assert run(['true']).ok",
        "code = 'm = bytearray(400 << 20)\\nfor i in range(0, len(m), 4096): m[i] = 1'",
        "hog = ['/usr/bin/python3', '-I', '-S', '-c', code]",
        "for memory in ('300MiB', '1GiB'):",
        "    r = run(hog, limits=isojob.Limits(memory=memory, cpu_time=None))",
        "    print(r.status, r.evidence.memory_events['oom_kill'] > 0)",
        "r = run(hog, limits=isojob.Limits(memory='32MiB'))",
        "print(r.status)",
        "print(run(['true']).status)",
    )
    lines = printed.splitlines()
    assert lines == ["signaled True", "signaled True", "memory_limit", "ok"]


FULL = """\
import os, sys
file = os.open("/disk/file", os.O_RDONLY)
while os.read(file, 1 << 17):
    pass
print(flush=True)
sys.stdin.readline()
memory = bytearray(200 << 20)
for at in range(0, len(memory), 4096):
    memory[at] = 1
"""
"""Fills its limit of 256 MiB with page cache; when told to, takes 200 MiB."""


def test_outer_memory_limit_after_page_cache(outer: list[Path], disk: Sandbox) -> None:
    """Nor is what once had all of its own limit as page cache, which is no sign of it."""
    name = "memory.max" if cgroup_version() == 2 else "memory.limit_in_bytes"
    directory = str(disk.mounts[0].source)
    with Path(directory, "file").open("wb") as file:
        file.truncate(300 << 20)
    printed = host(
        outer,
        f"sandbox = isojob.Sandbox(mounts=[isojob.Mount.bind({directory!r}, '/disk')])",
        f"program = ['/usr/bin/python3', '-I', '-S', '-c', {FULL!r}]",
        "limits = isojob.Limits(memory='256MiB', cpu_time=None, wall_time=None)",
        "async def main():",
        "    async with isojob.open_isolated(program, limits=limits, sandbox=sandbox) as process:",
        "        await process.stdout.receive()",
        f"        limit({name!r}, 150 << 20)",
        "        await process.stdin.send(b'on\\n')",
        "        r = await process.result()",
        "    print(r.status, r.evidence.memory_peak >> 20, r.evidence.memory_events)",
        "anyio.run(main)",
    )
    status, peak, events = printed.split(maxsplit=2)
    assert int(peak) >= 250
    assert ast.literal_eval(events)["oom_kill"] > 0
    assert status == "signaled", events


KILLED_AT_START = (
    "zygote: PoolBrokenError: the zygote died while it started: killed, perhaps for want of memory"
)
NO_MEMORY = (
    r"(zygote|cell): (ok|signaled|nonzero_exit|PoolBrokenError: .* died.*"
    r"|SandboxSetupError: .*(Owner died|Cannot allocate memory|want of memory|too little memory).*)"
)


def settled(counter: Path) -> int:
    """What it says when it has not fallen for 50 ms, or after two seconds."""
    least, since, end = 1 << 62, time.monotonic(), time.monotonic() + 2
    while since + 0.05 > time.monotonic() < end:
        if (now := int(counter.read_text())) < least:
            least, since = now, time.monotonic()
        time.sleep(0.005)
    return least


def test_no_memory(outer: list[Path]) -> None:
    """No room for zygote, init or job: a named error or a killed job, never the job's own limit."""
    if cgroup_version() == 2:
        limit, current, leaf = "memory.max", "memory.current", LEAF
        own = Path("/proc/self/cgroup").read_text().strip().removeprefix("0::/")
        homes = [f"/sys/fs/cgroup/{own}"]
    else:
        limit, current, leaf = "memory.limit_in_bytes", "memory.usage_in_bytes", ""
        homes = [str(directory.parent.parent) for directory in outer]
    (memory,) = (directory for directory in outer if (directory / limit).exists())
    most = (memory / limit).read_text()
    program = inside(
        outer,
        "import subprocess, isojob._stock",
        "run(['true'])",
        "driver = isojob._stock.find_driver(frozenset())",
        "isojob._stock.find_driver = lambda accepted: driver",
        # The kernel would kill the largest: it is us. So we leave, and only what we start enters.
        f"for d in {homes}: pathlib.Path(d, 'cgroup.procs').write_text('0')",
        "def enter():",
        f"    for d in outer: pathlib.Path(d, {leaf!r}, 'cgroup.procs').write_text('0')",
        "subprocess.Popen = functools.partial(subprocess.Popen, preexec_fn=enter)",
        "async def main():",
        "    pool = None",
        "    for line in sys.stdin:",
        "        try:",
        "            if line == 'run\\n':",
        "                pool = pool or await isojob.Pool(parked=0).__aenter__()",
        "                print((await pool.run(['true'])).status, flush=True)",
        "            else:",
        "                if pool: await pool.aclose()",
        "                pool = print(flush=True)",
        "        except (isojob.IsojobError, OSError) as e: print(f'{type(e).__name__}: {e}', flush=True)",
        "    if pool: await pool.aclose()",
        "anyio.run(main)",
    )
    ends: Counter[str] = Counter()
    with subprocess.Popen(
        [sys.executable, "-c", "\n".join(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(what: str) -> str:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{what}\n".encode())
            assert select.select([process.stdout], [], [], 60 * SLOW)[0], (what, ends)
            return process.stdout.readline().decode().rstrip("\n")

        try:
            for room in range(-1 << 19, 3 << 19, (1 if SLOW == 1 else 3) << 16):
                for start in (True, False):
                    if start:
                        ask("close")
                    for file, what in (("memory.force_empty", "0"), ("memory.reclaim", "64M")):
                        with suppress(OSError):  # page cache, as much as there is
                            (memory / file).write_text(what)
                    # What the last job took is given back after it has ended: a limit above that
                    # is none.
                    used = settled(memory / current)
                    with suppress(OSError):  # EBUSY: so much cannot be taken away
                        (memory / limit).write_text(str(max(0, used + room)))
                    ends[f"{'zygote' if start else 'cell'}: {ask('run')}"] += 1
                    (memory / limit).write_text(most)
                    then = ask("run")
                    if then != "ok":  # the zygote was dying as it was asked
                        then = ask("run")
                    assert then == "ok", (room, start, ends)
        finally:
            (memory / limit).write_text(most)
            process.stdin.close()
    print(*ends.items(), sep="\n")
    assert [end for end in ends if not re.fullmatch(NO_MEMORY, end)] == []
    assert {"zygote: ok", "cell: ok", KILLED_AT_START} <= set(ends)
    assert any(re.match("cell: .*Error", end) for end in ends)


def test_no_processes(outer: list[Path]) -> None:
    """A named error at each step that forks, and a whole pool again when there is room."""
    printed = host(
        outer,
        "pids = next(d for d in map(pathlib.Path, outer) if (d / 'pids.max').exists())",
        "def used(): return int((pids / 'pids.current').read_text())",
        "run(['true'])",
        "isojob._run._close_pools()",
        "stages = set()",
        "failed = 0",
        "for new in (True, False):",
        "    for room in range(10):",
        "        limit('pids.max', used() + room)",
        "        try: assert run(['true']).ok",
        "        except (isojob.IsojobError, OSError) as e:",
        "            failed += 1",
        "            stages.add(f'{type(e).__name__}: {e}')",
        "        limit('pids.max', 'max')",
        "        assert run(['true']).ok",
        "        if new: isojob._run._close_pools()",
        "print(failed > 2)",
        "print(sorted(stages))",
    )
    print(printed)
    first, _, rest = printed.partition("\n")
    assert first == "True", printed
    for stage in ast.literal_eval(rest):
        assert re.fullmatch(
            r"SandboxSetupError: .*Resource temporarily unavailable \(raise.*\)", stage
        )


def test_no_cgroup_directories(outer: list[Path]) -> None:
    """The limit on descendants is an error that names the directory."""
    if cgroup_version() == 1:
        pytest.skip("v1 has no limit on directories; runs on v2")
    printed = host(
        outer,
        "run(['true'])",
        "isojob._run._close_pools()",
        "for more in range(4):",
        "    limit('cgroup.max.descendants', 1 + more)",
        "    try: assert run(['true']).ok",
        "    except isojob.IsojobError as e: print(type(e).__name__, e)",
        "    else: print('ok')",
        "    limit('cgroup.max.descendants', 'max')",
        "    assert run(['true']).ok",
        "    isojob._run._close_pools()",
    )
    lines = printed.splitlines()
    assert len(lines) == 4
    assert "ok" not in lines[:2], printed
    assert lines[3] == "ok", printed
    assert all("emporarily" in line for line in lines[:2]), printed


NO_DESCRIPTOR = r"SandboxSetupError: .*(Too many open files \(raise the hard limit.*\)|no descriptor was free.*)"


async def test_zygote_without_descriptors() -> None:
    """EMFILE in the zygote, also as it receives: named errors, no lost slot, then work as before."""
    errors: set[str] = set()
    async with Pool(parked=0, max_jobs=4) as pool:
        await pool.run(["true"])
        assert pool._stock.zygote is not None
        pid = pool._stock.zygote.pid
        old = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        held = len(os.listdir(f"/proc/{pid}/fd")) if os.access(f"/proc/{pid}/fd", os.R_OK) else 8
        for room in range(4, held + 12):  # with less poll() fails
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (room, old[1]))
            with anyio.fail_after(30 * SLOW):
                try:
                    assert (await pool.run(["echo", "hi"])).stdout == b"hi\n"
                except (IsojobError, OSError) as error:
                    errors.add(f"{type(error).__name__}: {error}")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, old)
        for _ in range(8):
            assert (await pool.run(["true"])).ok
        assert pool.statistics().running == 0
        assert pool.statistics().zygotes == 1
        print(errors)
    assert errors
    assert [error for error in errors if not re.fullmatch(NO_DESCRIPTOR, error)] == []

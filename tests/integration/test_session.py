"""Sessions: one directory, many jobs, each in a fresh cell."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from environment import PATIENT, SLOW, children_of, settle
from leftovers import cgroups

from isojob import (
    Cache,
    CommandNotFoundError,
    HostNotSupportedError,
    JobFailedError,
    Limits,
    Mount,
    Pool,
    PoolBrokenError,
    PoolClosedError,
    Result,
    Sandbox,
    SandboxSetupError,
    SeccompProfile,
    Session,
    Status,
)
from isojob.cgroups import find


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    async with Pool(max_jobs=4) as opened:
        yield opened


def sh(script: str) -> list[str]:
    return ["sh", "-c", script]


def sessions(pool: Pool) -> list[int]:
    """Its zygotes of sessions; children that they are making have that name for a moment."""
    zygote = pool.stock.zygote
    if zygote is None or not zygote.alive:
        return []
    found = []
    for pid in children_of(zygote.pid):
        with suppress(OSError):
            if re.search(r"\(isojob-session\) [SRD]", Path(f"/proc/{pid}/stat").read_text()):
                found.append(pid)
    return found


async def test_compile_once_run_many(pool: Pool) -> None:
    """What a kept run makes the others see; what the others do nobody else sees."""
    source = b"""#include <stdio.h>
    int main(void) { int a, b; scanf("%d %d", &a, &b); printf("%d\\n", a + b); return 0; }"""
    async with pool.session(files={"main.c": source}) as session:
        assert isinstance(session, Session)
        results = [await session.run(["gcc", "-o", "main", "main.c"], check=True)]

        async def one(number: int) -> None:
            result = await session.run(
                sh("./main; rm main main.c; ls; echo x >mine; ls"),
                keep=False,
                input=b"%d 3" % number,
            )
            assert result.stdout == b"%d\nmine\n" % (number + 3), result
            results.append(result)

        async with anyio.create_task_group() as tasks:
            for number in range(12):
                tasks.start_soon(one, number)
        left = await session.collect("*")
        assert set(left.files) == {"main", "main.c"}
        usage = session.usage()
        assert usage.wall_time == pytest.approx(sum(one.usage.wall_time for one in results))
        for name in ("memory_peak", "processes_peak", "oom_kills", "io_read_bytes"):
            parts = [getattr(one.usage, name) for one in results]
            merge = max if name.endswith("_peak") else sum
            assert getattr(usage, name) == (None if None in parts else merge(parts)), name
    with pytest.raises(PoolClosedError, match="the session is closed"):
        await session.run(["true"])
    with pytest.raises(PoolClosedError, match="the session is closed"):
        await session.run_pair(["true"], ["true"])


async def test_each_run_is_fresh_but_for_the_directory(pool: Pool) -> None:
    """Processes, /tmp, /dev/shm, limits and verdicts are the run's own."""
    async with pool.session(limits=Limits(wall_time=20 * SLOW)) as session:
        await session.run(sh("echo 1 >/tmp/a; echo 1 >/dev/shm/a; echo 1 >a; sleep 600 &"))
        seen = await session.run(
            sh("ls /tmp /dev/shm; ls; ls -d /proc/[0-9]*; id -u; cat /proc/$$/uid_map")
        )
        words = (seen.stdout or b"").split()
        assert words[:3] == [b"/dev/shm:", b"/tmp:", b"a"], seen.stdout
        assert b"/proc/2" in words and b"1000" in words
        result = await session.run(["sleep", "60"], limits=Limits(wall_time=0.2))
        assert result.status == Status.WALL_TIME_LIMIT
        result = await session.run(sh("exit 4"), keep=False)
        assert result.exit_code == 4
        with pytest.raises(JobFailedError):
            await session.run(sh("exit 4"), check=True)
        assert (await session.collect("a")).files == {"a": b"1\n"}


async def test_sessions_do_not_see_each_other(pool: Pool) -> None:
    """Nor do the pool's other jobs; each directory goes with its session."""
    async with pool.session(files={"a": b"1"}) as first:
        async with pool.session(files={"b": b"2"}) as second:
            for session, name in ((first, b"a"), (second, b"b")):
                for keep in (True, False):
                    seen = await session.run(sh("ls -A; cat /proc/self/mounts"), keep=keep)
                    lines = (seen.stdout or b"").splitlines()
                    assert lines[0] == name
                    boxes = [line for line in lines if line.split()[1:2] == [b"/box"]]
                    assert len(boxes) == (1 if keep else 2)
            assert (await pool.run(["ls", "-A"])).stdout == b""
            assert len(sessions(pool)) == 2
        assert len(sessions(pool)) == 1
        assert (await first.run(["cat", "a"])).stdout == b"1"
    assert sessions(pool) == []


async def test_leftovers_fool_nobody(pool: Pool) -> None:
    """Links, FIFOs, set-id bits and closed directories: not the host, and not the next run's files."""
    async with pool.session() as session:
        await session.run(
            sh(
                "ln -s /etc/passwd a; mkfifo b; ln -s / c; mkdir -m 0 d; cp /bin/sh e; chmod 4755 e;"
                "echo x >f; ln f g; mkdir h; echo 1 >h/x; ln -s . i; chmod 0 f"
            )
        )
        found = await session.collect("a", "b", "c/etc/passwd", "d/x", "h", "i/g", "e", "f")
        assert set(found.files) == {"e", "f"}
        assert set(found.uncollected) == {"a", "b", "c/etc/passwd", "d/x", "h", "i/g"}
        with anyio.fail_after(20 * SLOW):
            result = await session.run(
                sh("cat a b f; chmod 644 g; cat g; ls -l a b f"),
                files={"a": b"1", "b": b"2", "f": b"3"},
            )
        assert (result.stdout or b"").startswith(b"123x\n"), result.stdout
        assert (result.stdout or b"").count(b"-rw-r--r--") == 3
        for name in ("h", "c/x", "i/x", "d/x"):
            with pytest.raises(SandboxSetupError):
                await session.put({name: b"1"})
        whoami = await session.run(sh("./e -c 'grep -E ^Uid /proc/self/status'"))
        assert len(set((whoami.stdout or b"").split()[1:])) == 1, "no set-id bit has any force"
        assert (await session.run(["cat", "h/x"])).stdout == b"1\n"


async def test_closed_directory(pool: Pool) -> None:
    """A job that closes the directory to itself does not stop the session."""
    async with pool.session(files={"a": b"1"}) as session:
        for _ in range(2):
            await session.run(sh("chmod 0 ."))
            await session.put({"b": b"2"})
            await session.run(sh("chmod 0 ."))
            assert (await session.run(["cat", "a", "b"])).stdout == b"12"
            await session.run(sh("chmod 0 ."))
            assert (await session.run(["cat", "a", "b"], keep=False)).stdout == b"12"


async def test_more_than_a_job_may_write(pool: Pool) -> None:
    """The directory's capacity is its own: files of that size can be put there."""
    async with pool.session(disk="2MiB", limits=Limits(disk="64KiB")) as session:
        await session.put({"large": b"x" * 1_000_000})
        assert (await session.run(["wc", "-c", "large"])).stdout == b"1000000 large\n"


async def test_profile_that_denies_what_files_need(tmp_path: Path) -> None:
    """A filter loaded ahead of time lets the launcher write files, whatever the profile says."""
    text = """{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["unlinkat", "unlink"], "action": "SCMP_ACT_KILL_PROCESS"}]}"""
    (tmp_path / "profile.json").write_text(text)
    profile = SeccompProfile.load(tmp_path / "profile.json")
    async with Pool(Sandbox(seccomp=profile)) as pool:
        result = await pool.run(["cat", "a"], files={"a": b"1"})
        assert (result.stdout, result.status) == (b"1", "ok")
        result = await pool.run(["rm", "a"], files={"a": b"1"})
        assert result.status == Status.SECCOMP_VIOLATION


async def test_capacity(pool: Pool) -> None:
    """The directory has its own, what a run changes in its view has the run's."""
    async with pool.session(disk="1MiB", inodes=20, limits=Limits(disk="2MiB")) as session:
        await session.put({"some": b"x" * 500_000})
        result = await session.run(sh("head -c 900000 /dev/zero >more; echo $?"))
        assert b"No space" in (result.stderr or b"")
        await session.run(["rm", "more"])
        result = await session.run(sh("head -c 1500000 /dev/zero >more; echo $?"), keep=False)
        assert result.stdout == b"0\n"
        result = await session.run(sh("head -c 2500000 /dev/zero >more"), keep=False)
        assert b"No space" in (result.stderr or b"")
        result = await session.run(sh("for i in $(seq 30); do echo >$i || exit 9; done"))
        assert result.exit_code == 9 or b"No space" in (result.stderr or b"")
        with pytest.raises(SandboxSetupError, match="No space"):
            await session.put({"large": b"x" * 900_000})


async def test_writers_are_alone(pool: Pool) -> None:
    """A run that keeps its changes never meets another run."""
    async with pool.session() as session:
        script = "mkdir lock || echo met; sleep 0.01; rmdir lock"
        met: list[bytes | None] = []

        async def one(number: int) -> None:
            keep = number % 3 == 0
            look = script if keep else "test -e lock && echo met; true"
            met.append((await session.run(sh(look), keep=keep)).stdout)

        async with anyio.create_task_group() as tasks:
            for number in range(15):
                tasks.start_soon(one, number)
        assert met == [b""] * 15


async def test_private_views_are_up_to_date(pool: Pool) -> None:
    """Cells parked before a change do not show what was there before."""
    async with pool.session() as session:
        for number in range(4):
            await session.run(sh(f"echo {number} >n; rm -rf dir; mkdir dir; echo >dir/{number}"))
            for _ in range(2):
                seen = await session.run(
                    sh("cat n; ls dir; rm -r dir; mkdir dir; ls -A dir"), keep=False
                )
                assert (seen.stdout or b"").split() == [b"%d" % number] * 2


async def test_cancelled_runs(pool: Pool) -> None:
    """The session goes on; nothing of the run does."""
    async with pool.session() as session:
        for keep in (True, False):
            with anyio.move_on_after(0.3 * SLOW) as scope:
                await session.run(sh("echo 1 >a; sleep 600"), keep=keep)
            assert scope.cancelled_caught
            assert (await session.run(["cat", "a"])).stdout == b"1\n"
        waiting = anyio.CancelScope()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(session.run, ["sleep", "0.3"])

            async def wait() -> None:
                with waiting:
                    await session.run(["true"])

            await anyio.sleep(0.1)
            tasks.start_soon(wait)
            await anyio.sleep(0.05)
            waiting.cancel()
        assert (await session.run(["true"])).ok
        assert pool.statistics().running == 0


async def test_outputs_and_cache(pool: Pool) -> None:
    """A step that was made before is not run; what it makes is there all the same."""
    cache = Cache("1MiB")
    script = sh("echo run >&2; cat in >out; chmod 751 out; echo junk >junk")

    async def build(text: bytes, **options: Any) -> tuple[bytes | None, bytes | None]:
        async with pool.session(files={"in": text}, cache=cache) as session:
            result = await session.run(script, outputs=["out"], **options)
            seen = await session.run(sh("cat out; ls; stat -c %a out"), keep=False)
            return seen.stdout, result.stderr

    first = await build(b"1\n")
    assert first == (b"1\nin\nout\n751\n", b"run\n")
    assert (cache.hits, cache.misses, len(cache)) == (0, 1, 1)
    assert await build(b"1\n") == first
    assert (cache.hits, cache.misses) == (1, 1)
    await build(b"2\n")
    await build(b"1\n", env={"X": "1"})
    await build(b"1\n", input=b"1")
    assert (cache.hits, cache.misses) == (1, 4)
    failing = sh("echo >out; exit 3")
    for _ in range(2):
        async with pool.session(cache=cache) as session:
            result = await session.run(failing, outputs=["out"])
            assert result.exit_code == 3
            assert (await session.collect("*")).files == {}, "what failed makes nothing"
    assert cache.hits == 1
    for _ in range(2):
        async with pool.session(cache=cache) as session:
            await session.run(sh("date +%N >in"))  # differs, and is not seen: its command does not
            await session.run(["true"])
            await session.run(script, outputs=["out"])
    assert cache.hits == 2
    cache.clear()
    assert len(cache) == 0
    async with pool.session(files={"in": b"x" * 100}) as session:  # also without a cache
        await session.run(script, outputs=["out"])
        assert set((await session.collect("*")).files) == {"in", "out"}


@pytest.mark.parametrize("cached", [False, True])
async def test_outputs_that_do_not_fit(pool: Pool, cached: bool) -> None:
    """What a job made too large, too deep or too many for the directory is told, and its result kept."""
    cache = Cache() if cached else None
    n = "n" * 255
    deep = f"i=0; while [ $i -lt 8 ]; do mkdir {n}; cd {n}; i=$((i+1)); done; echo 1 >{n}"
    large = "head -c 600000 /dev/zero >a; cp a b"
    for script, outputs, told in (
        (deep, ["/".join("*" * 9)], {"/".join([n] * 9): "too long"}),
        (large, ["a", "b"], {"b": "600000 bytes, more than there is room for"}),
    ):
        for _ in range(2):
            async with pool.session(disk="1MiB", cache=cache) as session:
                result = await session.run(sh(script), outputs=outputs)
                assert result.ok and result.uncollected == told
                assert not result.files.keys() & told.keys()
                assert (await session.collect("*")).files == {}, "all that is named, or nothing"
    large = f"echo made; {large}"
    for disk, left in (("2MiB", {}), ("1MiB", {"b"})):
        async with pool.session(disk=disk, cache=cache) as session:
            result = await session.run(sh(large), outputs=["a", "b"])
            assert (result.stdout, set(result.uncollected)) == (b"made\n", set(left))
    if cache is not None:
        assert cache.hits == 2
    async with pool.session(disk="1MiB", files={"x": b"x" * 700_000}, cache=cache) as session:
        result = await session.run(sh("head -c 600000 /dev/zero >a"), outputs=["a"])
        assert result.ok and "No space left on device" in result.uncollected["a"]
        assert result.files == {}
        assert set((await session.collect("*")).files) == {"x"}, "half a file is none"
        assert (await session.run(["cat", "x"], keep=False)).stdout == b"x" * 700_000
    async with pool.session(files={"x/y": b""}, cache=cache) as session:
        result = await session.run(sh("rm -r x; echo >x"), outputs=["x"])
        assert "Is a directory" in result.uncollected["x"]
        await session.run(sh("mkdir -m 0 closed"))
        result = await session.run(sh("chmod 755 closed; echo >closed/x"), outputs=["closed/x"])
        assert result.ok and "Permission denied" in result.uncollected["closed/x"]
        assert result.files == {}


@pytest.mark.parametrize("name", [b"\xff", "д".encode() * 60, b"a" + "д".encode() * 60])
async def test_outputs_with_names_that_are_no_text(name: bytes, pool: Pool) -> None:
    """Why one cannot be kept is told in text, also where the kernel's words were cut within a letter."""
    async with pool.session() as session:
        quoted = "".join(f"\\{byte:03o}" for byte in name)
        await session.run(sh(f'mkdir -p "$(printf "{quoted}")/x"'))
        result = await session.run(
            sh(f'n="$(printf "{quoted}")"; rm -r "$n"; echo >"$n"'), outputs=["*"]
        )
    assert result.ok
    assert "Is a directory" in result.uncollected[os.fsdecode(name)]
    assert Result.model_validate_json(result.model_dump_json()).uncollected == result.uncollected


async def test_ids_of_a_session_that_was_killed(
    is_root: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its job goes on, and nobody else is given the ids that it has."""
    monkeypatch.setattr("isojob._zygote.SLOTS", 4)
    async with Pool(max_jobs=4, parked=0) as pool, anyio.create_task_group() as tasks:
        with suppress(PoolBrokenError):
            async with pool.session() as session:
                limits = Limits(wall_time=120 * SLOW)
                run = partial(session.run, ["sleep", "600"], keep=False, limits=limits)

                async def until_its_end() -> None:
                    with suppress(PoolBrokenError, PoolClosedError):
                        await run()

                tasks.start_soon(until_its_end)
                await anyio.sleep(0.3 * SLOW)
                (killed,) = sessions(pool)
                (init,) = children_of(killed)
                (job,) = children_of(init)
                theirs = set(uids(job))
                os.kill(killed, signal.SIGKILL)
                assert settle(lambda: sessions(pool)) == []
                others = set()
                for _ in range(8):
                    async with pool.open(["sleep", "60"]) as process:
                        others |= set(uids(process.pid))
                assert set(uids(job)) == theirs, "it still runs"
                if is_root:
                    assert not theirs & others
                raise PoolBrokenError("enough")
        tasks.cancel_scope.cancel()


def uids(pid: int) -> list[str]:
    """Of a process, as the host sees them."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1:] for line in lines if line.startswith("Uid:"))


async def test_last_session_of_a_dead_zygote() -> None:
    """With it goes what that zygote has left, in a pool that is quiet from then on."""
    async with Pool(max_jobs=4, parked=0) as pool:
        async with pool.session():
            assert pool.stock.zygote is not None
            subtree = pool.stock.zygote.subtree
            assert subtree is not None
            os.kill(pool.stock.zygote.pid, signal.SIGKILL)
            with anyio.fail_after(20 * SLOW):
                while pool.statistics().zygotes < 2:
                    with suppress(PoolBrokenError):
                        await pool.run(["true"])
            assert pool.stock.retired
        assert pool.stock.retired == []
        assert not any(directory.exists() for directory in subtree.directories)


async def test_a_kept_run_moves_no_mount(tmp_path: Path) -> None:
    """What one renames above a mount's target is seen by the next, and has no mount on it."""
    tmp_path.chmod(0o755)
    (tmp_path / "real").write_text("real\n")
    sandbox = Sandbox(mounts=[Mount.bind(tmp_path, "/box/in/tests")])
    move = "mv in {0}; mkdir -p in/tests; echo fake >in/tests/real; cat {0}/tests/real"
    async with (
        Pool(sandbox, max_jobs=4, parked=2) as pool,
        pool.session(files={"f": b""}) as session,
    ):
        for _ in range(2):
            assert (await session.run(["cat", "in/tests/real"])).stdout == b"real\n"
        for number in range(3):  # more than are parked
            await anyio.sleep(0.1 * SLOW)
            result = await session.run(sh(move.format(f"x{number}")))
            assert result.stdout == b"real\n", (result.stdout, result.stderr)
            assert (await session.run(["cat", "in/tests/real"], keep=False)).stdout == b"real\n"


async def test_limits_that_the_host_cannot_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a session are refused as a pool's and a job's are, not left out."""
    driver = find()
    driver.missing |= {"cpus": "delegate it"}
    monkeypatch.setattr("isojob._stock.find_driver", lambda _: driver)
    monkeypatch.setattr("isojob._stock.block_devices", lambda _: ())
    async with Pool(max_jobs=2) as pool:
        cases: list[tuple[dict[str, Any], type[Exception], str]] = [
            ({"cpus": 0.5}, HostNotSupportedError, "cannot give cpus"),
            ({"io_read_bps": 1 << 20}, HostNotSupportedError, "no block device"),
            ({"cpuset": "4095"}, ValueError, "4095"),
        ]
        for limits, error, words in cases:
            with pytest.raises(error, match=words):
                async with pool.session(limits=Limits(**limits)):
                    pass
        assert settle(lambda: sessions(pool)) == []
        async with pool.session() as session:
            assert (await session.run(["true"])).ok


async def test_what_isojob_does_itself_has_no_limits(pool: Pool) -> None:
    """Files go into the directory and out of it whatever its jobs may use."""
    small = Limits(memory="3MiB", disk="64MiB", wall_time=0.001, cpu_time=0.001, collect="64MiB")
    large = b"x" * 40_000_000
    async with pool.session(limits=small, files={"a": large}) as session:
        await session.put({"b": b"1"})
        assert (await session.collect("?")).files == {"a": large, "b": b"1"}
        ample = PATIENT.model_copy(update={"disk": 64 << 20, "collect": 64 << 20})
        script = "head -c 20000000 /dev/zero >c"
        result = await session.run(sh(script), outputs=["c"], limits=ample)
        assert result.ok and result.uncollected == {}


async def test_a_put_waits_for_what_it_needs() -> None:
    """Not for room for all that the directory could hold."""
    small = Limits(memory="32MiB")
    async with (
        Pool(limits=small, memory="200MiB") as other,
        other.session(disk="190MiB") as session,
        other.open(["cat"]),
    ):
        with anyio.fail_after(20 * SLOW):
            await session.put({"a": b"x"})


async def test_cache_tells_steps_apart(pool: Pool, tmp_path: Path) -> None:
    """By streams, by what is kept of what is collected, by the size of the directory."""
    cache = Cache()
    (tmp_path / "in").write_bytes(b"AAA")
    for given in (None, tmp_path / "in", tmp_path / "in"):
        async with pool.session(cache=cache) as session:
            with (given or Path("/dev/null")).open("rb") as file:
                options: dict[str, Any] = {} if given is None else {"stdin": file}
                result = await session.run(sh("cat >out"), outputs=["out"], **options)
            assert result.files == {"out": b"AAA" if given else b""}
    both = sh("echo 1 >a; echo 2 >b")
    async with pool.session(cache=cache) as session:
        await session.run(both, collect=["a"], outputs=["b"])
    async with pool.session(cache=cache) as session:
        await session.run(both, outputs=["a", "b"])
        assert set((await session.collect("*")).files) == {"a", "b"}
    fill = "head -c 8192 /dev/zero >pad; head -c 1000000 /dev/zero >big 2>/dev/null; rm pad"
    for disk, size in (("64KiB", 65536 - 8192), ("8MiB", 1_000_000)):
        async with pool.session(cache=cache, disk=disk) as session:
            assert (await session.run(sh(fill))).ok
            result = await session.run(sh("wc -c <big >out"), outputs=["out"])
            assert int(result.files["out"]) == size
    assert cache.hits == 0


@pytest.mark.parametrize("cache", [None, Cache()])
async def test_a_directory_that_is_no_text(pool: Pool, cache: Cache | None) -> None:
    """Names are what `os.fsdecode` makes of them, with a cache, too."""
    for _ in range(2):
        async with pool.session(files={"caf\udce9/a": b"1"}, cache=cache) as session:
            result = await session.run(sh("cat a >b"), cwd="/box/caf\udce9", outputs=["b"])
            assert result.files == {"b": b"1"}, result
    assert cache is None or cache.hits > 0


async def test_cached_results_are_the_callers(pool: Pool) -> None:
    """What one changes in its result no other finds changed."""
    cache = Cache()
    for _ in range(3):
        async with pool.session(cache=cache) as session:
            result = await session.run(sh("echo 1 >a"), outputs=["a"])
            assert result.files == {"a": b"1\n"} and result.uncollected == {}
            result.files.clear()
            result.uncollected["b"] = "x"
    assert cache.hits == 2


async def test_outputs_of_another_directory(pool: Pool) -> None:
    """They are named as the job sees them, and kept where it made them."""
    async with pool.session(files={"build/input": b""}) as session:
        script = "echo 1 >out; echo 2 >é; echo 3 >other"
        result = await session.run(sh(script), cwd="/box/build", outputs=["out", "??"])
        assert (result.files, result.uncollected) == ({"out": b"1\n", "é": b"2\n"}, {})
        kept = await session.collect("*", "*/*")
        assert kept.files == {"build/input": b"", "build/out": b"1\n", "build/é": b"2\n"}
        with pytest.raises(ValueError, match="not in the session's directory"):
            await session.run(sh("true"), cwd="/tmp", outputs=["out"])


async def test_outputs_that_were_not_all_seen(pool: Pool) -> None:
    """Whatever is left out of what a pattern names keeps the rest out, too."""
    n = "n" * 255
    script = (
        f"echo 1 >out1; i=0; while [ $i -lt 17 ]; do mkdir {n}; cd {n}; i=$((i+1)); done; echo 2 >f"
    )
    async with pool.session() as session:
        result = await session.run(sh(script), outputs=["out[0-9]", "[n]*/" * 17 + "f"])
        assert result.ok and result.files == {"out1": b"1\n"}
        assert [len(name.split("/")) for name in result.uncollected] == [18]
        assert (await session.collect("*")).files == {}


async def test_outputs_are_what_the_search_found(pool: Pool) -> None:
    """What is kept is what the cell found for `outputs`, by whatever rules it searches."""
    async with pool.session() as session:
        for pattern, name in (
            *(("out[[:digit:]]", "out1"), ("a\\*[b]", "a*b"), ("[a[^b]x", "^x"), ("[]c]", "]")),
            *(("x[", "x["), ("?\N{EURO SIGN}", "e\N{EURO SIGN}"), (".[!/]", ".y")),
        ):
            script = 'umask 22; echo 1 >"$1"'
            result = await session.run(["sh", "-c", script, "sh", name], outputs=[pattern])
            assert result.ok, result
            kept = (await session.collect("*", ".*")).files
            assert kept == result.files, (pattern, result.uncollected)
            await session.run(sh("rm -f -- * .[!.]*"))
        result = await session.run(
            sh("echo 1 >.x; echo 2 >y; echo 3 >z"), collect=[".x", "z"], outputs=["*"]
        )
        assert set(result.files) == {".x", "y", "z"}
        assert set((await session.collect("*", ".*")).files) == {"y", "z"}
        result = await session.run(sh("echo 1 >p1; mkfifo p2"), outputs=["p[[:digit:]]"])
        assert result.uncollected == {"p2": "a FIFO"}
        assert "p1" not in (await session.collect("*")).files


async def test_cache_knows_what_it_cannot_know(pool: Pool, tmp_path: Path) -> None:
    """Not the streams of the caller's, nor what a step that did not end has left."""
    cache = Cache()
    build = sh("cat in - >out")
    for text in (b"1", b"2"):
        (tmp_path / "stdin").write_bytes(text)
        with (tmp_path / "stdin").open("rb") as file:
            async with pool.session(files={"in": b""}, cache=cache) as session:
                await session.run(build, outputs=["out"], stdin=file)
                assert (await session.collect("out")).files == {"out": text}
    for seconds in (0.3 * SLOW, 20 * SLOW):
        async with pool.session(cache=cache) as session:
            with anyio.move_on_after(seconds):
                await session.run(sh(f"echo half >in; sleep {0.6 * SLOW}; echo whole >in"))
            await session.run(build, outputs=["out"])
            whole = seconds > 10 * SLOW
            assert (await session.collect("out")).files == {
                "out": b"whole\n" if whole else b"half\n"
            }
    assert cache.hits == 0
    async with pool.session(files={"in": b"x"}, cache=cache) as session:
        result = await session.run(build, outputs=["out"], collect=["in", "none"])
        assert result.files == {"in": b"x", "out": b"x"}
        assert set((await session.collect("*")).files) == {"in", "out"}


class _Held(SimpleNamespace):
    def model_copy(self, update: dict[str, Any]) -> _Held:
        return _Held(**{**vars(self), **update})


def test_cache_is_bounded() -> None:
    """The least used goes first; what is larger than all of it is not kept."""

    def made(data: bytes, said: bytes = b"") -> Any:
        return _Held(stdout=said, stderr=None, files={"a": data}, args=("x",), uncollected={})

    cache = Cache(50_000)
    for number in range(20):
        cache.put(b"%d" % number, made(b"x" * 1000), {"a": (b"x" * 1000, 0o644)})
        cache.get(b"0")
    assert 3 <= len(cache) <= 9
    assert cache.get(b"0") is not None and cache.get(b"19") is not None
    assert cache.get(b"1") is None
    cache.put(b"large", made(b"x" * 50_000), {"a": (b"x" * 50_000, 0o644)})
    assert cache.get(b"large") is None
    cache.put(b"talks", made(b"", b"x" * 50_000), {"a": (b"", 0o644)})
    assert cache.get(b"talks") is None


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"files": {"../a": b""}}, ValueError),
        ({"files": "a"}, TypeError),
        ({"limits": {}}, TypeError),
        ({"disk": "64M"}, ValueError),
        ({"disk": -1}, ValueError),
        ({"disk": 0}, ValueError),
        ({"limits": Limits(disk=None)}, ValueError),
        ({"inodes": True}, TypeError),
        ({"inodes": 0}, ValueError),
        ({"inodes": 2**64}, ValueError),
        ({"cache": {}}, TypeError),
    ],
)
async def test_bad_sessions(pool: Pool, options: dict[str, Any], error: type[Exception]) -> None:
    """Named before anything is made, or undone."""
    with pytest.raises(error):
        async with pool.session(**options):
            pytest.fail("entered")
    assert sessions(pool) == []


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"outputs": ["a"], "keep": False}, ValueError),
        ({"outputs": "a"}, TypeError),
        ({"outputs": ["a"], "collect": "b"}, TypeError),
        ({"outputs": ["/a"]}, ValueError),
        ({"files": {"/a": b""}}, ValueError),
        ({"sandbox": None}, TypeError),
        ({"limits": 1}, TypeError),
    ],
)
async def test_bad_runs(pool: Pool, options: dict[str, Any], error: type[Exception]) -> None:
    """As for run_isolated."""
    async with pool.session() as session:
        with pytest.raises(error):
            await session.run(["true"], **options)


@pytest.mark.parametrize("keep", [True, False])
async def test_end_of_the_pool(keep: bool) -> None:
    """Sessions end with it: what runs, and what would."""
    errors: list[type[BaseException]] = []
    async with Pool() as pool:
        session_manager = pool.session()
        session = await session_manager.__aenter__()

        async def one() -> None:
            try:
                await session.run(["sleep", "600"], keep=keep)
            except PoolClosedError as error:
                errors.append(type(error))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one)
            await anyio.sleep(0.3 * SLOW)
            await pool.aclose()
        with pytest.raises(PoolClosedError):
            await session.run(["true"])
        async with pool:  # its zygote is another one
            await session_manager.__aexit__(None, None, None)
            assert (await pool.run(["true"])).ok
    assert errors == [PoolClosedError]


def cells() -> set[str]:
    """Names of the cgroups of all cells of this process's pools."""
    found = set[str]()
    for directory in cgroups():
        with suppress(OSError):  # it may go meanwhile
            found.update(name for name in os.listdir(directory) if name.startswith("cell-"))
    return found


@pytest.mark.parametrize("who", ["zygote", "session"])
async def test_dead_zygote(who: str) -> None:
    """Its directory is gone, which is said; the pool goes on, and a new session works."""
    async with Pool() as pool:
        async with pool.session(files={"a": b"1"}) as session:
            assert (await session.run(["cat", "a"])).ok
            await anyio.sleep(0.1)  # another is parked
            assert cells()
            assert pool.stock.zygote is not None
            pid = pool.stock.zygote.pid if who == "zygote" else sessions(pool)[0]
            os.kill(pid, signal.SIGKILL)
            await anyio.sleep(0.3 * SLOW)
            with anyio.fail_after(20 * SLOW):
                for _ in range(2):
                    with pytest.raises(PoolBrokenError):
                        await session.run(["cat", "a"])
        assert not settle(cells), "they would stay until the pool is closed"
        async with pool.session(files={"a": b"2"}) as session:
            assert (await session.run(["cat", "a"])).stdout == b"2"


async def test_a_zygote_that_dies_as_it_is_asked() -> None:
    """Nothing was begun: the session is one of the next zygote's."""
    async with Pool() as pool, anyio.create_task_group() as others:

        async def end_it() -> None:
            assert pool.stock.zygote is not None
            pid = pool.stock.zygote.pid
            os.kill(pid, signal.SIGSTOP)
            began.set()
            await anyio.sleep(0.2 * SLOW)  # until it was asked
            os.kill(pid, signal.SIGKILL)

        for _ in range(3):
            began = anyio.Event()
            others.start_soon(end_it)
            await began.wait()
            async with pool.session(files={"a": b"1"}) as session:
                assert (await session.run(["cat", "a"])).stdout == b"1"


async def test_a_conversation(pool: Pool) -> None:
    """An open job works on the directory; alone if it is kept, on a view of its own if not."""
    async with pool.session(files={"f": b"0"}) as session:
        async with session.open(sh("read x; echo $x >>f; cat f; read x; echo $x")) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            await process.stdin.send(b"one\n")
            assert await process.stdout.receive() == b"0one\n"
            with anyio.move_on_after(0.2) as scope:
                await session.run(["true"], keep=False)
            assert scope.cancelled_caught  # it waits for its turn
            await process.stdin.send(b"two\n")
            assert (await process.result()).ok
        async with (
            session.open(sh("read x; echo $x >f; cat f"), keep=False) as first,
            session.open(sh("cat f; read x"), keep=False, pty=True) as second,
        ):
            for process, said in ((first, b"a\n"), (second, b"0one\r\n")):
                assert process.stdin is not None
                assert process.stdout is not None
                await process.stdin.send(b"a\n")
                heard = b""
                while said not in heard:  # beside the terminal's echo
                    heard += await process.stdout.receive()
            assert (await session.run(["cat", "f"], keep=False)).stdout == b"0one\n"
        assert (await session.collect("f")).files == {"f": b"0one\n"}
        assert session.usage().wall_time > 0.2


async def test_a_conversation_that_breaks_off(pool: Pool) -> None:
    """Errors leave the session usable, and end the job."""
    async with pool.session() as session:
        with pytest.raises(TypeError, match="takes no input"):
            async with session.open(["cat"], input=b"x"):  # type: ignore[call-arg]
                raise AssertionError("it did not start")
        with pytest.raises(CommandNotFoundError):
            async with session.open(["/nowhere"]):
                raise AssertionError("it did not start")

        async def fail() -> None:
            async with session.open(sh("echo x >kept; echo; sleep 100")) as process:
                assert process.stdout is not None
                await process.stdout.receive()
                raise KeyError("of the caller")

        with pytest.raises(KeyError):
            await fail()
        assert (await session.collect("kept")).files == {"kept": b"x\n"}
        with anyio.move_on_after(0.2) as scope:
            async with session.open(["sleep", "100"]):
                await anyio.sleep(100)
        assert scope.cancelled_caught
        assert (await session.run(["true"])).ok
    with pytest.raises(PoolClosedError):
        async with session.open(["true"]):
            raise AssertionError("it did not start")


async def test_outputs_beside_a_mount(tmp_path: Path) -> None:
    """Patterns that happen to fit a mount keep all that the job made."""
    tmp_path.chmod(0o755)
    sandbox = Sandbox(mounts=[Mount.bind(tmp_path, "/box/include")])
    async with Pool(sandbox) as pool, pool.session() as session:
        result = await session.run(sh("mkdir a b; echo x >a/x.o"), outputs=["*/*.o"])
        assert (result.files, result.uncollected) == ({"a/x.o": b"x\n"}, {})
        assert (await session.run(["cat", "a/x.o"])).stdout == b"x\n"


async def test_a_pair(pool: Pool) -> None:
    """Each works on a view of its own session's directory; nothing of it stays."""
    ask = sh("cat word; read answer; echo $answer >&2; echo x >left")
    reply = sh("read word; echo $word $(cat word); ls >&2; echo x >left")
    async with (
        pool.session(files={"word": b"ping\n"}) as one,
        pool.session(files={"word": b"pong\n"}) as other,
    ):
        used: dict[Session | None, list[float]] = {one: [], other: [], None: []}
        for session, own in ((other, b"pong\n"), (one, b"ping\n"), (None, b"given\n")):
            result = await one.run_pair(
                ask,
                reply,
                interactor_session=session,
                interactor_files={} if session else {"word": own},
                idle_time=20 * SLOW,
                transcript=1000,
            )
            assert result.solution.ok, result.solution
            assert result.interactor.ok, result.interactor
            assert result.solution.stderr == b"ping " + own
            assert result.interactor.stderr == b"word\n"
            assert result.transcript[0] == ("solution", b"ping\n")
            assert result.transcript[1] == ("interactor", b"ping " + own)
            used[one].append(result.solution.usage.wall_time)
            used[session].append(result.interactor.usage.wall_time)
        for session in (one, other):
            assert session.usage().wall_time == pytest.approx(sum(used[session]))
        assert (await one.collect("left")).files == {}
        assert (await other.run(["ls"], keep=False)).stdout == b"word\n"
        with pytest.raises(TypeError, match="takes no stdout"):
            await one.run_pair(ask, reply, stdout=1)  # type: ignore[call-arg]
        with pytest.raises(ValueError, match="no number of bytes"):
            await one.run_pair(ask, reply, transcript=-1)
        with pytest.raises(CommandNotFoundError):
            await one.run_pair(ask, ["/nowhere"], interactor_session=other)
        assert (await one.run(["true"])).ok
        assert (await other.run(["true"])).ok

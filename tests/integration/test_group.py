"""run_pair and run_group: jobs that talk to each other and to nobody else."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from environment import SLOW

from isojob import (
    CommandNotFoundError,
    Limits,
    PairResult,
    Pool,
    Result,
    Sandbox,
    Status,
    _pair,
    run_group,
    run_pair,
)
from isojob._group import Member
from isojob._pair import _first

GUESS = """
low, high = 1, 1000
while True:
    middle = (low + high) // 2
    print(middle, flush=True)
    answer = input()
    if answer == "yes": break
    low, high = (middle + 1, high) if answer == "more" else (low, middle - 1)
"""
TELL = """
import sys
count = 0
while True:
    number = int(input())
    count += 1
    if number == 777: break
    print("more" if number < 777 else "less", flush=True)
print("yes", flush=True)
print(count, file=sys.stderr)
"""


TRANSCRIPTS = [0, 1000] if SLOW == 1 else [1000]
LATER = ["sh", "-c", "cat; sleep 1; exit 0"]
"""Ends a while after the other: what ends of the other's end is seen within moments of it."""


def python(code: str) -> list[str]:
    return ["python3", "-I", "-S", "-c", code]


@pytest.mark.parametrize("transcript", [0, 50, 10_000])
async def test_pair(transcript: int) -> None:
    """An interactive problem, with the kernel's pipes and with ours, which read along."""
    result = await run_pair(python(GUESS), python(TELL), transcript=transcript)
    assert result.solution.ok and result.interactor.ok, result
    assert result.interactor.stderr == b"8\n"
    assert not result.idle
    said = b"".join(data for _, data in result.transcript)
    if transcript == 10_000:
        assert (
            said
            == b"500\nmore\n750\nmore\n875\nless\n812\nless\n781\nless\n765\nmore\n773\nmore\n777\nyes\n"
        )
        assert [side for side, _ in result.transcript[:3]] == ["solution", "interactor", "solution"]
        assert not result.transcript_truncated
    else:
        assert (len(said), result.transcript_truncated) == (transcript, bool(transcript))
    assert PairResult.model_validate_json(result.model_dump_json()) == result
    each = result.solution.usage, result.interactor.usage
    assert result.usage().wall_time == each[0].wall_time + each[1].wall_time
    assert result.usage().context_switches == sum(one.context_switches or 0 for one in each)
    assert result.usage().memory_peak in {one.memory_peak for one in each}


@pytest.mark.parametrize("transcript", [0, 1000])
async def test_streams_by_name(transcript: int) -> None:
    """/dev/stdin and /dev/stdout open, although the other end is another uid's."""
    asks = ["sh", "-c", "echo a > /dev/stdout; read x < /dev/stdin; echo $x >&2"]
    answers = ["sh", "-c", "read x < /dev/stdin; echo $x$x > /dev/stdout"]
    result = await run_pair(asks, answers, transcript=transcript)
    assert (result.solution.stderr, result.interactor.stderr) == (b"aa\n", b"")


@pytest.mark.parametrize("transcript", TRANSCRIPTS)
@pytest.mark.parametrize(
    ("solution", "interactor", "statuses", "first"),
    [
        (["sh", "-c", "exit 3"], LATER, ("nonzero_exit", "ok"), "solution"),
        (LATER, ["sh", "-c", "exit 3"], ("ok", "nonzero_exit"), "interactor"),
        (["yes"], ["sleep", "0.1"], ("signaled", "ok"), None),
        (["sleep", "0.1"], ["yes"], ("ok", "signaled"), None),
        (["sh", "-c", "exec >&-; read x; exit 0"], ["cat"], ("ok", "ok"), None),
        (["sh", "-c", "exec <&- >&-; sleep 1"], ["cat"], ("ok", "ok"), "interactor"),
        (["sh", "-c", "kill -9 $$"], LATER, ("signaled", "ok"), "solution"),
        (["sh", "-c", "while :; do :; done"], LATER, ("cpu_time_limit", "ok"), "solution"),
    ],
)
async def test_whatever_either_does(
    transcript: int,
    solution: list[str],
    interactor: list[str],
    statuses: tuple[str, str],
    first: str | None,
) -> None:
    """No deadlock; each has its own verdict, and it is known whose end came first."""
    limits = Limits(wall_time=20 * SLOW, cpu_time=0.3 * SLOW)
    with anyio.fail_after(40 * SLOW):
        result = await run_pair(solution, interactor, limits=limits, transcript=transcript)
    assert (result.solution.status, result.interactor.status) == statuses
    if first is not None and SLOW == 1:
        assert result.first_to_end == first


def test_who_was_first() -> None:
    """By the clocks; but who dies of a closed pipe was second to who closed it a moment ago."""

    def ended(number: int | None) -> Any:
        return SimpleNamespace(signal=number)

    plain, broken = ended(None), ended(signal.SIGPIPE)
    for later_ns, pair, first in (
        (1, (plain, plain), "solution"),
        (-1, (plain, plain), "interactor"),
        (1_000_000, (broken, plain), "interactor"),
        (1_000_000_000, (broken, plain), "solution"),
        (-1_000_000, (plain, broken), "solution"),
        (-1_000_000_000, (plain, broken), "interactor"),
        (1, (broken, broken), "solution"),
    ):
        assert _first(*pair, later_ns) == first
    # With a transcript nobody's word is taken for it: a job can send itself the signal.
    assert _first(broken, plain, 1_000_000, []) == "solution"
    assert _first(plain, broken, -1_000_000, []) == "interactor"
    assert _first(broken, plain, 1_000_000, ["solution"]) == "solution"
    assert _first(plain, plain, 1_000_000, ["interactor", "solution"]) == "interactor"
    assert _first(plain, plain, 1_000_000_000, ["interactor", "solution"]) == "solution"


async def test_cause_and_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a transcript it is seen who ended, and whom that ended, whatever signal was the end."""
    apart: list[int] = []

    def noting(solution: Result, interactor: Result, later_ns: int, ends: Any) -> Any:
        apart.append(abs(later_ns))
        return _first(solution, interactor, later_ns, ends)

    monkeypatch.setattr(_pair, "_first", noting)
    cat = ["cat"]
    for _ in range(10 if SLOW == 1 else 2):
        for end in ("exit 3", "kill -PIPE $$"):
            one = ["sh", "-c", end]
            for pair, first in (((one, cat), "solution"), ((cat, one), "interactor")):
                result = await run_pair(*pair, transcript=1)
                assert result.first_to_close == first
                # Where a busy host's processors came 0.2 s late to one, it is as it was seen.
                assert result.first_to_end == first or apart[-1] >= _pair.CLOSE_NS
    assert min(apart) < _pair.CLOSE_NS


@pytest.mark.parametrize("transcript", TRANSCRIPTS)
@pytest.mark.parametrize("command", ["cat", "yes"])
async def test_both_block(command: str, transcript: int) -> None:
    """Each waits for the other to write, or to read: the wall time ends one, and so the other."""
    with anyio.fail_after(20 * SLOW):
        limits = Limits(wall_time=0.4 * SLOW)
        result = await run_pair([command], [command], limits=limits, transcript=transcript)
    statuses = {result.solution.status, result.interactor.status}
    assert "wall_time_limit" in statuses
    assert statuses <= {"wall_time_limit", "ok", "signaled"}


@pytest.mark.parametrize("transcript", TRANSCRIPTS)
async def test_last_words_to_nobody(transcript: int) -> None:
    """Who writes to one that has ended is told at once, whoever passes the bytes on."""
    writer = (
        "import os, time\ntime.sleep(0.5)\nos.write(1, b'late')\ntime.sleep(0.2)\nos.write(1, b'x')"
    )
    with anyio.fail_after(20 * SLOW):
        result = await run_pair(python(writer), ["true"], transcript=transcript)
    assert result.solution.status in ("signaled", "nonzero_exit"), result.solution


async def test_limits_of_each_side() -> None:
    """The interactor may have more."""
    result = await run_pair(
        ["sleep", "60"],
        ["sh", "-c", "cat; sleep 0.1; exit 5"],
        limits=Limits(wall_time=0.3),
        interactor_limits=Limits(wall_time=20 * SLOW),
    )
    assert result.solution.status == Status.WALL_TIME_LIMIT
    assert result.interactor.exit_code == 5
    assert result.first_to_end == "solution"


async def test_who_closed_first() -> None:
    """A stream may be closed long before the end: with a transcript that is seen."""
    closes = ["sh", "-c", "echo hello; exec >&-; sleep 0.5; cat >&2"]
    for solution, interactor, who in (
        (closes, ["cat"], "solution"),
        (["cat"], closes, "interactor"),
        (
            ["sh", "-c", "sleep 0.5; echo unheard; sleep 0.5"],
            ["sh", "-c", "exec <&-; cat /dev/null; sleep 2"],
            "interactor",
        ),
    ):
        result = await run_pair(solution, interactor, transcript=1000)
        assert result.first_to_close == who, result
    assert (await run_pair(["true"], ["true"])).first_to_close is None
    for _ in range(30):  # whoever it was, one of them was
        both = ["sh", "-c", "kill -9 $$"]
        assert (await run_pair(both, both, transcript=100)).first_to_close is not None


async def test_idleness() -> None:
    """Two that wait for each other are ended early; two that work are not."""
    idle = max(1.0, 0.4 * SLOW)  # what a busy machine may keep a burning job waiting
    with anyio.fail_after(20 * SLOW):
        result = await run_pair(["cat"], ["cat"], idle_time=idle)
    assert result.idle
    statuses = {result.solution.status, result.interactor.status}
    assert "killed" in statuses and statuses <= {"killed", "ok"}
    ended = next(r for r in (result.solution, result.interactor) if r.status == "killed")
    assert ended.evidence.stop == "idle"
    assert "waited for each other" in str(ended)
    assert str(result).endswith("; both waited, and were ended")
    work = "import time\nend = time.monotonic() + %s\nwhile time.monotonic() < end: pass"
    limits = Limits(cpu_time=20 * SLOW, wall_time=60 * SLOW)
    result = await run_pair(python(work % (3 * idle)), ["cat"], idle_time=idle, limits=limits)
    assert not result.idle
    assert result.solution.ok and result.interactor.ok


class Talker:
    """What `watch_idle` asks of a job."""

    def __init__(self) -> None:
        self.cpu = 1
        self.was_ended = False

    def cpu_ns(self) -> int:
        return self.cpu

    def end_idle(self) -> None:
        self.was_ended = True


async def test_idleness_beside_a_loop_that_stands_still() -> None:
    """Two that wait for the host's relay are not idle; when it relays, and they rest, they are."""
    idle = 0.4
    pair: Any = [Talker(), Talker()]
    found: list[bool] = []
    since = 0.0
    with anyio.fail_after(20 * SLOW):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_pair.watch_idle, pair, idle, found)
            for _ in range(4):
                await anyio.sleep(idle / 4)  # it looks
                time.sleep(2 * idle)  # the host stands still
                await anyio.sleep(idle / 16)  # it looks, before a relay had its turn
                assert not found
                pair[0].cpu += 1
            since = time.monotonic()
    assert found == [True] and all(one.was_ended for one in pair)
    assert time.monotonic() - since >= idle


async def test_apart_but_for_the_pipes() -> None:
    """Neither sees the other's files or processes; each has the sandbox it was given."""
    look = "ls; hostname; echo /proc/[0-9]*; ls -l /proc/self/fd | grep -c pipe"
    result = await run_pair(
        ["sh", "-c", f"exec >&2; {look}"],
        ["sh", "-c", f"exec >&2; {look}"],
        files={"mine": b""},
        interactor_files={"theirs": b""},
        interactor_sandbox=Sandbox(hostname="other"),
    )
    # It is alone (init is hidden); its pipes are stdin, the pipe to grep, and stderr.
    assert (result.solution.stderr or b"").split() == [b"mine", b"isojob", b"/proc/2", b"3"]
    assert (result.interactor.stderr or b"").split() == [b"theirs", b"other", b"/proc/2", b"3"]


async def test_pair_of_a_pool() -> None:
    """The sandbox and the limits are those of the pool where each runs."""
    look = ["sh", "-c", "(hostname; ulimit -n) >&2"]
    async with (
        Pool(limits=Limits(open_files=50), max_jobs=2) as pool,
        Pool(Sandbox(hostname="other"), Limits(open_files=60), max_jobs=1) as other,
    ):
        result = await pool.run_pair(look, look, interactor_pool=other)
        assert result.solution.stderr == b"isojob\n50\n"
        assert result.interactor.stderr == b"other\n60\n"
        result = await pool.run_pair(look, look, limits=Limits(open_files=70), transcript=10)
        assert result.solution.stderr == b"isojob\n70\n"
        assert result.interactor.stderr == b"isojob\n70\n"
        with pytest.raises(ValueError, match="2 jobs at once do not fit"):
            await other.run_pair(look, look)
        with pytest.raises(TypeError, match="takes no sandbox"):
            await pool.run_pair(look, look, sandbox=Sandbox())  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="interactor_pool must be a pool, not str"):
            await pool.run_pair(look, look, interactor_pool="x")  # type: ignore[arg-type]
        for used in (pool, other):
            assert (used.statistics().running, used.statistics().waiting) == (0, 0)


async def test_one_cannot_start() -> None:
    """Then the other is ended, and the error is the one of a single job."""
    for pair in ((["nope"], ["sleep", "600"]), (["sleep", "600"], ["nope"])):
        with anyio.fail_after(20 * SLOW), pytest.raises(CommandNotFoundError):
            await run_pair(*pair)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"transcript": -1}, ValueError),
        ({"transcript": True}, ValueError),
        ({"idle_time": 0}, ValueError),
        ({"idle_time": float("nan")}, ValueError),
        ({"sandbox": "x"}, TypeError),
        ({"interactor_sandbox": "x"}, TypeError),
        ({"limits": "x"}, TypeError),
        ({"interactor_files": {"../x": b""}}, ValueError),
    ],
)
async def test_bad_pairs(options: dict[str, Any], error: type[Exception]) -> None:
    """Named before anything starts."""
    with pytest.raises(error):
        await run_pair(["true"], ["true"], **options)


async def test_cancelled_pair() -> None:
    """Nothing is left of either."""
    for transcript in (0, 100):
        with anyio.move_on_after(0.4 * SLOW) as scope:
            await run_pair(["sleep", "7123"], ["sleep", "7123"], transcript=transcript)
        assert scope.cancelled_caught
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    assert b"7123" not in (entry / "cmdline").read_bytes()
                except OSError:
                    continue


async def test_pipeline() -> None:
    """Each writes to the next; inputs and outputs at the ends are as in run_isolated."""
    results = await run_group(
        [{"command": ["cat"], "input": b"b\na\nb\n"}, ["sort"], ["uniq", "-c"]]
    )
    assert [result.status for result in results] == ["ok"] * 3
    assert (results[-1].stdout or b"").split() == [b"1", b"a", b"2", b"b"]
    assert results[0].stdout is None
    limits = Limits(cpu_time=20 * SLOW, wall_time=60 * SLOW)
    count = 20_000_000
    results = await run_group(
        [
            {"command": ["head", "-c", str(count), "/dev/zero"], "limits": limits},
            {"command": ["cat"], "limits": limits},
            {"command": ["wc", "-c"], "limits": limits},
        ]
    )
    assert results[2].stdout == b"%d\n" % count


async def test_end_of_a_reader() -> None:
    """SIGPIPE goes back through the pipeline, as in a shell."""
    results = await run_group([["yes"], ["cat"], ["head", "-n", "1"]])
    assert [result.status for result in results] == ["signaled", "signaled", "ok"]


async def test_ring() -> None:
    """Pipes may lead back."""
    script = "import sys\nfor n in range(100):\n  %s\n"
    first = "print(n, flush=True); assert int(input()) == n + 2"
    other = "print(int(input()) + 1, flush=True)"
    results = await run_group(
        [python(script % first), python(script % other), python(script % other)],
        [(0, 1), (1, 2), (2, 0)],
    )
    assert [result.status for result in results] == ["ok"] * 3, results


@pytest.mark.parametrize(
    ("jobs", "pipes", "error"),
    [
        ("cat", None, TypeError),
        ({"command": ["cat"]}, None, TypeError),
        ([], None, ValueError),
        (["cat"], None, TypeError),
        ([["cat"], ["cat"]], [(0, 2)], ValueError),
        ([["cat"], ["cat"]], [(0, -1)], ValueError),
        ([["cat"], ["cat"]], [(0, True)], TypeError),
        ([["cat"], ["cat"]], [0, 1], TypeError),
        ([["cat"], ["cat"], ["cat"]], [(0, 1), (0, 2)], ValueError),
        ([["cat"], ["cat"], ["cat"]], [(0, 2), (1, 2)], ValueError),
        ([["cat"], {"command": ["cat"], "input": b""}], None, ValueError),
        ([["cat"], {"input": b""}], None, TypeError),
        ([["cat"], {"command": ["cat"], "check": True}], None, ValueError),
        ([["cat"], {"command": ["cat"], "nonsense": 1}], None, TypeError),
        ([["cat"], {"command": ["cat"], "sandbox": None}], None, TypeError),
        ([["cat"]] * 100, None, ValueError),
    ],
)
async def test_bad_groups(jobs: Any, pipes: Any, error: type[Exception]) -> None:
    """Named before anything starts, and no descriptor is left."""
    with pytest.raises(error):
        await run_group(jobs, pipes)


async def test_end_of_who_begins_anew() -> None:
    """Who was to end while its cell was found dead is ended in the next one."""
    async with Pool(max_jobs=1) as pool:
        member = Member(pool, pool.job(["true"], None))
        reasons: list[str] = []
        lease, outcome = (
            SimpleNamespace(stop=lambda: None),
            SimpleNamespace(stop_reason=reasons.append),
        )
        member.began(lease, outcome)  # type: ignore[arg-type]
        member.end_idle()
        member.began(lease, outcome)  # type: ignore[arg-type]
        assert reasons == ["idle", "idle"]


async def test_time_in_the_queue() -> None:
    """A group waits for all its slots, and each of its jobs tells for how long."""
    async with Pool(max_jobs=2) as pool, anyio.create_task_group() as tasks:
        tasks.start_soon(pool.run, ["sleep", "3"])
        await anyio.sleep(0.1)
        results = await pool.run_group([["true"], ["true"]])
        for result in results:
            assert result.usage.queue_time is not None
            assert 0.2 < result.usage.queue_time < 3 + 5 * SLOW
            assert result.evidence.queue_ns == round(result.usage.queue_time * 1e9)


async def test_slots_are_taken_at_once() -> None:
    """Groups that would fit one after the other never wait for each other's half."""
    async with Pool(max_jobs=3) as pool:
        with anyio.fail_after(60 * SLOW):
            async with anyio.create_task_group() as tasks:
                for _ in range(6):
                    tasks.start_soon(pool.run_group, [["echo", "x"], ["cat"]])
                    tasks.start_soon(pool.run, ["true"])
        assert (pool.statistics().running, pool.statistics().waiting) == (0, 0)

"""Two jobs of which each reads what the other writes."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
from typing_extensions import override

from isojob._group import Member, connect, perform
from isojob._job import DEVNULL, StrOrBytesPath
from isojob._models import Model, parse_seconds
from isojob._options import PairOptions, check_options
from isojob._relay import Relay, Side, Transcript
from isojob.limits import Limits
from isojob.result import Result, Usage

if TYPE_CHECKING:
    from isojob._pool import Pool
    from isojob._stock import Stock

__all__ = ["Pair", "PairResult", "Place"]

SAME_NS, CLOSE_NS = 10_000_000, 200_000_000
_OTHER = "interactor_"
_LOOKS = 8


class PairResult(Model, frozen=True):
    """How a pair of jobs ended.

    Attributes:
        solution: The result of the one; its stdout went to the other.
        interactor: The result of the other.
        first_to_end: Whose main process ended first, as their cells saw it. The end of one that
            ends the other, by the end of its input, may be seen moments after that; with a
            transcript cause and effect are told apart: of two that end within 0.2 s of each other
            the one is first that was the first to close a stream. Without one it rests on the jobs'
            word: who dies of SIGPIPE within 10 ms of the other's end is second to it, and a job can
            send itself that signal. Where something depends on it, ask for a transcript.
        first_to_close: Who was the first to close a stream to the other, at its end or before.
            None: nobody looked, which takes a transcript.
        idle: Both waited without using any CPU for ``idle_time``, and were ended for it (one may
            have seen the end of the other, and have exited).
        transcript: What they said, in order, as far as the transcript was to reach.
        transcript_truncated: They said more.
    """

    solution: Result
    interactor: Result
    first_to_end: Side
    first_to_close: Side | None = None
    idle: bool = False
    transcript: tuple[tuple[Side, bytes], ...] = ()
    transcript_truncated: bool = False

    def usage(self) -> Usage:
        """What both have used, by `Usage.total`: times and counts added, the highest peaks."""
        return Usage.total((self.solution.usage, self.interactor.usage))

    @override
    def __str__(self) -> str:
        ended = "both waited, and were ended" if self.idle else f"{self.first_to_end} ended first"
        return f"solution {self.solution}; interactor {self.interactor}; {ended}"


async def watch_idle(members: Sequence[Member], seconds: float, found: list[bool]) -> None:
    """Ends the jobs when none of them has used CPU for so long."""
    last: list[int | None] = []
    idle = 0
    while True:
        await anyio.sleep(seconds / _LOOKS)
        now = [member.cpu_ns() for member in members]
        # Counted and not timed: while this loop stands still nobody relays what they say.
        idle = 0 if now != last or None in now else idle + 1
        last = now
        if idle == _LOOKS:
            found.append(True)
            for member in members:
                member.end_idle()
            return


@dataclass(frozen=True)
class Place:
    """Where one of the two runs, and under which limits unless it is given others."""

    pool: Pool
    limits: Limits
    stock: Stock | None = None

    def member(
        self, command: Sequence[StrOrBytesPath], options: Mapping[str, Any], prefix: str
    ) -> Member:
        """The job, of those options that begin with the prefix."""
        limits = options.get(prefix + "limits")
        own = {name: options[prefix + name] for name in _OWN if prefix + name in options}
        limits = self.limits if limits is None else limits
        job = self.pool.job(command, limits, stdout=DEVNULL, **own)
        return Member(self.pool, job, self.stock)


_OWN = ("files", "env", "collect")


@dataclass(frozen=True)
class Pair:
    """Two checked requests."""

    solution: Member
    interactor: Member
    idle_time: float | None
    transcript: int

    @classmethod
    def make(
        cls,
        solution: Sequence[StrOrBytesPath],
        here: Place,
        interactor: Sequence[StrOrBytesPath],
        there: Place | None,
        options: PairOptions,
    ) -> Pair:
        """Checks everything that can be checked before it is their turn.

        Args:
            solution: The one command.
            here: Where it runs.
            interactor: The other.
            there: Where that runs; None: in the same pool, by default under the same limits.
            options: Those of `run_pair`.

        Raises:
            TypeError, ValueError: An argument that makes no sense.
        """
        check_options("run_pair", options, PairOptions.__optional_keys__)
        one = here.member(solution, options, "")
        there = Place(here.pool, one.job.limits) if there is None else there
        idle_time, transcript = options.get("idle_time"), options.get("transcript", 0)
        if isinstance(transcript, bool) or not isinstance(transcript, int) or transcript < 0:
            raise ValueError(f"transcript: {transcript!r} is no number of bytes")
        return cls(
            one,
            there.member(interactor, options, _OTHER),
            None if idle_time is None else parse_seconds(idle_time),
            transcript,
        )

    async def run(self) -> PairResult:
        """Both, from the start of the first to the end of the last.

        Raises:
            HostNotSupportedError: Idleness cannot be seen on this host.
            IsojobError: One of them could not be run; the other was ended.
        """
        solution, interactor, transcript = self.solution, self.interactor, self.transcript
        idle_time = self.idle_time
        members = (solution, interactor)
        if idle_time is not None:
            for member in members:
                await member.check_accounts()
        said, idle = Transcript(transcript), list[bool]()
        relays: list[Relay] = []
        extra: list[Any] = []
        try:
            if transcript:
                relays.append(Relay(solution, interactor, "solution", said))
                relays.append(Relay(interactor, solution, "interactor", said))
                extra += [relay.run for relay in relays]
            else:
                connect(solution, interactor)
                connect(interactor, solution)
            if idle_time is not None:
                extra.append(lambda: watch_idle(members, idle_time, idle))
            first, second = await perform(members, *extra)
        finally:
            for member in members:
                member.close()
            for relay in relays:
                relay.close()
        ends = said.ends if transcript else None
        ended = _first(first, second, interactor.ended_ns - solution.ended_ns, ends)
        return PairResult(
            solution=first,
            interactor=second,
            first_to_close=None if ends is None else ends[0] if ends else ended,
            first_to_end=ended,
            idle=bool(idle),
            transcript=said.said,
            transcript_truncated=said.truncated,
        )


def _first(
    solution: Result, interactor: Result, later_ns: int, ends: Sequence[Side] | None = None
) -> Side:
    """Who ended first; the interactor's end was seen so much later than the solution's.

    A process closes its pipes on the way out: what that does to the other can be seen sooner than
    its end. Where we pass the bytes on we see the cause first.

    Args:
        solution: The one result.
        interactor: The other.
        later_ns: May be negative.
        ends: Whose streams were seen to end; None: nobody looked.
    """
    if ends and abs(later_ns) < CLOSE_NS:
        return ends[0]
    if ends is None and abs(later_ns) < SAME_NS:
        # A job's word, but else every second writer whose reader has gone would be first.
        broken = [result.signal == signal.SIGPIPE for result in (solution, interactor)]
        if broken[0] != broken[1]:
            return "interactor" if broken[0] else "solution"
    return "solution" if later_ns >= 0 else "interactor"

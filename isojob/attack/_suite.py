"""Runs the attacks and judges what came of them."""

from __future__ import annotations

import secrets
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AsyncExitStack
from enum import StrEnum
from functools import cache
from importlib.resources import files
from pathlib import Path

import anyio

from isojob._models import Model
from isojob._pool import Pool
from isojob._python import PythonPool
from isojob.attack._attack import LIMITS, Attack, Door
from isojob.attack._doors import DOORS, Asked, Enter, warm_door
from isojob.attack._images import import_image
from isojob.attack._scene import Scene
from isojob.errors import HostNotSupportedError, IsojobError
from isojob.host.posture import find_filter
from isojob.limits import Limits
from isojob.mounts import Mount
from isojob.result import Result, Status
from isojob.sandbox import Sandbox

__all__ = ["Finding", "Outcome", "attack"]

_LAYERS = {
    Status.MEMORY_LIMIT: "cgroup: memory limit",
    Status.CPU_TIME_LIMIT: "init: CPU time of the cgroup",
    Status.WALL_TIME_LIMIT: "init: wall time",
    Status.OUTPUT_LIMIT: "host: output limit",
    Status.SECCOMP_VIOLATION: "seccomp",
}
_MODULES = (
    "attacker",
    "processes",
    "memory",
    "clocks",
    "files",
    "spaces",
    "calls",
    "identity",
    "uncounted",
    "watching",
    "composed",
)
_NOT_EVERYWHERE = {"cpus", "cpuset", "io_read_bps"}
"""Limits that some hosts cannot give; there no job has them, and nothing can be got past."""
_SYSTEM_PYTHON = Path("/usr/bin/python3")
_INSIDE = "/opt/attacker"
SPARE = 4
"""A program that is to end by itself gets so many times the time limits of the others."""


class Outcome(StrEnum):
    """What came of an attack."""

    CONTAINED = "contained"
    ESCAPED = "escaped"
    WRONG_VERDICT = "wrong verdict"
    ERROR = "error"


class Finding(Model, frozen=True):
    """One attack, and what came of it.

    Attributes:
        name: The attack's.
        kind: What it was aimed at.
        title: What it tried.
        outcome: What came of it.
        problems: What was reached, or what is wrong, in words.
        stopped_by: What its attempts met, each as ``layer: how``.
        notes: What else it said.
        status: The status of its job.
        wall_time: Of its job, seconds.
    """

    name: str
    kind: str
    title: str
    outcome: Outcome
    problems: tuple[str, ...] = ()
    stopped_by: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    status: Status | None = None
    wall_time: float = 0.0

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers in `stopped_by`, each once."""
        return tuple(dict.fromkeys(word.partition(":")[0] for word in self.stopped_by))


async def attack(
    attacks: Iterable[Attack],
    *,
    sandbox: Sandbox | None = None,
    at_once: int = 4,
    patience: float = 1.0,
    warm: bool = False,
    found: Callable[[Finding], None] = lambda _: None,
) -> list[Finding]:
    """Runs attacks on sandboxes of this host.

    Args:
        attacks: Which.
        sandbox: What is attacked.
        at_once: How many at the same time.
        patience: Times are allowed so many times as long, for slow machines.
        warm: Run those that are jobs by themselves as forks of a warm interpreter.
        found: Told of each finding as it comes.

    Returns:
        One finding for each attack in their order, and a last one for what is left on the host.

    Raises:
        IsojobError: No sandbox can be made here.
    """
    command, extra = _interpreter()
    template = Sandbox() if sandbox is None else sandbox
    if extra:
        template = template.model_copy(update={"mounts": (*template.mounts, *extra)})
    todo = list(attacks)
    findings: dict[int, Finding] = {}
    with Scene() as scene:
        async with AsyncExitStack() as stack:
            enter = stack.enter_async_context
            doors = dict(DOORS)
            pool = await enter(Pool(template, LIMITS, max_jobs=2 * at_once))
            if warm:
                # Where the host has it; the pool sees to it that jobs see it, too.
                outside = command.replace(_INSIDE, sys.base_prefix, 1) if extra else command
                python = PythonPool(
                    python=outside, sandbox=sandbox, limits=LIMITS, max_jobs=2 * at_once
                )
                doors["alone"] = warm_door(await enter(python))
            runner = _Runner(pool, doors, scene, command, patience)
            turn = anyio.Semaphore(at_once)

            async def one(index: int) -> None:
                async with turn:
                    findings[index] = await runner.run(todo[index])
                found(findings[index])

            await pool.run(["true"])  # a host that cannot says so here
            async with anyio.create_task_group() as tasks:
                for index in range(len(todo)):
                    tasks.start_soon(one, index)
        last = _afterwards(scene)
    found(last)
    return [*(findings[index] for index in range(len(todo))), last]


def _scaled(limits: Limits, patience: float) -> Limits:
    return limits.model_copy(
        update={
            "cpu_time": (limits.cpu_time or 1) * patience,
            "wall_time": (limits.wall_time or 1) * patience,
        }
    )


def _interpreter() -> tuple[str, tuple[Mount, ...]]:
    """A Python that the sandbox has, and what has to be bound for it."""
    if _SYSTEM_PYTHON.exists():
        return str(_SYSTEM_PYTHON), ()
    home = Path(sys.base_prefix)
    name = f"bin/python{sys.version_info[0]}.{sys.version_info[1]}"
    if home.is_relative_to("/usr"):
        return str(home / name), ()
    return f"{_INSIDE}/{name}", (Mount.bind(home, _INSIDE),)


@cache
def _programs() -> dict[str, bytes]:
    folder = files("isojob.attack") / "programs"
    return {f"{name}.py": (folder / f"{name}.py").read_bytes() for name in _MODULES}


@cache
def _filtered(sandbox: Sandbox) -> str:
    """Calls that the filter refuses whatever their arguments."""
    compiled = find_filter(sandbox)
    if compiled is None or not compiled.bpf:
        return ""
    import runpy

    from isojob.seccomp import evaluator
    from isojob.seccomp._architectures import architecture

    numbers = runpy.run_path(str(files("isojob.attack") / "programs" / "attacker.py"))["NUMBERS"]
    refused = []
    for name, number in numbers.items():
        answer = evaluator.run(compiled.bpf, evaluator.Call(number, arch=architecture().audit))
        if answer != evaluator.ALLOW:
            refused.append(name)
    return ",".join(refused)


class _Runner:
    """Runs one attack after the other in a pool."""

    def __init__(
        self, pool: Pool, doors: dict[Door, Enter], scene: Scene, command: str, patience: float
    ) -> None:
        self._pool = pool
        self._doors = doors
        self._scene = scene
        self._command = command
        self._patience = patience

    async def run(self, attack: Attack) -> Finding:
        """Runs one and judges it."""
        if attack.door == "image":
            return await anyio.to_thread.run_sync(self._import, attack)
        token = f"{self._scene.stamp}-{secrets.token_hex(4)}"
        try:
            asked = self._asked(attack, token)
            result = await self._doors[attack.door](self._pool, asked)
        except IsojobError as error:
            if isinstance(error, HostNotSupportedError) and attack.limits.keys() & _NOT_EVERYWHERE:
                refusal = f"pool: {error.missing}"
                return self._finding(attack, Outcome.CONTAINED, stopped_by=(refusal,))
            return self._finding(attack, Outcome.ERROR, problems=(str(error),))
        return self._judge(attack, asked, result, token)

    def _asked(self, attack: Attack, token: str) -> Asked:
        limits = self._pool.limits.model_copy(update=attack.limits)
        by_time = attack.ends & {Status.CPU_TIME_LIMIT, Status.WALL_TIME_LIMIT}

        def command(program: tuple[str, ...]) -> list[str]:
            if not program:
                return []
            module, function, *arguments = program
            return [
                *(self._command, "-B", "-S", "-E", f"{module}.py", function, token),
                *(word.format_map(self._scene.words) for word in arguments),
            ]

        return Asked(
            command=command(attack.program),
            before=command(attack.before),
            beside=command(attack.beside),
            limits=_scaled(limits, self._patience * (1 if by_time else SPARE)),
            keep=attack.keep,
            collect=attack.collect,
            rest={
                "files": _programs(),
                "input": attack.input,
                "env": {"ISOJOB_FILTERED": _filtered(self._pool.sandbox)},
            },
        )

    def _import(self, attack: Attack) -> Finding:
        with tempfile.TemporaryDirectory(prefix="attack-") as directory:
            secret = Path(self._scene.words["secret"])
            told = list(import_image(attack.program[1], secret, Path(directory)))
        problems = [what for word, what in told if word == "escaped"]
        problems += self._scene.damage()
        return self._finding(
            attack,
            Outcome.ESCAPED if problems else Outcome.CONTAINED,
            problems=tuple(problems),
            stopped_by=tuple(what for word, what in told if word == "stopped"),
        )

    def _judge(self, attack: Attack, asked: Asked, result: Result, token: str) -> Finding:
        escapes: list[str] = []
        stopped: list[str] = []
        notes: list[str] = []
        for line in result.stdout_text.splitlines():
            word, _, rest = line.partition(" ")
            for kind, where in (("ESCAPED", escapes), ("STOPPED", stopped), ("NOTE", notes)):
                if word == kind:
                    where.append(rest)
        escapes += [f"process {pid} is left" for pid in self._scene.survivors(token)]
        escapes += self._scene.damage()
        wrong = [] if attack.check is None else list(attack.check(result))
        if attack.soon and result.usage.wall_time > (asked.limits.wall_time or 1) / SPARE:
            wrong.append(f"the end came after {result.usage.wall_time:.1f} s")
        if result.status in _LAYERS:
            stopped.append(_LAYERS[result.status])
        elif attack.answer:
            stopped.append(attack.answer)
        outcome = Outcome.CONTAINED
        if escapes:
            outcome = Outcome.ESCAPED
        elif b"Traceback" in (result.stderr or b"") and result.status == Status.NONZERO_EXIT:
            outcome = Outcome.ERROR
            wrong = [(result.stderr or b"").decode(errors="replace").strip().splitlines()[-1]]
        elif result.status not in attack.ends:
            outcome = Outcome.WRONG_VERDICT
            wrong.insert(0, f"{result}, not {' or '.join(sorted(attack.ends))}")
        elif wrong:
            outcome = Outcome.WRONG_VERDICT
        return self._finding(
            attack,
            outcome,
            problems=(*escapes, *wrong),
            stopped_by=tuple(stopped),
            notes=tuple(notes),
            status=result.status,
            wall_time=result.usage.wall_time,
        )

    @staticmethod
    def _finding(attack: Attack, outcome: Outcome, **rest: object) -> Finding:
        return Finding.model_validate(
            {"name": attack.name, "kind": attack.kind, "title": attack.title, "outcome": outcome}
            | rest
        )


def _afterwards(scene: Scene) -> Finding:
    def all_problems() -> Iterator[str]:
        yield from scene.damage()
        yield from (f"process {pid} is left" for pid in scene.processes_left())
        yield from (f"cgroup {path} is left" for path in scene.cgroups_left())

    problems = tuple(all_problems())
    return Finding(
        name="afterwards",
        kind="the host",
        title="what is left when the pool is closed",
        outcome=Outcome.ESCAPED if problems else Outcome.CONTAINED,
        problems=problems,
        stopped_by=() if problems else ("pool: no process, mount, cgroup is left",),
    )

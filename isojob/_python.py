"""Python jobs in warm interpreters: forks of one that has imported what they need."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from typing_extensions import override

from isojob._branches import Branches
from isojob._interpreter import Interpreter
from isojob._job import Content, Job, StrOrBytesPath
from isojob._models import parse_bytes, parse_seconds
from isojob._options import RunOptions, check_options
from isojob._pool import Pool
from isojob._python_input import NOT_GIVEN, argument_of, modules_of, source_of
from isojob._python_result import (
    MAX_VALUE,
    PythonException,
    PythonResult,
    answer_size,
    read_answer,
    understand,
)
from isojob._python_statistics import PythonStatistics
from isojob._shield import in_thread
from isojob._shutdown import refuse_late
from isojob._stock import Stock
from isojob._template import Template
from isojob.errors import IsojobError, PoolClosedError
from isojob.limits import Limits
from isojob.sandbox import Sandbox

__all__ = ["PythonException", "PythonPool", "PythonResult", "run_python"]

PRELOAD_LIMITS = Limits(
    memory="2GiB", processes=1024, cpu_time=None, wall_time=None, address_space=None
)


class _WarmPool(Pool):
    """A pool whose launchers are forks of a template."""

    def __init__(self, template: Template, sandbox: Sandbox | None, **options: Any) -> None:
        self._template = template
        self.branches: Branches | None = None
        if isinstance(sandbox, Sandbox) and sandbox.root.writable:
            # The template runs on the root that its forks have, and each cell would have another.
            raise ValueError("warm interpreters have no writable root: give one to Pool")
        super().__init__(sandbox, **options)

    @override
    def close(self) -> None:
        if self.branches is not None:
            self.branches.shut()
        super().close()
        if self.branches is not None:
            self.branches.close()

    @override
    def forget(self) -> None:
        if self.branches is not None:
            self.branches.let_go()
        super().forget()

    @override
    def _new_stock(self) -> Stock:
        return Stock(self.sandbox, self.limits, self._parked, self._uid_range, self._template)


class PythonPool:
    """Runs Python programs in warm interpreters, each a fork in a fresh cell of its own.

        async with PythonPool(preload=["numpy"]) as pool:
            result = await pool.run_python("import numpy; result = numpy.arange(9).sum().item()")
            print(result.value)  # 36

    A job has all that a job of `Pool` has: namespaces, root, cgroup, filter, ids, limits and a
    verdict of its own. What it shares with other jobs of the pool is how the template came out:
    the layout of memory, the seed of hashes, what the preloads have computed. No job's data gets
    into the template. `rotate_jobs` and `rotate_seconds` bound how long one lives.

    Methods may be called from any event loop (asyncio or trio) of any thread while it is open.

    Args:
        preload: Modules to import once, in this order, isolated like a job. They must start no
            threads. Their code is trusted with the verdicts of the jobs that run on it, not with
            the host.
        python: A CPython (3.8 or later) or that of a virtual environment, by its path; by default
            the one that runs us. What it is made of is bound in, read-only.
        sandbox: What jobs see, as in `Pool`.
        limits: Used where a call gives none.
        preload_limits: What all templates of the pool may use together, with the inits of their
            cells: ``memory``, ``processes`` (inits are one each), ``cpus`` and ``cpuset`` count. By
            default 2 GiB and 1,024 processes.
        preload_time: Seconds that imports may take.
        branch_memory: What the templates of further sets of preloads may have beyond the first's
            together, bytes or a string such as ``"1GiB"``; the longest unused end for it.
        max_value: The largest `PythonResult.value`, bytes of JSON or a string such as ``"1MiB"``.
        rotate_jobs: Start a new template after so many jobs.
        rotate_seconds: And when it is so old.
        **options: ``max_jobs``, ``memory``, ``parked``, ``queue``, ``uid_range`` of `Pool`.
    """

    def __init__(
        self,
        preload: Sequence[str] = (),
        *,
        python: str | os.PathLike[str] | None = None,
        sandbox: Sandbox | None = None,
        limits: Limits | None = None,
        preload_limits: Limits | None = None,
        preload_time: float = 30.0,
        branch_memory: int | str = "1GiB",
        max_value: int | str = "1MiB",
        rotate_jobs: int | None = None,
        rotate_seconds: float | None = None,
        **options: Any,
    ) -> None:
        if rotate_jobs is not None:
            if isinstance(rotate_jobs, bool) or not isinstance(rotate_jobs, int):
                raise TypeError(f"rotate_jobs must be an int, not {type(rotate_jobs).__name__}")
            if rotate_jobs < 1:
                raise ValueError("rotate_jobs must be at least 1")
        if python is not None and not isinstance(python, (str, os.PathLike)):
            raise TypeError(f"python must be a path, not {type(python).__name__}")
        self._preload = modules_of(preload)
        self._python = python
        self._sandbox = sandbox
        self._preload_limits = PRELOAD_LIMITS if preload_limits is None else preload_limits
        if not isinstance(self._preload_limits, Limits):
            kind = type(preload_limits).__name__
            raise TypeError(f"preload_limits must be isojob.Limits, not {kind}")
        self._preload_time = parse_seconds(preload_time)
        self._max_value = parse_bytes(max_value)
        if self._max_value >= MAX_VALUE:
            raise ValueError(f"max_value: {max_value} is too much")
        self._rotate_jobs = rotate_jobs
        self._rotate_seconds = None if rotate_seconds is None else parse_seconds(rotate_seconds)
        self._options = {"limits": limits, **options}
        self._lock = threading.RLock()  # as that of _run.py
        self._renewal: threading.Thread | None = None
        self._jobs = 0
        self._born = 0.0
        self._branch_memory = parse_bytes(branch_memory)
        self._opening: object | None = None
        """Of who enters it, until it is open; `close` takes it away."""
        self._make(_NO_PYTHON)

    def _make(self, interpreter: Interpreter) -> None:
        template = Template(interpreter, self._preload, self._preload_limits, self._preload_time)
        self._pool = _WarmPool(template, self._sandbox, **self._options)
        self._branches = Branches(self._pool, template, self._branch_memory)
        self._pool.branches = self._branches

    async def __aenter__(self) -> Self:
        with self._lock:
            if self._pool.stock.open or self._opening is not None:
                raise RuntimeError("the pool is open already")
            opening = self._opening = object()
        try:
            interpreter = await in_thread(lambda: Interpreter.find(self._python))
            with self._lock:
                if self._opening is not opening:
                    raise PoolClosedError
                self._make(interpreter)
                pool = self._pool
                pool.open_now()
                self._jobs, self._born = 0, time.monotonic()
        finally:
            with self._lock:
                if self._opening is opening:
                    self._opening = None
        await pool.started()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends every job and the template, and waits until nothing of them is left (bounded)."""
        await in_thread(self.close)

    def close(self) -> None:
        """As `aclose`, blocking."""
        with self._lock:
            self._opening, pool = None, self._pool
        pool.close()
        with self._lock:
            renewal, self._renewal = self._renewal, None
        if renewal is not None:
            renewal.join()

    async def run_python(
        self,
        code: str | bytes | Path,
        *,
        argument: Any = NOT_GIVEN,
        args: Sequence[str] = (),
        preload: Sequence[str] = (),
        limits: Limits | None = None,
        files: Mapping[str, Content] | None = None,
        check: bool = False,
        **options: Any,
    ) -> PythonResult:
        """Runs a program as ``__main__``, as ``python main.py`` would, in the working directory.

        Args:
            code: Source text, or a file with it.
            argument: Given to the program as the global ``argument``, through JSON.
            args: ``sys.argv[1:]``.
            preload: Modules to have imported beside the pool's, in this order. The first job that
                asks for a set pays for its template: a fork of the one that has most of it, whose
                memory it shares.
            limits: As for `run_isolated`; by default the pool's.
            files: As for `run_isolated`.
            check: Raise `JobFailedError` unless the status is ``ok``.
            **options: ``input``, ``stdin``, ``stdout``, ``stderr``, ``env``, ``cwd`` and
                ``collect`` of `run_isolated`.

        Returns:
            The global ``result`` of the program is `PythonResult.value`.

        Raises:
            TypeError: `argument` is nothing that JSON knows, or `code` is no source.
            ValueError: A core dump is wanted: only jobs of `Pool` leave one.
            PreloadError: The template could not be made ready again.
            IsojobError: As `run_isolated`.
        """
        check_options("run_python", options, RunOptions.__optional_keys__)
        name, source = source_of(code)
        if isinstance(args, (str, bytes)) or not isinstance(args, Sequence):
            raise TypeError(f"args must be a sequence of words, not {args!r}")
        if not all(isinstance(word, str) for word in args):
            raise TypeError("args: words are str")
        if files is None:
            files = {}
        elif not isinstance(files, Mapping):
            raise TypeError(f"files must be a mapping, not {type(files).__name__}")
        elif name in files:
            raise ValueError(f"files: {name!r} is the program itself")
        job = self._job([name, *args], limits, {name: source, **files}, options)
        # As the interpreter does since 3.9: absolute, below the directory it is found in.
        path = f"{job.cwd or job.workdir}/{name}"
        return await self._run(
            job, [path, "", argument_of(argument), name, *args], preload, check=check
        )

    async def call_python(
        self,
        function: str,
        argument: Any = NOT_GIVEN,
        *,
        preload: Sequence[str] = (),
        limits: Limits | None = None,
        files: Mapping[str, Content] | None = None,
        check: bool = False,
        **options: Any,
    ) -> PythonResult:
        """Calls a function of a module, best of a preloaded one; its value comes back by JSON.

        Args:
            function: ``"module:function"``.
            argument: Its one argument, through JSON; without, it is called with none.
            preload: As for `run_python`.
            limits: As for `run_python`.
            files: As for `run_isolated`.
            check: As for `run_python`.
            **options: As for `run_python`.
        """
        check_options("call_python", options, RunOptions.__optional_keys__)
        if not isinstance(function, str):
            raise TypeError(f'function must be "module:function", not {type(function).__name__}')
        module, colon, name = function.partition(":")
        if not colon or not all(p.isidentifier() for p in (*module.split("."), *name.split("."))):
            raise ValueError(f'function {function!r}: must be "module:function"')
        job = self._job([function], limits, files, options)
        return await self._run(job, ["", function, argument_of(argument), ""], preload, check=check)

    def _job(
        self,
        command: Sequence[StrOrBytesPath],
        limits: Limits | None,
        files: Mapping[str, Content] | None,
        options: dict[str, Any],
    ) -> Job:
        job = self._pool.job(command, limits, files=files, **options)
        if job.limits.core:
            # Its template may leave none, and what is forked from it has its hard limit.
            raise ValueError(
                "limits.core: a job of a warm interpreter leaves no core dump: use Pool"
            )
        return job

    async def _run(
        self, job: Job, argv: Sequence[str], preload: Sequence[str], *, check: bool
    ) -> PythonResult:
        modules = modules_of(preload)
        job.argv = [os.fsencode(word) for word in argv]
        if any(b"\0" in word for word in job.argv):
            raise ValueError("args: a NUL byte")
        job.result_size = answer_size(self._max_value)
        try:
            async with self._branches.stock(modules) as stock:
                result = await self._pool.perform(job, stock=stock)
            data = read_answer(job.result_fd, self._max_value)
        finally:
            if job.result_fd >= 0:  # it was sent, however it ended
                os.close(job.result_fd)
                self._count()
        python = understand(result, data, self._max_value)
        if check:
            python.check_returncode()
        return python

    def _count(self) -> None:
        """Starts a new template where this one has done enough."""
        self._jobs += 1
        self._branches.tidy()
        old = self._rotate_seconds is not None and (
            time.monotonic() - self._born > self._rotate_seconds
        )
        if not old and (self._rotate_jobs is None or self._jobs < self._rotate_jobs):
            return
        with self._lock:
            if self._renewal is not None and self._renewal.is_alive():
                return
            renewal = threading.Thread(target=self._renew, name="isojob-rotate", daemon=True)
            with suppress(RuntimeError):  # none can be started: the next job tries again
                renewal.start()
                self._renewal = renewal
                self._jobs, self._born = 0, time.monotonic()

    def _renew(self) -> None:
        stock = self._pool.stock
        with suppress(IsojobError, OSError):  # the old one stays; the next count tries again
            stock.renew()
            self._branches.forget_old()
        with suppress(IsojobError, OSError):
            stock.bury_now()  # which no job may do for a long time

    def statistics(self) -> PythonStatistics:
        """A snapshot of slots, queue, stock and templates."""
        return self._branches.statistics()


_NO_PYTHON = Interpreter("", (), (0, 0))


_default_lock = threading.RLock()
_default: PythonPool | None = None


async def run_python(code: str | bytes | Path, **options: Any) -> PythonResult:
    """`PythonPool.run_python` on a pool of the process, without preloads."""
    global _default
    refuse_late()
    pool = _default
    if pool is None:
        pool = PythonPool()
        await pool.__aenter__()
        with _default_lock:
            first = _default is None
            if first:
                _default = pool
        if not first:  # another call was faster
            await pool.aclose()
            assert _default is not None
            pool = _default
    return await pool.run_python(code, **options)

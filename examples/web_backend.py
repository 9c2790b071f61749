"""A web service that runs code sent by strangers: ``python examples/web_backend.py``.

One pool for the whole service bounds what runs at once and what may wait; who comes when both are
full is sent away with 503. A client that hangs up takes its job along.

Needs ``pip install 'isojob[examples]'``. Try it::

    curl -s localhost:8000/runs --json '{"code": "print(int(input()) ** 2)", "stdin": "12"}'
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated

import anyio
import uvicorn
from fastapi import FastAPI, HTTPException, Request, status
from pydantic import BaseModel, Field

from isojob import Limits, Pool, PoolStatistics, QueueFullError, Result, Status, Usage

LIMITS = Limits(cpu_time=2, wall_time=5, memory="128MiB", processes=32, output="64KiB")
RETRY_AFTER = 1


class Run(BaseModel, extra="forbid"):
    """What a client sends. The server in front of this one should bound the request's size."""

    code: Annotated[str, Field(max_length=65536)]
    stdin: Annotated[str, Field(max_length=65536)] = ""


class Answer(BaseModel):
    """What a client gets back; that the program failed is an answer like any other.

    Attributes:
        status: How it ended; decided by evidence that the program cannot forge.
        returncode: Its exit status, or -N for signal N.
        stdout: What it wrote, at most `LIMITS.output` bytes.
        stderr: The same for stderr.
        usage: Seconds, bytes and counts.
        explanation: All of it in one sentence.
    """

    status: Status
    returncode: int
    stdout: str
    stderr: str
    usage: Usage
    explanation: str

    @classmethod
    def of(cls, result: Result) -> Answer:
        """Shows the client what is its business: neither the command line nor the host."""
        return cls(
            status=result.status,
            returncode=result.returncode,
            stdout=result.stdout_text,
            stderr=result.stderr_text,
            usage=result.usage,
            explanation=str(result),
        )


async def run_while_connected(request: Request, pool: Pool, run: Run) -> Result | None:
    """Runs the code; if the client goes away first, ends the job and returns None.

    The server tells that a client is gone, but stops nothing by itself: without this, whoever
    reloads a page often enough occupies every slot.
    """
    result: Result | None = None
    refused: QueueFullError | None = None

    async with anyio.create_task_group() as tasks:

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            # isojob returns from a cancelled call when all of the job is gone.
            tasks.cancel_scope.cancel()

        tasks.start_soon(watch)
        try:
            result = await pool.run(
                ["python3", "-I", "main.py"],
                files={"main.py": run.code.encode()},
                input=run.stdin.encode(),
            )
        except QueueFullError as error:
            # A task group would wrap it.
            refused = error
        tasks.cancel_scope.cancel()
    if refused is not None:
        raise refused
    return result


def create_app(limits: Limits = LIMITS, *, max_jobs: int | None = None, queue: int = 64) -> FastAPI:
    """The service.

    Args:
        limits: What each program may use.
        max_jobs: Programs at once; None: as many as fit the machine.
        queue: Requests that may wait for their turn.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with Pool(limits=limits, max_jobs=max_jobs, queue=queue) as pool:
            app.state.pool = pool
            yield

    app = FastAPI(title="isojob", lifespan=lifespan)

    @app.post("/runs")
    async def create_run(run: Run, request: Request) -> Answer:
        try:
            result = await run_while_connected(request, app.state.pool, run)
        except QueueFullError as error:
            raise HTTPException(
                status.HTTP_503_SERVICE_UNAVAILABLE,
                str(error),
                headers={"Retry-After": str(RETRY_AFTER)},
            ) from None
        if result is None:
            # Nobody reads this; it is for the log.
            raise HTTPException(499, "the client went away")
        return Answer.of(result)

    @app.get("/statistics")
    async def statistics() -> PoolStatistics:
        pool: Pool = app.state.pool
        return pool.statistics()

    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: serves on the loopback interface until it is interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-jobs", type=int, metavar="N", help="programs at once")
    options = parser.parse_args(arguments)
    uvicorn.run(create_app(max_jobs=options.max_jobs), host="127.0.0.1", port=options.port)


if __name__ == "__main__":
    main()

"""Where the tests run."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import textwrap
import time
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from isojob import Limits
from isojob._models import Evidence, Status, Usage
from isojob.result import Posture, Result

SLOW = int(os.environ.get("ISOJOB_TEST_SLOWNESS", "1"))
"""How many times slower than ordinary hardware this machine is (an emulated CPU)."""

WHOLE = bool(os.environ.get("ISOJOB_TEST_WHOLE"))
"""All rounds of the tests that go by rounds, as `make soak` has it; a share of them else."""

PYTHON = "/usr/bin/python3"

DATA = Path(__file__).parent / "data"
"""What others have published; its README says who."""

PATIENT = Limits(wall_time=30 * max(1, SLOW / 4), cpu_time=10 * max(1, SLOW / 4))
"""For jobs whose times are not the question."""


CHILD_USES_THE_POOL = (
    "            try:",
    "                asyncio.events._set_running_loop(None)",
    "                async def child():",
    "                    return (await pool.run_python('result = 8', preload=['bz2'])).value",
    "                assert asyncio.run(child()) == 8",
    "                pool.close()",
    "                os._exit(0)",
    "            finally:",
    "                os._exit(1)",
)
"""Lines of a program for `run_python`: what it does in a child that it has forked in its loop."""


def dedent(text: str) -> str:
    """A program as it stands in a test, without its margin."""
    return textwrap.dedent(text).lstrip("\n")


@cache
def declared_arguments() -> dict[str, str]:
    """The types of each call's arguments, a letter each, as the kernel declares them."""
    lines = (DATA / "syscall-arguments.txt").read_text().splitlines()
    return dict(line.replace(" -", " ").split(" ") for line in lines)


def declared_bits(call: str, index: int) -> int:
    """How many low bits the kernel reads of an argument; KeyError: nobody has looked it up."""
    letters = declared_arguments()[call].ljust(6, "l")  # what is not declared is not read
    return {"i": 32, "I": 32, "m": 16, "l": 64, "p": 64}[letters[index]]


def rounds(share: int, whole: int) -> int:
    """How many rounds: ISOJOB_TEST_ROUNDS if it is set."""
    ordinary = max(min(2, share), (whole if WHOLE else share) // SLOW)
    return int(os.environ.get("ISOJOB_TEST_ROUNDS", ordinary))


def seeded() -> random.Random:
    """Chance that can be repeated: by ISOJOB_TEST_SEED, which is printed."""
    seed = int(os.environ.get("ISOJOB_TEST_SEED", random.randrange(2**32)))
    print(f"seed {seed}")
    return random.Random(seed)


def cgroup_version() -> int:
    """2 on a pure v2 host, else 1."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return 2 if len(lines) == 1 and lines[0].startswith("0::") else 1


def run_python(*lines: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in an interpreter of its own, for what would change the whole process."""
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )


def cmdline(pid: int) -> bytes:
    """Words of a process, each with a NUL; empty: it is dead."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def children_of(pid: int) -> list[int]:
    """Children of a process with one thread: of a zygote, the inits of its cells."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


T = TypeVar("T")


async def at_once(start: Callable[[int, int], Awaitable[T]], count: int = 2) -> list[tuple[str, T]]:
    """Jobs that are alive at one moment, which no sleep assures: the line of each, what came of it.

    `start` is given the standard input and output of a job that writes one line, then reads its
    input to the end. Numbers of namespaces tell jobs apart only so: the kernel gives a number out
    again as soon as its namespace is gone.
    """
    lines, results = [""] * count, {}
    inputs, outputs = [os.pipe() for _ in range(count)], [os.pipe() for _ in range(count)]

    async def run(number: int) -> None:
        try:
            results[number] = await start(inputs[number][0], outputs[number][1])
        finally:
            os.close(outputs[number][1])

    try:
        async with anyio.create_task_group() as tasks:
            for number in range(count):
                tasks.start_soon(run, number)
            for number in range(count):
                with open(outputs[number][0], encoding="utf-8") as output:
                    lines[number] = await anyio.to_thread.run_sync(output.readline)
            for _, hold in inputs:
                os.close(hold)
    finally:
        for stdin, _ in inputs:
            os.close(stdin)
    return [(lines[number], results[number]) for number in range(count)]


def settle(check: Callable[[], object], seconds: float = 5.0) -> object:
    """Calls until the answer is empty; the last answer."""
    end = time.monotonic() + seconds
    while True:
        answer = check()
        if not answer or time.monotonic() > end:
            return answer
        time.sleep(0.02)


def write_image(path: Path, config: dict[str, Any], files: dict[str, bytes]) -> None:
    """Makes an OCI image layout of one layer, with links to a /usr that is mounted into it."""
    blobs = path / "blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes) -> dict[str, str]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}"}

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("bin", "lib", "lib64"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, f"usr/{name}"
            archive.addfile(link)
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    manifest = {
        "config": blob(json.dumps({"config": config}).encode()),
        "layers": [blob(out.getvalue())],
    }
    index = {"manifests": [blob(json.dumps(manifest).encode())]}
    (path / "index.json").write_text(json.dumps(index))


def result_of(stdout: bytes, **fields: Any) -> Result:
    """A result that said this."""
    usual = {"status": Status.OK, "returncode": 0, "args": (), "stderr": b""}
    posture = Posture(cgroup="v2", privilege="root", kernel="6", namespaces=(), seccomp="default")
    evidence = Evidence(si_code="exited", si_status=0, wall_ns=0)
    given = {"usage": Usage(wall_time=0), "evidence": evidence, "posture": posture}
    return Result.model_validate({**usual, **given, "stdout": stdout, **fields})

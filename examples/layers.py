"""Roots in layers: what many tasks have in common, and what each brings itself.

A grader keeps one layer with the interpreter, one with the packages that a course allows, and one with
the files of each task. isojob puts them one over the other, read-only and without copying; what a job
writes is gone with it.

    python examples/layers.py

Needs nothing but isojob, and Python in /usr with all that it loads (as Debian and Fedora have it).
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import anyio

from isojob import Limits, Mount, Pool, Result, Root, Sandbox

PROGRAM = """
import json, course
task = json.load(open("/task/task.json"))
print(task["name"] + ":", course.mean(task["numbers"]))
try:
    open("/task/task.json", "w")
except OSError as error:
    print(error.strerror)
"""
COURSE = "def mean(numbers): return sum(numbers) / len(numbers)\n"
TASKS = {
    "first": '{"name": "first", "numbers": [1, 2, 3]}',
    "second": '{"name": "second", "numbers": [10, 20]}',
}
LIMITS = Limits(cpu_time=2, wall_time=10, memory="64MiB")


def layer(path: Path, files: dict[str, str]) -> Path:
    """A directory that everybody may read: jobs are not who you are."""
    path.mkdir()
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def base(path: Path) -> Path:
    """The lowest layer: links into the host's /usr, which is bound. An image has it all inside."""
    layer(path, {})
    for name in ("bin", "lib", "lib64"):
        (path / name).symlink_to(f"usr/{name}")
    return path


async def grade(layers: list[Path]) -> Result:
    """Runs the program on the root that these layers make."""
    sandbox = Sandbox(
        root=Root.layers(layers),
        mounts=(Mount.bind("/usr", "/usr"),),
        env={"PYTHONPATH": "/opt/course"},
    )
    async with Pool(sandbox, LIMITS, max_jobs=1) as pool:
        return await pool.run(["python3", "main.py"], files={"main.py": PROGRAM.encode()})


async def main() -> int:
    """0 if each task found its own data, and the layers below it."""
    os.umask(0o022)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        shared = [
            base(directory / "base"),
            layer(directory / "course", {"opt/course/course.py": COURSE}),
        ]
        said = []
        for task, text in TASKS.items():
            top = layer(directory / task, {"task/task.json": text})
            result = await grade([*shared, top])
            print(result.stdout_text, end="" if result.ok else f"{result}\n{result.stderr_text}")
            said.append(result.stdout_text.splitlines())
    refused = "Read-only file system"
    return 0 if said == [["first: 2.0", refused], ["second: 15.0", refused]] else 1


if __name__ == "__main__":
    sys.exit(anyio.run(main))

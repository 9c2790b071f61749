"""A pipeline of strangers' programs, each in a sandbox of its own.

What a shell does with ``generate | filter | count``: but no stage sees the files, the processes or the
memory of another, and each has limits and a verdict of its own. One stage can be wrong without the
others being to blame.

    python examples/pipeline.py

Needs nothing but isojob, and Python in /usr.
"""

from __future__ import annotations

import sys

import anyio

from isojob import Limits, Pool, Result

GENERATE = """
for number in range(200_000):
    print(number, "even" if number % 2 == 0 else "odd", "line of the log")
"""
FILTER = """
import sys
for line in sys.stdin:
    if line.split()[1] == "odd": sys.stdout.write(line)
"""
COUNT = "import sys; print(sum(1 for _ in sys.stdin))"
GREEDY = "import sys; print(len(sys.stdin.read() * 100))"
LIMITS = Limits(cpu_time=5, wall_time=20, memory="64MiB", processes=1, output="1KiB")


async def pipeline(pool: Pool, *stages: str) -> list[Result]:
    """Runs Python programs of which each reads what the one before it writes."""
    return await pool.run_group(
        [
            {"command": ["python3", "stage.py"], "files": {"stage.py": stage.encode()}}
            for stage in stages
        ]
    )


async def main() -> int:
    """0 if the first pipeline counts right, and of the second one stage is to blame."""
    async with Pool(limits=LIMITS, max_jobs=3) as pool:
        results = {
            "count": await pipeline(pool, GENERATE, FILTER, COUNT),
            "greedy": await pipeline(pool, GENERATE, FILTER, GREEDY),
        }
    for name, stages in results.items():
        print(f"{name}: {stages[-1].stdout_text.strip() or 'no answer'}")
        for number, result in enumerate(stages, 1):
            print(f"  {number}  {result}")
    first, second = results.values()
    blamed = [str(result.status) for result in second]
    return 0 if first[-1].stdout == b"100000\n" and blamed[-1] == "memory_limit" else 1


if __name__ == "__main__":
    sys.exit(anyio.run(main))

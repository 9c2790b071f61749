"""Follows a program while it runs, and ends it when it has said enough.

Prints each line as it comes, beside what the job has used by then. The program looks for prime numbers
for ever; a second one writes a line without end, and is not let get away with it.

    python examples/live.py

Needs nothing but isojob, and Python in /usr.
"""

from __future__ import annotations

import sys

import anyio
from anyio.streams.buffered import BufferedByteReceiveStream

from isojob import DEVNULL, STDOUT, Limits, Result, open_isolated

PRIMES = """
found = []
for number in range(2, 10**9):
    if all(number % prime for prime in found):
        found.append(number)
        print(number, flush=True)
"""
NO_LINES = "while True: print(end='word ', flush=True)"
LIMITS = Limits(cpu_time=5, wall_time=20, memory="64MiB", output="1MiB")
LONGEST = 1000


async def follow(program: str, enough: int) -> tuple[list[str], Result]:
    """The first lines of a program, and how it ended; nobody waits for more of them."""
    lines: list[str] = []
    async with open_isolated(
        ["python3", "main.py"],
        files={"main.py": program.encode()},
        stdin=DEVNULL,
        stderr=STDOUT,
        limits=LIMITS,
    ) as process:
        assert process.stdout is not None
        stream = BufferedByteReceiveStream(process.stdout)
        try:
            while len(lines) < enough:
                line = (await stream.receive_until(b"\n", LONGEST)).decode(errors="replace")
                lines.append("".join(c if c.isprintable() else "?" for c in line))
                usage = process.usage()
                print(f"{usage.wall_time:6.2f} s  {usage.cpu_time or 0:5.2f} s CPU  {lines[-1]}")
        except anyio.IncompleteRead:
            pass  # it ended
        except anyio.DelimiterNotFound:
            print(f"a line of more than {LONGEST} bytes")
        process.kill()
        result = await process.result()
    return lines, result


async def main() -> int:
    """0 if both were followed as far as they should be."""
    lines, result = await follow(PRIMES, 10)
    print(result)
    nothing, endless = await follow(NO_LINES, 10)
    print(endless)
    return 0 if lines[-1:] == ["29"] and not nothing else 1


if __name__ == "__main__":
    sys.exit(anyio.run(main))

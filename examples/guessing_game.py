"""An interactive problem: two strangers' programs talk, and neither can reach anything else.

The interactor thinks of a number, the solution guesses it with at most ten questions. Three solutions
play: one that halves the interval, one that counts upwards, one that says nothing and waits.

    python examples/guessing_game.py

Needs nothing but isojob, and Python in /usr.
"""

from __future__ import annotations

import sys

import anyio

from isojob import Limits, PairResult, run_pair

INTERACTOR = """
import sys
for question in range(10):
    guess = int(input())
    if guess == 777:
        print("right", flush=True)
        sys.exit(0)
    print("more" if guess < 777 else "less", flush=True)
print("enough", flush=True)
sys.exit(1)
"""
SOLUTIONS = {
    "halving": """
low, high = 1, 1000
while True:
    middle = (low + high) // 2
    print(middle, flush=True)
    answer = input()
    if answer == "right": break
    low, high = (middle + 1, high) if answer == "more" else (low, middle - 1)
""",
    "counting": """
for number in range(1, 1001):
    print(number, flush=True)
    if input() in ("right", "enough"): break
""",
    "waiting": "input()",
}
LIMITS = Limits(cpu_time=1, wall_time=10, memory="64MiB", processes=1)


def verdict(result: PairResult) -> str:
    """What a judge would say: the interactor's exit status decides, if both behaved."""
    if result.idle:
        return "idle"
    # Whoever is left alone dies of it: of a pipe that nobody reads, or an empty line.
    if result.first_to_end == "interactor" and not result.interactor.ok:
        return "wrong answer"
    if not result.solution.ok:
        return str(result.solution.status)
    return "accepted" if result.interactor.ok else "wrong answer"


async def play(solution: str) -> PairResult:
    """One game."""
    return await run_pair(
        ["python3", "solution.py"],
        ["python3", "interactor.py"],
        files={"solution.py": solution.encode()},
        interactor_files={"interactor.py": INTERACTOR.encode()},
        limits=LIMITS,
        idle_time=1,
        transcript=10_000,
    )


async def main() -> int:
    """All games; 0 if the one that should win does."""
    verdicts = {}
    for name, solution in SOLUTIONS.items():
        result = await play(solution)
        verdicts[name] = verdict(result)
        print(f"{name}: {verdicts[name]}; {result.first_to_end} ended first")
        for side, said in result.transcript[:6]:
            print(f"  {side:10} {said.decode(errors='replace').strip()}")
        if len(result.transcript) > 6:
            print(f"  ... {len(result.transcript) - 6} more")
    return 0 if verdicts["halving"] == "accepted" else 1


if __name__ == "__main__":
    sys.exit(anyio.run(main))

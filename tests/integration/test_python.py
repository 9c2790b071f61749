"""Warm interpreters: a job behaves as under ``python main.py``, in a cell like any other's."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from environment import PATIENT, PYTHON, SLOW, at_once, dedent

from isojob import Limits, Mount, Pool, PoolClosedError, Sandbox, Status, run_isolated
from isojob._interpreter import Interpreter
from isojob._models import parse_bytes
from isojob._python import PythonPool, PythonResult, run_python
from isojob.cgroups import find
from isojob.errors import (
    CommandNotExecutableError,
    CommandNotFoundError,
    HostNotSupportedError,
    PreloadError,
    SandboxSetupError,
)


@pytest.fixture
async def pool() -> AsyncIterator[PythonPool]:
    async with PythonPool(python=PYTHON, limits=PATIENT, parked=1) as pool:
        yield pool


async def test_value_and_argument(pool: PythonPool) -> None:
    """What is given is the global ``argument``; the global ``result`` comes back."""
    result = await pool.run_python(
        "result = [argument['x'] * 2, 'ü', None]\nprint('out')", argument={"x": 21}
    )
    assert result.ok and result.status is Status.OK
    assert result.value == [42, "ü", None]
    assert result.stdout == b"out\n" and result.stderr == b""
    assert result.exception is None and result.value_problem is None
    assert result.args == ("main.py",)
    assert result.usage.cpu_time is not None and result.evidence.cpu_is_whole
    assert PythonResult.model_validate_json(result.model_dump_json()).value == result.value
    assert (await pool.run_python("result = 'argument' in globals()")).value is False


async def test_exceptions(pool: PythonPool) -> None:
    """Type, message and the user's own lines."""
    result = await pool.run_python(
        "import json\n\ndef f():\n    json.loads('{')\n\nf()\n", input=b""
    )
    assert result.exception is not None
    assert result.exception.type == "json.decoder.JSONDecodeError"
    assert result.exception.message.startswith("Expecting property name")
    assert 'File "/box/main.py", line 6, in <module>\n    f()\n' in result.exception.traceback
    assert "runner" not in result.exception.traceback
    assert result.exception.traceback == result.stderr_text
    quiet = await pool.run_python("result = 3\nraise SystemExit(4)")
    assert (quiet.exception, quiet.exit_code, quiet.value) == (None, 4, 3)
    odd = await pool.run_python("class E(Exception):\n    def __str__(self): 1/0\nraise E")
    assert odd.exception is not None and odd.exception.type == "E"


async def test_values_that_do_not_come(pool: PythonPool) -> None:
    """No JSON, too large, or lies: said, and never an error of the host."""
    result = await pool.run_python("result = {1, 2}")
    assert result.ok and result.value is None
    assert result.value_problem is not None and "set" in result.value_problem
    result = await pool.run_python("result = 'x' * 2**21")
    assert result.ok and result.value is None
    assert result.value_problem is not None and "max_value" in result.value_problem
    deep = "import json\nclass D:\n    pass\nx = []\nfor _ in range(900): x = [x]\nresult = x"
    assert (await pool.run_python(deep)).ok
    odd = """
        class E(Exception):
            def __str__(self): 1/0
        class D(dict):
            def items(self): raise E
        result = D(x=1)
        """
    result = await pool.run_python(dedent(odd))
    assert result.ok and result.value is None
    assert result.value_problem == "E: <exception str() failed>"
    result = await pool.run_python("import os; result = 5; os._exit(0)")
    assert (result.ok, result.value) == (True, None)
    forged = """
        import sys, gc, ctypes
        frame = sys._getframe()
        while frame.f_back: frame = frame.f_back
        said = '[' * 60000
        for f in gc.get_objects():
            if getattr(f, '__name__', '') == 'answer': f(said)
        frame = sys._getframe(1)
        while frame:
            if 'answer' in frame.f_locals: frame.f_locals['answer'](said)
            frame = frame.f_back
        import os; os._exit(0)
        """
    result = await pool.run_python(dedent(forged))
    assert result.ok and result.value is None and result.value_problem


async def test_size_of_values() -> None:
    """`max_value` is for the value alone, and what else is said has its own room."""
    async with PythonPool(python=PYTHON, limits=PATIENT, parked=0, max_value=100) as pool:
        for size, comes in ((98, True), (99, False)):
            result = await pool.run_python(f"result = 'x' * {size}")
            assert result.value == ("x" * size if comes else None)
            problem = None if comes else "101 bytes of JSON, more than max_value"
            assert result.value_problem == problem
        # As the job writes it; others write 0.00001.
        assert (await pool.run_python("result = [1e-05] * 14")).value == [1e-05] * 14
        for code in ("1/0", "raise ZeroDivisionError('\U0001f600' * 100_000)"):
            error = (await pool.run_python(code)).exception
            assert error is not None and error.type == "ZeroDivisionError"
            assert error.traceback.startswith("Traceback") and len(error.message) < 70_000


async def test_values_beside_little_address_space() -> None:
    """What the value is written to is not the job's: it does not count as its address space."""
    few = PATIENT.model_copy(update={"address_space": 512 << 20})
    async with PythonPool(python=PYTHON, limits=few, parked=0, max_value="1GiB") as pool:
        size = "import os; result = int(open('/proc/self/statm').read().split()[0]) >> 28"
        if (await pool.run_python(size, limits=PATIENT)).value:
            pytest.skip("a sanitizer keeps terabytes of addresses")
        result = await pool.run_python("result = len(bytearray(100_000_000))")
        assert (result.value, result.value_problem) == (100_000_000, None)
        result = await pool.run_python("result = len(bytearray(600_000_000))")
        assert result.exception is not None and result.exception.type == "MemoryError"


async def test_words_that_no_json_can_carry(pool: PythonPool) -> None:
    """Whatever a job says, its result can be written."""
    for code in (
        "result = '\\ud800'",
        "result = ['\\udfff'] * 3",
        "raise ValueError('\\ud800')",
        *(f"x = []\nfor _ in range({n}): x = [x]\nresult = x" for n in (150, 199, 200, 254, 900)),
        "result = float('nan')",
        "class E(Exception): pass\nE.__name__ = E.__qualname__ = 'a\\0b'\nraise E",
    ):
        result = await pool.run_python(code)
        again = PythonResult.model_validate_json(result.model_dump_json())
        assert again.status == result.status


async def test_call(pool: PythonPool) -> None:
    """A function of a module, with an argument and without."""
    assert (await pool.call_python("math:sqrt", 16.0)).value == 4.0
    assert (await pool.call_python("os:getcwd")).value == "/box"
    assert (await pool.call_python("mine:f", [1], files={"mine.py": b"def f(x): return x"})).value
    failed = await pool.call_python("math:sqrt", -1)
    assert failed.exception is not None and failed.exception.type == "ValueError"
    assert failed.exit_code == 1
    missing = await pool.call_python("nowhere:f")
    assert missing.exception is not None and missing.exception.type == "ModuleNotFoundError"


@pytest.mark.parametrize(
    ("code", "limits", "status"),
    [
        ("while True: pass", {"cpu_time": 0.5}, Status.CPU_TIME_LIMIT),
        ("import time; time.sleep(60)", {"wall_time": 0.5}, Status.WALL_TIME_LIMIT),
        ("x = bytearray(200 << 20)", {"memory": "64MiB"}, Status.MEMORY_LIMIT),
        ("while True: print('x' * 1000)", {"output": "64KiB"}, Status.OUTPUT_LIMIT),
        (
            "import threading, time\n"
            + "threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n" * 20,
            {"processes": 8},
            Status.NONZERO_EXIT,
        ),
        ("import os\nos.kill(os.getpid(), 9)", {}, Status.SIGNALED),
        ("import os\nos._exit(137)", {}, Status.NONZERO_EXIT),
        ("open('/tmp/x', 'wb').write(bytes(9 << 20))", {"file_size": "1MiB"}, Status.NONZERO_EXIT),
    ],
)
async def test_verdicts(
    code: str, limits: dict[str, Any], status: Status, pool: PythonPool
) -> None:
    """Limits hold and verdicts are right, whatever the interpreter thinks of it."""
    result = await pool.run_python(code, limits=PATIENT.model_copy(update=limits))
    assert result.status is status, (str(result), result.stderr_text)


async def test_a_cell_like_any_other(pool: PythonPool) -> None:
    """Every namespace is fresh, and there are no ids, capabilities or descriptors to speak of."""
    code = dedent("""
        import os
        kinds = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
        status = dict(l.rstrip("\\n").split(":\\t", 1) for l in open("/proc/self/status") if ":\\t" in l)
        result = {
            "namespaces": {k: os.readlink(f"/proc/self/ns/{k}") for k in kinds},
            "ids": [os.getuid(), os.getgid(), os.geteuid()],
            "status": {k: status[k] for k in status if k.startswith(("Cap", "NoNew", "Seccomp", "Groups"))},
            "descriptors": sorted(os.listdir("/proc/self/fd")),
            "processes": sorted(n for n in os.listdir("/proc") if n.isdigit()),
            "cgroup": open("/proc/self/cgroup").read(),
            "maps": open("/proc/self/uid_map").read().split(),
            "pid": [os.getpid(), os.getppid(), os.getsid(0)],
            "hostname": os.uname().nodename,
            "writable": [os.access(p, os.W_OK) for p in ("/box", "/tmp", "/usr", "/", "/dev/.warm")],
            "comm": open("/proc/self/comm").read(),
            "limits": open("/proc/self/limits").read().split("\\n"),
            "mounts": sorted(l.split()[1] for l in open("/proc/self/mounts")),
            "nice": os.nice(0),
            "oom": open("/proc/self/oom_score_adj").read(),
        }
        """)
    plain_code = code + "\nimport json; print(json.dumps(result))"
    waiting = code + "\nimport sys; print(flush=True); sys.stdin.read()"
    (_, one), (_, two) = await at_once(
        lambda stdin, stdout: pool.run_python(waiting, stdin=stdin, stdout=stdout)
    )
    async with Pool(limits=PATIENT, parked=0) as plain:
        other = await plain.run([PYTHON, "main.py"], files={"main.py": plain_code.encode()})
    exec_ed = json.loads(other.stdout_text)
    ours = {k: os.readlink(f"/proc/self/ns/{k}") for k in one.value["namespaces"]}
    for kind, name in one.value["namespaces"].items():
        assert len({name, two.value["namespaces"][kind], ours[kind]}) == 3, kind
    for key, value in one.value.items():
        if key in ("namespaces", "maps", "mounts", "limits", "status", "comm"):
            continue
        expected = exec_ed[key]
        assert value == expected, key
    status = one.value["status"]
    assert {status[k].strip("0") for k in status if k.startswith("Cap")} == {""}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    mine = {line[:26]: line[26:] for line in one.value["limits"]}
    theirs = {line[:26]: line[26:] for line in exec_ed["limits"]}
    assert mine == theirs
    more = set(one.value["mounts"]) - set(exec_ed["mounts"])
    assert not more, more


async def test_jobs_share_no_data(pool: PythonPool) -> None:
    """A marker in the memory of one job is nowhere in that of another, nor in a file."""
    marker = os.urandom(12).hex()
    leave = "kept = [argument] * 1000; s = argument * 100\nopen('/tmp/m', 'w').write(argument)"
    assert (await pool.run_python(leave, argument=marker)).ok
    scan = dedent("""
        import os
        first, second = (half.encode() for half in argument)
        found = 0
        for line in open("/proc/self/maps"):
            where, mode, *rest = line.split()
            low, high = (int(x, 16) for x in where.split("-"))
            if "r" not in mode or "[v" in line: continue
            if high - low > 1 << 32: continue  # what a sanitizer keeps of all addresses
            with open("/proc/self/mem", "rb", 0) as memory:
                try:
                    memory.seek(low); data = memory.read(high - low)
                except (OSError, ValueError, OverflowError): continue
            at = data.find(first)
            while at >= 0:  # the two are never put together here
                found += data[at + len(first) : at + len(first) + len(second)] == second
                at = data.find(first, at + 1)
        result = [found, os.path.exists("/tmp/m")]
        """)
    halves = [marker[:12], marker[12:]]
    probe = await pool.run_python(scan, argument=halves)
    assert probe.value == [0, False], probe.stderr_text
    control = await pool.run_python("kept = ''.join(argument)\n" + scan, argument=halves)
    assert control.value[0] >= 1  # the scan does find what is there


async def test_chance(pool: PythonPool) -> None:
    """Forks of one template do not draw the same numbers."""
    code = "import random, uuid, os, tempfile\nresult = [random.random(), str(uuid.uuid4()), os.urandom(4).hex()]"
    drawn = [(await pool.run_python(code)).value for _ in range(3)]
    for column in zip(*drawn, strict=True):
        assert len(set(column)) == 3


async def test_chance_of_numpy(tmp_path: Path) -> None:
    """Its global generator is seeded anew in each fork: a stand-in says so without numpy."""
    folder = tmp_path / "modules/numpy"
    folder.mkdir(parents=True)
    folder.parent.chmod(0o755)
    tmp_path.chmod(0o755)
    (folder / "__init__.py").touch()
    stand_in = """
        import os
        state = b""
        def seed():
            global state
            state = os.urandom(4)
        seed()
        template = state
        """
    (folder / "random.py").write_text(dedent(stand_in))
    sandbox = Sandbox(
        mounts=[Mount.bind(folder.parent, "/modules")], env={"PYTHONPATH": "/modules"}
    )
    code = "import numpy.random as r\nresult = [r.template.hex(), r.state.hex()]"
    async with PythonPool(["numpy.random"], sandbox=sandbox, python=PYTHON, limits=PATIENT) as pool:
        drawn = [(await pool.run_python(code)).value for _ in range(3)]
    assert len({template for template, _ in drawn}) == 1
    assert len({*drawn[0], *(state for _, state in drawn)}) == 4


async def test_preloads(tmp_path: Path) -> None:
    """Are there before the job, and what they computed is in every fork, changed for itself alone."""
    async with PythonPool(["json", "decimal"], python=PYTHON, limits=PATIENT, parked=1) as pool:
        code = "import sys; result = 'decimal' in sys.modules; import decimal; decimal.Mine = 1"
        assert (await pool.run_python(code)).value is True
        result = await pool.run_python("import decimal; result = hasattr(decimal, 'Mine')")
        assert result.value is False
        assert (await pool.call_python("decimal:getcontext")).value_problem


@pytest.mark.parametrize("workdir", ["/box", "/work"])
async def test_mounts_in_the_working_directory(tmp_path: Path, workdir: str) -> None:
    """Are there for preloads, and for jobs, beside what is a job's own."""
    tmp_path.chmod(0o755)
    (tmp_path / "mine.py").write_text("import os\nTHERE = os.listdir(os.path.dirname(__file__))")
    sandbox = Sandbox(
        workdir=workdir,
        mounts=[
            Mount.bind(tmp_path, f"{workdir}/lib/mine"),
            Mount.tmpfs(f"{workdir}/scratch", size="1MiB"),
        ],
        env={"PYTHONPATH": f"{workdir}/lib/mine"},
    )
    async with PythonPool(["mine"], python=PYTHON, sandbox=sandbox, limits=PATIENT) as pool:
        code = "import os, mine; open('scratch/x', 'x'); result = mine.THERE, sorted(os.listdir())"
        for _ in range(2):
            result = await pool.run_python(code)
            assert result.value == [["mine.py"], ["lib", "main.py", "scratch"]], result


async def test_preloads_that_ignore_their_children(tmp_path: Path) -> None:
    """Of which a template has some before it is ready."""
    tmp_path.chmod(0o755)
    (tmp_path / "careless.py").write_text(
        "import signal, subprocess\nsubprocess.Popen(['true'])\n"
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
    )
    sandbox = Sandbox(mounts=[Mount.bind(tmp_path, "/modules")], env={"PYTHONPATH": "/modules"})
    async with PythonPool(["careless"], python=PYTHON, sandbox=sandbox, parked=0) as pool:
        assert (await pool.run_python("result = 1")).value == 1


HOOK = """
import os, threading, time
def flush():
    if {}: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
os.register_at_fork(after_in_child=flush)
"""


async def test_threads_of_hooks(tmp_path: Path) -> None:
    """One that a preload starts in a launcher would go on beside the job, without its filter."""
    tmp_path.chmod(0o755)
    (tmp_path / "late.py").write_text(HOOK.format("os.path.exists('/modules/now')"))
    sandbox = Sandbox(mounts=[Mount.bind(tmp_path, "/modules")], env={"PYTHONPATH": "/modules"})
    async with PythonPool(["late"], python=PYTHON, sandbox=sandbox, parked=0) as pool:
        assert (await pool.run_python("result = 1")).value == 1
        (tmp_path / "now").write_text("")
        with pytest.raises(SandboxSetupError, match="threads"):
            await pool.run_python("result = 1")
        (tmp_path / "now").unlink()
        assert (await pool.run_python("result = 1")).value == 1


@pytest.mark.parametrize(
    ("module", "code", "words"),
    [
        ("broken", "1/0", "ZeroDivisionError: division by zero"),
        ("absent", "", "ModuleNotFoundError"),
        ("hanging", "import time; time.sleep(600)", "were not done after"),
        ("hungry", "x = bytearray(300 << 20)", "died while it imported"),
        ("threaded", "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()", "threads"),
        ("hooked", HOOK.format("True"), "starts threads in forks"),
        ("sharing", "import mmap; kept = mmap.mmap(-1, 4096)", "shared memory"),
        ("ending", "import os; os._exit(3)", "died while it imported"),
        ("exiting", "raise SystemExit(0)", "SystemExit"),
        ("mute", "class E(Exception):\n    def __str__(self): 1/0\nraise E", "mute.E: <exception str"),
        ("deadly", "import os; os.kill(os.getpid(), 11)", "died while it imported"),
    ],
)  # fmt: skip
async def test_bad_preloads(module: str, code: str, words: str, tmp_path: Path) -> None:
    """The error names the module, and nothing is left."""
    tmp_path.chmod(0o755)
    folder = tmp_path / "modules"
    folder.mkdir()
    if module != "absent":
        (folder / f"{module}.py").write_text(code)
    sandbox = Sandbox(mounts=[Mount.bind(folder, "/modules")], env={"PYTHONPATH": "/modules"})
    pool = PythonPool(
        ["json", module],
        python=PYTHON,
        sandbox=sandbox,
        preload_time=2 * max(1, SLOW / 2) if module == "hanging" else 60,
        preload_limits=Limits(memory="128MiB", processes=None, cpu_time=None, wall_time=None),
        parked=0,
    )
    with pytest.raises(PreloadError, match=words) as caught:
        async with pool:
            pass
    assert caught.value.module == module
    raised = ("broken", "absent", "exiting", "mute")
    assert caught.value.traceback.startswith("Traceback") == (module in raised)
    with pytest.raises(PoolClosedError):
        await pool.run_python("1")


async def test_profiles_that_end_jobs() -> None:
    """One that answers for what a launcher calls cannot hold before the job comes: refused."""
    from isojob import ProfileError, SeccompProfile

    # munmap: what init believes would be left to the job.
    for call, action in (("chdir", "KILL_PROCESS"), ("munmap", "ERRNO"), ("close", "ERRNO")):
        rule = {"names": [call], "action": f"SCMP_ACT_{action}"}
        bad = SeccompProfile.model_validate(
            {"name": "bad", "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}
        )
        with pytest.raises(ProfileError, match="bad"):
            async with PythonPool(python=PYTHON, sandbox=Sandbox(seccomp=bad)):
                pass
    compute = Sandbox(seccomp=SeccompProfile.compute())
    async with PythonPool(python=PYTHON, sandbox=compute, limits=PATIENT, parked=0) as pool:
        assert (await pool.run_python("result = 1 + 1")).value == 2
        result = await pool.run_python(
            "import ctypes; ctypes.CDLL(None).syscall(165, 0, 0, 0, 0, 0)"
        )
        assert result.status is Status.SECCOMP_VIOLATION
    free = Sandbox(seccomp=SeccompProfile.unconfined())
    async with PythonPool(python=PYTHON, sandbox=free, limits=PATIENT, parked=0) as pool:
        assert (await pool.run_python("result = 1 + 1")).value == 2


async def test_template_is_isolated(tmp_path: Path) -> None:
    """What a preload can do: nothing to the host."""
    tmp_path.chmod(0o755)
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "nosy.py").write_text(
        dedent("""
        import os, socket
        status = dict(l.rstrip("\\n").split(":\\t", 1) for l in open("/proc/self/status") if ":\\t" in l)
        SEEN = {
            "status": {k: status[k] for k in status if k.startswith(("Cap", "NoNew", "Seccomp", "Groups"))},
            "processes": sorted(n for n in os.listdir("/proc") if n.isdigit()),
            "environment": sorted(os.environ),
            "uid": os.getuid(),
            "writable": [p for p in ("/", "/usr", "/etc", "/box", "/dev") if os.access(p, os.W_OK)],
            "namespaces": {k: os.readlink(f"/proc/self/ns/{k}") for k in os.listdir("/proc/self/ns")},
            "descriptors": sorted(
                os.readlink(f"/proc/self/fd/{n}").partition("[")[0]
                for n in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{n}")
            ),
            "interfaces": [l.split(":")[0].strip() for l in open("/proc/net/dev") if ":" in l],
            "cgroup": open("/proc/self/cgroup").read(),
        }
        """)
    )
    os.environ["ISOJOB_TEST_SECRET"] = "x"
    sandbox = Sandbox(mounts=[Mount.bind(folder, "/modules")], env={"PYTHONPATH": "/modules"})
    try:
        async with PythonPool(["nosy"], python=PYTHON, sandbox=sandbox, limits=PATIENT) as pool:
            seen = (await pool.run_python("import nosy; result = nosy.SEEN")).value
    finally:
        del os.environ["ISOJOB_TEST_SECRET"]
    assert {seen["status"][k].strip("0") for k in seen["status"] if k.startswith("Cap")} == {""}
    assert (seen["status"]["NoNewPrivs"], seen["status"]["Seccomp"]) == ("1", "2")
    assert len(seen["processes"]) == 2  # pid 1 of its namespace, itself
    assert "ISOJOB_TEST_SECRET" not in seen["environment"]
    assert seen["writable"] == []
    # Its requests, and the program that it executes as init: nothing of the host.
    program = "/memfd:isojob-zygote (deleted)"
    assert seen["descriptors"] == ["/dev/null"] * 3 + [program, "socket:"]
    assert seen["interfaces"] == ["lo"]
    assert set(seen["cgroup"].rstrip().replace("\n", ":").split(":")[2::3]) == {"/"}
    for kind in ("mnt", "net", "pid", "ipc", "uts", "cgroup"):
        assert seen["namespaces"][kind] != os.readlink(f"/proc/self/ns/{kind}")
    if os.geteuid() == 0:
        assert seen["uid"] not in (0, os.getuid())


async def test_dead_template() -> None:
    """A template that dies is replaced; its parked cells still do their job."""
    async with PythonPool(python=PYTHON, limits=PATIENT, parked=1) as pool:
        assert (await pool.run_python("1")).ok
        zygote = pool._pool.stock.zygote
        assert zygote is not None
        for _ in range(2):
            os.kill(pool.statistics().templates[0].pid, signal.SIGKILL)
            for _ in range(4):
                assert (await pool.run_python("result = 1")).value == 1
            zygote = pool._pool.stock.zygote
            assert zygote is not None
        assert pool.statistics().zygotes >= 2


async def test_template_that_dies_while_it_makes_a_cell() -> None:
    """The call that waits for that cell gets one of the next template."""
    values: list[object] = []
    async with PythonPool(python=PYTHON, limits=PATIENT, parked=0) as pool:
        assert (await pool.run_python("1")).ok

        async def call() -> None:
            values.append((await pool.run_python("result = 1")).value)

        for _ in range(max(3, 20 // SLOW)):
            pid = pool.statistics().templates[0].pid
            os.kill(pid, signal.SIGSTOP)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(call)
                await anyio.sleep(0.05 * SLOW)
                os.kill(pid, signal.SIGKILL)
            assert values.pop() == 1


def hanging(folder: Path, name: str, *, always: bool) -> Sandbox:
    """Where the import of that module hangs, or begins to as soon as there is a file ``hang``."""
    folder.parent.chmod(0o755)
    folder.mkdir()
    line = "import os, time\nif {}: time.sleep(1000)\n"
    (folder / f"{name}.py").write_text(line.format(always or "os.path.exists('/modules/hang')"))
    return Sandbox(mounts=[Mount.bind(folder, "/modules")], env={"PYTHONPATH": "/modules"})


async def test_cancelled_start(tmp_path: Path) -> None:
    """A first template that hangs holds nobody: neither who opens the pool nor the end of it."""
    sandbox = hanging(tmp_path / "modules", "hangs", always=True)
    options: dict[str, Any] = {"sandbox": sandbox, "python": PYTHON, "preload_time": 3600}
    with anyio.fail_after(600):
        with anyio.move_on_after(0.5) as scope:
            async with PythonPool(["hangs"], **options):
                raise AssertionError
        assert scope.cancelled_caught
    with anyio.fail_after(600):
        async with anyio.create_task_group() as tasks:
            pool = PythonPool(["hangs"], **options)

            async def open_it() -> None:
                with pytest.raises(PoolClosedError):
                    await pool.__aenter__()

            tasks.start_soon(open_it)
            await anyio.sleep(0.5 * SLOW)
            await pool.aclose()


async def test_restart_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that wait for one start are told by it together; each can be cancelled."""
    folder = tmp_path / "modules"
    sandbox = hanging(folder, "second", always=False)
    time = 2.0 * SLOW
    options: dict[str, Any] = {"sandbox": sandbox, "python": PYTHON, "preload_time": time}
    begun: list[object] = []
    told: list[str] = []
    with anyio.fail_after(600):
        async with PythonPool(["second"], limits=PATIENT, parked=0, **options) as pool:
            assert (await pool.run_python("result = 1")).value == 1
            (folder / "hang").touch()
            stock = pool._pool.stock
            start = stock._start

            def counted() -> Any:
                begun.append(None)
                return start()

            monkeypatch.setattr(stock, "_start", counted)

            async def call() -> None:
                with pytest.raises(PreloadError) as raised:
                    await pool.run_python("1")
                told.append(raised.value.module)

            assert stock.zygote is not None
            os.kill(stock.zygote.pid, signal.SIGKILL)
            async with anyio.create_task_group() as tasks:
                for _ in range(4):
                    tasks.start_soon(call)
                with anyio.move_on_after(time / 4) as scope:
                    await pool.run_python("1")
                assert scope.cancelled_caught and not told
            assert (told, len(begun)) == (["second"] * 4, 1)
            (folder / "hang").unlink()
            assert (await pool.run_python("result = 2")).value == 2


async def test_rotation() -> None:
    """After so many jobs there is another template: another seed of hashes."""
    code = "result = hash('isojob')"
    async with PythonPool(python=PYTHON, limits=PATIENT, parked=1, rotate_jobs=3) as pool:
        seen = {(await pool.run_python(code)).value for _ in range(3)}
        assert len(seen) == 1
        with anyio.fail_after(60):
            while len(seen) == 1:
                seen.add((await pool.run_python(code)).value)
        assert pool.statistics().zygotes >= 2


@pytest.mark.parametrize("stack", ["64MiB", "3MiB", None])
async def test_stacks_of_threads(stack: str | None) -> None:
    """As the C library takes them from the limit when a program is executed."""
    code = (
        "import ctypes\n"
        "libc, attributes, size = ctypes.CDLL(None), (ctypes.c_char * 256)(), ctypes.c_size_t()\n"
        "libc.pthread_getattr_default_np(attributes)\n"
        "libc.pthread_attr_getstacksize(attributes, ctypes.byref(size))\n"
        "print(size.value)"
    )
    limits = PATIENT.model_copy(update={"stack": parse_bytes(stack) if stack else None})
    executed = await run_isolated([PYTHON, "-c", code], limits=limits)
    async with PythonPool(python=PYTHON, limits=limits, parked=0) as pool:
        warm = await pool.run_python(code)
    assert executed.ok and warm.stdout == executed.stdout


async def test_rotation_counts_every_job() -> None:
    """Those that are cancelled, too: else who waits for no end keeps one template for ever."""
    async with PythonPool(python=PYTHON, limits=PATIENT, parked=1, rotate_jobs=2) as pool:
        for _ in range(2):
            with anyio.move_on_after(0.5):
                await pool.run_python("while True: pass")
        with anyio.fail_after(60):
            while pool.statistics().zygotes < 2:  # noqa: ASYNC110 - nobody tells
                await anyio.sleep(0.01)


async def test_rotation_in_a_quiet_pool() -> None:
    """What was replaced ends with its last job, not only with the next one."""
    async with PythonPool(python=PYTHON, limits=PATIENT, parked=0, rotate_jobs=2) as pool:
        before = pool.statistics().templates[0].pid
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pool.run_python, f"import time; time.sleep({1.5 * SLOW})")
            await anyio.sleep(0.2)
            for _ in range(2):
                await pool.run_python("result = 1")
            with anyio.fail_after(60):
                while pool.statistics().zygotes < 2:  # noqa: ASYNC110 - nobody tells
                    await anyio.sleep(0.01)
            (now,) = pool.statistics().templates
            assert (now.pid != before, now.jobs) == (True, 0)
        with anyio.fail_after(60):
            while pool._pool.stock.retired:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        await pool.run_python("result = 1")
        await pool.run_python("result = 1")
        with anyio.fail_after(60):
            while pool.statistics().zygotes < 3 or pool._pool.stock.retired:  # noqa: ASYNC110
                await anyio.sleep(0.01)


async def test_rotation_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread for it is no job's fault, nor the end's; a later job's is started."""
    start = threading.Thread.start
    refused: list[str] = []

    def full(self: threading.Thread) -> None:
        if self.name == "isojob-rotate":
            refused.append(self.name)
            raise RuntimeError("can't start new thread")
        start(self)

    async with PythonPool(python=PYTHON, limits=PATIENT, parked=1, rotate_jobs=2) as pool:
        monkeypatch.setattr(threading.Thread, "start", full)
        assert [(await pool.run_python("result = 1")).value for _ in range(3)] == [1] * 3
        assert len(refused) == 2
        await pool.aclose()
        async with pool:
            monkeypatch.undo()
            await pool.run_python("result = 1")
            await pool.run_python("result = 1")
            with anyio.fail_after(60):
                while pool.statistics().zygotes < 2:  # noqa: ASYNC110 - nobody tells
                    await anyio.sleep(0.01)


async def test_cancelled(pool: PythonPool) -> None:
    """Cancelling ends the job; the pool goes on."""
    with anyio.move_on_after(0.5) as scope:
        await pool.run_python("while True: pass")
    assert scope.cancelled_caught
    assert (await pool.run_python("result = 2")).value == 2


async def test_many_at_once() -> None:
    """More than are parked, with right answers."""
    async with PythonPool(python=PYTHON, limits=PATIENT, max_jobs=8) as pool:
        answers: dict[int, Any] = {}

        async def one(number: int) -> None:
            result = await pool.run_python("result = argument ** 2", argument=number)
            answers[number] = result.value

        async with anyio.create_task_group() as tasks:
            for number in range(max(8, 64 // SLOW)):
                tasks.start_soon(one, number)
        assert answers == {n: n**2 for n in answers} and len(answers) >= 8


async def test_waiting_calls_hold_no_descriptors() -> None:
    """Thousands may wait for their turn: what a call needs of the host it takes when it has one."""
    async with PythonPool(python=PYTHON, limits=PATIENT, max_jobs=1, parked=1) as pool:
        await pool.run_python("")
        before = len(os.listdir("/proc/self/fd"))
        async with anyio.create_task_group() as tasks:
            for _ in range(100):
                tasks.start_soon(pool.run_python, "import time; time.sleep(60)")
            while pool.statistics().waiting < 99:  # noqa: ASYNC110 - a figure, no event
                await anyio.sleep(0.01)
            assert len(os.listdir("/proc/self/fd")) < before + 50
            tasks.cancel_scope.cancel()


async def test_files_and_streams(pool: PythonPool, tmp_path: Path) -> None:
    """The options of any job: files, collect, env, cwd, args, output to a file."""
    program = tmp_path / "prog.py"
    program.write_text(
        "import sys, os\nopen('out', 'w').write(' '.join(sys.argv))\nprint(os.getcwd())"
    )
    result = await pool.run_python(program, args=["a", "b"], collect=["out"])
    assert result.files == {"out": b"prog.py a b"} and result.stdout == b"/box\n"
    with (tmp_path / "stdout").open("wb") as file:
        assert (await pool.run_python("print('x')", stdout=file)).stdout is None
    assert (tmp_path / "stdout").read_bytes() == b"x\n"
    assert (await pool.run_python("import os; result = os.getcwd()", cwd="/tmp")).value == "/tmp"


async def test_variables_that_streams_depend_on(pool: PythonPool) -> None:
    """As an interpreter that starts with them has it; and nothing stays of them."""
    code = "import sys\nfor s in (sys.stdin, sys.stdout, sys.stderr):\n"
    code += "    print(s.encoding, s.errors, s.write_through, type(s.buffer).__name__)"
    plain: dict[str, str] = {}
    encodings = ({"PYTHONIOENCODING": value} for value in ("latin-1:replace", "ascii", ":ignore"))
    unbuffered = ({"PYTHONUNBUFFERED": value} for value in ("1", "0", "yes"))
    for env in (plain, *encodings, *unbuffered, plain):
        cold = await run_isolated([PYTHON, "-c", code], env=env)
        warm = await pool.run_python(code, env=env)
        assert warm.ok and warm.stdout == cold.stdout, env


async def test_large_words(pool: PythonPool) -> None:
    """Source and argument far beyond what a command line takes."""
    code = "#" * (1 << 20) + "\nresult = len(argument)"
    assert (await pool.run_python(code, argument="x" * 900_000)).value == 900_000


def pyenv() -> Path:
    root = os.environ.get("PYENV_ROOT")
    return (Path(root) if root else Path.home() / ".pyenv") / "versions"


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10", "3.11", "3.12", "3.13"])
async def test_virtual_environments(version: str, tmp_path: Path) -> None:
    """Another version, in a virtual environment below a home that only its owner reads."""
    found = None
    own = pyenv().glob(f"{version}.*/bin") if os.access(pyenv(), os.R_OK | os.X_OK) else ()
    for folder in (Path("/usr/bin"), Path("/usr/local/bin"), *own):
        if os.access(folder / f"python{version}", os.X_OK):
            found = folder / f"python{version}"
    if found is None:
        pytest.skip(f"no Python {version} on this machine")
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    subprocess.run([found, "-m", "venv", "--without-pip", home / "venv"], check=True)
    site = next((home / "venv/lib").glob("python*/site-packages"))
    (site / "ours.py").write_text("VALUE = 3\n")
    async with PythonPool(["ours"], python=home / "venv/bin/python", limits=PATIENT) as pool:
        code = "import ours, sys; result = [ours.VALUE, sys.prefix, list(sys.version_info[:2])]"
        result = await pool.run_python(code)
        assert result.value == [3, str(home / "venv"), [int(n) for n in version.split(".")]], (
            result.stderr_text
        )
        again = "import subprocess, sys\nprint(subprocess.check_output([sys.executable, '-c', 'import ours; print(ours.VALUE)']))"
        assert (await pool.run_python(again)).stdout == b"b'3\\n'\n"


async def test_default_pool() -> None:
    """`run_python` needs no pool."""
    from isojob import _python

    try:
        assert (await run_python("result = argument", argument=[1])).value == [1]
        assert (await run_python("result = 2", limits=PATIENT)).value == 2
    finally:
        default, _python._default = _python._default, None
        if default is not None:
            await default.aclose()


def nested(depth: int) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ({"code": 5}, TypeError),
        ({"code": "1", "argument": {1, 2}}, TypeError),
        ({"code": "1", "args": ["a\0b"]}, ValueError),
        ({"code": "1", "files": {"main.py": b""}}, ValueError),
        ({"code": "1", "limits": 5}, TypeError),
        ({"code": "1", "limits": Limits(core="1MiB")}, ValueError),
        ({"code": "1", "nonsense": 5}, TypeError),
        ({"code": "1", "stdin": 99}, ValueError),
        ({"code": "1", "args": "abc"}, TypeError),
        ({"code": "1", "args": [1]}, TypeError),
        ({"code": "1", "args": 5}, TypeError),
        ({"code": "1", "preload": None}, TypeError),
        ({"code": "1", "preload": ["a" * 5000]}, ValueError),
        ({"code": "1", "preload": ["a" * 300] * 64}, ValueError),
        ({"code": "1", "files": [1]}, TypeError),
        ({"code": "1", "sandbox": Sandbox()}, TypeError),
        ({"code": Path()}, ValueError),
        ({"code": "1", "argument": nested(100_000)}, TypeError),
    ],
)
async def test_bad_calls(call: dict[str, Any], error: type[Exception], pool: PythonPool) -> None:
    """A named error before anything starts."""
    with pytest.raises(error):
        await pool.run_python(**call)
    with pytest.raises(ValueError, match="module:function"):
        await pool.call_python("math.sqrt", 1)
    with pytest.raises(TypeError, match="module:function"):
        await pool.call_python(math.sqrt, 1)  # type: ignore[arg-type]


async def test_preload_limits_that_the_host_cannot_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused as a job's are, not left out; those that do not count are not asked for."""
    driver = find()
    driver.missing |= {"cpus": "delegate it", "io_limit": "delegate it"}
    monkeypatch.setattr("isojob._stock.find_driver", lambda _: driver)
    limits = Limits(memory="512MiB", processes=64, cpus=0.5, io_read_bps=1 << 20)
    with pytest.raises(HostNotSupportedError, match=r"preload_limits\.cpus: .*cannot give cpus"):
        async with PythonPool(python=PYTHON, preload_limits=limits):
            pass
    allowed = Sandbox(allow_missing={"cpus"})
    options: dict[str, Any] = {"python": PYTHON, "limits": PATIENT, "sandbox": allowed}
    async with PythonPool(preload_limits=limits, **options) as pool:
        assert (await pool.run_python("result = 1")).value == 1


async def test_preload_limits_are_for_templates(tmp_path: Path) -> None:
    """A job is not held where its template is: on v1 it has a cgroup wherever that has one."""
    ours = sorted(os.sched_getaffinity(0))
    look = "import os\nresult = sorted(os.sched_getaffinity(0))"
    limits = Limits(memory="1GiB", processes=256, cpuset=str(ours[0]), cpus=0.5)
    async with PythonPool(python=PYTHON, limits=PATIENT, preload_limits=limits) as pool:
        for preload in ([], ["fractions"]):
            assert (await pool.run_python(look, preload=preload)).value == ours


async def test_disks_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of disk I/O are for what isojob itself binds in, too."""
    seen: list[Sandbox] = []

    def devices(sandbox: Sandbox) -> tuple[str, ...]:
        seen.append(sandbox)
        return ()

    monkeypatch.setattr("isojob._stock.block_devices", devices)
    assert sys.prefix != sys.base_prefix, "this test runs in a virtual environment"
    async with PythonPool(limits=PATIENT, parked=0):
        pass
    assert sys.prefix in {mount.source for mount in seen[-1].mounts}


async def test_bad_pools(tmp_path: Path) -> None:
    """The same for pools."""
    cases: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"preload": "json"}, TypeError),
        ({"preload": ["a b"]}, ValueError),
        ({"preload": ["os; x"]}, ValueError),
        ({"rotate_jobs": 0}, ValueError),
        ({"rotate_jobs": "3"}, TypeError),
        ({"rotate_jobs": 2.5}, TypeError),
        ({"python": 5}, TypeError),
        ({"preload_time": -1}, ValueError),
        ({"max_value": "5 apples"}, ValueError),
        ({"max_value": 1 << 40}, ValueError),
        ({"max_jobs": 0}, ValueError),
        ({"sandbox": 5}, TypeError),
        ({"preload_limits": 5}, TypeError),
    ]
    for options, error in cases:
        with pytest.raises(error):
            PythonPool(**options)
    with pytest.raises(ValueError, match=r"preload_limits\.cpuset: '4095'"):
        async with PythonPool(python=PYTHON, preload_limits=Limits(cpuset="4095")):
            pass
    with pytest.raises(CommandNotFoundError):
        async with PythonPool(python=tmp_path / "python"):
            pass
    shim, text, closed = tmp_path / "shim", tmp_path / "text", tmp_path / "closed"
    shim.write_text("#!/bin/sh\necho shim: no such version >&2\nexit 127\n")
    text.write_text("print(1)\n")
    closed.write_text("")
    lies = ("[1, 2]", "[" * 100_000, '["", "", "", "", "cpython", ["x"]]', '["", "", "", 1, "", 3]')
    liars = [tmp_path / f"liar{number}" for number in range(len(lies))]
    for file, lie in zip(liars, lies, strict=True):
        file.write_text(f"#!/bin/sh\necho '{lie}'\n")
    for file in (shim, text, *liars):
        file.chmod(0o755)
    programs: list[tuple[str | Path, str]] = [
        ("/bin/true", "no Python: it exited with 0"),
        (shim, "no Python: it exited with 127: shim: no such version"),
        (text, "Exec format error"),
        *((liar, "no Python: it exited with 0") for liar in liars),
        (closed, "Permission denied"),
    ]
    for program, why in programs:
        with pytest.raises(CommandNotExecutableError, match=why):
            async with PythonPool(python=program):
                pass


async def test_a_script_that_starts_an_interpreter(tmp_path: Path) -> None:
    """As the shims of version managers do: jobs run in what it starts, not in the script."""
    shim = tmp_path / "python"
    shim.write_text(f'#!/bin/sh\nexec "{PYTHON}" "$@"\n')
    shim.chmod(0o755)
    async with PythonPool(python=shim, limits=PATIENT, parked=0) as pool:
        assert (await pool.run_python("result = 1 + 1")).value == 2
    with pytest.raises(PoolClosedError):
        await PythonPool().run_python("1")


async def test_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two who enter it at once one is told; closing ends also who is about to open it."""
    pool = PythonPool(python=PYTHON, parked=0)
    said: list[str] = []

    async def enter() -> None:
        try:
            await pool.__aenter__()
            said.append("open")
        except (RuntimeError, PoolClosedError) as error:
            said.append(type(error).__name__)

    async with anyio.create_task_group() as group:
        group.start_soon(enter)
        group.start_soon(enter)
    assert sorted(said) == ["RuntimeError", "open"]
    await pool.aclose()
    said.clear()
    asked, answer, find = threading.Event(), threading.Event(), Interpreter.find

    def found_late(python: str) -> Interpreter:
        asked.set()
        answer.wait(60)
        return find(python)

    with monkeypatch.context() as patch:
        patch.setattr(Interpreter, "find", found_late)
        async with anyio.create_task_group() as group:
            group.start_soon(enter)
            await anyio.to_thread.run_sync(asked.wait, 60)
            await pool.aclose()
            answer.set()
    assert said == ["PoolClosedError"]
    with pytest.raises(PoolClosedError):
        await pool.run_python("")
    async with pool:
        assert (await pool.run_python("result = 1")).value == 1


async def test_preloads_that_change_streams(tmp_path: Path) -> None:
    """What they have put in the place of standard streams is not a job's."""
    tmp_path.chmod(0o755)
    wraps = "import codecs, sys\nsys.stdout = codecs.getwriter('utf-8')(sys.stdout.buffer)\n"
    (tmp_path / "wraps.py").write_text(wraps + "sys.stderr = None\ndel sys.stdin\n")
    sandbox = Sandbox(mounts=(Mount.bind(tmp_path, "/modules"),), env={"PYTHONPATH": "/modules"})
    async with PythonPool(["wraps"], python=PYTHON, sandbox=sandbox, parked=0) as pool:
        result = await pool.run_python("import sys; print(input(), file=sys.stderr)", input=b"x")
    assert (result.status, result.stderr) == (Status.OK, b"x\n")

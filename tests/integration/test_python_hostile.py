"""Warm interpreters and programs that know how they are made."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
from environment import PATIENT, PYTHON, SLOW, dedent

from isojob import Status
from isojob._python import PythonPool


@pytest.fixture
async def pool() -> AsyncIterator[PythonPool]:
    async with PythonPool(python=PYTHON, limits=PATIENT, parked=1) as pool:
        yield pool


SCAN = """
    import os
    needle = bytes(argument[::-1])
    def ours():
        for line in open("/proc/self/maps"):
            where, mode, *rest = line.split()
            if "r" in mode and not line.rstrip().endswith(("[vvar]", "[vsyscall]", "[vvar_vclock]")):
                yield tuple(int(x, 16) for x in where.split("-"))
    count = 0
    with open("/proc/self/mem", "rb", 0) as memory:
        for low, high in list(ours()):
            if high - low > 1 << 32: continue  # what a sanitizer keeps of all addresses
            for at in range(low, high, 1 << 20):
                try:
                    memory.seek(at)
                    count += memory.read(min(1 << 20, high - at)).count(needle)
                except (OSError, OverflowError): pass
    result = count
    """


async def test_no_secret_of_another_job(pool: PythonPool) -> None:
    """The whole address space is searched for what the job before had in hand, many times over."""
    marker = os.urandom(16)
    keep = "kept = [bytes(argument[::-1]) + bytes([n]) for n in range(200)]\nresult = len(kept)"
    backwards = list(marker[::-1])
    assert (await pool.run_python(keep, argument=backwards)).value == 200
    clean = await pool.run_python(dedent(SCAN), argument=backwards)
    # Its own needle is what there is to find, once or in a copy or two.
    assert clean.ok and 1 <= clean.value < 20, (clean, clean.stderr_text)
    dirty = await pool.run_python(keep + "\n" + dedent(SCAN), argument=backwards)
    assert dirty.value >= 200  # it would have been found


@pytest.mark.parametrize(
    "code",
    [
        # the template and siblings
        """
        import os
        result = [n for n in os.listdir("/proc") if n.isdigit() and int(n) not in (1, os.getpid())]
        """,
        """
        import os
        found = []
        for pid in range(1, 400):
            if pid == os.getpid(): continue
            for name in ("mem", "maps", "environ", "fd", "root", "ns/user", "cwd", "exe"):
                try:
                    path = f"/proc/{pid}/{name}"
                    found.append(os.readlink(path) if name in ("root", "ns/user", "cwd", "exe")
                                 else os.listdir(path) if name == "fd" else open(path, "rb").read(1))
                except OSError: pass
        result = found
        """,
        """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        assert os.getppid() == 1  # of what forked it nothing else is in its namespace
        found = []
        for pid in {*range(1, 400)} - {os.getpid()}:
            if libc.ptrace(16, pid, 0, 0) == 0: found.append(f"attached to {pid}")
            for number in range(65):
                try: os.kill(pid, number)
                except OSError: continue
                found.append(f"signal {number} to {pid}")
        result = found
        """,
        # what the launcher had
        """
        import os
        result = [d for d in os.listdir("/proc/self/fd") if int(d) > 2 and os.path.exists(f"/proc/self/fd/{d}")]
        """,
        """
        import os, socket
        found = []
        for fd in range(3, 300):
            try: os.fstat(fd)
            except OSError: continue
            found.append(fd)
        result = found
        """,
        """
        result = [line for line in open("/proc/self/maps") if "isojob-cell" in line]
        """,
    ],
)  # fmt: skip
async def test_reaches_nobody(code: str, pool: PythonPool) -> None:
    """Neither template nor sibling, neither init nor what its launcher had in hand."""
    result = await pool.run_python(dedent(code))
    assert result.ok, result.stderr_text
    assert result.value == []


async def test_the_message_is_not_kept(pool: PythonPool) -> None:
    """A large one comes in pages that the caller is charged with: they go when it has been read."""
    result = await pool.run_python(
        'result = [line for line in open("/proc/self/maps") if "memfd" in line], len(argument)',
        argument="x" * 300_000,
    )
    assert result.ok, result.stderr_text
    lines, size = result.value
    assert size == 300_000
    assert [line for line in lines if "isojob-job" in line] == []


@pytest.mark.parametrize(
    ("code", "status", "code_of_exit"),
    [
        # the launcher's own library is still loaded: another serve, another open
        (
            """
            import ctypes
            native = ctypes.PyDLL("/dev/.warm/warm.so")
            native.isojob_warm_open(4, 5)
            native.isojob_warm_serve(3, None)
            """,
            Status.OK,
            0,
        ),
        # what looks like a result, to whatever may be open
        (
            """
            import json, os, struct
            said = json.dumps({"value": 666, "exception": None}).encode()
            for fd in range(1024):
                for data in (said, struct.pack("<Q", len(said)) + said, bytes(64)):
                    for write in (os.write, lambda fd, data: os.pwrite(fd, data, 0)):
                        try: write(fd, data)
                        except OSError: pass
            os.closerange(0, 1024)
            raise SystemExit(3)
            """,
            Status.NONZERO_EXIT,
            3,
        ),
        # writes over the frames and the code of the runner
        (
            """
            import sys, os
            frame = sys._getframe(1)
            names = set()
            while frame:
                names |= set(frame.f_globals)
                frame.f_globals["_finish"] = lambda *a: os._exit(7)
                frame.f_globals["_describe"] = None
                frame.f_globals["json"] = None
                frame = frame.f_back
            1/0
            """,
            Status.NONZERO_EXIT,
            None,
        ),
        ("import sys\nsys.settrace(lambda *a: 1/0)\ndef f(): pass\nf()", Status.NONZERO_EXIT, 1),
        ("import builtins\nbuiltins.print = builtins.open = None\nraise SystemExit(9)", Status.NONZERO_EXIT, 9),
        ("import json\njson.dumps = lambda *a, **k: 1/0\nresult = 1", Status.OK, 0),
        ("import os\nos._exit = lambda *a: None\nresult = 1", None, None),
        ("import sys\nsys.modules.clear()\nresult = 1", None, None),
        ("import ctypes\nctypes.memset(0, 0, 99)", Status.SIGNALED, None),
        ("import ctypes, gc\nfor o in gc.get_objects()[:2000]: ctypes.memset(id(o), 0, 16)\n", None, None),
        (
            "import atexit, os, time\natexit.register(lambda: time.sleep(60))",
            Status.WALL_TIME_LIMIT,
            None,
        ),
        (
            "class D:\n    def __del__(self):\n        while True: pass\nd = D()",
            Status.CPU_TIME_LIMIT,
            None,
        ),
        (
            """
            import threading, time, os
            def late():
                time.sleep(0.3)
                os._exit(5)
            threading.Thread(target=late).start()
            result = 1
            """,
            Status.NONZERO_EXIT,
            5,
        ),
        ("import sys, io\nsys.stdout = sys.stderr = None\nresult = 1", Status.OK, 0),
        ("import gc\ngc.disable(); gc.unfreeze(); gc.collect()\nresult = 1", Status.OK, 0),
        ("import signal\nfor n in range(1, 32):\n  try: signal.signal(n, signal.SIG_IGN)\n  except OSError: pass\nwhile True: pass", Status.CPU_TIME_LIMIT, None),
    ],
)  # fmt: skip
async def test_evidence_stays_true(
    code: str, status: Status | None, code_of_exit: int | None, pool: PythonPool
) -> None:
    """However the interpreter is bent, the account and the end are the kernel's."""
    limits = PATIENT.model_copy(
        update={"cpu_time": 1.0 * max(1, SLOW / 4), "wall_time": 6.0 * max(1, SLOW / 4)}
    )
    result = await pool.run_python(dedent(code), limits=limits)
    if status is not None:
        assert result.status is status, (str(result), result.stderr_text)
    if code_of_exit is not None:
        assert result.exit_code == code_of_exit
    assert result.value != 666
    cpu = result.usage.cpu_time
    assert cpu is not None and cpu > 0 and result.evidence.cpu_is_whole
    if result.status is Status.CPU_TIME_LIMIT:
        assert cpu >= (limits.cpu_time or 0) * 0.99
    after = await pool.run_python(
        "import json, builtins, os, sys\nresult = [json.loads('1'), print is not None]"
    )
    assert after.value == [1, True]


async def test_what_one_changes_no_other_sees(pool: PythonPool) -> None:
    """Monkeypatches, sys.path, environment, handlers, files: all end with their job."""
    change = dedent("""
        import os, sys, json, signal, builtins, random, gc
        json.loads = lambda s: "owned"
        builtins.len = lambda x: 0
        sys.path.append("/owned"); sys.meta_path.clear(); sys.path_hooks.clear()
        os.environ["OWNED"] = "1"; os.umask(0); random.seed(1)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        gc.set_threshold(1); sys.setrecursionlimit(50)
        open("/tmp/owned", "w").close()
        """)
    look = dedent("""
        import os, sys, json, signal, gc
        result = [json.loads("1"), len([1, 2]), "/owned" in sys.path, len(sys.meta_path) > 0,
                  "OWNED" in os.environ, os.umask(0o22), gc.get_threshold()[0] > 1,
                  signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, sys.getrecursionlimit(),
                  os.listdir("/tmp")]
        """)
    before: Any = (await pool.run_python(look)).value
    assert (await pool.run_python(change)).ok
    assert (await pool.run_python(look)).value == before
    assert before[:6] == [1, 2, False, True, False, 0o22]

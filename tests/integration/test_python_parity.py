"""Warm interpreters: programs run as under ``python main.py``."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from environment import PATIENT, PYTHON, SLOW, dedent

from isojob import Mount, Pool, Sandbox, Status
from isojob._job import Content
from isojob._python import PythonPool


@pytest.fixture
async def pool() -> AsyncIterator[PythonPool]:
    async with PythonPool(python=PYTHON, limits=PATIENT, parked=1) as pool:
        yield pool


PROGRAMS = {
    "print": "print('hello'); print('wörld', end='')",
    "globals": """
        import sys
        print(__name__, __file__, sys.argv, sys.path[0], __spec__, __doc__, __builtins__)
        print(sorted(globals()), type(__loader__).__name__, __loader__.path)
        """,
    "exit codes": "import sys; sys.exit(argument_of if 0 else 7)",
    "exit without a main module": "import sys; del sys.modules['__main__']; sys.exit(0)",
    "exit none": "import sys; print(1); sys.exit()",
    "exit text": "import sys; print('a'); sys.exit('b')",
    "exit huge": "raise SystemExit(2**40)",
    "exit negative": "raise SystemExit(-1)",
    "os._exit": "import os; print('lost', end=''); os._exit(5)",
    "uncaught": "def f():\n    raise ValueError('x')\n\nf()",
    "chained": "try:\n    1/0\nexcept ZeroDivisionError:\n    raise KeyError('y')",
    "syntax": "x = = 1\n",
    "group": "raise ExceptionGroup('g', [ValueError(1), TypeError(2)])",
    "hook": "import sys\nsys.excepthook = lambda *a: print('hooked', a[0].__name__)\n1/0",
    "hook exits": "import sys\nsys.excepthook = lambda *a: sys.exit(5)\n1/0",
    "hook fails": "import sys\nsys.excepthook = lambda *a: [][1]\n1/0",
    "hook is none": "import sys\nsys.excepthook = None\n1/0",
    "hook is gone": "import sys\ndel sys.excepthook\n1/0",
    "interrupt": "print('x')\nraise KeyboardInterrupt",
    "interrupt and the end": """
        import atexit, threading, time
        atexit.register(print, 'registered')
        class Loud:
            def __del__(self): print('gone')
        kept = Loud()
        threading.Thread(target=lambda: (time.sleep(.1), print('thread'))).start()
        raise KeyboardInterrupt
        """,
    "interrupt, stdout closed": "import sys; sys.stdout.close(); raise KeyboardInterrupt",
    "interrupt, no stdout": "import sys; sys.stdout = None; raise KeyboardInterrupt",
    "exit of a message": "class E(Exception):\n    def __str__(s): raise SystemExit(0)\nraise E",
    "exit without stderr": "import sys; sys.stderr = None; sys.exit('bye')",
    "no stdout at all": "import sys; del sys.stdout",
    "no stderr at all": "import sys; del sys.stderr; sys.exit('bye')",
    "stderr closed below": "import os, sys; os.close(2); sys.stderr.write('x')",
    "last of all": """
        import atexit, sys
        names = ('last_type', 'last_value', 'last_traceback', 'last_exc')
        atexit.register(lambda: print([hasattr(sys, name) for name in names]))
        1/0
        """,
    "exit without a code": """
        class Exit(SystemExit):
            @property
            def code(self): raise ValueError
        raise Exit
        """,
    "json of its own": "import json\njson.dumps = lambda *a, **k: 1/0",
    "descriptor closed": "import os; print('x'); os.close(1)",
    "stdout before what went wrong": "import os; os.dup2(1, 2); print('x'); 1/0",
    "stdout before a message": "import os, sys; os.dup2(1, 2); print('x'); sys.exit('bye')",
    "stdout before atexit": """
        import atexit, os
        print('x', end='')
        atexit.register(os.abort)
        """,
    "stdout before threads": """
        import os, threading, time
        print('x', end='')
        threading.Thread(target=lambda: (time.sleep(.1), os._exit(0))).start()
        """,
    "what the buffer holds": "import os; print('x' * 9000, end=''); os._exit(0)",
    "files stay open": "f = open('out', 'w'); f.write('data')",
    "files stay open, held by typing": """
        from typing import List
        class Node: pass
        def walk(x: List[Node]): pass
        f = open('out', 'w'); f.write('data')
        """,
    "files stay open, held by a handler": """
        import signal
        def handler(*a): pass
        signal.signal(signal.SIGTERM, handler)
        f = open('out', 'w'); f.write('data')
        """,
    "destructors, held by a patch": """
        import json
        class Loud:
            def __del__(self): print('gone')
        kept = Loud()
        json.JSONEncoder.default = lambda self, o: str(o)
        """,
    "files stay open, in a module": "import helper; helper.f = open('out', 'w')\n"
    "helper.f.write('data')",
    "archives stay open, held by typing": """
        import zipfile
        from typing import List
        class Node:
            def walk(self): pass
        nodes: List[Node] = []
        f = zipfile.ZipFile('out', 'w')
        f.writestr(zipfile.ZipInfo('a', (1980, 1, 1, 0, 0, 0)), 'b')
        """,
    "destructors, held by a thread": """
        import threading, time
        class Loud:
            def __del__(self): print('gone')
        kept = Loud()
        def work():
            while True: time.sleep(.05)
        threading.Thread(target=work, daemon=True).start()
        """,
    "a module of its own, wanted by a thread": """
        import helper, threading, time
        def work():
            while True:
                import helper
                helper.VALUE
                time.sleep(.001)
        threading.Thread(target=work, daemon=True).start()
        time.sleep(.05)
        """,
    "a C stream that a thread reads": """
        import ctypes, os, threading, time
        os.dup2(os.pipe()[0], 0)
        threading.Thread(target=ctypes.CDLL(None).getchar, daemon=True).start()
        time.sleep(.05)
        """,
    "destructors that need modules": """
        import os
        from typing import List
        class File:
            def __del__(self): os.rename('part', 'out')
        open('part', 'w').close()
        files: List[File] = []
        kept = File()
        """,
    "audited": """
        import sys
        sys.addaudithook(lambda name, args: print(name))
        """,
    "odd variables": """
        from typing import List
        class Key(str):
            __hash__ = str.__hash__
            def __eq__(self, other): 1/0
        class Node:
            def walk(self): pass
        nodes: List[Node] = []
        globals()[Key('__loader__')] = 1
        """,
    "no modules": "import sys; sys.modules = None",
    "another stdout": "import io, sys; print('x'); sys.stdout = io.StringIO(); print('y')",
    "a tee for stdout": """
        import sys
        class Tee:
            def __init__(self): self.file = open('out', 'w')
            def write(self, text): self.file.write(text); sys.__stdout__.write(text)
            def flush(self): pass
        sys.stdout = Tee()
        print('x')
        """,
    "files in files stay open": """
        import bz2
        f = open('out', 'wb')
        g = bz2.BZ2File(f, 'wb')
        g.write(b'data')
        """,
    "order of destructors": """
        import weakref
        from functools import partial
        kept = [weakref.finalize(object, print, 'object')]
        a = type('A', (), {'__del__': partial(print, 'a')})()
        b = type('B', (), {'__del__': partial(print, 'b')})()
        """,
    "frozen exceptions": """
        import dataclasses
        @dataclasses.dataclass(frozen=True)
        class E(Exception):
            code: int = 3
        raise E
        """,
    "a kind of interrupt": "class E(KeyboardInterrupt): pass\nraise E",
    "interrupt, hook exits": """
        import sys
        sys.excepthook = lambda *a: sys.exit(9)
        raise KeyboardInterrupt
        """,
    "interrupt, blocked": """
        import signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        raise KeyboardInterrupt
        """,
    "zone": "import time; print(time.tzname, time.localtime(0)[:5])",
    "itself again": """
        import os, sys
        print(sys.argv, len(sys.orig_argv), flush=True)
        if 'again' not in sys.argv:
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], 'again'])
        """,
    "C streams": "import ctypes\nctypes.CDLL(None).printf(b'x\\n')",
    "atexit fails": "import atexit; atexit.register(lambda: 1/0); print('x')",
    "atexit exits": "import atexit, sys; atexit.register(lambda: sys.exit(7)); print('x')",
    "odd syntax error": "raise SyntaxError('m', ('f', 'a', 'b', 5))",
    "traced": """
        import sys
        def trace(frame, event, argument):
            if event == 'call': print('call', frame.f_code.co_name)
            return trace
        def f(): pass
        sys.settrace(trace)
        f()
        """,
    "profiled": """
        import sys
        def profile(frame, event, argument):
            if event == 'call': print('call', frame.f_code.co_name)
        def f(): pass
        sys.setprofile(profile)
        f()
        """,
    "lines of stdin": "import sys; print(list(sys.stdin))",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "abort": "import os; os.abort()",
    "streams": """
        import sys
        for s in (sys.stdin, sys.stdout, sys.stderr):
            print(s.name, s.mode, s.encoding, s.errors, s.line_buffering, s.fileno(), s.isatty(),
                  s.seekable(), type(s).__name__, type(s.buffer).__name__, s.newlines)
        print(sys.__stdout__ is sys.stdout, sys.flags.isolated, sys.flags.safe_path,
              sys.dont_write_bytecode)
        """,
    "stdin": "import sys\nprint(repr(input()), sys.stdin.read().upper(), sys.stdin.readline() == '')",
    "eof": "import sys; sys.stdin.read()\nprint(input())",
    "stderr order": "import sys\nfor i in range(3): print(i); print(i, file=sys.stderr)",
    "binary": "import sys; sys.stdout.buffer.write(b'\\xff\\0\\n')",
    "surrogates": "print('\\udcff')",
    "closed stdout": "import sys\nsys.stdout.close()\n",
    "atexit": """
        import atexit
        atexit.register(print, 'first registered')
        atexit.register(print, 'last registered')
        print('main')
        """,
    "threads": """
        import threading, time
        def late():
            time.sleep(0.2); print('late')
        threading.Thread(target=late).start()
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        print(threading.current_thread().name, threading.active_count())
        """,
    "destructors": """
        class Loud:
            def __del__(self): print('gone', __name__ if '__name__' in globals() else None)
        kept = Loud()
        print('end')
        """,
    "subprocess": """
        import subprocess, sys
        print(subprocess.run(['/bin/echo', 'child'], capture_output=True, text=True).stdout)
        print(subprocess.check_output([sys.executable, '-c', 'print(6*7)']).decode())
        """,
    "fork": """
        import os
        pid = os.fork()
        if pid == 0:
            print('child', flush=True); os._exit(3)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        """,
    "multiprocessing": """
        import multiprocessing as mp
        def square(x): return x * x
        if __name__ == '__main__':
            with mp.get_context('fork').Pool(2) as pool:
                print(pool.map(square, range(5)))
        """,
    "asyncio": """
        import asyncio
        async def main():
            await asyncio.sleep(0.01)
            return await asyncio.gather(*(asyncio.sleep(0, i) for i in range(3)))
        print(asyncio.run(main()))
        """,
    "signals": """
        import signal
        print(signal.getsignal(signal.SIGINT) is signal.default_int_handler,
              signal.getsignal(signal.SIGPIPE), signal.getsignal(signal.SIGTERM),
              signal.pthread_sigmask(signal.SIG_BLOCK, []))
        signal.signal(signal.SIGALRM, lambda *a: print('alarm'))
        signal.setitimer(signal.ITIMER_REAL, 0.05); signal.pause()
        """,
    "recursion": "def f(): f()\nf()",
    "module": "import helper; print(helper.VALUE, helper.__file__)",
    "pickle": """
        import pickle
        class C: pass
        print(pickle.loads(pickle.dumps(C())).__class__ is C, C.__module__)
        """,
    "warnings": "import warnings; warnings.warn('careful')",
    "environment": "import os; print({k: v for k, v in sorted(os.environ.items())}, os.getcwd())",
    "locale": "import locale, sys; print(locale.getlocale(), sys.getfilesystemencoding())",
    "main trick": "import __main__; x = 5; print(__main__.x)",
    "relative": "from . import x",
    "future": "print(1 / 2, type(print), (lambda: (yield))().__class__.__name__)",
    "gc": "import gc; print(gc.isenabled(), gc.get_threshold(), gc.get_debug())",
}


@pytest.mark.parametrize("name", list(PROGRAMS)[:: 1 if SLOW == 1 else 6])
async def test_as_under_python(name: str, pool: PythonPool) -> None:
    """Output, exit status and traceback of each program are those of ``python main.py``."""
    code = dedent(PROGRAMS[name])
    given: dict[str, Any] = {
        "input": "first\r\nzwei\rte ü\n".encode(),
        "env": {"GREETING": "hi", "TZ": "XYZ-9"},
    }
    given["collect"] = ["out"]
    files: dict[str, Content] = {"helper.py": b"VALUE = 11\n"}
    async with Pool(limits=PATIENT, parked=0) as plain:
        expected = await plain.run(
            [PYTHON, "main.py"], files={**files, "main.py": code.encode()}, **given
        )
    result = await pool.run_python(code, files=files, **given)
    # Our main program is some frames deeper, and elsewhere.
    deep = re.compile(rb"repeated \d+ more times|0x[0-9a-f]+")
    assert result.stderr is not None and expected.stderr is not None
    ours = [result.stdout, deep.sub(b"", result.stderr), result.status, result.returncode]
    assert result.files == expected.files
    expected = expected.model_copy(update={"stderr": deep.sub(b"", expected.stderr)})
    assert ours == [expected.stdout, expected.stderr, expected.status, expected.returncode]


async def test_modules_of_the_program(pool: PythonPool) -> None:
    """A program's own module is found though the template has loaded another of that name."""
    code = "import token, ast, json, json.decoder; result = [token.V, ast.V, json.V]"
    own: dict[str, Content] = {f"{name}.py": b"V = 1" for name in ("token", "ast", "json/decoder")}
    result = await pool.run_python(code, files={**own, "json/__init__.py": b"V = 1"})
    assert result.value == [1, 1, 1], result.stderr_text
    # A directory of data hides nothing.
    result = await pool.run_python("import json; json.dumps(1)", files={"json/data": b""})
    assert result.ok, result.stderr_text


async def test_preloads_in_the_working_directory(tmp_path: Path) -> None:
    """A module that is there and loaded already is the same."""
    tmp_path.chmod(0o755)
    (tmp_path / "__init__.py").write_text("import time; WHEN = time.monotonic()")
    sandbox = Sandbox(mounts=[Mount.bind(tmp_path, "/box/helpers")], env={"PYTHONPATH": "/box"})
    async with PythonPool(["helpers"], python=PYTHON, sandbox=sandbox, parked=0) as pool:
        code = "import helpers, time; result = helpers.WHEN"
        values = [(await pool.run_python(code)).value for _ in range(2)]
    assert values[0] == values[1] is not None


async def test_calls_that_leave_their_directory(pool: PythonPool) -> None:
    """It may be gone when they end."""
    helper = "import os, tempfile\ndef f():\n  with tempfile.TemporaryDirectory() as d: os.chdir(d)"
    result = await pool.call_python("helper:f", files={"helper.py": helper.encode()})
    assert result.ok, result.stderr_text


async def test_forked_children_say_nothing(pool: PythonPool) -> None:
    """What becomes of a child is not told for the program."""
    code = """
        import os
        result = "parent"
        if (pid := os.fork()) == 0:
            os.wait = None
            raise ValueError("the child's own")
        import atexit; atexit.register(os.waitpid, pid, 0)
        """
    result = await pool.run_python(dedent(code))
    assert (result.status, result.value, result.exception) == (Status.OK, "parent", None)
    assert "the child's own" in result.stderr_text


async def test_modules_that_come_with_the_job() -> None:
    """Directories of PYTHONPATH are searched though the template had none of them."""
    sandbox = Sandbox(env={"PYTHONPATH": "/box/lib"})
    options: dict[str, Any] = {"python": PYTHON, "limits": PATIENT, "sandbox": sandbox}
    async with PythonPool(["decimal"], parked=0, **options) as pool:
        files: dict[str, Content] = {"lib/helper.py": b"def f(): return 5"}
        result = await pool.run_python("import helper; result = helper.f()", files=files)
        assert result.value == 5, result.stderr_text
        assert (await pool.call_python("helper:f", files=files)).value == 5


@pytest.mark.parametrize("name", ["PYTHONSAFEPATH", "PYTHONDONTWRITEBYTECODE"])
async def test_variables_of_the_interpreter(name: str, tmp_path: Path) -> None:
    """Those of `Sandbox.env` hold for templates and jobs."""
    (tmp_path / "shown.py").write_text("V = 1")
    tmp_path.chmod(0o755)
    env = {"PYTHONPATH": "/modules", name: "1"}
    sandbox = Sandbox(mounts=(Mount.bind(tmp_path, "/modules"),), env=env)
    code = """
        import os, shown, sys
        try:
            import helper
        except ImportError as error:
            print(error)
        print(sys.path, sorted(os.listdir()))
        """
    called: dict[str, Content] = {"called.py": b"def f(): return 1"}
    files: dict[str, Content] = {"helper.py": b""}
    async with PythonPool(["shown"], python=PYTHON, sandbox=sandbox, parked=0) as pool:
        result = await pool.run_python(dedent(code), files=files)
        assert (await pool.call_python("called:f", files=called)).value == 1
    async with Pool(sandbox, parked=0) as plain:
        files["main.py"] = dedent(code).encode()
        expected = await plain.run([PYTHON, "main.py"], files=files)
    assert (result.stdout, result.stderr) == (expected.stdout, expected.stderr)

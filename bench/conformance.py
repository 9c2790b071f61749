"""CPython's own tests, run by ``python main.py`` and by forks of a warm interpreter, compared.

    python bench/conformance.py [--python PATH] [MODULE...]

Both run in cells of the same sandbox. The interpreter needs its ``test`` package: those of pyenv and
python.org have it, Debian's does not. Prints each module whose tests do not end the same, and a total.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass

import anyio

from isojob import Limits, Pool, PythonPool, Result, Sandbox
from isojob._interpreter import Interpreter

LIMITS = Limits(
    cpu_time=200, wall_time=200, memory="2GiB", processes=128, output="4MiB", disk="512MiB",
    open_files=1024,
)  # fmt: skip
DRIVER = """
import importlib, io, json, sys, unittest
importlib.import_module("test." + sys.argv[1])
suite = unittest.defaultTestLoader.loadTestsFromName("test." + sys.argv[1])
stream = io.StringIO()
done = unittest.TextTestRunner(stream=stream, verbosity=0).run(suite)
bad = sorted(str(case) for case, _ in (*done.failures, *done.errors))
skipped = sorted(str(case) for case, _ in done.skipped)
sys.__stdout__.write("\\n@" + json.dumps([done.testsRun, bad, skipped]) + "\\n")
sys.__stdout__.flush()
"""
MODULES = """
    abc argparse array ascii_formatd atexit augassign base64 baseexception bigmem binascii binop bisect
    bool bufio builtin bytes bz2 calendar call class cmath cmd code codeccallbacks codecs codeop
    collections colorsys compare compile complex configparser context contextlib contextlib_async copy
    copyreg coroutines csv dataclasses datetime dbm_dumb decimal decorators defaultdict deque descr
    descrtut dict dict_version dictcomps dictviews difflib dis doctest dummy_thread dynamic
    dynamicclassattribute enum enumerate eof errno except_star exception_group
    exception_hierarchy exception_variations exceptions fcntl file filecmp fileinput fileio finalization float
    flufl fnmatch fork1 format fractions frame frozen fstring functools future gc generator_stop
    generators genericalias genericclass genericpath genexps getopt getpass gettext glob global grammar
    graphlib gzip hash hashlib heapq hmac html htmlparser index inspect int int_literal io ipaddress
    isinstance iter iterlen itertools json keyword keywordonlyarg keywordonlyarg largefile lib2to3
    linecache list listcomps locale long longexp lzma math memoryio memoryview metaclass mimetypes
    minidom module modulefinder named_expressions numeric_tower opcodes openpty operator optparse
    ordered_dict os pathlib patma pickle picklebuffer pipes pkgutil plistlib popen positional_only_arg
    posix posixpath pow pprint print property pty pulldom pwd pyclbr pyexpat queue quopri raise random
    range re reprlib resource richcmp rlcompleter runpy sax sched scope secrets select selectors set setcomps
    shelve shlex shutil signal slice sort statistics stat strftime string string_literals stringprep strptime
    strtod struct structseq subclassinit subprocess sundry super symtable syntax sys sysconfig
    tabnanny tempfile textwrap thread threadedtempfile threading threading_local time timeit token
    tokenize traceback tstring tuple type_annotations type_comments typechecks types typing ucn unary
    unicode unicode_file unicode_identifiers unicodedata unittest univnewlines unpack unpack_ex
    userdict userlist userstring utf8_mode utf8source uuid wave weakref weakset with xml_etree yield_from
    zipapp zipfile zipimport zlib
"""
NO_TESTS = ("No module named 'test", "SkipTest")
"""This version has no such module, or it does not test this system."""


@dataclass
class End:
    """How a module's tests ended."""

    status: str
    run: int
    bad: list[str]
    skipped: list[str]


def read(result: Result) -> End:
    """What the driver has said."""
    for line in reversed(result.stdout_text.splitlines()):
        if line.startswith("@"):
            run, bad, skipped = json.loads(line[1:])
            return End(str(result.status), run, bad, skipped)
    return End(str(result.status), 0, [result.stderr_text.strip().rpartition("\n")[2][:200]], [])


async def main() -> None:
    """All modules that there are, each both ways."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("modules", nargs="*")
    options = parser.parse_args()
    names = options.modules or [f"test_{name}" for name in dict.fromkeys(MODULES.split())]
    interpreter = Interpreter.find(options.python)
    sandbox = Sandbox(mounts=interpreter.mounts(Sandbox().root))
    total = same = tests = alike = 0
    async with (
        Pool(sandbox, LIMITS, max_jobs=2) as plain,
        PythonPool(python=options.python, limits=LIMITS, max_jobs=2) as warm,
    ):
        for name in names:
            ends: list[End] = []
            command = [interpreter.executable, "main.py", name]
            ends.append(read(await plain.run(command, files={"main.py": DRIVER.encode()})))
            ends.append(read(await warm.run_python(DRIVER, args=[name])))
            executed, forked = ends
            if executed.run == 0 and any(why in "".join(executed.bad) for why in NO_TESTS):
                continue
            if executed.run == forked.run == 0:
                print(f"{name}: no test ran, {executed.status}", *executed.bad[:1])
                continue
            total += 1
            tests += executed.run
            different = {*executed.bad} ^ {*forked.bad} | {*executed.skipped} ^ {*forked.skipped}
            alike += executed.run - len(different)
            if (executed.run, executed.status) == (forked.run, forked.status) and not different:
                same += 1
                continue
            print(f"{name}: {executed.run} tests {executed.status}, {forked.run} {forked.status}")
            for case in sorted(different)[:6]:
                how = "executed" if case in (*executed.bad, *executed.skipped) else "warm"
                print(f"    only {how}: {case[:140]}")
    if total == 0:
        raise SystemExit("none of the modules is there: the interpreter has no test package")
    print(f"{same} of {total} modules and {alike} of {tests} tests end the same both ways")


if __name__ == "__main__":
    anyio.run(main)

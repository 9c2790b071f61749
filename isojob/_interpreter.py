"""Which Python a warm pool runs, and what of the host it needs to see."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from isojob.errors import CommandNotExecutableError, CommandNotFoundError
from isojob.mounts import Mount, Root

__all__ = ["Interpreter"]

_SECONDS = 20.0
_QUESTION = (
    "import json, sys; print(json.dumps([sys.prefix, sys.base_prefix, sys.exec_prefix, "
    "sys.executable, sys.implementation.name, list(sys.version_info[:2])]))"
)
_TOOLCHAIN = ("/usr/", "/bin/", "/lib/", "/lib64/")
"""What `Root.host` shows."""
_OLDEST = (3, 8)


@dataclass(frozen=True)
class Interpreter:
    """A CPython of this host.

    Attributes:
        executable: Absolute path; of a virtual environment, the one in there.
        prefixes: Directories with its standard library and packages.
        version: Major and minor.
    """

    executable: str
    prefixes: tuple[str, ...]
    version: tuple[int, int]

    @classmethod
    def find(cls, python: str | os.PathLike[str] | None = None) -> Interpreter:
        """The interpreter of that path; by default the one that runs us (blocking).

        Raises:
            CommandNotFoundError: It is not there.
            CommandNotExecutableError: It is no CPython of a version that can be used.
        """
        executable = os.path.abspath(sys.executable if python is None else os.fspath(python))
        if not os.path.exists(executable):
            raise CommandNotFoundError(executable, "name a Python interpreter by its path")
        # Without site a virtual environment does not say so.
        *prefixes, own, name, version = _ask(executable)
        found = int(version[0]), int(version[1])
        if name != "cpython" or found < _OLDEST:
            least = ".".join(map(str, _OLDEST))
            what = f"{name} {found[0]}.{found[1]}, and CPython {least} or newer is needed"
            raise CommandNotExecutableError(executable, f"it is {what}", 0)
        # A shim of pyenv's or asdf's is a script, and starts another.
        executable, homes = _follow(own or executable)
        folders = dict.fromkeys([*homes, *map(str, prefixes)])
        for folder in folders:
            if os.path.realpath(folder) in ("/", os.path.realpath(os.path.expanduser("~"))):
                what = f"it is installed in {folder}, and jobs would see all that is in there"
                raise CommandNotExecutableError(executable, what, 0)
        return cls(executable, tuple(folders), found)

    def mounts(self, root: Root) -> tuple[Mount, ...]:
        """What has to be bound for it, read-only, at its own place."""
        shown = _TOOLCHAIN if root.kind == "host" else ()
        wanted: list[str] = []
        for folder in self.prefixes:
            if f"{os.path.realpath(folder)}/".startswith(shown) or folder == "/":
                continue
            if not any(f"{folder}/".startswith(f"{other}/") for other in wanted):
                wanted = [other for other in wanted if not other.startswith(f"{folder}/")]
                wanted.append(folder)
        return tuple(Mount.bind(folder, folder) for folder in wanted)


def _ask(executable: str) -> list[Any]:
    """What it tells of itself, as `_QUESTION` lists it."""
    # A shim chooses by variables (PYENV_VERSION), and finds what it starts by PATH.
    unwanted = ("PYTHON", "LD_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    command = [executable, "-I", "-S", "-c", _QUESTION]
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    try:
        asked = subprocess.Popen(
            command, stdin=null, stdout=pipe, stderr=pipe, env=env, start_new_session=True
        )
    except OSError as error:
        raise CommandNotExecutableError(executable, errno=error.errno or errno.EACCES) from error
    with asked:
        try:
            out, err = asked.communicate(timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            what = f"it did not say within {_SECONDS:g} s which Python it is"
            raise CommandNotExecutableError(executable, what, 0) from None
        finally:
            if asked.returncode is None:
                os.killpg(asked.pid, signal.SIGKILL)  # what it has started with it
    try:
        answer = json.loads(out)
    except (ValueError, RecursionError):
        answer = None
    if asked.returncode or not _is_answer(answer):
        said = err.decode(errors="replace").strip().splitlines()[:1]
        what = ": ".join((f"it is no Python: it exited with {asked.returncode}", *said))
        raise CommandNotExecutableError(executable, what, 0)
    return answer


def _is_answer(answer: object) -> TypeGuard[list[Any]]:
    match answer:
        case [str(), str(), str(), str(), str(), [int(), int()]]:
            return True
    return False


def _follow(executable: str) -> tuple[str, list[str]]:
    """The path to execute, and the directories above ``bin`` that belong to an interpreter.

    A link from elsewhere (``~/.local/bin``) is followed, not shown to jobs: what else is there is
    none of their business.
    """
    homes = []
    at = Path(executable)
    chosen = None
    for _ in range(40):
        home = at.parent.parent
        if (home / "pyvenv.cfg").is_file() or next(home.glob("lib/python3*/os.py"), None):
            chosen = chosen or str(at)
            homes += [str(home), os.path.realpath(home)]
        if not at.is_symlink():
            break
        at = Path(os.path.normpath(at.parent / os.readlink(at)))
    return chosen or str(at), homes

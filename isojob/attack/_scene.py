"""What is put on the host for the attacks to reach, and what must be as it was afterwards."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["Scene"]

_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
_VARIABLE = "ISOJOB_ATTACK_SECRET"
_IPC_CREAT, _IPC_RMID = 0o1000, 0
_VICTIM = "import time; print(flush=True); time.sleep(3600)"
_MOUNTS = "/proc/self/mountinfo"
_PLACES = ("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", _MOUNTS)


class Scene:
    """A secret file, a variable, a process, a server, a socket and a segment of the host.

    Use it as a context manager; it takes all of them away again.
    """

    def __init__(self) -> None:
        self.marker = f"isojob-attack-{secrets.token_hex(6)}"
        self.stamp = secrets.token_hex(6)
        """What the arguments of every program begin with."""
        self._stack = ExitStack()
        self._servers: list[socket.socket] = []
        self._before: dict[str, str] = {}

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _build(self) -> None:
        directory = Path(tempfile.mkdtemp(prefix="scene-"))
        self._stack.callback(shutil.rmtree, directory, ignore_errors=True)
        directory.chmod(0o755)
        self._secret = directory / "secret"
        self._secret.write_text(self.marker)
        os.environ[_VARIABLE] = self.marker
        self._stack.callback(os.environ.pop, _VARIABLE, None)
        self._victim = subprocess.Popen(
            [sys.executable, "-c", _VICTIM, self.marker],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        self._stack.callback(self._end_victim)
        # exec has closed our pipe before /proc shows the new arguments: it says when it is there.
        assert self._victim.stdout is not None
        self._victim.stdout.readline()
        tcp = self._stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        local = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        local.bind("\0" + self.marker)
        local.listen()
        self._servers = [tcp, local]
        for server in self._servers:
            server.setblocking(False)
        libc = ctypes.CDLL(None)
        self._key = secrets.randbelow(2**30) + 1
        segment = libc.shmget(self._key, 4096, _IPC_CREAT | 0o666)
        if segment >= 0:
            self._stack.callback(libc.shmctl, segment, _IPC_RMID, None)
        self.words = {
            "marker": self.marker,
            "secret": str(self._secret),
            "pid": str(self._victim.pid),
            "port": str(tcp.getsockname()[1]),
            "abstract": self.marker,
            "segment": str(self._key),
            **{f"ns_{kind}": os.readlink(f"/proc/self/ns/{kind}") for kind in _NAMESPACES},
        }
        self._before = self._places()
        self._children = set(self._own_children())
        self._pools = set(self._cgroups())

    def _end_victim(self) -> None:
        self._victim.kill()
        self._victim.communicate()

    @staticmethod
    def _places() -> dict[str, str]:
        found = {}
        for place in _PLACES:
            try:
                text = Path(place).read_text()
            except OSError:
                continue
            ours = [line for line in text.splitlines() if "isojob" in line]
            found[place] = "\n".join(ours) if place == _MOUNTS else text
        return found

    def damage(self) -> Iterator[str]:
        """What is not as it was, in words."""
        if self._victim.poll() is not None:
            yield "a process of the host was killed"
        try:
            if self._secret.read_text() != self.marker:
                yield "a file of the host was changed"
        except OSError:
            yield "a file of the host is gone"
        for server in self._servers:
            try:
                server.accept()[0].close()
            except BlockingIOError:
                continue
            yield "a server of the host was connected to"
        for place, text in self._places().items():
            if text != self._before[place]:
                yield f"{place} has changed"

    @staticmethod
    def survivors(token: str) -> list[str]:
        """Processes that carry this word in their arguments."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    arguments = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if token.encode() in arguments:
                    found.append(entry.name)
        return found

    def processes_left(self) -> list[str]:
        """Attacking programs, and children of this process that were not there before."""
        return [
            *self.survivors(self.stamp),
            *(pid for pid in self._own_children() if pid not in self._children),
        ]

    @staticmethod
    def _own_children() -> Iterator[str]:
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):  # a thread that has ended
                yield from (task / "children").read_text().split()

    def cgroups_left(self) -> list[str]:
        """Directories of pools of this process that were not there before."""
        return [path for path in self._cgroups() if path not in self._pools]

    @staticmethod
    def _cgroups() -> list[str]:
        prefix = f"isojob-{os.getpid()}-"
        return [
            os.path.join(top, name)
            for top, names, _ in os.walk("/sys/fs/cgroup")
            for name in names
            if name.startswith(prefix)
        ]

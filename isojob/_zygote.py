"""The zygote process: started from a sealed memfd, asked for cells, ended and cleaned up after."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import threading
from contextlib import suppress
from importlib.resources import as_file, files
from pathlib import Path

from typing_extensions import override

from isojob import wire
from isojob._descriptors import sealed_memfd, send_fds
from isojob._maker import Maker
from isojob._shutdown import ending
from isojob._spec import FIXED_RLIMITS, rlimit
from isojob._starts import Starts
from isojob._template import Imports, Template
from isojob.cgroups import Driver, Subtree
from isojob.errors import (
    HostNotSupportedError,
    IsojobError,
    PoolBrokenError,
    PoolClosedError,
    SandboxSetupError,
)
from isojob.host import failures, ids
from isojob.host.filesystems import mounted_files
from isojob.host.posture import check_always, find_filter
from isojob.host.rootfs import write_plan
from isojob.sandbox import Sandbox
from isojob.wire import FilterFlag, MessageType, Tag, Writer

__all__ = ["Zygote", "privilege"]

START_SECONDS = 20.0
STOP_SECONDS = 10.0
SLOTS = 4096
_ROOT, _SINGLE, _RANGES = 0, 1, 2


def privilege(uid_range: range = ids.DEFAULT_RANGE, *, writable: bool = False) -> str:
    """How cells get their ids: ``root``, ``user+ranges`` or ``user``.

    uid 0 of a container's user namespace is no root here: it cannot map ids it does not have. A
    writable root has to be the job's, and only root can give it to another id than the caller's.
    """
    if os.geteuid() == 0 and ids.mapped(uid_range):
        return "root"
    return "user+ranges" if ids.subordinate() and not writable else "user"


_executable: bytes | None = None


def _program() -> bytes:
    global _executable
    if _executable is None:
        source = files("isojob").joinpath("_libexec", "isojob-zygote")
        try:
            with as_file(source) as path:
                _executable = Path(path).read_bytes()
        except FileNotFoundError as error:
            raise HostNotSupportedError(
                "this installation of isojob has no isojob-zygote executable",
                "reinstall isojob on Linux with a C compiler: pip install --force-reinstall isojob",
            ) from error
    return _executable


class Zygote(Maker):
    """One running zygote with its subtree of cgroups and its block of uids.

    With a template its launchers are forks of a warm interpreter.

    Not bound to an event loop or thread; `make` may be called from any.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        driver: Driver,
        uid_range: range,
        template: Template | None,
        starts: Starts,
    ) -> None:
        self.privilege = privilege(uid_range, writable=sandbox.root.writable)
        self.mode = {"root": _ROOT, "user": _SINGLE, "user+ranges": _RANGES}[self.privilege]
        super().__init__(driver, own_ids=self.mode != _SINGLE)
        self._given_up = False
        self._template = template
        self.template_pid = 0
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ids: ids.IdBlock | None = None
        self._subordinate: ids.SubordinateIds | None = None
        try:
            with starts.under_way(self):
                self._start(sandbox, uid_range)
        except BaseException:
            self.close()
            raise

    def _start(self, sandbox: Sandbox, uid_range: range) -> None:
        config = Writer(MessageType.CONFIG)
        fds: list[int] = []
        slots, base = SLOTS, 1
        if self.mode == _ROOT:
            self._ids = ids.claim(2 * slots, uid_range)
            base = self._ids.first
        elif self.mode == _SINGLE:
            ids.check_not_root()
        else:
            self._subordinate = subordinate = ids.subordinate()
            assert subordinate is not None
            slots = min(slots, subordinate.count // 2)
            base = subordinate.some(2 * slots)
        self.subtree = self.driver.create()
        check_always(self.driver, sandbox.allow_missing)  # some is seen in what was made
        config.number(Tag.MODE, self.mode)
        config.number(Tag.UID_BASE, base)
        config.number(Tag.SLOTS, slots)
        config.number(Tag.JOB_UID, sandbox.uid)
        config.number(Tag.JOB_GID, sandbox.gid)
        config.text(Tag.HOSTNAME, sandbox.hostname)
        config.text(Tag.WORKDIR, sandbox.workdir)
        compiled = find_filter(sandbox)
        if compiled is not None and compiled.bpf:
            flags = FilterFlag.EARLY if compiled.preload else FilterFlag(0)
            flags |= FilterFlag.NOTIFY if compiled.notify else FilterFlag(0)
            config.put(Tag.FILTER, compiled.bpf, flags)
        for resource, value in FIXED_RLIMITS:
            rlimit(config, resource, value, value)
        write_cgroups(config, self.driver, self.subtree, fds)
        plan = Writer(MessageType.CONFIG)
        if self._template is not None:
            self._template.write(config, plan, self.driver, sandbox)
        with mounted_files(sandbox.root.lower) as images:
            write_plan(config, plan, sandbox, images, own_ids=self.own_ids)
            fds.extend(images.values())
            if self._ids is not None:
                config.put(Tag.IDS_LOCK)
                fds.append(self._ids.lock)
            pidfd = os.pidfd_open(os.getpid())
            try:
                config.put(Tag.HOST_PIDFD)
                self._spawn(config, plan, [*fds, pidfd])
            finally:
                os.close(pidfd)

    def _spawn(self, config: Writer, plan: Writer, fds: list[int]) -> None:
        """Starts the process, and waits until it is ready."""
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control = control
        if self._given_up:
            control.shutdown(socket.SHUT_RDWR)
        control.settimeout(START_SECONDS)
        body = tree = program = -1
        try:
            body = sealed_memfd("isojob-config", config.body())
            tree = sealed_memfd("isojob-root", plan.body())
            program = sealed_memfd("isojob-zygote", _program())
            self._process = _start(program, theirs.fileno())
            theirs.close()
            send_fds(control, config.header(memfd=True), [body, tree, *fds])
            self._await_ready(control, None if self._template is None else Imports(self._template))
        except TimeoutError as error:
            raise PoolBrokenError(f"the zygote was not ready after {START_SECONDS} s") from error
        except BrokenPipeError as error:
            raise self._died_at_start() from error
        finally:
            theirs.close()
            for fd in (body, tree, program):
                if fd >= 0:
                    os.close(fd)
        control.setblocking(False)

    def give_up(self) -> None:
        """Has the start fail soon, from any thread: nobody waits for it any more."""
        self._given_up = True
        if (control := self._control) is not None:
            with suppress(OSError):
                control.shutdown(socket.SHUT_RDWR)

    def _await_ready(self, control: socket.socket, imports: Imports | None) -> None:
        while True:
            if imports is not None:
                control.settimeout(imports.left)
            try:
                datagram = control.recv(wire.RECEIVE_SIZE)
            except ConnectionResetError:
                datagram = b""
            except TimeoutError:
                if imports is None:
                    raise
                raise imports.late() from None
            if not datagram:
                raise self._died_at_start()
            message = wire.decode(datagram)
            if message.kind is MessageType.READY:
                self.template_pid = wire.parse_ready(message)
                return
            if message.kind is MessageType.PRELOAD and imports is not None:
                imports.hear(message)
            elif message.kind is MessageType.MAP:
                self._map_ids()
                send_fds(control, Writer(MessageType.MAP).message(), [])
            else:
                failure = wire.parse_failure(message)
                if failure.stage == "template" and imports is not None:
                    raise imports.died()
                raise failures.to_exception(failure)

    def _died_at_start(self) -> IsojobError:
        if self._given_up:
            return PoolClosedError()
        assert self._process is not None
        how = ""
        with suppress(subprocess.TimeoutExpired):
            if (ended := self._process.wait(1)) == -signal.SIGKILL:
                how = ": killed, perhaps for want of memory"
            if ended == -signal.SIGSYS:
                return HostNotSupportedError(
                    "a seccomp filter around this process kills it for a system call that making "
                    "a sandbox needs",
                    "systemd: SystemCallFilter=@system-service @mount sethostname seccomp; "
                    f"else {failures.CONTAINER}",
                )
        return PoolBrokenError(f"the zygote died while it started{how}")

    def _map_ids(self) -> None:
        """newuidmap(1): our own id as 0, the subordinate ones from 1."""
        subordinate = self._subordinate
        assert subordinate is not None and self._process is not None
        for program, own, first in (
            ("newuidmap", os.getuid(), subordinate.uid),
            ("newgidmap", os.getgid(), subordinate.gid),
        ):
            numbers = (self._process.pid, 0, own, 1, 1, first, subordinate.count)
            command = [program, *map(str, numbers)]
            try:
                done = subprocess.run(command, capture_output=True, check=False, timeout=10)
            except subprocess.TimeoutExpired as error:
                raise SandboxSetupError(program, errno.ETIMEDOUT) from error
            except OSError as error:
                raise SandboxSetupError(program, error.errno or errno.EIO) from error
            if done.returncode != 0:
                raise SandboxSetupError(
                    program, errno.EPERM, done.stderr.decode("utf-8", "replace").strip()
                )

    @override
    def kill(self) -> None:
        """Ends it at once, for it does not answer; its parked cells go with it."""
        self.broken = True
        if (process := self._process) is not None:
            process.kill()

    @property
    @override
    def alive(self) -> bool:
        """Whether the process runs; a dead one is to be replaced."""
        return not self.broken and self._process is not None and self._process.poll() is None

    def ask(self, message: bytes) -> socket.socket:
        """Sends one end of a socket: for a session, or for another template.

        Returns:
            The other end.

        Raises:
            BlockingIOError: Too many requests are under way; try again in a moment.
            PoolBrokenError: This one is dead.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self.send(message, [theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        return ours

    @property
    @override
    def pid(self) -> int:
        """Host pid of the process."""
        assert self._process is not None
        return self._process.pid

    @override
    def close(self) -> None:
        """Ends the zygote with all its cells, waits for it (bounded), removes what it could not.

        Idempotent, from any thread.
        """
        with ending(), self._lock:
            control, self._control = self._control, None
            if control is not None:
                # Not close alone: a forked child of ours may hold the socket open.
                with suppress(OSError):
                    control.shutdown(socket.SHUT_RDWR)
                control.close()
            if self._process is not None:
                self._end_process(self._process)
                self._process = None
            try:
                if self.subtree is not None:
                    self.subtree.release()
                    self.subtree.remove()
                    self.subtree = None
            finally:  # not before: a job of one that was killed may run until here
                if self._ids is not None:
                    self._ids.release()
                    self._ids = None

    @override
    def let_go(self) -> None:
        """In a forked child: closes the descriptors; the process is the parent's to end."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self.subtree is not None:
            self.subtree.release()
            self.subtree = None
        if self._ids is not None:
            self._ids.release()
            self._ids = None
        if self._process is not None:
            # Not our child: nothing to wait for, and no warning that it still runs.
            self._process.returncode = 0
            self._process = None

    @staticmethod
    def _end_process(process: subprocess.Popen[bytes]) -> None:
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # it hangs in a file system
                process.wait(STOP_SECONDS)


def _start(program: int, control: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            ["isojob-zygote", str(control)],
            executable=f"/proc/self/fd/{program}",
            pass_fds=(program, control),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            # Ctrl-C at a terminal is for the host process, which then ends us in order.
            start_new_session=True,
        )
    except OSError as error:
        failure = wire.Failure("start of the zygote", error.errno or 0)
        raise failures.to_exception(failure) from error


def write_cgroups(out: Writer, driver: Driver, subtree: Subtree, fds: list[int]) -> None:
    """Writes which cgroup files the cells use, in the order of the attached descriptors."""
    names = driver.files
    out.number(Tag.HIERARCHIES, len(subtree.bases))
    fds.extend(subtree.bases)
    for hierarchy, parent in enumerate(subtree.parents):
        out.text(Tag.CG_BASE, subtree.name, hierarchy)
        fds.append(parent)
    for hierarchy, file in names.limits:
        out.text(Tag.CG_LIMIT, file, hierarchy)
    for index, evidence in enumerate(names.evidence):
        flag = wire.RAW_EVIDENCE if evidence.raw else 0
        out.text(Tag.CG_EVIDENCE, evidence.name, evidence.hierarchy | flag)
        for line, mark in evidence.counters:
            out.pair(Tag.CG_COUNTER, line, mark, index)
    if names.cpu is not None:
        counter, unit = names.cpu
        out.number(Tag.CG_CPU, unit, counter)
    if names.kill is not None:
        out.text(Tag.CG_KILL, names.kill[1], names.kill[0])
    if names.oom is not None:
        hierarchy, counter = names.oom
        out.number(Tag.CG_OOM, counter, hierarchy)
    if names.into:
        out.put(Tag.CG_INTO)

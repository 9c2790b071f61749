"""Templates that have been taken over, by what they were to preload, and lie to their zygote."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import anyio
import pytest
from environment import PATIENT, PYTHON, SLOW, cmdline, dedent, settle

from isojob import (
    IsojobError,
    Mount,
    PoolBrokenError,
    PreloadError,
    PythonPool,
    Sandbox,
    SandboxSetupError,
)
from isojob._zygote import Zygote
from isojob.wire import MessageType, Tag, Writer

LIAR = dedent("""
    import ctypes, os, socket, time
    from contextlib import suppress

    NEW_USER, PARENT, CHILD_ENDS = 0x10000000, 0x8000, 17
    CLONE = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
    libc = ctypes.CDLL(None, use_errno=True)
    kept = []

    def clone(flags):
        pid = libc.syscall(CLONE, flags | CHILD_ENDS, 0, 0, 0, 0)
        if pid < 0:
            raise OSError(ctypes.get_errno(), "clone")
        return pid

    def greet(hello):
        hello.send(b"hello")
        time.sleep(600)

    def itself(hello):  # to have the template's maps written, as if they were a cell's
        hello.send(b"hello")

    def stranger(hello):  # who is no child of the zygote
        if os.fork() == 0:
            greet(hello)

    def reaped(hello):  # its pid may be somebody else's by now
        if (pid := os.fork()) == 0:
            hello.send(b"hello")
            os._exit(0)
        os.waitpid(pid, 0)

    def beside(hello):  # in the zygote's own user namespace
        if clone(PARENT) == 0:
            greet(hello)

    def mapped(hello):  # by itself, to its own id
        if clone(PARENT | NEW_USER) == 0:
            with open("/proc/self/uid_map", "w") as file:
                file.write(f"0 {MINE} 1")
            greet(hello)

    def dead(hello):  # when its maps are written, or before
        if clone(PARENT | NEW_USER) == 0:
            hello.send(b"hello")
            os._exit(0)

    def silent(hello):
        kept.append(hello.dup())

    def absent(hello):
        pass

    def flood(hello):  # as the cell's init: words of files, more than there can be
        if clone(PARENT | NEW_USER) == 0:
            hello.send(b"hello")
            _, fds, _, _ = socket.recv_fds(hello, 4096, 250)
            lease = socket.socket(fileno=fds[0])
            for _ in range(50_000):
                lease.send(WORDS)
            os._exit(0)

    def reapers(hello):  # more children for the zygote than it can bury
        while True:
            with suppress(OSError):  # on a busy machine so many are dead that no more can be made
                if clone(PARENT) == 0:
                    os._exit(0)

    me = os.getpid()
    MINE = os.getuid()
    WORDS = bytes.fromhex(os.environ["WORDS"])
    answer = os.environ["ANSWER"]
    requests = socket.socket(fileno=3)
    while answer == "never ready":
        requests.send(b"Iliar")
    if answer == "absent" and WORDS:
        requests.send(WORDS)
    requests.send(b"R")
    while answer == "talkative":
        requests.send(b"more")
    while True:
        data, fds, _, _ = socket.recv_fds(requests, 16384, 1)
        if not data:
            os._exit(0)
        with socket.socket(fileno=fds[0]) as hello, suppress(Exception):
            globals()[answer](hello)
        if os.getpid() != me:  # then nobody says hello, which is no lie
            os._exit(1)
""")

LIES = ["itself", "stranger", "reaped", "beside"]
if os.geteuid() == 0:  # else its id is 0, to be mapped with CAP_SETFCAP alone (5.12)
    LIES.append("mapped")


def opened(folder: Path, answer: str, *preload: str, words: bytes = b"") -> PythonPool:
    """A pool that sees the module ``liar``."""
    folder.chmod(0o755)
    (folder / "modules").mkdir()
    (folder / "modules/liar.py").write_text(LIAR)
    env = {"PYTHONPATH": "/modules", "ANSWER": answer, "WORDS": words.hex()}
    sandbox = Sandbox(mounts=[Mount.bind(folder / "modules", "/modules")], env=env)
    return PythonPool(
        preload,
        python=PYTHON,
        sandbox=sandbox,
        limits=PATIENT,
        parked=0,
        preload_time=2 * SLOW if answer == "never ready" else 60,
    )


async def is_replaced(answer: str, folder: Path) -> None:
    """What lies is no cell's, and the pool tries twice more."""
    async with opened(folder, answer, "liar") as pool:
        with anyio.fail_after(60 * SLOW), pytest.raises(PoolBrokenError, match="template died"):
            await pool.run_python("result = 1")
        assert pool.statistics().zygotes == 3


@pytest.mark.parametrize("answer", LIES)
async def test_lies_about_a_cell(answer: str, tmp_path: Path) -> None:
    """No cell but a new child of the zygote's, in a new user namespace: who says else is replaced."""
    await is_replaced(answer, tmp_path)


if SLOW == 1:  # the zygote waits for ten seconds, three times

    @pytest.mark.slow
    async def test_takes_the_zygotes_patience(tmp_path: Path) -> None:
        """Who says nothing, or keeps it busy meanwhile, is replaced when that is over."""
        async with anyio.create_task_group() as tasks:
            for answer in ("silent", "reapers"):
                folder = tmp_path / answer
                folder.mkdir()
                tasks.start_soon(is_replaced, answer, folder)


@pytest.mark.parametrize("answer", [*LIES, "absent", "dead"])
async def test_a_branch_lies(answer: str, tmp_path: Path) -> None:
    """It takes no job along but those that asked for it."""
    async with opened(tmp_path, answer) as pool:
        for _ in range(2):
            with anyio.fail_after(30 * SLOW), pytest.raises(IsojobError) as caught:
                await pool.run_python("result = 1", preload=["liar"])
            if answer in LIES:
                assert isinstance(caught.value, PoolBrokenError)
            elif answer == "absent":
                assert isinstance(caught.value, SandboxSetupError)
                assert caught.value.stage == "fork of the template"
            assert (await pool.run_python("result = 2")).value == 2
        assert pool.statistics().zygotes == 1


async def test_speaks_when_not_asked(tmp_path: Path) -> None:
    """The zygote does not read on: it has ended it."""
    async with opened(tmp_path, "talkative", "liar") as pool:
        zygote = pool._pool.stock.zygote
        assert isinstance(zygote, Zygote)
        assert not settle(lambda: cmdline(zygote.template_pid), 10.0 * SLOW)
        with pytest.raises(PoolBrokenError, match="template died"):
            await pool.run_python("result = 1")


async def test_speaks_for_ever(tmp_path: Path) -> None:
    """Of its imports, before it is ready: it has its time like any other."""
    with anyio.fail_after(30 * SLOW), pytest.raises(PreloadError, match="were not done after"):
        async with opened(tmp_path, "never ready", "liar"):
            pass


async def test_floods_the_host(tmp_path: Path) -> None:
    """The host reads no more of a cell's words than there can be, and believes none of them."""
    words = Writer(MessageType.FILE)
    words.text(Tag.NAME, "same")
    async with opened(tmp_path, "flood", "liar", words=words.message()) as pool:
        for number in (1, 2):
            with anyio.fail_after(60 * SLOW), pytest.raises(PoolBrokenError, match="more files"):
                await pool.run_python("result = 1")
            assert pool.statistics().zygotes == number, "what has lied is not asked again"


async def test_forges_a_failure(tmp_path: Path) -> None:
    """What it says is no word of the zygote's, who would name a cure: to loosen the host."""
    words = Writer(MessageType.ERROR)
    words.text(Tag.STAGE, "uid_map")
    words.put(Tag.ERRNO, struct.pack("<i", errno.EPERM))
    async with opened(tmp_path, "absent", "liar", words=words.message()) as pool:
        with pytest.raises(SandboxSetupError) as caught:
            await pool.run_python("result = 1")
    assert caught.value.stage == "fork of the template"


async def test_no_socket_that_holds_up_who_closes_it(tmp_path: Path) -> None:
    """It could be sent to the zygote, or as a cell's to the host, which close what they do not want."""
    tmp_path.chmod(0o755)
    code = dedent("""
        import socket

        def refused(make, *words):
            try:
                make(*words)
            except OSError as error:
                return error.errno

        tcp = socket.socket()
        seen = [
            refused(tcp.setsockopt, socket.SOL_SOCKET, socket.SO_LINGER, b"\\1\\0\\0\\0" * 2),
            refused(tcp.setsockopt, socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            refused(socket.socket, socket.AF_PACKET, socket.SOCK_RAW),
        ]
        tcp.close()
    """)
    (tmp_path / "prober.py").write_text(code)
    sandbox = Sandbox(mounts=[Mount.bind(tmp_path, "/modules")], env={"PYTHONPATH": "/modules"})
    async with PythonPool(["prober"], python=PYTHON, sandbox=sandbox, limits=PATIENT) as pool:
        result = await pool.run_python("import prober; result = prober.seen")
    assert result.value == [errno.ENOPROTOOPT, None, errno.EAFNOSUPPORT]

"""Where there is no Linux: the package imports, its models work, and running a job says what to do.

The other system is imitated: what it lacks is taken away before isojob is imported. A run on one
would be better; the code under test takes every such path here too.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

IMITATE = """
import anyio._backends._asyncio, anyio.to_thread, os, signal, socket, subprocess, sys
import isojob  # with everything of others' that it needs; only our own is imported anew below
isojob.Sandbox.model_validate_json(isojob.Sandbox().model_dump_json())
for name in [name for name in sys.modules if name.split(".")[0] == "isojob"]:
    del sys.modules[name]
LINUX = ("memfd_create pidfd_open pipe2 sched_getaffinity MFD_CLOEXEC MFD_ALLOW_SEALING setns unshare"
         " getxattr splice eventfd").split()
POSIX = ("register_at_fork fork geteuid getuid getgid getegid getgroups uname sysconf fchmod O_CLOEXEC"
         " O_DIRECTORY O_NOFOLLOW pread set_blocking").split()
MODULES = ("fcntl", "pwd", "grp", "resource", "termios", "pty")
system = sys.argv[1]
sys.platform = system
for name in LINUX + (POSIX if system == "win32" else []):
    if hasattr(os, name):
        delattr(os, name)
if system == "win32":
    for name in MODULES:
        sys.modules[name] = None
    for name in ("AF_UNIX", "SOCK_SEQPACKET", "socketpair", "send_fds", "recv_fds", "SCM_RIGHTS",
                 "MSG_NOSIGNAL", "MSG_CMSG_CLOEXEC"):
        if hasattr(socket, name) and name != "socketpair":
            delattr(socket, name)
    for name in ("SIGPIPE", "pthread_sigmask", "sigtimedwait", "SIGCHLD"):
        delattr(signal, name)
import isojob
assert isojob.Limits(memory="64MiB").memory == 64 << 20
sandbox = isojob.Sandbox(mounts=[isojob.Mount.tmpfs("/data", size="1MiB")])
assert isojob.Sandbox.model_validate_json(sandbox.model_dump_json()) == sandbox
assert isojob.SeccompProfile.default().name
async def main():
    try:
        await isojob.run_isolated(["true"])
    except isojob.HostNotSupportedError as error:
        print(type(error).__name__, error.cure)
"""


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_imports_and_says_what_to_do(system: str) -> None:
    """Models can be used for development there; a job is refused with the way to a Linux."""
    program = (
        "import asyncio\nLOOP = asyncio.new_event_loop()\n"
        f"{IMITATE}\nLOOP.run_until_complete(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, system], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("HostNotSupportedError ")
    assert ("WSL" if system == "win32" else "Linux") in done.stdout

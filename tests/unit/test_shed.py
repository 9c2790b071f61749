"""The filter that init gives itself, read by our evaluator call by call."""

from __future__ import annotations

import errno
import shutil
import subprocess
from pathlib import Path

import pytest

from isojob.seccomp import syscall_name
from isojob.seccomp._architectures import architecture
from isojob.seccomp.evaluator import Call, check, run

NATIVE = Path(__file__).resolve().parents[2] / "isojob" / "native"
ALLOW, EPERM = 0x7FFF0000, 0x50000 | errno.EPERM
PROT_EXEC, NOTIF_RECV, X32 = 4, 0xC0502100, 0x40000000

PROGRAM = r"""
#include "shed.c"
int main(void)
{
    return zygote_shed(IDS_ROOT) || write(1, code, sizeof(code)) != sizeof(code);
}
"""

ALLOWED = """poll ppoll read pread64 write pwrite64 writev recvmsg sendmsg setsockopt waitid kill
    timerfd_settime clock_gettime clock_nanosleep nanosleep restart_syscall sched_yield openat openat2
    close fcntl getdents64 newfstatat fstat statx brk munmap mremap madvise futex getrandom
    rt_sigaction rt_sigprocmask getpid gettid tgkill exit exit_group"""
BY_ARGUMENT = {"mmap", "mprotect", "ioctl"}


@pytest.fixture(scope="module")
def bpf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    gcc = shutil.which("gcc")
    assert gcc, "isojob needs a C compiler to be built; so does this test"
    directory = tmp_path_factory.mktemp("shed")
    (directory / "main.c").write_text(PROGRAM)
    program = directory / "program"
    flags = ["-std=c17", "-D_GNU_SOURCE", f"-I{NATIVE}"]
    subprocess.run([gcc, *flags, "-o", program, directory / "main.c"], check=True)
    return subprocess.run([program], capture_output=True, check=True).stdout


def test_calls(bpf: bytes) -> None:
    """Those of the list pass whatever their arguments, no others."""
    arch = architecture().audit
    check(bpf)
    seen = set()
    for nr in (*range(1200), X32, X32 + 1, 2**32 - 1):
        answers = {
            run(bpf, Call(nr, (a, a, a, a, a, a), arch)) for a in (0, 1, 0xFFFFFFFF, 2**64 - 1)
        }
        assert answers <= {ALLOW, EPERM}
        if answers == {ALLOW}:
            seen.add(syscall_name(arch, nr))
        elif ALLOW in answers:
            assert syscall_name(arch, nr) in BY_ARGUMENT
    expected = set(ALLOWED.split())
    if architecture().name == "aarch64":
        expected -= {"poll"}
    assert seen == expected
    for other in (0x40000003, 0x40000028, 0):
        assert run(bpf, Call(1, arch=other)) == EPERM


def test_arguments(bpf: bytes) -> None:
    """Memory that is executable, and devices, are refused; high bits do not help."""
    arch = architecture()
    numbers = {syscall_name(arch.audit, nr): nr for nr in range(500)}
    for high in (0, 1 << 32):
        for name in ("mmap", "mprotect"):
            for protection in range(8):
                call = Call(numbers[name], (0, 4096, protection | high, 0, 0, 0), arch.audit)
                assert run(bpf, call) == (EPERM if protection & PROT_EXEC else ALLOW)
        for request in (0x5412, NOTIF_RECV, NOTIF_RECV + 1):
            call = Call(numbers["ioctl"], (5, request | high, 0, 0, 0, 0), arch.audit)
            assert run(bpf, call) == (ALLOW if request == NOTIF_RECV else EPERM)

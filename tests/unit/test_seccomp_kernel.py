"""Filters in force: the kernel takes them, answers as they say, and real programs run under them.

Each test starts a Python that loads a filter on itself and goes on as the program in question.
"""

from __future__ import annotations

import errno
import platform
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from isojob.seccomp import SeccompProfile

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="numbers are x86_64's"
)

LOADER = """
import ctypes, os, sys

libc = ctypes.CDLL(None, use_errno=True)
bpf = bytes.fromhex(sys.argv[1])

class Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

def call(nr, *args):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(nr), *(ctypes.c_ulong(arg) for arg in args))
    return ctypes.get_errno() if result < 0 else 0

# PR_SET_NO_NEW_PRIVS; SECCOMP_SET_MODE_FILTER
assert libc.prctl(38, 1, 0, 0, 0) == 0
program = Program(len(bpf) // 8, bpf)
assert libc.syscall(317, 1, 0, ctypes.byref(program)) == 0, os.strerror(ctypes.get_errno())
"""

HIGH = 1 << 32
IO_URING_SETUP = 425
FORBIDDEN = [165, 272, 308, 101, 321, 323, 298, 425, 250, 310, 312, 438, 304, 154]


def filter_of(profile: str) -> str:
    """The filter in hexadecimal; what would notify kills here, where nobody listens."""
    bpf = getattr(SeccompProfile, profile)().compile().bpf
    killing = [
        (code, yes, no, 0x80000000 if code == 0x06 and k == 0x7FC00000 else k)
        for code, yes, no, k in struct.iter_unpack("=HBBI", bpf)
    ]
    return b"".join(struct.pack("=HBBI", *each) for each in killing).hex()


def python(script: str, profile: str = "default") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LOADER + textwrap.dedent(script), filter_of(profile)],
        capture_output=True,
        text=True,
        check=False,
    )


def run(folder: Path, *command: str, profile: str = "default") -> str:
    """The output of a program that runs under a profile, which must succeed."""
    script = LOADER + "os.execvp(sys.argv[2], sys.argv[2:])"
    done = subprocess.run(
        [sys.executable, "-c", script, filter_of(profile), *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_calls_as_answered() -> None:
    """The kernel gives each call the default profile's answer, whatever is above 32 bits."""
    done = python(f"""
        high = {HIGH}
        print(call(41, 40, 1, 0), call(41, 40 | high, 1, 0), call(41, 38 | high, 5, 0))
        print(call(1000), call(435, 0, 0), call(0x40000000 | 39))
        print(call(302, 1 | high, 7, 0, 0), call(302, 0, 7, 0, 0))
        print(call(16, 0, 0x5412 | high, 0), call(16, 0, 0x5423, 0))
        print(call(41, 2, 3, 1), call(41, 2, 3 | 0x80000 | high, 1), call(41, 2, 10, 3))
        print(call(41, 1, 1, 0), call(41, 2, 1 | 0x80000, 6), call(41, 16, 3 | 0x80000, 0))
        print(call(135, 0xffffffff), call(135, 0x0040000), call(135, 0x0040000 | high))
        print(call(56, 0x10000000 | 17, 0), call(56, 0x10000000 | high | 17, 0))
        print(*[call(nr, 0, 0, 0, 0, 0) for nr in {FORBIDDEN}])
    """)
    no_family, no_call, no = errno.EAFNOSUPPORT, errno.ENOSYS, errno.EPERM
    assert done.stderr == ""
    assert [[int(n) for n in line.split()] for line in done.stdout.splitlines()] == [
        [no_family] * 3,
        [no_call] * 3,
        [no, 0],
        [no] * 2,
        [no, no, errno.EPROTONOSUPPORT],
        [0, 0, no_family],
        [0, no, no],
        [no, no],
        [no_call if nr == IO_URING_SETUP else no for nr in FORBIDDEN],
    ]


def test_compute_kills_attacks() -> None:
    """Under the compute profile a socket is an error, and mount, ptrace or bpf are the end."""
    done = python(
        "print(call(41, 2, 1, 0), call(41, 16, 3, 0), call(29, 0, 1, 0), call(1000))", "compute"
    )
    assert done.stdout.split() == [
        str(n) for n in (errno.EPERM, errno.EAFNOSUPPORT, errno.EPERM, errno.ENOSYS)
    ]
    for nr in (165, 166, 101, 321, 272, 308, 175, 246, 250, 425, 323, 298):
        done = python(f"print('alive'); sys.stdout.flush(); call({nr}, 0, 0, 0)", "compute")
        assert (done.stdout, done.returncode) == ("alive\n", -31), nr


def test_record_locks() -> None:
    """Memory that no cgroup is charged with: the compute profile refuses them, but not flock."""
    attempt = """
        import fcntl, struct, tempfile
        for command in (6, 7, 37, 38):
            with tempfile.TemporaryFile() as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                lock = struct.pack("@hh4xqqi4x", fcntl.F_WRLCK, 0, 0, 1, 0)
                try:
                    print(fcntl.fcntl(file, command, lock) == lock)
                except PermissionError:
                    print("refused")
    """
    assert python(attempt, "compute").stdout.split() == ["refused"] * 4
    assert python(attempt).stdout.split() == ["True"] * 4


@pytest.mark.parametrize("name", ["default", "compute", "unconfined"])
def test_every_profile_loads(name: str) -> None:
    """The kernel takes the filters of all profiles."""
    assert python("print('loaded')", name).stdout == "loaded\n"


PYTHON = """
import asyncio, concurrent.futures, json, math, mmap, multiprocessing, socket, ssl, subprocess
import tempfile, threading, time
numbers = []
threads = [threading.Thread(target=numbers.append, args=(n,)) for n in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert sorted(numbers) == list(range(8))
if __name__ == "__main__":
    assert subprocess.run(["echo", "x"], capture_output=True).stdout == b"x\\n"
    assert multiprocessing.get_context("fork").Pool(2).map(math.factorial, [3, 4]) == [6, 24]
    async def main():
        await asyncio.sleep(0.01)
        process = await asyncio.create_subprocess_exec("true")
        return await process.wait()
    assert asyncio.run(main()) == 0
    with tempfile.TemporaryFile() as file:
        file.write(b"x" * 4096)
        file.flush()
        mmap.mmap(file.fileno(), 4096).close()
    print("done")
"""

C = """
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
static void *work(void *p) { *(int *)p = 42; return NULL; }
int main(void)
{
    pthread_t t; int n = 0, status; char *big = (char *)malloc(1 << 26);
    if (!big || pthread_create(&t, NULL, work, &n) || pthread_join(t, NULL)) return 1;
    if (fork() == 0) _exit(7);
    wait(&status);
    printf("%d %d\\n", n, WEXITSTATUS(status));
    return 0;
}
"""

JAVA = """
import java.util.stream.*;
public class Main {
    public static void main(String[] args) throws Exception {
        long sum = IntStream.range(0, 100000).parallel().mapToLong(i -> i).sum();
        Thread thread = new Thread(() -> System.out.println(sum));
        thread.start();
        thread.join();
    }
}
"""


def needs(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"no {program}")


@pytest.mark.parametrize("profile", ["default", "compute"])
def test_python(tmp_path: Path, profile: str) -> None:
    """Python runs threads, processes, pools, event loops and memory maps."""
    (tmp_path / "main.py").write_text(PYTHON)
    assert run(tmp_path, sys.executable, "main.py", profile=profile) == "done\n"


def test_python_sockets(tmp_path: Path) -> None:
    """Under the default profile, sockets of the three families work; interfaces are not listed."""
    script = """
import socket
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        socket.socket(family, kind).close()
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
client.sendall(b"hello")
print(server.accept()[0].recv(5), socket.getaddrinfo("localhost", 80)[0][4][1])
try: socket.if_nameindex()
except OSError as error: print(error.errno)
"""
    assert run(tmp_path, sys.executable, "-c", script) == "b'hello' 80\n97\n"


@pytest.mark.parametrize("profile", ["default", "compute"])
@pytest.mark.parametrize(("compiler", "file"), [("gcc", "main.c"), ("g++", "main.cc")])
def test_c(tmp_path: Path, compiler: str, file: str, profile: str) -> None:
    """The compilers run, and so does what they make."""
    needs(compiler)
    (tmp_path / file).write_text(C)
    run(tmp_path, compiler, "-O1", "-pthread", "-o", "main", file, profile=profile)
    assert run(tmp_path, "./main", profile=profile) == "42 7\n"


def test_node(tmp_path: Path) -> None:
    """Node runs timers, files, worker threads, processes and a server under the default profile."""
    needs("node")
    script = """
const { Worker } = require("worker_threads");
const server = require("http").createServer((q, r) => r.end("hi")).listen(0, "127.0.0.1", () => {
  require("http").get({ port: server.address().port, host: "127.0.0.1" }, (r) => {
    r.on("data", (d) => {
      new Worker("1", { eval: true }).on("exit", () => {
        const text = require("child_process").execFileSync("echo", [d.toString()]);
        setTimeout(() => { console.log(text.toString().trim()); server.close(); }, 1);
      });
    });
  });
});
"""
    assert run(tmp_path, "node", "-e", script) == "hi\n"


@pytest.mark.parametrize("profile", ["default", "compute"])
def test_java(tmp_path: Path, profile: str) -> None:
    """The JVM compiles and runs threads and a parallel stream."""
    needs("java")
    (tmp_path / "Main.java").write_text(JAVA)
    output = run(tmp_path, "java", "-Xmx256m", "Main.java", profile=profile)
    assert output == "4999950000\n"


def test_rust(tmp_path: Path) -> None:
    """The Rust compiler runs, and so does what it makes, under the default profile."""
    needs("rustc")
    if subprocess.run(["rustc", "--version"], capture_output=True, check=False).returncode:
        pytest.skip("rustc is not set up")
    (tmp_path / "main.rs").write_text(
        'fn main() { let t = std::thread::spawn(|| 42); println!("{}", t.join().unwrap()); }'
    )
    run(tmp_path, "rustc", "main.rs")
    assert run(tmp_path, "./main") == "42\n"


def test_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The go command builds and runs a program under the default profile."""
    needs("go")
    (tmp_path / "main.go").write_text(
        'package main\nimport "fmt"\nfunc main() { c := make(chan int); '
        "go func() { c <- 42 }(); fmt.Println(<-c) }\n"
    )
    monkeypatch.setenv("GOCACHE", str(tmp_path / "cache"))
    assert run(tmp_path, "go", "run", "main.go") == "42\n"

"""Hosts that lack something: refused with a cure, or accepted by name; and hosts in trouble."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from environment import cgroup_version, run_python

PREPARE = """
import asyncio, ctypes, os, resource, sys
import anyio, anyio._backends._asyncio, isojob
from isojob import Limits, Sandbox, _zygote
from isojob._run import run_isolated_sync as run
Sandbox().seccomp.compile(); _zygote._program()
"""
NOBODY = """
run(["true"]); isojob._run._close_pools()  # everything is imported by now
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
"""


def python(*parts: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in a fresh interpreter."""
    return run_python(PREPARE, *parts)


PROCESSES = """
code = (
    "import os, time\\nn = 1\\ntry:\\n while n < 50:\\n  if os.fork() == 0: time.sleep(60)\\n  n += 1"
    "\\nexcept OSError: print(n)"
)
program = ["/usr/bin/python3", "-I", "-S", "-c", code]
async def most(sandbox):
    warm = isojob.PythonPool(python=program[0], sandbox=sandbox)
    said = []
    async with isojob.Pool(sandbox) as pool, pool.session() as session, warm:
        for limits in (Limits(processes=n) for n in (1, 2, 10)):
            said += [await pool.run(program, limits=limits), await session.run(program, limits=limits)]
            said += [await warm.run_python(code, limits=limits)]
    return [int(r.stdout) for r in said]
"""
EXACTLY = [n for n in (1, 2, 10) for _ in range(3)]


def needs_root() -> None:
    """Becoming another uid needs root; the run as root shows it."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become nobody; runs in the environments that are root")


def test_no_cgroup_is_refused() -> None:
    """An ordinary user without a delegated cgroup gets an error that says how to mend it."""
    needs_root()
    done = python(
        NOBODY,
        "try: run(['true'])",
        "except isojob.HostNotSupportedError as e: print(e.missing, '|', e.cure)",
    )
    assert done.returncode == 0, done.stderr
    missing, _, cure = done.stdout.partition(" | ")
    assert "cgroup" in missing
    assert "root" in cure or "Delegate" in cure


UNSEEN = """
own = f"/sys/fs/cgroup{open('/proc/self/cgroup').read().strip().removeprefix('0::')}"
mine = os.path.dirname(own) + f"/isojob-test-{os.getpid()}"
os.mkdir(mine)
libc = ctypes.CDLL(None, use_errno=True)
open(f"{mine}/cgroup.procs", "w").write("0")
assert libc.unshare(0x20020000) == 0 and libc.mount(None, b"/", None, 0x44000, None) == 0
if (child := os.fork()) == 0:
    assert libc.mount(b"proc", b"/proc", b"proc", 0, None) == 0
    try: run(["true"])
    except isojob.HostNotSupportedError as e: print(e.missing, "|", e.cure, flush=True)
    open(f"{own}/cgroup.procs", "w").write("0")
    os._exit(0)
os.waitpid(child, 0)
open(f"{own}/cgroup.procs", "w").write("0")
for inner in os.scandir(mine):
    if inner.is_dir(): os.rmdir(inner)
os.rmdir(mine)
"""


def test_cgroup_with_processes_of_another_pid_namespace() -> None:
    """What has no number here cannot be moved out of the way: said so, and nobody is moved."""
    needs_root()
    if cgroup_version() != 2:
        pytest.skip("v1 needs no leaf; runs on v2")
    done = python(UNSEEN)
    assert (done.returncode, done.stderr) == (0, "")
    missing, _, cure = done.stdout.partition(" | ")
    assert "holds a process of another pid namespace" in missing
    assert "enter the pid namespace first" in cure


def test_no_cgroup_accepted_by_name() -> None:
    """With allow_missing, what remains holds, and the posture says what does not."""
    needs_root()
    done = python(
        NOBODY,
        "s = Sandbox(allow_missing={'cgroup'})",
        "r = run(['sh', '-c', 'id -u; cat /proc/self/uid_map; echo x > /usr/x'], sandbox=s)",
        "assert r.posture.cgroup == 'none' and 'memory_limit' in r.posture.missing, r.posture",
        "assert r.posture.privilege == 'user'",
        "assert r.usage.memory_peak is None and r.usage.cpu_time is None",
        "assert b'Read-only' in r.stderr, r.stderr",
        "print(r.stdout.split())",
        "r = run(['sh', '-c', 'kill -9 $$'], sandbox=s); assert r.status == 'signaled', r",
        "r = run(['sleep', '60'], sandbox=s, limits=Limits(wall_time=0.5))",
        "assert r.status == 'wall_time_limit', r",
        PROCESSES,
        f"said = anyio.run(most, s); assert said == {EXACTLY}, said",
        "r = run(['/usr/bin/python3', '-I', '-S', '-c', 'bytearray(1 << 30)'], sandbox=s)",
        "assert b'MemoryError' in r.stderr, r",
        "import anyio",
        "from isojob import HostNotSupportedError, run_pair",
        "try: anyio.run(lambda: run_pair(['true'], ['sleep', '60'], sandbox=s, idle_time=50))",
        "except HostNotSupportedError as error: print(error.missing)",
    )
    assert (done.returncode, done.stderr) == (0, "")
    told = "[b'1000', b'1000', b'0', b'1']\nidle_time without CPU accounting\n"
    assert done.stdout == told


NO_CGROUPS = """
run(["true"]); isojob._run._close_pools()
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x00020000) == 0 and libc.mount(None, b"/", None, 0x44000, None) == 0
for line in reversed(open("/proc/self/mountinfo").read().splitlines()):
    if " - cgroup" in line: assert libc.umount2(line.split()[4].encode(), 2) == 0, line
"""


def test_no_cgroup_as_root() -> None:
    """RLIMIT_NPROC counts by uid, and init has one of its own: the limit is the job's alone."""
    needs_root()
    done = python(
        NO_CGROUPS,
        PROCESSES,
        "s = Sandbox(allow_missing={'cgroup'})",
        "r = run(['true'], sandbox=s); print(r.posture.cgroup, r.posture.privilege)",
        f"said = anyio.run(most, s); assert said == {EXACTLY}, said",
    )
    assert (done.stderr, done.stdout) == ("", "none root\n")


NO_DESCRIPTOR = r"OSError: \[Errno 24\] Too many open files.*|ok"


def test_no_descriptor_left(anyio_backend: str) -> None:
    """EMFILE is an OSError; nothing is lost, and the next call works when there is room again."""
    done = python(
        "async def held():",
        "    assert (await isojob.run_isolated(['echo', 'fine'])).stdout == b'fine\\n'",
        "    (pool,) = isojob._run._pools.values()",
        "    while pool._stock._spent or pool._stock.parked < pool._stock.wanted: await anyio.sleep(0.01)",
        "    return len(os.listdir('/proc/self/fd')) - 3 * pool._stock.parked",  # a lease, two pipes
        "async def main():",
        "    before, seen = await held(), set()",
        "    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]",
        "    for room in range(4, before + 40):",
        "        resource.setrlimit(resource.RLIMIT_NOFILE, (room, hard))",
        "        try: seen.add(str((await isojob.run_isolated(['true'])).status))",
        "        except (OSError, isojob.IsojobError) as e: seen.add(f'{type(e).__name__}: {e}')",
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))",
        "    after = await held()",
        "    assert after == before, (before, after)",
        "    print(*sorted(seen), sep='\\n')",
        f"anyio.run(main, backend={anyio_backend!r})",
    )
    assert (done.stderr, done.returncode) == ("", 0)
    seen = done.stdout.splitlines()
    assert "ok" in seen
    assert len(seen) > 1
    assert [line for line in seen if not re.fullmatch(NO_DESCRIPTOR, line)] == []


OWN_NAMESPACE = """
import ctypes
before = os.geteuid(), os.getegid()
ctypes.CDLL(None, use_errno=True).unshare(0x10000000)
open("/proc/self/setgroups", "w").write("deny")
open("/proc/self/uid_map", "w").write(f"0 {before[0]} 1")
open("/proc/self/gid_map", "w").write(f"0 {before[1]} 1")
assert os.geteuid() == 0
accept = Sandbox(allow_missing={"cgroup"})
"""
DUMPABLE = "import ctypes; ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)"


SUBORDINATE = """
import tempfile
run(["true"]); isojob._run._close_pools()
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x00020000) == 0 and libc.mount(None, b"/", None, 0x44000, None) == 0
for file in ("/etc/subuid", "/etc/subgid"):
    with tempfile.NamedTemporaryFile("w") as own:
        own.write("65534:1879048192:64\\n"); own.flush(); os.chmod(own.name, 0o644)
        if not os.path.exists(file): open(file, "w").close()
        assert libc.mount(own.name.encode(), file.encode(), None, 0x1000, None) == 0, file
accept = {"cgroup"}
if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
    # Delegated as systemd does it: the directory and two of its files belong to the user.
    above = "/sys/fs/cgroup" + open("/proc/self/cgroup").read().strip().removeprefix("0::")
    mine = os.path.dirname(above) + f"/isojob-test-{os.getpid()}"
    os.mkdir(mine)
    for name in ("", "cgroup.procs", "cgroup.subtree_control"):
        os.chown(f"{mine}/{name}", 65534, 65534)
    open(f"{mine}/cgroup.procs", "w").write("0")
    accept = set()
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
libc.prctl(4, 1, 0, 0, 0)
"""


def test_subordinate_ids() -> None:
    """An ordinary user with subordinate ids: each job has host ids that are not the user's own."""
    needs_root()
    assert shutil.which("newuidmap"), "needs newuidmap (Debian: apt-get install uidmap)"
    done = python(
        SUBORDINATE,
        "s = Sandbox(allow_missing=accept)",
        "seen = [run(['cat', '/proc/self/uid_map', '/proc/self/gid_map'], sandbox=s) for _ in '123']",
        "assert {r.posture.privilege for r in seen} == {'user+ranges'}, seen",
        "assert all((r.posture.cgroup == 'v2') == (not accept) for r in seen), seen",
        "hosts = [[int(line.split()[1]) for line in r.stdout.splitlines()] for r in seen]",
        "assert all(len(set(h[:2])) == 2 and h[:2] == h[2:] for h in hosts), hosts",
        "assert all(1 <= i <= 64 for h in hosts for i in h), hosts",
        "assert len({i for h in hosts for i in h[:2]}) == 6, hosts",
        PROCESSES,
        f"said = anyio.run(most, s); assert said == {EXACTLY}, said",
        "files = {'x': b'x'}",
        "r = run(['sh', '-c', 'id -u; id -g; id -G; stat -c %u x .'], sandbox=s, files=files)",
        "print(r.status, r.stdout.split())",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ok [b'1000', b'1000', b'1000', b'1000', b'1000']\n", done.stderr
    for directory in Path("/sys/fs/cgroup").glob("**/isojob-test-*"):
        for inner in sorted(directory.glob("**/"), reverse=True):
            inner.rmdir()


COMPOSED = """
import os, tempfile, anyio
from isojob import Mount, Pool, Root
sh = lambda script: ["sh", "-c", script]
async def main():
    async with Pool(Sandbox(allow_missing=accept)) as pool:
        async with pool.session(files={"f": b"0"}) as session:
            kept = await session.run(sh("printf 1 >>f; cat f; stat -c %u:%g f ."))
            print(kept.status, kept.stdout, kept.posture.privilege)
            view = await session.run(sh("printf 2 >>f; cat f"), keep=False)
            pair = await session.run_pair(sh("cat f; echo; read x; echo $x >&2"), ["cat"])
            print(view.stdout, pair.solution.stderr, (await session.collect("f")).files)
        async with pool.open(sh("test -t 0; echo $?; exit 3"), pty=True) as process:
            said = b"".join([piece async for piece in process.stdout])
            print(said, (await process.result()).returncode)
    with tempfile.TemporaryDirectory() as top:
        await layered(top)
async def layered(top):
    os.chmod(top, 0o755)
    os.makedirs(top + "/opt")
    for name in ("bin", "lib", "lib64"):
        os.symlink("usr/" + name, f"{top}/{name}")
    root = Root.directory(top, writable=True)
    made = Sandbox(root=root, mounts=(Mount.bind("/usr", "/usr"),), allow_missing=accept)
    async with Pool(made) as pool:
        for _ in "12":
            r = await pool.run(sh("ls -A /opt; echo x >/opt/x; cat /opt/x; stat -c %u /opt"))
            print(r.stdout, r.posture.privilege)
    root = Root.layers([top])
    made = Sandbox(root=root, mounts=(Mount.bind("/usr", "/usr"),), allow_missing=accept)
    async with Pool(made) as pool:
        r = await pool.run(sh("ls -A /opt; echo x >/opt/x"))
        print(r.stdout, r.status, r.posture.privilege)
anyio.run(main)
"""


def test_subordinate_ids_composed() -> None:
    """Sessions, pairs, terminals and layers with them; a writable root is the caller's own id's."""
    needs_root()
    assert shutil.which("newuidmap"), "needs newuidmap (Debian: apt-get install uidmap)"
    done = python(SUBORDINATE, COMPOSED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        r"ok b'011000:1000\n1000:1000\n' user+ranges",
        r"b'012' b'01\n' {'f': b'01'}",
        r"b'0\r\n' 3",
        r"b'x\n1000\n' user",
        r"b'x\n1000\n' user",
        r"b'' nonzero_exit user+ranges",
    ]
    for directory in Path("/sys/fs/cgroup").glob("**/isojob-test-*"):
        for inner in sorted(directory.glob("**/"), reverse=True):
            inner.rmdir()


def test_user_namespaces_switched_off() -> None:
    """The error names the sysctl."""
    needs_root()
    done = python(
        NOBODY,
        DUMPABLE,
        OWN_NAMESPACE,
        "open('/proc/sys/user/max_user_namespaces', 'w').write('0')",
        "try: run(['true'], sandbox=accept)",
        "except isojob.HostNotSupportedError as e: print(e.cure)",
    )
    assert "user.max_user_namespaces" in done.stdout, (done.stdout, done.stderr)


def test_root_of_a_container() -> None:
    """A uid 0 that is somebody else outside works with a single id; host root itself is refused."""
    needs_root()
    look = "print(run(['cat', '/proc/self/uid_map'], sandbox=accept).stdout.split())"
    done = python(NOBODY, DUMPABLE, OWN_NAMESPACE, look)
    assert done.stdout == "[b'1000', b'0', b'1']\n", done.stderr
    done = python(
        "run(['true']); isojob._run._close_pools()",
        OWN_NAMESPACE,
        "try: run(['true'], sandbox=accept)",
        "except isojob.HostNotSupportedError as e: print(e.missing)",
    )
    assert "root's" in done.stdout, (done.stdout, done.stderr)


def test_disk_full_for_the_job() -> None:
    """ENOSPC while the files are written: the job never ran, the error names the file."""
    done = python(
        "try: run(['true'], files={'big': b'x' * 60_000, 'more': b'y' * 5_000}, limits=Limits(disk='64KiB'))",
        "except isojob.SandboxSetupError as e: print(e.stage, e.errno)",
        "assert run(['true']).ok",
    )
    assert done.stdout == "write file more 28\n", (done.stdout, done.stderr)


def test_import_is_light() -> None:
    """Importing isojob starts nothing and loads no library."""
    code = "import isojob, sys, os; print(sorted({'trio', 'cffi', 'typer', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

"""What a job can see and touch, looked at from inside and from outside."""

from __future__ import annotations

import ctypes
import json
import os
import socket
from contextlib import suppress
from pathlib import Path

import anyio
import pytest
from environment import SLOW, at_once, cgroup_version

from isojob import Mount, Pool, Root, Sandbox, run_isolated
from isojob import _zygote as zygote
from isojob.errors import CommandNotFoundError, SandboxSetupError
from isojob.host import rootfs
from isojob.seccomp import SeccompProfile
from isojob.wire import Tag, Writer

NAMESPACES = ("user", "pid", "net", "mnt", "ipc", "uts", "cgroup")

LOOK = """
import json, os
status = dict(line.rstrip("\\n").split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
print(json.dumps({
    "ns": {n: os.readlink("/proc/self/ns/" + n) for n in %r},
    "status": status,
    "fds": sorted(os.listdir("/proc/self/fd")),
    "uid": os.getresuid(), "gid": os.getresgid(), "groups": os.getgroups(),
    "pid": os.getpid(), "ppid": os.getppid(), "sid": os.getsid(0),
    "uid_map": open("/proc/self/uid_map").read().split(),
    "pids": sorted(p for p in os.listdir("/proc") if p.isdigit()),
    "root": sorted(os.listdir("/")),
    "hostname": os.uname().nodename,
}))
""" % (NAMESPACES,)


async def look(python: str, **options: object) -> dict[str, object]:
    """What a job sees of itself."""
    result = await run_isolated([python, "-I", "-S", "-c", LOOK], **options)  # type: ignore[arg-type]
    assert result.ok, (result, result.stderr)
    seen: dict[str, object] = json.loads(result.stdout or b"")
    return seen


async def test_jobs_share_nothing(python: str, is_root: bool) -> None:
    """Of two jobs at once and the host none has a namespace of another's; as root, nor a uid."""
    command = [
        python,
        "-I",
        "-S",
        "-c",
        LOOK + "\nimport sys; sys.stdout.flush(); sys.stdin.read()",
    ]
    both = await at_once(lambda stdin, out: run_isolated(command, stdin=stdin, stdout=out))
    assert all(result.ok for _, result in both)
    a, b = (json.loads(line) for line, _ in both)
    for name in NAMESPACES:
        numbers = {a["ns"][name], b["ns"][name], os.readlink(f"/proc/self/ns/{name}")}
        assert len(numbers) == 3, name
    if is_root:
        assert len({a["uid_map"][1], b["uid_map"][1], str(os.getuid())}) == 3


async def test_privileges(python: str, is_root: bool) -> None:
    """No capability in any set, no_new_privs, a filter, own session, one uid, no groups."""
    seen = await look(python)
    status = seen["status"]
    assert isinstance(status, dict)
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert (seen["uid"], seen["gid"]) == ([1000] * 3, [1000] * 3)
    assert set(seen["groups"]) <= {1000, 65534}  # type: ignore[call-overload]
    assert (seen["pid"], seen["ppid"], seen["sid"]) == (2, 1, 2)
    assert seen["fds"] == ["0", "1", "2", "3"]  # 3 is the listing itself
    assert seen["pids"] == ["2"], "init is hidden"
    assert seen["hostname"] == "isojob"


async def test_host_root_is_never_mapped(python: str, is_root: bool) -> None:
    """Inside, the map is seen in terms of the parent namespace: 0 of it is no target."""
    seen = await look(python)
    words = [int(word) for word in seen["uid_map"]]  # type: ignore[attr-defined]
    targets = words[1::3]
    if is_root:
        assert len(targets) == 2
        assert all(target >= 0x70000000 for target in targets)
        assert 0 not in targets
    else:
        assert words[0] != 0 or len(targets) == 2, "a single id maps to the job's, never to 0"


async def test_root_is_minimal(python: str) -> None:
    """The root holds the toolchain and what isojob makes; no /sys, /run, /root, /home, /var."""
    seen = await look(python)
    expected = {"bin", "box", "dev", "etc", "lib", "lib32", "lib64", "libx32", "nix", "gnu"}
    expected |= {"proc", "sbin", "tmp", "usr"}
    assert set(seen["root"]) <= expected  # type: ignore[call-overload]


WRITE_EVERYWHERE = """
import os
writable = []
for top, dirs, files in os.walk("/", topdown=True):
    if top.startswith(("/proc", "/box", "/tmp", "/dev/shm")):
        dirs.clear(); continue
    try:
        with open(top + "/.isojob-probe", "w"): writable.append(top)
    except OSError: pass
    if top.count("/") > 2: dirs.clear()
print(writable)
"""


async def test_nothing_but_the_box_is_writable(python: str) -> None:
    """Everything outside of /box, /tmp and /dev/shm is read-only."""
    result = await run_isolated([python, "-I", "-S", "-c", WRITE_EVERYWHERE])
    assert result.stdout == b"[]\n", result


async def test_mount_flags() -> None:
    """Every mount is nosuid, every bind read-only and nodev, /proc read-only and hidepid."""
    result = await run_isolated(["cat", "/proc/self/mountinfo"])
    assert result.stdout is not None
    seen = {}
    for line in result.stdout.decode().splitlines():
        words = line.split()
        # The device nodes of an unprivileged cell are binds: they alone are not nodev.
        seen[words[4]] = set(words[5].split(",")) | set(words[-1].split(","))
    for target, flags in seen.items():
        assert "nosuid" in flags, target
        # A mask of /proc is a bind of /dev/null, or of an empty directory beside it.
        if not target.startswith(("/dev", "/proc/")) and target != "/":
            assert "nodev" in flags, target
        if target not in ("/box", "/tmp", "/dev/shm") and not target.startswith(
            ("/dev/", "/proc/")
        ):
            assert "ro" in flags, target
    proc = [line for line in result.stdout.decode().splitlines() if line.split()[4] == "/proc"]
    assert "hidepid=invisible" in proc[-1] or "hidepid=2" in proc[-1]


async def test_nested_user_namespaces_are_off(python: str) -> None:
    """unshare, clone and clone3 give no new user namespace, also without a seccomp filter."""
    code = (
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "print(libc.unshare(0x10000000), libc.unshare(0x10000000 | 0x20000), libc.unshare(0x20000))"
    )
    for sandbox in (Sandbox(), Sandbox(seccomp=SeccompProfile.unconfined())):
        result = await run_isolated([python, "-I", "-S", "-c", code], sandbox=sandbox)
        assert result.stdout == b"-1 -1 -1\n"


async def test_proc_cannot_be_written(python: str) -> None:
    """No file of /proc opens for writing, and the masked ones tell nothing."""
    code = (
        "import os\n"
        "for p in ('/proc/sys/kernel/core_pattern', '/proc/sys/kernel/msgmax', '/proc/sysrq-trigger',"
        " '/proc/self/oom_score_adj', '/proc/self/uid_map', '/proc/sys/user/max_user_namespaces'):\n"
        "    try: fd = os.open(p, os.O_WRONLY)\n"
        "    except OSError: continue\n"
        "    if os.fstat(fd).st_rdev != os.makedev(1, 3): print('open', p)\n"
        "for p in ('/proc/kallsyms', '/proc/timer_list', '/proc/interrupts'):\n"
        "    try: data = open(p).read()\n"
        "    except OSError: data = ''\n"
        "    if data: print('readable', p)\n"
        # Whose keys and accounts of keys: only uids that are mapped here, or nobody's at all.
        "uids = {line.split()[0] for line in open('/proc/self/uid_map')}\n"
        "for p, column in (('/proc/keys', 5), ('/proc/key-users', 0)):\n"
        "    for line in open(p):\n"
        "        if line.split()[column].rstrip(':') not in uids: print(p, line)"
    )
    result = await run_isolated([python, "-I", "-S", "-c", code])
    assert (result.stdout, result.stderr) == (b"", b"")


async def test_masks_that_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module may add a part of /proc that is to be hidden, and take it away again."""
    monkeypatch.setattr(rootfs, "MASKS", (*rootfs.MASKS, "/data/asound"))
    entry = tmp_path / "asound"
    tmp_path.chmod(0o755)
    sandbox = Sandbox(mounts=[Mount.bind(tmp_path, "/data")])
    async with Pool(sandbox=sandbox, parked=0) as pool:
        for _ in range(2):
            for text in ("cards", None):
                if text is None:
                    entry.unlink()
                else:
                    entry.write_text(text)
                    entry.chmod(0o644)
                result = await pool.run(["sh", "-c", "cat /data/asound 2>/dev/null; ls /data"])
                assert (result.ok, result.stdout) == (True, b"asound\n" if text else b"")


async def test_init_is_out_of_reach(python: str) -> None:
    """The job cannot signal, trace, reschedule or limit pid 1, nor open its /proc."""
    code = (
        "import ctypes, os, resource, signal\n"
        "for s in (signal.SIGKILL, signal.SIGSTOP):\n"
        "    try: os.kill(1, s)\n"
        "    except OSError: pass\n"
        "def attempt(name, f):\n"
        "    try: f(); print('did', name)\n"
        "    except OSError: pass\n"
        "attempt('environ', lambda: open('/proc/1/environ').read())\n"
        "attempt('fd', lambda: os.listdir('/proc/1/fd'))\n"
        "attempt('mem', lambda: open('/proc/1/mem', 'rb'))\n"
        "attempt('prlimit', lambda: resource.prlimit(1, resource.RLIMIT_CPU, (1, 1)))\n"
        "attempt('affinity', lambda: os.sched_setaffinity(1, {0}))\n"
        "attempt('nice', lambda: os.setpriority(os.PRIO_PROCESS, 1, 19))\n"
        "attempt('scheduler', lambda: os.sched_setscheduler(1, os.SCHED_BATCH, os.sched_param(0)))\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.ptrace(16, 1, 0, 0) == 0: print('did ptrace')\n"
        "print('alive')"
    )
    for sandbox in (Sandbox(), Sandbox(seccomp=SeccompProfile.unconfined())):
        result = await run_isolated([python, "-I", "-S", "-c", code], sandbox=sandbox)
        assert result.stdout == b"alive\n", (sandbox.seccomp.name, result.stdout, result)


async def test_network_is_empty(python: str) -> None:
    """The host's loopback is another one; vsock is closed, with high bits set too."""
    server = socket.create_server(("127.0.0.1", 0))
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0isojob-test-{os.getpid()}")
    abstract.listen()
    with server, abstract:
        code = (
            "import ctypes, socket, sys\n"
            "def attempt(f):\n"
            "    try: f(); print('reached')\n"
            "    except OSError: pass\n"
            f"attempt(lambda: socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2))\n"
            f"attempt(lambda: socket.socket(socket.AF_UNIX).connect('\\0isojob-test-{os.getpid()}'))\n"
            "libc = ctypes.CDLL(None)\n"
            "libc.syscall.argtypes = [ctypes.c_long] * 4\n"
            "for family in (38, 40, 38 | 1 << 32, 40 | 1 << 32):\n"
            "    if libc.syscall(41, family, 1, 0) >= 0: print('family', family)"
        )
        result = await run_isolated([python, "-I", "-S", "-c", code])
    assert (result.stdout, result.stderr) == (b"", b"")


async def test_no_secret_of_the_host(python: str, tmp_path: Path) -> None:
    """/etc is synthetic; the caller's files and environment are not there."""
    (tmp_path / "secret").write_text("hunter2")
    script = f"cat /etc/shadow {tmp_path}/secret /root/* /home/*/* 2>/dev/null; cat /etc/passwd"
    result = await run_isolated(["sh", "-c", script])
    assert result.stdout is not None
    assert b"hunter2" not in result.stdout
    assert [line.split(":")[0] for line in result.stdout.decode().splitlines()] == [
        "root",
        "job",
        "nobody",
    ]


async def test_bind_mounts(python: str, tmp_path: Path) -> None:
    """A bind shows a directory or a file, read-only unless asked otherwise, also below /box."""
    tmp_path.chmod(0o755)
    (tmp_path / "data").write_text("42")
    (tmp_path / "data").chmod(0o644)
    (tmp_path / "out").mkdir(mode=0o777)
    (tmp_path / "out").chmod(0o777)
    sandbox = Sandbox(
        mounts=(
            Mount.bind(tmp_path, "/mnt/data"),
            Mount.bind(tmp_path / "data", "/box/in/data"),
            Mount.bind(tmp_path / "out", "/out", read_only=False),
            Mount.tmpfs("/scratch", size="1MiB"),
        )
    )
    script = (
        "cat /mnt/data/data /box/in/data; echo no > /mnt/data/data; echo no > /box/in/data; "
        "echo yes > /out/file; dd if=/dev/zero of=/scratch/x bs=1M count=2"
    )
    result = await run_isolated(["sh", "-c", script], sandbox=sandbox)
    assert result.stdout == b"4242"
    assert (result.stderr or b"").count(b"Read-only") == 2
    assert b"No space left" in (result.stderr or b"")
    assert (tmp_path / "data").read_text() == "42"
    assert (tmp_path / "out" / "file").read_text() == "yes\n"


@pytest.mark.parametrize("workdir", ["/box", "/work"])
async def test_mounts_in_mounts(tmp_path: Path, workdir: str) -> None:
    """What lies in a tmpfs of the caller, whatever is around that, and in /box if that is nothing."""
    tmp_path.chmod(0o755)
    (tmp_path / "sub").mkdir()
    (tmp_path / "file").write_text("mine")
    mounts = [
        Mount.tmpfs("/a", size="1MiB"),
        Mount.bind(tmp_path, "/a/b"),
        Mount.bind(tmp_path / "file", "/a/c/d"),
        Mount.tmpfs("/a/e", size="1MiB"),
        Mount.bind(tmp_path, "/a/e/f"),
        Mount.bind(tmp_path, "/g"),
        Mount.tmpfs("/g/sub", size="1MiB"),
        Mount.bind(tmp_path, "/g/sub/h"),
        Mount.bind(tmp_path, "/box/i"),
    ]
    places = ("/a/b/file", "/a/c/d", "/a/e/f/file", "/g/file", "/g/sub/h/file", "/box/i/file")
    async with Pool(sandbox=Sandbox(mounts=mounts, workdir=workdir)) as pool:
        assert (await pool.run(["cat", *places])).stdout == b"mine" * 6
        async with pool.session() as session:
            assert (await session.run(["cat", *places])).stdout == b"mine" * 6


@pytest.mark.parametrize("place", ["/mnt", "/box"])
@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("dir", "file", "a directory is wanted"),
        ("file", "dir", "a file is to be mounted"),
        ("dir", "link", "name where it leads"),
        ("dir", "new", "nothing can be made there"),
    ],
)
async def test_targets_of_another_kind(
    tmp_path: Path, place: str, first: str, second: str, words: str
) -> None:
    """The refusal says what was to go on what."""
    tmp_path.chmod(0o755)
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("dir")
    mounts = [
        Mount.bind(tmp_path, f"{place}/all"),
        Mount.bind(tmp_path / first, f"{place}/all/{second}"),
    ]
    with pytest.raises(SandboxSetupError, match=f"mount target {place}/all.*{words}"):
        await run_isolated(["true"], sandbox=Sandbox(mounts=mounts))


async def test_bind_of_an_interpreter_below_a_closed_home(tmp_path: Path, is_root: bool) -> None:
    """One Mount.bind brings in a tree whose parents only the caller may enter."""
    home = tmp_path / "home"
    prefix = home / "env" / "bin"
    prefix.mkdir(parents=True)
    (prefix / "tool").write_text("#!/bin/sh\necho from the tool\n")
    (prefix / "tool").chmod(0o755)
    home.chmod(0o700)
    sandbox = Sandbox(mounts=(Mount.bind(home / "env", str(home / "env")),))
    result = await run_isolated([str(prefix / "tool")], sandbox=sandbox)
    assert result.stdout == b"from the tool\n"


async def test_bad_mounts(tmp_path: Path) -> None:
    """A missing source, an unreadable one, and a target through a link are refused by name."""
    with pytest.raises(SandboxSetupError, match="gone"):
        await run_isolated(["true"], sandbox=Sandbox(mounts=(Mount.bind(tmp_path / "gone", "/x"),)))
    # /bin is a link in the root: nothing is mounted through it.
    if os.path.islink("/bin"):
        sandbox = Sandbox(mounts=(Mount.bind(tmp_path, "/bin/sub"),))
        with pytest.raises(SandboxSetupError, match="mount target"):
            await run_isolated(["true"], sandbox=sandbox)


async def test_unreadable_bind_source(tmp_path: Path, is_root: bool) -> None:
    """A source that the caller may not read is refused."""
    if is_root:
        pytest.skip("root may read everything; runs as uid 1000")
    (tmp_path / "closed").mkdir(mode=0o000)
    sandbox = Sandbox(mounts=(Mount.bind(tmp_path / "closed", "/closed"),))
    with pytest.raises(SandboxSetupError, match="closed"):
        await run_isolated(["true"], sandbox=sandbox)


async def test_root_directory(tmp_path: Path) -> None:
    """Root.directory shows another tree, read-only, with isojob's /proc, /dev, /tmp and /box."""
    tmp_path.chmod(0o755)
    for name in ("usr", "bin", "lib", "lib64", "sbin"):
        host = Path("/") / name
        if host.is_symlink():
            (tmp_path / name).symlink_to(os.readlink(host))
    (tmp_path / "usr").mkdir()
    (tmp_path / "etc").mkdir()
    (tmp_path / "marker").write_text("mine")
    sandbox = Sandbox(root=Root.directory(tmp_path), mounts=(Mount.bind("/usr", "/usr"),))
    if not Path("/bin").is_symlink():
        pytest.fail("this test needs a merged /usr")
    result = await run_isolated(
        ["sh", "-c", "cat /marker; touch /marker2 2>/dev/null || echo ro; ls /dev/null; pwd"],
        sandbox=sandbox,
    )
    assert result.stdout == b"minero\n/dev/null\n/box\n", result.stderr
    assert not (tmp_path / "marker2").exists()


async def test_consecutive_jobs_share_nothing() -> None:
    """Files, shared memory and SysV objects of one job are gone in the next."""
    first = await run_isolated(
        ["sh", "-ec", "echo x > /box/a; echo x > /tmp/b; echo x > /dev/shm/c; ipcmk -M 4096"]
    )
    assert first.ok, first
    result = await run_isolated(["sh", "-c", "ls -A /box /tmp /dev/shm; ipcs -m | grep 0x; true"])
    assert result.stdout is not None
    assert sorted(result.stdout.split()) == [b"/box:", b"/dev/shm:", b"/tmp:"]


async def test_cgroup_is_invisible(python: str) -> None:
    """No cgroupfs in the root, and the job sees itself at the root of its own namespace."""
    result = await run_isolated(["sh", "-c", "ls /sys/fs/cgroup; cat /proc/self/cgroup"])
    assert result.stdout is not None
    for line in result.stdout.decode().splitlines():
        assert line.endswith(":/"), line


async def test_cells_in_the_callers_cgroup(python: str) -> None:
    """From outside: the job's processes are in a cgroup below the caller's own."""
    async with Pool(parked=0) as pool, anyio.create_task_group() as tasks:
        ours = f"600.{os.getpid()}"  # other sleepers of this machine are not our business
        tasks.start_soon(pool.run, ["sleep", ours])
        found: list[str] = []
        with anyio.fail_after(10 * SLOW):
            while not found:
                await anyio.sleep(0.1)
                for entry in Path("/proc").iterdir():
                    with suppress(OSError):
                        if f"sleep\0{ours}\0".encode() == (entry / "cmdline").read_bytes():
                            found += (entry / "cgroup").read_text().splitlines()
        tasks.cancel_scope.cancel()
        mine = Path("/proc/self/cgroup").read_text().splitlines()
        if cgroup_version() == 2:
            base = mine[0].partition("::")[2].removesuffix("/isojob-host")
            assert found[0].partition("::")[2].startswith(f"{base}/isojob-{os.getpid()}-")
        else:
            memory = next(line for line in mine if ":memory:" in line).rpartition(":")[2]
            line = next(line for line in found if ":memory:" in line).rpartition(":")[2]
            assert line.startswith(f"{memory.rstrip('/')}/isojob-{os.getpid()}-")


async def test_a_working_directory_of_bytes(python: str) -> None:
    """A name that is no UTF-8 is one to the kernel, and in /etc/passwd."""
    code = "import os, pwd; print(ascii([os.getcwd(), pwd.getpwuid(os.getuid()).pw_dir]))"
    made = Sandbox(workdir="/\udcff")
    result = await run_isolated([python, "-I", "-c", code], sandbox=made)
    assert result.stdout == b"['/\\udcff', '/\\udcff']\n", result.stderr


async def test_hostname_workdir_and_ids(python: str) -> None:
    """Sandbox sets what the job sees."""
    sandbox = Sandbox(hostname="grader", workdir="/work", uid=4242, gid=4343)
    seen = await look(python, sandbox=sandbox)
    assert (seen["hostname"], seen["uid"], seen["gid"]) == ("grader", [4242] * 3, [4343] * 3)
    result = await run_isolated(["sh", "-c", "pwd; echo $HOME; touch x && ls"], sandbox=sandbox)
    assert result.stdout == b"/work\n/work\nx\n"


async def test_seccomp_violation_names_the_call(python: str) -> None:
    """A KILL rule ends the job and names the system call; the program cannot hide or forge it."""
    profile = SeccompProfile.compute()
    code = "import ctypes; ctypes.CDLL(None).ptrace(0, 0, 0, 0)"
    result = await run_isolated([python, "-I", "-S", "-c", code], sandbox=Sandbox(seccomp=profile))
    assert (result.status, result.evidence.syscall) == ("seccomp_violation", "ptrace")
    fine = await run_isolated(
        [python, "-I", "-S", "-c", "print(1)"], sandbox=Sandbox(seccomp=profile)
    )
    assert fine.stdout == b"1\n"


async def test_seccomp_late_filter(python: str, tmp_path: Path) -> None:
    """A profile that the launcher itself would not pass is loaded last, its listener included."""
    document = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {"names": ["setsid", "timerfd_settime"], "action": "SCMP_ACT_KILL_PROCESS"},
            {"names": ["recvmsg", "sendmsg"], "action": "SCMP_ACT_ERRNO"},
        ],
    }
    (tmp_path / "late.json").write_text(json.dumps(document))
    profile = SeccompProfile.load(tmp_path / "late.json")
    compiled = profile.compile()
    assert compiled.notify
    assert not compiled.preload
    sandbox = Sandbox(seccomp=profile)
    result = await run_isolated(["echo", "hi"], sandbox=sandbox)
    assert result.stdout == b"hi\n"
    code = "import os; os.setsid()"
    result = await run_isolated(["sh", "-c", f"{python} -I -S -c '{code}'; true"], sandbox=sandbox)
    assert (result.status, result.evidence.syscall) == ("seccomp_violation", "setsid")


async def test_missing_command_under_a_filter_that_ends_writers() -> None:
    """What is our own last word is not taken for the job's."""
    profile = SeccompProfile.model_validate(
        {
            "name": "mute",
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["write"], "action": "SCMP_ACT_KILL_PROCESS"}],
        }
    )
    async with Pool(sandbox=Sandbox(seccomp=profile), parked=0) as pool:
        for _ in range(10):
            with pytest.raises(CommandNotFoundError):
                await pool.run(["no-such-program"])
            with pytest.raises(CommandNotFoundError):
                async with pool.open(["no-such-program"]) as process:
                    await process.wait()
        assert (await pool.run(["echo", "x"])).status == "seccomp_violation"


async def test_keyring_is_empty(python: str) -> None:
    """The caller's session keyring does not come along, also without a filter."""
    code = (
        "import ctypes, sys; libc = ctypes.CDLL(None, use_errno=True)\n"
        "b = ctypes.create_string_buffer(4096)\n"
        "print(libc.syscall(250, 11, -3, b, 4096))\n"  # KEYCTL_READ of the session keyring
        "print(libc.syscall(250, 10, -3, b'user', sys.argv[1].encode(), 0))"  # KEYCTL_SEARCH
    )
    libc = ctypes.CDLL(None, use_errno=True)
    name = f"isojob-test-{os.getpid()}"
    key = libc.syscall(248, b"user", name.encode(), b"x", ctypes.c_size_t(1), -3)  # add_key
    assert key > 0, os.strerror(ctypes.get_errno())
    try:
        # The pool must come after the key: its zygote would hold a keyring of before.
        async with Pool(Sandbox(seccomp=SeccompProfile.unconfined())) as pool:
            result = await pool.run([python, "-I", "-S", "-c", code, name])
    finally:
        assert libc.syscall(250, 9, key, -3) == 0  # KEYCTL_UNLINK
    assert result.stdout in (b"0\n-1\n", b"-1\n-1\n"), result


async def test_planted_link_below_a_writable_bind(tmp_path: Path) -> None:
    """A link that an earlier job left in a writable bind is no mount target."""
    tmp_path.chmod(0o777)
    (tmp_path / "x").symlink_to("/etc")
    sandbox = Sandbox(
        mounts=(
            Mount.bind(tmp_path, "/box/data", read_only=False),
            Mount.tmpfs("/box/data/x", size="1MiB"),
        )
    )
    with pytest.raises(SandboxSetupError, match="mount target"):
        await run_isolated(["true"], sandbox=sandbox)


async def test_core_limit_that_pipes_honour(python: str) -> None:
    """RLIMIT_CORE is 1, which keeps a piped core_pattern from starting its handler (core(5))."""
    code = "import resource; print(resource.getrlimit(resource.RLIMIT_CORE))"
    result = await run_isolated([python, "-I", "-c", code])
    assert result.stdout == b"(1, 1)\n"


@pytest.mark.parametrize("place", ["/proc", "/proc/self/fdinfo", "/sys/fs/cgroup", "/", "/sys"])
async def test_no_link_leads_to_the_host(tmp_path: Path, place: str) -> None:
    """A bind source that is a link to what a bind may not show is refused, as is a root."""
    (tmp_path / "link").symlink_to(place)
    (tmp_path / "again").symlink_to(tmp_path / "link")
    for sandbox in (
        Sandbox(mounts=(Mount.bind(tmp_path / "again", "/mnt"),)),
        Sandbox(mounts=(Mount.bind(tmp_path / "again", "/box/mnt", read_only=False),)),
        Sandbox(root=Root.directory(tmp_path / "again")),
    ):
        with pytest.raises(ValueError, match="processes or cgroups"):
            await run_isolated(["true"], sandbox=sandbox)


@pytest.mark.parametrize("kind", ["workdir", "tmpfs", "directory", "file", "root", "layers"])
async def test_no_name_leads_to_the_host(tmp_path: Path, kind: str) -> None:
    """Where the host's root hangs while a root is built has no name: each is the sandbox's own."""
    tmp_path.chmod(0o755)
    target, file, image = f"/.host{tmp_path}/made", tmp_path / "file", tmp_path / "image"
    file.write_text("mine")
    (image / ".host").mkdir(parents=True)
    (image / ".host" / "file").write_text("mine")
    for name in ("bin", "lib", "lib64"):
        (image / name).symlink_to(f"usr/{name}")
    usr = Mount.bind("/usr", "/usr")
    sandbox, words = {
        "workdir": (Sandbox(workdir=target), "stat -c %F"),
        "tmpfs": (Sandbox(mounts=[Mount.tmpfs(target, size="1MiB")]), "stat -c %F"),
        "directory": (Sandbox(mounts=[Mount.bind(image, target)]), "stat -c %F"),
        "file": (Sandbox(mounts=[Mount.bind(file, target)]), "cat"),
        "root": (Sandbox(root=Root.directory(image), mounts=[usr]), "cat"),
        "layers": (Sandbox(root=Root.layers([image]), mounts=[usr]), "cat"),
    }[kind]
    path = "/.host/file" if kind in ("root", "layers") else target
    before = sorted(tmp_path.rglob("*"))
    result = await run_isolated([*words.split(), path], sandbox=sandbox)
    assert result.stdout == (b"mine" if words == "cat" else b"directory\n"), result
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("link", ["/.host", "/../../..", "/proc/self/root", "/proc/1/root"])
async def test_no_link_of_a_root_leads_to_the_host(tmp_path: Path, link: str) -> None:
    """Targets, and a working directory, that an image has links for."""
    tmp_path.chmod(0o755)
    image = tmp_path / "image"
    (image / "opt").mkdir(parents=True)
    (image / "home").symlink_to(link)
    (image / "opt" / "home").symlink_to(link)
    before = sorted(tmp_path.rglob("*"))
    for root in (Root.directory(image), Root.layers([image])):
        for top in ("/home", "/opt/home"):
            target = f"{top}{tmp_path}/made"
            for sandbox in (
                Sandbox(root=root, workdir=target),
                Sandbox(root=root, mounts=[Mount.tmpfs(target, size="1MiB")]),
                Sandbox(root=root, mounts=[Mount.bind(image, target)]),
                Sandbox(root=root, mounts=[Mount.bind(image, top)]),
            ):
                with pytest.raises(SandboxSetupError, match="Not a directory|symbolic links"):
                    await run_isolated(["true"], sandbox=sandbox)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", ["link", "tree"])
async def test_the_zygote_looks_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Whatever was checked before: no proc or cgroup of the host is mounted, nor came with a bind."""
    monkeypatch.setattr(rootfs, "check_source", lambda path: path)
    (tmp_path / "link").symlink_to("/proc")
    (tmp_path / "tree").symlink_to("/sys/fs")
    sandbox = Sandbox(mounts=(Mount.bind(tmp_path / place, "/mnt"),))
    with pytest.raises(SandboxSetupError, match="dangerous mount /?mnt"):
        await run_isolated(["true"], sandbox=sandbox)


async def test_copies_of_small_trees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str
) -> None:
    """What /etc has of the host is copied if it is small, bound if not; secrets are in no copy."""
    small, large = tmp_path / "small", tmp_path / "large"
    (small / "sub").mkdir(parents=True)
    (small / "file").write_text("content")
    (small / "program").write_text("#!/bin/sh\n")
    (small / "program").chmod(0o755)
    (small / "secret").write_text("secret")
    (small / "secret").chmod(0o600)
    (small / "closed").mkdir(mode=0o700)
    (small / "sub" / "link").symlink_to("../file")
    os.mkfifo(small / "fifo")
    large.mkdir()
    for number in range(200):
        (large / str(number)).write_text("x")

    def plan(
        config: Writer, out: Writer, sandbox: Sandbox, images: dict[str, int], *, own_ids: bool
    ) -> None:
        rootfs.write_plan(config, out, sandbox, images, own_ids=own_ids)
        for source in (small, large):
            out.pair(Tag.ROOT_COPY, f"copies/{source.name}", str(source))

    monkeypatch.setattr(zygote, "write_plan", plan)
    code = (
        "import os\n"
        "for top, directories, files in sorted(os.walk('/copies')):\n"
        "    if top == '/copies/large': print(len(files)); continue\n"
        "    for name in sorted(directories + files):\n"
        "        path = os.path.join(top, name)\n"
        "        mode = oct(os.lstat(path).st_mode & 0o777) if not os.path.islink(path) else ''\n"
        "        print(path, mode, os.path.isfile(path) and open(path).read().strip())\n"
        "print(*(line.split()[4] for line in open('/proc/self/mountinfo') if 'copies' in line))"
    )
    async with Pool() as pool:
        result = await pool.run([python, "-I", "-S", "-c", code])
    assert result.stdout_text.splitlines() == [
        "/copies/large 0o755 False",
        "/copies/small 0o755 False",
        "200",
        "/copies/small/file 0o644 content",
        "/copies/small/program 0o755 #!/bin/sh",
        "/copies/small/sub 0o755 False",
        "/copies/small/sub/link  content",
        "/copies/large",
    ], result.stderr_text

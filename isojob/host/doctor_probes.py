"""Tries kernel features, each in a process of its own; a program, run by `doctor`.

Only the standard library, and nothing of isojob: it runs under ``python -I -S``. Arguments: a
group, ``root`` or ``user``, the first of two free uids, and what the group needs. Each attempt
prints a line, ``[name, errno, detail]``; errno 0 is success, -1 a failure without a number.
"""

import ctypes
import json
import os
import platform
import signal
import struct
import sys
from collections.abc import Callable
from functools import partial

LIBC = ctypes.CDLL(None, use_errno=True)
PATIENCE = 5

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_INTO_CGROUP = 0x200000000
KINDS = {
    "mnt": CLONE_NEWNS,
    "pid": CLONE_NEWPID,
    "net": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
    "cgroup": 0x02000000,
}
MS_RDONLY, MS_REC, MS_PRIVATE = 1, 0x4000, 0x40000
MNT_DETACH = 2
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000

# From 424 on a call has one number on every architecture.
OPEN_TREE, MOVE_MOUNT, CLONE3, CLOSE_RANGE, OPENAT2 = 428, 429, 435, 436, 437
MOUNT_SETATTR, LANDLOCK_CREATE_RULESET = 442, 444
OLD_CALLS = {
    "x86_64": {"pivot_root": 155, "seccomp": 317, "getppid": 110},
    "aarch64": {"pivot_root": 41, "seccomp": 277, "getppid": 173},
}


def syscall(number: int, *arguments: object) -> int:
    """Makes a system call, with ints at the width of a register.

    Raises:
        OSError: It returned -1.
    """
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    LIBC.syscall.restype = ctypes.c_long
    result = LIBC.syscall(ctypes.c_long(number), *wide)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(result)


def old_call(name: str) -> int:
    """The number of a call from before the numbers were made the same everywhere."""
    return OLD_CALLS[platform.machine()][name]


def unshare(flags: int) -> None:
    """Moves this process into new namespaces."""
    if LIBC.unshare(ctypes.c_int(flags)) != 0:
        raise OSError(ctypes.get_errno(), "unshare")


def mount(source: bytes, target: bytes, kind: bytes, flags: int = 0, data: bytes = b"") -> None:
    """Mounts a file system."""
    if LIBC.mount(source, target, kind, ctypes.c_ulong(flags), data) != 0:
        raise OSError(ctypes.get_errno(), f"mount {target.decode()}")


def answer(step: Callable[[], str | None]) -> tuple[int, str]:
    """How a step ended."""
    try:
        return 0, step() or ""
    except OSError as error:
        return error.errno or -1, f"{error.strerror or ''} {error.filename or ''}".strip()
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent is to hear of it
        return -1, f"{type(error).__name__}: {error}"


def in_child(step: Callable[[], str | None]) -> str:
    """Runs a step in a child and raises here what it raised there."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(PATIENCE)
        os.write(write_end, json.dumps(answer(step)).encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as stream:
        data = stream.read()
    _, status = os.waitpid(pid, 0)
    if not data:
        raise OSError(-1, f"the process ended early ({os.waitstatus_to_exitcode(status)})")
    number, detail = json.loads(data)
    if number:
        raise OSError(number, detail)
    return str(detail)


def in_user_namespace(step: Callable[[], str | None], mode: str, base: int) -> str:
    """Runs a step in a child with a user namespace of its own, its ids mapped as isojob does."""
    up_read, up_write = os.pipe()
    down_read, down_write = os.pipe()

    def inside() -> str | None:
        os.close(up_read)
        os.close(down_write)
        unshare(CLONE_NEWUSER)
        os.write(up_write, b"u")
        os.close(up_write)
        if os.read(down_read, 1) != b"m":
            return None  # the parent says why
        if mode == "root":
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
        return step()

    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        signal.alarm(PATIENCE)
        os.write(write_end, json.dumps(answer(inside)).encode())
        os._exit(0)
    for fd in (up_write, down_read, write_end):
        os.close(fd)
    mapping = 0, ""
    if os.read(up_read, 1) == b"u":
        mapping = answer(lambda: write_maps(pid, mode, base))
        if mapping[0] == 0:
            os.write(down_write, b"m")
    os.close(down_write)
    os.close(up_read)
    with os.fdopen(read_end, "rb") as stream:
        data = stream.read()
    os.waitpid(pid, 0)
    number, detail = mapping if mapping[0] else json.loads(data or b'[-1, "ended early"]')
    if number:
        raise OSError(number, detail)
    return str(detail)


def write_maps(pid: int, mode: str, base: int) -> None:
    """uid_map and gid_map (user_namespaces(7))."""
    if mode == "root":
        uids = gids = f"0 {base} 1\n1000 {base + 1} 1\n"
    else:
        uids, gids = f"1000 {os.geteuid()} 1\n", f"1000 {os.getegid()} 1\n"
        with open(f"/proc/{pid}/setgroups", "w") as file:
            file.write("deny")
    for name, text in (("uid_map", uids), ("gid_map", gids)):
        with open(f"/proc/{pid}/{name}", "w") as file:
            file.write(text)


def unshare_kind(kind: str) -> str:
    """A namespace of one kind; the new one is another than the old one."""
    before = os.readlink(f"/proc/self/ns/{kind}")
    unshare(KINDS[kind])
    # unshare(2) puts the children into a pid namespace, not the caller.
    if kind == "pid":
        return in_child(lambda: f"process {os.getpid()} in it")
    after = os.readlink(f"/proc/self/ns/{kind}")
    if before == after:
        raise OSError(-1, "the namespace is still the old one")
    return ""


def private_mounts() -> bytes:
    """A mount namespace with a fresh tmpfs in it; where it is."""
    unshare(CLONE_NEWNS)
    mount(b"none", b"/", b"", MS_REC | MS_PRIVATE)
    place = next(path for path in ("/tmp", "/mnt", "/usr") if os.path.isdir(path))  # noqa: S108
    mount(b"isojob", place.encode(), b"tmpfs", 0, b"size=64k")
    return place.encode()


def try_tmpfs() -> str:
    """tmpfs(5)."""
    return f"on {private_mounts().decode()}"


def try_proc() -> str:
    """A proc of one's own in a new pid namespace."""
    unshare(CLONE_NEWPID | CLONE_NEWNS)
    mount(b"none", b"/", b"", MS_REC | MS_PRIVATE)

    def inside() -> str:
        mount(b"proc", b"/proc", b"proc", 0, b"hidepid=2")
        return f"{sum(name.isdigit() for name in os.listdir('/proc'))} process visible in it"

    return in_child(inside)


def try_mount_api() -> str:
    """open_tree, mount_setattr and move_mount: a read-only copy of /usr somewhere else."""
    target = private_mounts() + b"/x"
    os.mkdir(target)
    tree = syscall(OPEN_TREE, AT_FDCWD, b"/usr", 1 | os.O_CLOEXEC | AT_RECURSIVE)
    # struct mount_attr: attr_set (RDONLY, NOSUID, NODEV), attr_clr, propagation, userns_fd.
    attributes = struct.pack("=4Q", 1 | 2 | 4, 0, 0, 0)
    flags = AT_EMPTY_PATH | AT_RECURSIVE
    syscall(MOUNT_SETATTR, tree, b"", flags, attributes, len(attributes))
    syscall(MOVE_MOUNT, tree, b"", AT_FDCWD, target, 4)
    if not os.statvfs(target).f_flag & os.ST_RDONLY:
        raise OSError(-1, "the copy is not read-only")
    return ""


def try_pivot_root() -> str:
    """pivot_root(2) onto an empty tmpfs."""
    os.chdir(private_mounts())
    syscall(old_call("pivot_root"), b".", b".")
    if LIBC.umount2(b".", MNT_DETACH) != 0:
        raise OSError(ctypes.get_errno(), "umount2")
    os.chdir("/")
    if os.listdir("/"):
        raise OSError(-1, "the old root is still there")
    return ""


def try_overlay() -> str:
    """An overlayfs mounted from within a user namespace (5.11)."""
    top = private_mounts().decode()
    for name in ("l", "u", "w", "m"):
        os.mkdir(f"{top}/{name}")
    options = f"lowerdir={top}/l,upperdir={top}/u,workdir={top}/w,userxattr"
    mount(b"overlay", f"{top}/m".encode(), b"overlay", 0, options.encode())
    return ""


def try_openat2() -> str:
    """openat2(2) refuses a link."""
    how = struct.pack("=3Q", os.O_PATH | os.O_CLOEXEC, 0, 0x04)
    syscall(OPENAT2, AT_FDCWD, b"/", how, len(how))
    try:
        syscall(OPENAT2, AT_FDCWD, b"/proc/self/cwd", how, len(how))
    except OSError as error:
        if error.errno == 40:  # ELOOP
            return ""
        raise
    raise OSError(-1, "RESOLVE_NO_SYMLINKS was not heeded")


def try_close_range() -> str:
    """close_range(2)."""
    fd = os.dup(0)
    syscall(CLOSE_RANGE, fd, fd, 0)
    try:
        os.fstat(fd)
    except OSError:
        return ""
    raise OSError(-1, "the descriptor is still open")


def try_pidfd() -> str:
    """pidfd_open(2)."""
    os.pidfd_open(os.getpid())
    return ""


def try_clone3() -> str:
    """clone3(2), as fork."""
    pid = syscall(CLONE3, struct.pack("=8Q", 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0), 64)
    if pid == 0:
        os._exit(7)
    _, status = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(status) != 7:
        raise OSError(-1, "the child did not run")
    return ""


class Program(ctypes.Structure):
    """struct sock_fprog (linux/filter.h)."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def load_filter(value: int, flags: int) -> int:
    """Loads a filter that answers getppid with `value` and allows everything else."""
    code = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (0x20, 0, 0, 0),
            (0x15, 0, 1, old_call("getppid")),
            (0x06, 0, 0, value),
            (0x06, 0, 0, 0x7FFF0000),
        )
    )
    buffer = ctypes.create_string_buffer(code, len(code))
    program = Program(4, ctypes.addressof(buffer))
    if LIBC.prctl(38, 1, 0, 0, 0) != 0:  # PR_SET_NO_NEW_PRIVS
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")
    return syscall(old_call("seccomp"), 1, flags, ctypes.byref(program))


def try_filter() -> str:
    """A seccomp filter that denies one call."""
    load_filter(0x00050000 | 13, 0)
    try:
        syscall(old_call("getppid"))
    except OSError as error:
        if error.errno == 13:
            return ""
    raise OSError(-1, "the filter was not heeded")


def try_notify() -> str:
    """A listener for user notifications (seccomp_unotify(2))."""
    os.fstat(load_filter(0x7FFF0000, 8))
    return ""


def try_landlock() -> str:
    """The version of the Landlock ABI (landlock_create_ruleset(2))."""
    return f"ABI {syscall(LANDLOCK_CREATE_RULESET, 0, 0, 1)}"


def try_into_cgroup(directory: int, place: str) -> str:
    """A child born in a cgroup by clone3, and killed by the cgroup's cgroup.kill."""
    arguments = struct.pack(
        "=11Q", CLONE_INTO_CGROUP, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, directory
    )
    pid = syscall(CLONE3, arguments, len(arguments))
    if pid == 0:
        signal.alarm(PATIENCE)
        signal.pause()
        os._exit(0)
    try:
        with open(f"{place}/cgroup.procs") as file:
            if str(pid) not in file.read().split():
                raise OSError(-1, "the child is in another cgroup")
        with open(f"{place}/cgroup.kill", "w") as file:
            file.write("1")
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    _, status = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        raise OSError(-1, "cgroup.kill did not kill")
    return ""


def try_attach(*places: str) -> str:
    """v1: a process moves itself into the cgroup of every hierarchy, and ends there."""
    for place in places:
        with open(f"{place}/tasks", "w") as file:
            file.write("0")
    return ""


def report(name: str, step: Callable[[], str | None]) -> None:
    """Runs a step in a child and prints how it ended."""
    sys.stdout.write(json.dumps([name, *answer(lambda: in_child(step))]) + "\n")
    sys.stdout.flush()


def main(group: str, mode: str, first: str, *rest: str) -> None:
    """Runs one group of attempts."""
    base = int(first)
    if group == "namespaces":
        steps: dict[str, Callable[[], str | None]] = {"user": lambda: None}
        steps.update({kind: partial(unshare_kind, kind) for kind in KINDS})
        steps["proc"] = try_proc
        steps["tmpfs"] = try_tmpfs
        steps["mount api"] = try_mount_api
        steps["pivot_root"] = try_pivot_root
        steps["overlay"] = try_overlay
        for name, step in steps.items():
            report(name, partial(in_user_namespace, step, mode, base))
    elif group == "calls":
        report("openat2", try_openat2)
        report("close_range", try_close_range)
        report("pidfd_open", try_pidfd)
        report("clone3", try_clone3)
        report("filter", try_filter)
        report("notify", try_notify)
        report("landlock", try_landlock)
    elif group == "cgroup2":
        report("attach", lambda: try_into_cgroup(int(rest[0]), rest[1]))
    else:
        report("attach", lambda: try_attach(*rest))


if __name__ == "__main__":
    main(*sys.argv[1:])

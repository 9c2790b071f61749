"""Attacks on files and mounts: out of the root, into the host's collector, onto what all share."""

import ctypes
import fcntl
import mmap
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time

from attacker import attempt, denied, escaped, main, refused, say, stopped

WRITABLE = ("/box", "/tmp", "/dev/shm", "/proc", "/sys")


def bait_link(secret):
    """A link in place of what the host reads back."""
    os.symlink(secret, "out.txt")
    os.symlink("/etc/shadow", "other.txt")
    os.symlink("/", "directory")


def bait_special():
    """A FIFO, a directory, a socket and devices, where a file is expected."""
    os.mkfifo("out.txt")
    os.mkdir("other.txt")
    os.mkdir("directory")
    socket.socket(socket.AF_UNIX).bind("directory/socket")
    os.symlink("/dev/zero", "directory/link")
    # The one device that needs no privilege (mknod(2), since 5.8): what overlayfs deletes by.
    for name, device in (("whiteout", 0), ("zero", os.makedev(1, 5))):
        try:
            os.mknod(f"directory/{name}", stat.S_IFCHR | 0o666, device)
        except OSError as error:
            denied(f"device {name}", error.errno)


def bait_sparse():
    """A file that claims to be huge."""
    with open("out.txt", "wb") as file:
        try:
            file.truncate(1 << 43)
        except OSError as error:
            denied("8 TiB", error.errno)
        try:
            file.truncate(48 << 20)
        except OSError as error:
            denied("48 MiB", error.errno)


def bait_many():
    """One file under many names."""
    os.mkdir("directory")
    with open("directory/0", "wb") as file:
        file.write(b"x" * (300 << 10))
    for number in range(1, 100):
        os.link("directory/0", f"directory/{number}")


def tangle():
    """A tree that is hard to remove: deep, odd names, no permissions."""
    for _ in range(300):
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
    for name in (b"\xff\n\x1b", b"-rf", b"*"):
        os.mkdir(name, 0)
    os.chmod(".", 0)


def climb():
    """Above the root, by .., by descriptors, by what /proc links to."""
    at = os.open("/", os.O_RDONLY)
    for _ in range(40):
        at = os.open("..", os.O_RDONLY, dir_fd=at)
    if not os.path.samestat(os.fstat(at), os.stat("/")):
        escaped("the root has a parent")
    else:
        stopped("mount", "the root's parent is itself")
    open_here = {int(name) for name in os.listdir("/proc/self/fd")}
    known = {0, 1, 2, at}
    for descriptor in sorted(open_here - known):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue
        if target not in ("/", "/proc/self/fd") and not target.startswith("/proc/"):
            escaped(f"descriptor {descriptor}: {target}")
    stopped("init", "no descriptor above 2")
    if not os.getcwd().startswith("/"):
        escaped(f"the working directory is outside: {os.getcwd()}")
    refused("chroot", b".")


def runtime():
    """Overwrites the program that runs it, for the next job to run."""
    for path in ("/proc/1/exe", "/proc/self/exe", os.path.realpath(sys.executable), "/bin/sh"):
        try:
            os.close(os.open(path, os.O_WRONLY))
        except OSError as error:
            denied(f"{path} for writing", error.errno)
        else:
            escaped(f"{path} opened for writing")


def devices():
    """Makes and opens device nodes."""
    for name, major, minor in (("mem", 1, 1), ("kmsg", 1, 11), ("sda", 8, 0), ("vda", 254, 0)):
        path = f"/tmp/{name}"
        try:
            os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(major, minor))
        except OSError as error:
            denied(f"mknod {name}", error.errno, "privileges")
            continue
        attempt(f"device {name}", os.open, path, os.O_RDWR)
    allowed = {"null", "zero", "full", "random", "urandom", "tty", "fd", "stdin", "stdout"}
    allowed |= {"stderr", "shm", ".empty", ".warm", "pts", "ptmx"}
    if extra := set(os.listdir("/dev")) - allowed:
        escaped(f"surface: in /dev: {sorted(extra)}")


def set_id():
    """Set-uid programs, its own and the host's."""
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file if ":" in line)
    if status["NoNewPrivs"].strip() != "1":
        escaped("no_new_privs is not set")
    else:
        stopped("privileges", "no_new_privs")
    with open("/proc/self/mounts") as file:
        loose = [line.split()[1] for line in file if "nosuid" not in line.split()[3].split(",")]
    if loose:
        escaped(f"without nosuid: {loose}")
    else:
        stopped("mount", "nosuid everywhere")
    copy = "/tmp/copy"
    with open("/usr/bin/id", "rb") as source, open(copy, "wb") as target:
        target.write(source.read())
    os.chmod(copy, 0o6755)
    done = subprocess.run([copy, "-u"], capture_output=True, check=False)
    if done.stdout.strip() != str(os.getuid()).encode():
        escaped(f"a set-uid program ran as {done.stdout!r}")


def hard_links():
    """Links to the host's files, to keep or to change them."""
    for path in ("/etc/passwd", "/usr/bin/id", "/etc/hostname"):
        if os.path.exists(path):
            attempt(f"hard link to {path}", os.link, path, "/tmp/link")


def proc_and_sys():
    """Files of the kernel that change the host."""
    for path in (
        "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sys/vm/drop_caches",
        "/proc/sys/kernel/hostname", "/proc/sys/net/ipv4/ip_forward", "/proc/sysrq-trigger",
        "/proc/sys/user/max_user_namespaces", "/proc/self/oom_score_adj", "/proc/self/uid_map",
        "/proc/irq/default_smp_affinity", "/proc/bus/pci/devices", "/proc/acpi/wakeup",
        "/sys/kernel/uevent_helper", "/sys/fs/cgroup/release_agent", "/proc/scsi/scsi",
    ):  # fmt: skip
        attempt(f"{path} for writing", os.open, path, os.O_WRONLY)


def kernel_secrets():
    """Files of the kernel that tell about the host."""
    for path in ("/proc/kcore", "/proc/timer_list", "/proc/sched_debug", "/dev/mem"):
        try:
            with open(path, "rb", buffering=0) as file:
                data = file.read(4096)
        except OSError as error:
            denied(path, error.errno)
            continue
        if data:
            escaped(f"surface: {path} can be read")
        else:
            stopped("mount", f"{path} is masked")
    try:
        with open("/proc/kallsyms") as file:
            if any(int(line.split()[0], 16) for line in file):
                escaped("surface: addresses of the kernel in /proc/kallsyms")
    except OSError as error:
        denied("/proc/kallsyms", error.errno)
    if os.path.isdir("/sys/kernel"):
        escaped("surface: /sys is mounted")


def mounts():
    """Makes what is read-only writable, uncovers what is covered, mounts what is not there."""
    empty = b"none"
    for what, arguments in (
        ("remount of / for writing", (empty, b"/", None, 0x1020, None)),
        ("remount of /usr for writing", (empty, b"/usr", None, 0x1020, None)),
        ("remount of /proc for writing", (empty, b"/proc", None, 0x1020, None)),
        ("bind of /proc over /tmp", (b"/proc", b"/tmp", None, 0x1000, None)),
        ("new proc", (b"proc", b"/tmp", b"proc", 0, None)),
        ("new sysfs", (b"sysfs", b"/tmp", b"sysfs", 0, None)),
        ("cgroup v1", (b"cgroup", b"/tmp", b"cgroup", 0, b"memory")),
        ("cgroup v2", (b"cgroup2", b"/tmp", b"cgroup2", 0, None)),
        ("tmpfs", (b"tmpfs", b"/tmp", b"tmpfs", 0, None)),
    ):
        refused("mount", *arguments, what=what)
    for path in (b"/proc", b"/tmp", b"/dev/shm", b"/"):
        refused("umount2", path, 2, what=f"umount of {path.decode()}")
    refused("open_tree", -100, b"/", 1)
    refused("fsopen", b"tmpfs", 0)
    refused("mount_setattr", -100, b"/", 0, b"\0" * 32, 32)
    refused("pivot_root", b"/tmp", b"/tmp")


def terminal():
    """Types into the terminal that started it all."""
    attempt("/dev/tty", os.open, "/dev/tty", os.O_RDWR)
    for descriptor in range(3):
        for request, name in ((0x5412, "TIOCSTI"), (0x541C, "TIOCLINUX")):
            for high in (0, 1 << 32):
                number = ctypes.c_ulong(request | high)
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.ioctl(descriptor, number, b"x") == 0:
                    escaped(f"{name} on {descriptor}")
                else:
                    denied(f"{name} on {descriptor}", ctypes.get_errno(), "seccomp")
    try:
        fcntl.ioctl(0, 0x540E, 1)  # TIOCSCTTY
    except OSError as error:
        denied("controlling terminal", error.errno)


def read_fast(rate, path=""):
    """Reads from a disk, past the page cache, faster than it may."""
    buffer = mmap.mmap(-1, 64 << 10)
    before, start = _read_from_disks(), time.monotonic()
    try:
        file = os.open(path or os.path.realpath(sys.executable), os.O_RDONLY | os.O_DIRECT)
        blocks = os.fstat(file).st_size // len(buffer)
        for number in range(4 * int(rate) // len(buffer)):
            os.preadv(file, [buffer], number % blocks * len(buffer))
    except OSError as error:
        denied("reads past the page cache", error.errno)
        return
    speed = (_read_from_disks() - before) / (time.monotonic() - start)
    if speed > 2 * int(rate):
        escaped(f"{speed:.0f} bytes a second instead of {rate}")
    else:
        stopped("cgroup", f"{speed:.0f} bytes a second")


def _read_from_disks():
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))


def compile_in(path, marker):
    """Has a compiler read what it may not read itself."""
    compilers = [name for name in ("gcc", "cc", "clang") if shutil.which(name)]
    if not compilers:
        say("NOTE", "no compiler is here")
        stopped("mount", "no compiler")
        return
    with tempfile.TemporaryDirectory() as directory:
        for what, source, arguments in (
            ("#include", f'#include "{path}"\n', ["-E", "-x", "c", "-"]),
            (".incbin", f'.incbin "{path}"\n', ["-c", "-x", "assembler", "-", "-o", "out"]),
            ("a file of options", "", [f"@{path}"]),
        ):
            done = subprocess.run(
                [compilers[0], *arguments],
                input=source.encode(),
                capture_output=True,
                check=False,
                cwd=directory,
            )
            found = done.stdout + done.stderr
            if os.path.exists(f"{directory}/out"):
                with open(f"{directory}/out", "rb") as file:
                    found += file.read()
            if marker.encode() in found:
                escaped(f"{what} shows a file of the host")
            else:
                stopped("mount", f"{what}: the compiler sees what the job sees")


def write_everywhere():
    """A file in every directory there is."""
    tried = 0
    for top, directories, _ in os.walk("/"):
        if top.startswith(WRITABLE):
            directories.clear()
            continue
        if top.count("/") > 3 or tried > 400:
            directories.clear()
        tried += 1
        try:
            os.close(os.open(f"{top}/isojob-was-here", os.O_CREAT | os.O_WRONLY))
        except OSError:
            continue
        escaped(f"wrote into {top}")
    stopped("mount", f"{tried} directories are read-only")


def secrets(path, marker):
    """What the host has and the job must not see."""
    for name in (
        path,
        "/etc/shadow",
        "/root/.ssh",
        "/home",
        "/run/docker.sock",
        "/var/run",
        "/boot",
    ):
        try:
            found = os.listdir(name) if os.path.isdir(name) else open(name, "rb").read(64)
        except OSError as error:
            denied(name, error.errno)
        else:
            if found:
                escaped(f"{name} can be read")
            else:
                stopped("mount", f"{name} is empty")
    with open("/proc/self/mountinfo") as file:
        if marker in file.read():
            escaped("the host's secret in mountinfo")
    say("NOTE", "entries of /:", *sorted(os.listdir("/")))


if __name__ == "__main__":
    main(globals())

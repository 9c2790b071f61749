"""Attacks through what jobs are composed with: a session, a terminal, a partner's pipes."""

import ctypes
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import time

from attacker import attempt, denied, escaped, main, ready, refused, say, stopped

_libc = ctypes.CDLL(None, use_errno=True)
_NEEDED = "attacker.py"


def _set_attribute(path, name, value):
    if _libc.setxattr(path.encode(), name.encode(), value, len(value), 0) != 0:
        raise OSError(ctypes.get_errno(), name)


def leave_traps(secret):
    """Prepares the directory for whoever runs in it next, and for the host."""
    os.symlink(secret, "out.txt")
    os.mkfifo("other.txt")
    os.symlink("/", "directory")
    os.rename(_NEEDED, "kept.py")
    os.symlink(secret, _NEEDED)
    os.remove("calls.py")
    os.mkfifo("calls.py", 0o666)
    with open("/usr/bin/id", "rb") as source, open("id", "wb") as target:
        target.write(source.read())
    os.chmod("id", 0o6755)
    for name, kind in (("null", stat.S_IFCHR), ("disk", stat.S_IFBLK)):
        attempt(f"a device: {name}", os.mknod, name, kind | 0o666, os.makedev(1, 3))
    capability = b"\1\0\0\2" + b"\xff" * 16
    attempt("capabilities of a file", _set_attribute, "id", "security.capability", capability)
    os.mkdir("closed")
    with open("closed/file", "w") as file:
        file.write("x")
    os.chmod("closed", 0)


def find_traps(secret):
    """The next job on that directory: is it tricked?"""
    if os.path.islink(_NEEDED) or not stat.S_ISREG(os.lstat("calls.py").st_mode):
        escaped("the host wrote through what the job before had left")
    done = subprocess.run(["./id", "-u"], capture_output=True, check=False)
    if done.stdout.strip() != str(os.getuid()).encode():
        escaped(f"a set-id program of the job before ran as {done.stdout!r}")
    else:
        stopped("mount", "set-id programs of the job before run as this job")
    attempt("what a link left behind leads to", os.open, secret, os.O_RDONLY)


def mark_layers():
    """Marks its directory so that an overlay on it would show what is elsewhere."""
    os.makedirs("sub/deep")
    for name, value in (("redirect", b"/../../.."), ("opaque", b"y"), ("metacopy", b"")):
        for kind in ("user", "trusted"):
            try:
                _set_attribute("sub", f"{kind}.overlay.{name}", value)
            except OSError as error:
                denied(f"{kind}.overlay.{name}", error.errno)
    os.remove("calls.py")
    try:
        os.mknod("calls.py", stat.S_IFCHR | 0o666, 0)
    except OSError as error:
        denied("a whiteout", error.errno)


def see_marks():
    """What a private view of that directory shows."""
    found = set(os.listdir("sub")) - {"deep"}
    if found:
        escaped(f"a mark in the lower layer shows {sorted(found)}")
    else:
        stopped("mount", "marks in the lower layer lead nowhere")
    if not stat.S_ISREG(os.lstat("calls.py").st_mode):
        escaped("a whiteout is in place of what the host wrote")


def change_the_original(marker):
    """Changes what it works on, in a view of its own: the next job must not see it."""
    for top, directories, names in os.walk("/box"):
        for name in [*directories, *names]:
            if name.endswith(".py"):
                os.remove(os.path.join(top, name))
    with open(marker, "w") as file:
        file.write(marker)


def as_it_was(marker):
    """Whether a private view of another job has come through."""
    if os.path.exists(marker):
        escaped("what another job did in a view of its own")
    else:
        stopped("mount", "a private view ends with its job")


def change_the_root(marker):
    """Changes all it can reach of a root that it may write to: nobody else must see it."""
    for top in ("/", "/etc", "/bin", "/usr", "/dev", "/proc", "/usr/bin", "/sbin", "/root"):
        try:
            with open(f"{top}/{marker}", "w") as file:
                file.write(marker)
        except OSError as error:
            denied(f"write in {top}", error.errno)
    with open("/etc/passwd", "w") as file:
        file.write(marker)
    shutil.move("/etc", "/moved")
    os.symlink("/moved", "/etc")
    shutil.rmtree("/root")
    os.mkdir("/root", 0o777)
    with open("/usr/bin/id", "rb") as source, open("/id", "wb") as target:
        target.write(source.read())
    os.chmod("/id", 0o6755)
    for name in ("redirect", "opaque", "origin"):
        for kind in ("user", "trusted"):
            try:
                _set_attribute("/root", f"{kind}.overlay.{name}", b"/../../..")
            except OSError as error:
                denied(f"{kind}.overlay.{name}", error.errno)
    if os.listdir("/root"):
        escaped("a mark of overlayfs that it set itself")
    ready()


def stay_in_a_changed_root(marker):
    """The same, and lives on meanwhile."""
    change_the_root(marker)
    time.sleep(900)


def leave_the_root(marker):
    """The way out of a root that it may write to, and what another job did to its own."""
    for top in ("/", "/etc", "/bin", "/usr", "/dev", "/usr/bin", "/sbin"):
        if os.path.lexists(f"{top}/{marker}"):
            escaped(f"what another job wrote in {top}")
    with open("/etc/passwd") as file:
        if marker in file.read() or os.path.islink("/etc") or not os.path.exists("/root/.profile"):
            escaped("what another job changed")
    stopped("mount", "a root is as the host gave it, whatever other jobs did")
    for name in ("/.lower", "/.root", "/rootwork", "/tmp/root", "/tmp/rootwork"):
        if os.path.lexists(name):
            escaped(f"{name} of the set-up")
    for _ in range(20):
        os.chdir("..")
    if os.stat(".").st_ino != os.stat("/").st_ino:
        escaped("a directory above its root")
    os.mkdir("/old")
    refused("chroot", b"/old")
    refused("pivot_root", b"/", b"/old")
    refused("mount", b"/usr", b"/old", None, 4096, None)
    refused("umount2", b"/", 2)
    refused("umount2", b"/dev", 2)
    for name in ("/dev", "/proc", "/tmp", "/box"):
        attempt(f"move {name} away", os.rename, name, "/away")
    for name, kind in (("/null", stat.S_IFCHR), ("/disk", stat.S_IFBLK)):
        attempt(f"a device: {name}", os.mknod, name, kind | 0o666, os.makedev(1, 3))
    with open("/usr/bin/id", "rb") as source, open("/id", "wb") as target:
        target.write(source.read())
    os.chmod("/id", 0o6755)
    if os.fork() == 0:
        os.execv("/id", ["id", "-u"])
    os.wait()


def on_a_terminal():
    """Types into its terminal, and looks for others."""
    for descriptor in range(3):
        for request, name in ((0x5412, "TIOCSTI"), (0x541C, "TIOCLINUX"), (0x541D, "TIOCCONS")):
            for high in (0, 1 << 32):
                if _libc.ioctl(descriptor, ctypes.c_ulong(request | high), b"x") == 0:
                    escaped(f"{name} on {descriptor}")
                else:
                    denied(f"{name} on {descriptor}", ctypes.get_errno(), "seccomp")
    # Its other side is the host's: TIOCGPTPEER and TIOCSPTLCK are for that side alone.
    attempt("the other side", fcntl.ioctl, 0, 0x5441, os.O_RDWR)
    attempt("unlock it", fcntl.ioctl, 0, 0x40045431, b"\0\0\0\0")
    for path in ("/dev/ptmx", "/dev/pts/ptmx", "/dev/console", "/dev/tty0", "/dev/tty1"):
        attempt(path, os.open, path, os.O_RDWR | os.O_NOCTTY)
    try:
        others = [name for name in os.listdir("/dev/pts") if name.isdigit()]
    except FileNotFoundError:
        others = []
    if others:
        escaped(f"terminals in /dev/pts: {others}")
    else:
        stopped("mount", "no other terminal is in sight")
    for group in (1, os.getpid() + 1000):
        try:
            os.tcsetpgrp(0, group)
        except OSError as error:
            denied(f"foreground group {group}", error.errno, "namespace")


def hang_up():
    """Hangs its terminal up, and lives on without."""
    for number in (signal.SIGHUP, signal.SIGTTOU, signal.SIGTTIN, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if os.fork() == 0:
        os.setsid()
        time.sleep(600)
    for descriptor in range(3):
        os.close(descriptor)
    time.sleep(600)


def reach_partner():
    """The other side of the pipes: its processes, its signals, its end of the pipe."""
    processes = {name for name in os.listdir("/proc") if name.isdigit()}
    mine = {str(os.getpid()), "1"}
    if processes - mine:
        escaped(f"processes of the partner: {sorted(processes - mine)}")
    else:
        stopped("namespace", "no process but its own")
    for descriptor in (0, 1):
        for target in (1, -1):
            try:
                fcntl.fcntl(descriptor, fcntl.F_SETOWN, target)
                flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
                fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC | os.O_NONBLOCK)
            except OSError as error:
                denied(f"signals from pipe {descriptor}", error.errno)
        try:
            fcntl.fcntl(descriptor, 1031, 1 << 30)  # F_SETPIPE_SZ
        except OSError as error:
            denied("a pipe of 1 GiB", error.errno, "kernel")
        else:
            escaped("a pipe of 1 GiB")
    try:
        other = os.open("/proc/self/fd/1", os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        denied("the other end of its pipe", error.errno)
        return
    os.write(1, b"to myself\n")
    try:
        if os.read(other, 100) != b"to myself\n":
            escaped("read what somebody else sent to the partner")
    except BlockingIOError:
        say("NOTE", "the partner was faster")
    stopped("pipe", "the other end of its own pipe shows its own bytes alone")


def hold_pipes():
    """Ends, and leaves children that keep the pipes open."""
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            for number in set(range(1, 32)) - {signal.SIGKILL, signal.SIGSTOP}:
                signal.signal(number, signal.SIG_IGN)
            time.sleep(600)
    say("NOTE", "left")


def partner():
    """Reads to the end of what it is sent."""
    while os.read(0, 65536):
        pass


def talk_on():
    """Writes until it is told that nobody reads."""
    try:
        while True:
            os.write(1, b"x" * 65536)
    except BrokenPipeError:
        stopped("pipe", "nobody reads any more: EPIPE")


def leaves():
    """Ends at the first word, or when nobody will say one."""
    os.read(0, 1)


if __name__ == "__main__":
    main(globals())

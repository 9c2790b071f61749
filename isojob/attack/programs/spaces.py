"""Attacks on namespaces, the network and the other jobs."""

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
import subprocess
import time

from attacker import attempt, denied, escaped, main, ready, refused, say, stopped, syscall

KINDS = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")


def nested():
    """New namespaces: the door to most bugs of the kernel."""
    for name, flag in (
        ("user", 0x10000000), ("mount", 0x20000), ("pid", 0x20000000), ("net", 0x40000000),
        ("ipc", 0x8000000), ("uts", 0x4000000), ("cgroup", 0x2000000), ("time", 0x80),
    ):  # fmt: skip
        refused("unshare", flag, what=f"unshare of the {name} namespace")
    arguments = (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17)
    value, number = syscall("clone3", arguments, 88)
    if value == 0:
        os._exit(0)
    if value > 0:
        escaped("clone3 with a new user namespace")
    else:
        denied("clone3", number)
    for path in ("/proc/sys/user/max_user_namespaces",):
        with open(path) as file:
            stopped("namespace", f"{path}: {file.read().strip()}")


def join():
    """Enters other namespaces."""
    for kind in KINDS:
        try:
            descriptor = os.open(f"/proc/1/ns/{kind}", os.O_RDONLY)
        except OSError as error:
            denied(f"init's {kind} namespace", error.errno)
            continue
        refused("setns", descriptor, 0, what=f"setns to init's {kind}")


def compare(*outside):
    """Compares its namespaces with the host's."""
    for kind, number in zip(KINDS, outside, strict=True):
        mine = os.readlink(f"/proc/self/ns/{kind}")
        if mine == number:
            escaped(f"shares the {kind} namespace of the host")
        else:
            stopped("namespace", f"{kind} is its own")


def host_processes(marker):
    """Looks for processes that are not its own."""
    pids = [name for name in os.listdir("/proc") if name.isdigit()]
    for pid in pids:
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if marker.encode() in file.read() and int(pid) != os.getpid():
                    escaped(f"sees process {pid} of the host")
        except OSError:
            continue
    if len(pids) > 3:
        escaped(f"sees {len(pids)} processes")
    stopped("namespace", f"sees {len(pids)} processes")


def interprocess(number):
    """Looks for System V objects, message queues and keys of others."""
    for name in ("shm", "msg", "sem"):
        try:
            with open(f"/proc/sysvipc/{name}") as file:
                lines = file.read().splitlines()[1:]
        except OSError as error:
            denied(f"System V {name}", error.errno)
            continue
        if lines:
            escaped(f"System V {name} of others: {lines}")
        else:
            stopped("namespace", f"no System V {name}")
    value, error = syscall("shmget", int(number), 0, 0)
    if value >= 0:
        escaped("a segment of the host")
    else:
        denied("a segment of the host", error)
    refused("keyctl", 0, -3, 0, what="the session keyring")
    refused("add_key", b"user", b"isojob", b"x", 1, -4)
    refused("request_key", b"user", b"isojob", None, -4)


def loopback(port, path):
    """Connects to servers of the host."""
    for address in ("127.0.0.1", "169.254.169.254", "10.0.0.1", "8.8.8.8"):
        with socket.socket() as out:
            out.settimeout(1)
            try:
                out.connect((address, int(port)))
            except TimeoutError:
                stopped("namespace", f"{address}: timeout")
            except OSError as error:
                denied(address, error.errno)
            else:
                escaped(f"connected to {address}:{port}")
    with socket.socket(socket.AF_UNIX) as out:
        attempt("an abstract socket of the host", out.connect, "\0" + path)
    with open("/proc/net/dev") as file:
        names = [line.split(":")[0].strip() for line in file if ":" in line]
    if set(names) - {"lo"}:
        escaped(f"interfaces: {names}")
    else:
        stopped("namespace", f"interfaces: {names}")


PROTOCOLS = {33: 6, 132: 1, 136: 2, 262: 1}
"""DCCP, SCTP, UDP-Lite, MPTCP, each with its type: modules that the kernel loads for who asks."""


def families():
    """Sockets of every family."""
    allowed = {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6}
    reached = []
    for family in range(1, 46):
        for high in (0, 1 << 32):
            for kind in (1, 2, 3, 5):
                value, number = syscall("socket", family | high, kind, 0)
                if number == errno.EAFNOSUPPORT:
                    break  # after a search for a module, which takes long
                if value >= 0:
                    os.close(value)
                    if family not in allowed:
                        reached.append(family)
                    elif kind == 3 and family in (socket.AF_INET, socket.AF_INET6):
                        escaped("a raw socket")
    for family in (socket.AF_INET, socket.AF_INET6):
        for protocol, kind in PROTOCOLS.items():
            value, number = syscall("socket", family, kind, protocol)
            if value >= 0:
                os.close(value)
                escaped(f"surface: protocol {protocol} of family {int(family)}")
            else:
                denied(f"protocol {protocol}", number)
    if reached:
        escaped(f"surface: socket families {sorted(set(reached))}")
    else:
        stopped("seccomp", "socket families other than unix, inet, inet6")


def bring_up():
    """Brings an interface up, or makes one."""
    with socket.socket() as any_socket:
        request = struct.pack("16sH14x", b"lo", 1)
        attempt("lo up", fcntl.ioctl, any_socket, 0x8914, request)
    attempt("packet socket", socket.socket, socket.AF_PACKET, socket.SOCK_RAW)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
            body = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + struct.pack("=HH8s", 12, 3, b"mine\0")
            netlink.send(struct.pack("=IHHII", 16 + len(body), 16, 0x605, 1, 0) + body)
            answer = netlink.recv(4096)
            number = -struct.unpack_from("=i", answer, 16)[0]
    except OSError as error:
        number = error.errno
    if number == 0:
        escaped("made an interface")
    else:
        denied("a new interface", number)


def hostname():
    """Renames the machine."""
    refused("sethostname", b"owned", 5)
    say("NOTE", "here it is", os.uname().nodename)


KEYRINGS = (-3, -4, -5)
"""Of the session, of the user, the user's session (keyrings(7))."""
ANY, LOCAL = 0xFFFFFFFF, 1
"""Addresses of vsock(7)."""


def leave_traces(marker):
    """Leaves something in every place that another job might share."""
    for directory in ("/box", "/tmp", "/dev/shm"):
        with open(f"{directory}/{marker}", "w") as file:
            file.write(marker)
    for name in ("shmget", "msgget", "semget"):
        arguments = {"shmget": (4242, 4096, 0o1666), "msgget": (4242, 0o1666)}
        syscall(name, *arguments.get(name, (4242, 1, 0o1666)))
    syscall("mq_open", marker.encode(), os.O_CREAT | os.O_RDWR, 0o666, 0)
    for keyring in KEYRINGS:
        syscall("add_key", b"user", marker.encode(), b"x", 1, keyring)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(15, marker.encode()[:15])
    kept = []
    for path in ("/dev/ptmx", "/dev/pts/ptmx"):
        with contextlib.suppress(OSError):
            kept.append(open(path, "r+b", buffering=0))
    with contextlib.suppress(OSError):
        listening = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        listening.bind((ANY, 4242))
        listening.listen()
        kept.append(listening)
    for address in ("\0" + marker, f"/tmp/{marker}.socket"):
        server = socket.socket(socket.AF_UNIX)
        server.bind(address)
        server.listen()
        kept.append(server)
    lock = open("/usr/bin/env", "rb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        denied("a lock on a file that all share", error.errno)
    ready()
    return kept, lock


def stay(marker):
    """The same, and stays while the other looks."""
    kept = leave_traces(marker)
    time.sleep(900)
    return kept


def find_traces(marker):
    """Looks for what the other left."""
    for directory in ("/box", "/tmp", "/dev/shm"):
        if any(marker in name for name in os.listdir(directory)):
            escaped(f"a file of the other job in {directory}")
    for name in ("shmget", "msgget", "semget"):
        value, _ = syscall(name, 4242, 0, 0)
        if value >= 0:
            escaped(f"{name} finds an object of the other job")
    for address in ("\0" + marker, f"/tmp/{marker}.socket"):
        with socket.socket(socket.AF_UNIX) as out:
            attempt("a socket of the other job", out.connect, address)
    if syscall("mq_open", marker.encode(), os.O_RDWR, 0, 0)[0] >= 0:
        escaped("a message queue of the other job")
    for keyring in KEYRINGS:
        if syscall("keyctl", 10, keyring, b"user", marker.encode(), 0)[0] >= 0:
            escaped("a key of the other job")
    with contextlib.suppress(OSError):
        for name in set(os.listdir("/dev/pts")) - {"ptmx"}:
            escaped(f"terminal {name} of the other job")
    with contextlib.suppress(OSError), socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as out:
        out.settimeout(1)
        attempt("a vsock of the other job", out.connect, (LOCAL, 4242))
    for pid in (name for name in os.listdir("/proc") if name.isdigit()):
        try:
            with open(f"/proc/{pid}/comm") as file:
                if file.read().strip() == marker[:15]:
                    escaped("a process of the other job")
        except OSError:
            continue
    if marker in subprocess.run(["env"], capture_output=True, text=True, check=False).stdout:
        escaped("the environment of the other job")
    with open("/usr/bin/env", "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("NOTE", "a lock on a file of the host is seen: docs/threat-model.md")
    stopped("namespace", "nothing of the other job")


if __name__ == "__main__":
    main(globals())

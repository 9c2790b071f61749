"""Attacks on memory: more than the limit, where it might not be counted."""

import ctypes
import mmap
import os
import resource
import select
import socket
import time

from attacker import denied, escaped, main, say, stopped, syscall

MIB = 1 << 20
FAR_TOO_MUCH = 128


def touch():
    """Page after page."""
    kept = []
    for count in range(FAR_TOO_MUCH):
        try:
            kept.append(bytearray(b"x") * MIB)
        except MemoryError:
            stopped("rlimit", f"{count} MiB: ENOMEM")
            return
    escaped(f"{FAR_TOO_MUCH} MiB")


def populate():
    """All at once, in one call of the kernel's."""
    area = mmap.mmap(-1, FAR_TOO_MUCH * MIB, flags=0x2 | 0x20 | 0x8000)  # MAP_POPULATE
    escaped(f"{len(area) // MIB} MiB")


def stack():
    """Its stack grows as it is touched, page by page."""
    with open("/proc/self/maps") as file:
        low = next(int(line.split("-")[0], 16) for line in file if line.endswith("[stack]\n"))
    for page in range(1, FAR_TOO_MUCH * MIB // mmap.PAGESIZE):
        ctypes.memset(low - page * mmap.PAGESIZE, 1, 1)
    escaped(f"{FAR_TOO_MUCH} MiB of stack")


def many_processes():
    """Each below the limit, all together far above."""
    for _ in range(8):
        if os.fork() == 0:
            kept = bytearray(b"x") * (40 * MIB)
            time.sleep(3)
            os._exit(len(kept) & 0)
    reached = sum(os.waitstatus_to_exitcode(os.wait()[1]) == 0 for _ in range(8))
    if reached == 8:
        escaped("320 MiB in 8 processes")


def fill(path):
    """Fills a file system."""
    block = b"x" * MIB
    with open(f"{path}/full", "wb", buffering=0) as file:
        for count in range(FAR_TOO_MUCH):
            try:
                file.write(block)
            except OSError as error:
                denied(f"{path} after {count} MiB", error.errno)
                return
    escaped(f"{FAR_TOO_MUCH} MiB in {path}")


def memfds():
    """Anonymous files."""
    kept, block = [], b"x" * MIB
    for count in range(FAR_TOO_MUCH):
        try:
            descriptor = os.memfd_create("full")
            os.write(descriptor, block)
        except OSError as error:
            denied(f"memfd after {count} MiB", error.errno)
            return
        kept.append(descriptor)
    escaped(f"{FAR_TOO_MUCH} MiB in memfds")


def system_v():
    """Shared memory that outlives its process."""
    libc = ctypes.CDLL(None)
    libc.shmat.restype = ctypes.c_void_p
    for count in range(FAR_TOO_MUCH // 8):
        handle, number = syscall("shmget", 0, 8 * MIB, 0o1600)
        if handle < 0:
            denied(f"System V memory after {8 * count} MiB", number)
            return
        address = libc.shmat(handle, None, 0)
        if address in (None, 2**64 - 1):
            stopped("kernel", f"shmat after {8 * count} MiB")
            return
        ctypes.memset(address, 1, 8 * MIB)
    escaped(f"{FAR_TOO_MUCH} MiB of System V memory")


def inodes():
    """Empty files: no byte of content, a kilobyte of kernel memory each."""
    for count in range(200_000):
        try:
            os.close(os.open(f"/tmp/{count}", os.O_CREAT | os.O_WRONLY))
        except OSError as error:
            denied(f"file number {count}", error.errno)
            return
    escaped("200,000 files")


def pipes_and_sockets():
    """Memory of the kernel, behind descriptors."""
    kept, total = [], 0
    while total < FAR_TOO_MUCH * MIB:
        try:
            pair = socket.socketpair()
            pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MIB)
            pair[0].setblocking(False)
            kept.append(pair)
            while True:
                total += pair[0].send(b"x" * 65536)
        except BlockingIOError:
            continue
        except OSError as error:
            denied(f"sockets with {total // MIB} MiB", error.errno)
            return
    escaped(f"{FAR_TOO_MUCH} MiB in sockets")


def descriptors():
    """As many as there are, of every kind that is cheap to make."""
    makers = (
        os.pipe,
        select.epoll,
        lambda: os.eventfd(0),
        lambda: os.memfd_create("x"),
        socket.socketpair,
    )
    kept = []
    while len(kept) < 100_000:
        try:
            kept.append(makers[len(kept) % len(makers)]())
        except OSError as error:
            denied(f"object number {len(kept)}", error.errno)
            return
    escaped("100,000 descriptors")


def timers():
    """Timers and pending signals are memory of the kernel without a descriptor."""
    handle = ctypes.c_int()
    for count in range(200_000):
        value, number = syscall("timer_create", 1, None, ctypes.byref(handle))
        if value < 0:
            denied(f"timer number {count}", number, "rlimit")
            return
    escaped("200,000 timers")


def page_cache():
    """Reads far more than its limit: nothing to blame it for."""
    total = 0
    directory = next(
        filter(os.path.isdir, (f"/usr/lib/{os.uname().machine}-linux-gnu", "/usr/lib"))
    )
    for name in sorted(os.listdir(directory))[:300]:
        try:
            with open(f"{directory}/{name}", "rb") as file:
                while data := file.read(MIB):
                    total += len(data)
        except OSError:
            continue
        if total > 150 * MIB:
            break
    say("NOTE", f"{total // MIB} MiB read")


def dead_child():
    """The peak of a child that is gone."""
    if os.fork() == 0:
        kept = bytearray(b"x") * (32 * MIB)
        os._exit(len(kept) & 0)
    os.wait()


def reservation():
    """A terabyte of addresses, none of them used, is no offence."""
    area = mmap.mmap(-1, 1 << 40, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    area[0] = 1
    say("NOTE", f"{len(area)} bytes reserved")


def locked():
    """Memory that cannot be taken away."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    area = mmap.mmap(-1, 48 * MIB)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    if ctypes.CDLL(None, use_errno=True).mlock(ctypes.c_void_p(address), 48 * MIB) == 0:
        escaped("48 MiB locked")
    stopped("rlimit", f"mlock beyond {soft} bytes")


if __name__ == "__main__":
    main(globals())

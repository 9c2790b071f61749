"""Attacks on time and output: CPU that is not counted, clocks, pipes."""

import ctypes
import fcntl
import os
import signal
import threading
import time

from attacker import attempt, denied, escaped, main, refused, say, stopped, syscall

BURNERS = 4
SCHED_CORE = 62
"""PR_SCHED_CORE of linux/prctl.h."""
MARGIN = 1.5


def burn(seconds):
    """So many seconds of CPU."""
    end = time.process_time() + float(seconds)
    while time.process_time() < end:
        pass


def deaf_loop():
    """Burns, and ignores all that can be ignored."""
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            continue
    burn(900)


def burning_children():
    """Four children burn; the main process sleeps."""
    for _ in range(4):
        if os.fork() == 0:
            burn(900)
    time.sleep(900)


def threads():
    """Threads that compute in C, so that they run at once."""
    import hashlib

    block = b"x" * (1 << 20)

    def work():
        while True:
            hashlib.sha256(block)

    for _ in range(4):
        threading.Thread(target=work, daemon=True).start()
    time.sleep(900)


def hidden():
    """Burns in children that nobody waits for, and in orphans."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    reading, writing = os.pipe()
    for kind in range(2):
        if os.fork() == 0:
            if kind and os.fork():
                os._exit(0)
            burn(0.4)
            os.close(writing)
            os._exit(0)
    os.close(writing)
    os.read(reading, 1)


def tell_cpu():
    """Burns a little, and tells what the kernel counts for this process alone."""
    burn(0.1)
    os.write(1, f"NOTE {time.process_time()} s of CPU\n".encode())
    os._exit(0)


def more_cpus(cpus):
    """More processors' worth of CPU time than it may have, in several processes."""
    start = time.monotonic()
    for _ in range(BURNERS):
        if os.fork() == 0:
            while time.monotonic() < start + 2:
                pass
            os._exit(0)
    for _ in range(BURNERS):
        os.wait()
    times = os.times()
    share = (times.children_user + times.children_system) / (time.monotonic() - start)
    if share > MARGIN * float(cpus):
        escaped(f"{share:.2f} processors instead of {cpus}")
    else:
        stopped("cgroup", f"{share:.2f} processors")


def other_cpus(allowed):
    """Processors that it may not run on."""
    for cpu in set(range(os.sysconf("SC_NPROCESSORS_CONF"))) - {int(allowed)}:
        attempt(f"processor {cpu}", os.sched_setaffinity, 0, {cpu}, layer="cgroup")
    found = os.sched_getaffinity(0)
    if found != {int(allowed)}:
        escaped(f"processors {sorted(found)}")
    else:
        stopped("cgroup", f"processor {allowed} alone")


def strange_name():
    """A name that breaks who parses /proc/PID/stat."""
    ctypes.CDLL(None).prctl(15, b") R 1 (\n x")
    burn(900)


def leader_gone():
    """The first thread ends, another goes on."""
    threading.Thread(target=burn, args=(900,)).start()
    ctypes.CDLL(None).pthread_exit(None)


def set_the_clock():
    """Sets the clock, then sleeps beyond its time."""
    refused("settimeofday", b"\0" * 16, None)
    refused("clock_settime", 0, b"\0" * 16)
    timex = (ctypes.c_long * 32)()
    timex[0] = 0x4000  # ADJ_TICK
    refused("adjtimex", timex, what="adjtimex that changes the tick")
    time.sleep(900)


def flood(descriptor):
    """Writes without an end."""
    block = b"x" * 65536
    while True:
        os.write(int(descriptor), block)


def held_pipe():
    """A child keeps the output open."""
    if os.fork() == 0:
        os.setsid()
        time.sleep(900)
    say("NOTE", "written before the end")


def closed_streams():
    """Closing its streams is not its end."""
    for descriptor in range(3):
        os.close(descriptor)
    time.sleep(900)


def whole_cores():
    """Keeps everybody else off the other threads of its cores, whatever its quota."""
    got, number = syscall("prctl", SCHED_CORE, 1, 0, 1, None)
    if got == 0:
        escaped("cores whose other threads run nothing else meanwhile")
    else:
        denied("core scheduling", number)


def unread_input():
    """Writes a lot and never reads."""
    for _ in range(3):
        os.write(1, b"y" * 65536)
        os.write(2, b"z" * 65536)


def broken_text():
    """Bytes that are no text, and a line without an end."""
    os.write(1, b"\xff\xfe\0\x1b[2J\xc3" + b"a" * 150_000)


def flags_of_pipes():
    """Makes the shared descriptions non-blocking and asynchronous."""
    for descriptor in (0, 1, 2):
        try:
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_NONBLOCK | os.O_ASYNC)
            fcntl.fcntl(descriptor, fcntl.F_SETOWN, 1)
        except OSError as error:
            denied(f"flags of {descriptor}", error.errno)


def truncate_output():
    """Output that is a file could be rewritten."""
    attempt("ftruncate of stdout", os.ftruncate, 1, 0, layer="pipe")
    attempt("lseek of stdout", os.lseek, 1, 1 << 40, os.SEEK_SET, layer="pipe")


if __name__ == "__main__":
    main(globals())

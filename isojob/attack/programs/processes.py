"""Attacks on processes: bombs, survivors, the supervisor."""

import contextlib
import ctypes
import os
import resource
import signal
import threading
import time

from attacker import attempt, denied, escaped, main, refused, say, stopped, syscall

FAR_TOO_MANY = 64
ORPHANS = 100


def fork_bomb():
    """Forks until it cannot."""
    for count in range(FAR_TOO_MANY):
        try:
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
        except OSError as error:
            denied(f"fork number {count}", error.errno)
            return
    escaped(f"{FAR_TOO_MANY} processes at once")


def fork_doubling():
    """Every process forks: 128 if nobody stops it."""
    first = os.getpid()  # not by its parent: orphans have the same
    reading, writing = os.pipe()
    for _ in range(7):
        try:
            os.fork()
        except OSError:
            break
    os.write(writing, b"x")
    time.sleep(0.5)
    if os.getpid() == first:
        alive = len(os.read(reading, 4096))
        if alive >= FAR_TOO_MANY:
            escaped(f"{alive} processes at once")
        stopped("cgroup", f"{alive} of 128 processes")


def thread_bomb():
    """Starts threads until it cannot."""
    threading.stack_size(64 * 1024)
    for count in range(FAR_TOO_MANY):
        try:
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        except (RuntimeError, MemoryError):
            stopped("cgroup", f"thread number {count}: EAGAIN")
            os._exit(0)
    escaped(f"{FAR_TOO_MANY} threads at once")
    os._exit(0)


def daemon():
    """Leaves a session leader behind that ignores every signal."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in range(1, 65):
                try:
                    signal.signal(number, signal.SIG_IGN)
                except (OSError, ValueError):
                    continue
            os.close(0)
            os.close(1)
            os.close(2)
            os.write(writing, b"x")
            time.sleep(300)
        os._exit(0)
    os.read(reading, 1)


def moving_chain():
    """A process that is always a new one: it forks and ends, for ever."""
    if os.fork() == 0:
        os.setsid()
        while True:
            try:
                if os.fork():
                    os._exit(0)
            except OSError:
                time.sleep(0.001)
    time.sleep(0.3)


def kill_everything(pid):
    """Signals all it can reach, and a process of the host."""
    attempt("SIGKILL to a process of the host", os.kill, int(pid), signal.SIGKILL)
    if os.fork() == 0:
        time.sleep(60)
    try:
        os.kill(-1, signal.SIGKILL)
    except OSError as error:
        denied("SIGKILL to all", error.errno)
    for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
        try:
            os.kill(1, number)
        except OSError as error:
            denied(f"signal {number} to init", error.errno)
    time.sleep(0.1)


def touch_init():
    """Traces init, reads its memory, takes its descriptors."""
    refused("ptrace", 16, 1, 0, 0, what="ptrace of init")
    for name in ("mem", "environ", "maps", "fd/3", "root/etc", "cwd"):
        try:
            descriptor = os.open(f"/proc/1/{name}", os.O_RDONLY)
        except OSError as error:
            denied(f"/proc/1/{name}", error.errno)
        else:
            data = b""
            try:
                data = os.read(descriptor, 64)
            except OSError as error:
                denied(f"/proc/1/{name}", error.errno)
            if data:
                escaped(f"/proc/1/{name} is readable")
    handle, number = syscall("pidfd_open", 1, 0)
    if handle < 0:
        denied("pidfd_open of init", number)
    else:
        refused("pidfd_getfd", handle, 0, 0, what="a descriptor of init")
    buffer = ctypes.create_string_buffer(16)
    vector = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 16)
    refused("process_vm_readv", 1, vector, 1, vector, 1, 0, what="reading init's memory")
    attempt("init's priority", os.setpriority, os.PRIO_PROCESS, 1, 19)
    attempt("init's CPU affinity", os.sched_setaffinity, 1, {0})
    attempt("init's limits", resource.prlimit, 1, resource.RLIMIT_NOFILE, (1, 1))


def orphans():
    """Orphans that nobody waits for would fill the limit, were there no init."""
    for count in range(ORPHANS):
        for _ in range(100):
            try:
                child = os.fork()
            except OSError:
                time.sleep(0.01)  # init may be a little behind
                continue
            break
        else:
            escaped(f"orphan number {count} was not reaped")
            return
        if child == 0:
            with contextlib.suppress(OSError):
                os.fork()
            os._exit(0)
        os.waitpid(child, 0)
    stopped("init", f"{ORPHANS} orphans, all reaped")


def stop_oneself():
    """Stops, so that nothing ends."""
    os.kill(os.getpid(), signal.SIGSTOP)


def asleep_in_vfork():
    """Sleeps in the kernel until a child is gone, and takes no signal meanwhile but SIGKILL."""
    flags = 0x100 | 0x4000 | signal.SIGCHLD  # CLONE_VM, CLONE_VFORK
    value, number = syscall("clone", flags, 0, 0, 0, 0)
    if value != 0:
        denied("vfork", number)
    time.sleep(900)


def abort():
    """An init that is the job itself cannot die of SIGABRT."""
    if os.getpid() == 1:
        escaped("the program is process 1")
    os.abort()


def priorities():
    """Takes the CPU from others."""
    attempt("nice -20", os.setpriority, os.PRIO_PROCESS, 0, -20)
    attempt("real time", os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(50))
    for value in ("-1000", "-1"):
        try:
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write(value)
        except OSError as error:
            denied(f"oom_score_adj {value}", error.errno)
        else:
            escaped(f"oom_score_adj {value}")


def rlimits():
    """Raises its hard limits."""
    for name in ("NPROC", "NOFILE", "FSIZE", "STACK", "MEMLOCK", "CORE", "NICE", "RTPRIO"):
        which = getattr(resource, f"RLIMIT_{name}")
        _, hard = resource.getrlimit(which)
        if hard == resource.RLIM_INFINITY:
            say("NOTE", f"{name} has no limit of its own")
            continue
        try:
            resource.setrlimit(which, (hard, hard + 1))
        except (OSError, ValueError):
            stopped("rlimit", f"{name} stays at {hard}")
        else:
            escaped(f"RLIMIT_{name} raised")


def leave_the_cgroup():
    """Looks for its cgroup, to leave or to change it."""
    with open("/proc/self/cgroup") as file:
        places = [line.strip().split(":", 2)[2] for line in file]
    if any(place != "/" for place in places):
        escaped(f"surface: cgroup paths of the host: {places}")
    else:
        stopped("namespace", "/proc/self/cgroup shows / alone")
    with open("/proc/self/mounts") as file:
        kinds = {line.split()[2] for line in file}
    if kinds & {"cgroup", "cgroup2", "sysfs"}:
        escaped(f"mounted: {kinds}")
    attempt("the cgroup directory", os.mkdir, "/sys/fs/cgroup/mine")


if __name__ == "__main__":
    main(globals())

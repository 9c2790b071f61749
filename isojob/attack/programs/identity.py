"""Attacks on identity and truth: privileges, secrets, forged ends."""

import ctypes
import os
import signal
import time

from attacker import attempt, denied, escaped, main, say, stopped, syscall


def ids():
    """Becomes somebody else."""
    for name, call in (("setuid", os.setuid), ("setgid", os.setgid), ("seteuid", os.seteuid)):
        attempt(f"{name}(0)", call, 0)
    attempt("setgroups", os.setgroups, [0])
    if os.getuid() == 0:
        escaped("uid 0")
    stopped("namespace", f"uid {os.getuid()}, groups {os.getgroups()}")


def capabilities():
    """Looks for any capability in any set."""
    with open("/proc/self/status") as file:
        sets = {line.split()[0]: line.split()[1] for line in file if line.startswith("Cap")}
    held = {name: value for name, value in sets.items() if int(value, 16)}
    if held:
        escaped(f"capabilities: {held}")
    else:
        stopped("privileges", "all five sets are empty")


def environment(marker):
    """Looks for the caller's environment."""
    if marker in str(dict(os.environ)):
        escaped("the caller's environment")
    for pid in (name for name in os.listdir("/proc") if name.isdigit()):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if marker.encode() in file.read():
                    escaped(f"the caller's environment in /proc/{pid}")
        except OSError as error:
            denied(f"/proc/{pid}/environ", error.errno)
    stopped("init", f"{len(os.environ)} variables, none of them the caller's")


def exit_137():
    """What a shell says of a killed program."""
    os._exit(137)


def raise_sigkill():
    """As the OOM killer would."""
    os.kill(os.getpid(), signal.SIGKILL)


def raise_sigsys():
    """As the filter would."""
    os.kill(os.getpid(), signal.SIGSYS)


def raise_sigxcpu():
    """As a CPU limit would."""
    os.kill(os.getpid(), signal.SIGXCPU)


def forged_report():
    """Words of init on every descriptor."""
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, b"IJOB" + b"\0" * 200)
        except OSError:
            continue
        escaped(f"descriptor {descriptor} can be written")
    os.write(2, b'{"status": "ok", "cpu_time": 0}')
    stopped("init", "no descriptor above 2")
    os._exit(3)


def traced():
    """A trace stop is not an end."""
    ctypes.CDLL(None).ptrace(0, 0, None, None)
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(900)


def sibling():
    """A child that is init's child, with an end of its own."""
    flags = 0x8000 | signal.SIGCHLD  # CLONE_PARENT
    pid, _ = syscall("clone", flags, 0, 0, 0, 0)
    if pid == 0:
        os._exit(99)
    time.sleep(0.1)
    say("NOTE", f"sibling {pid}")
    os._exit(9)


if __name__ == "__main__":
    main(globals())

"""The attacks: which there are, what each may use, and how each has to end."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from isojob.attack._attack import (
    DIES,
    MIB,
    SHORT_WALL,
    WALL,
    Attack,
    Check,
    Kind,
    ends,
    nothing_collected,
)
from isojob.attack._composed import composed_attacks
from isojob.result import Result

__all__ = ["ATTACKS"]

_CPU = ends("cpu_time_limit")
_MEMORY = ends("memory_limit")
_FULL = ends("memory_limit", "ok")
_SHORT_CPU: dict[str, Any] = {"cpu_time": 1.0}


def _signal(number: int) -> Check:
    def check(result: Result) -> Iterator[str]:
        if result.signal != number:
            yield f"signal {result.signal} instead of {number}"

    return check


def _exit(code: int) -> Check:
    def check(result: Result) -> Iterator[str]:
        if result.exit_code != code:
            yield f"exit status {result.exit_code} instead of {code}"

    return check


def _peak(result: Result) -> Iterator[str]:
    peak = result.usage.memory_peak
    if peak is not None and peak < 32 * MIB:
        yield f"the peak of a dead child is not in the account: {peak} bytes"


def _all_cpu(result: Result) -> Iterator[str]:
    used = result.usage.cpu_time
    if result.evidence.cpu_is_whole and used is not None and used < 0.7:
        yield f"0.8 s of CPU were burnt, {used:.2f} s are in the account"


def _its_own_cpu(result: Result) -> Iterator[str]:
    (said,) = re.findall(r"NOTE (\S+) s of CPU", result.stdout_text) or ("inf",)
    used = result.usage.cpu_time
    if used is not None and not 0.9 * float(said) <= used <= float(said) + 0.5:
        yield f"{said} s of CPU were burnt, {used:.2f} s are in the account"


def _within_collect(result: Result) -> Iterator[str]:
    total = sum(map(len, result.files.values()))
    if total > MIB:
        yield f"the host collected {total} bytes"


def _bytes_as_they_are(result: Result) -> Iterator[str]:
    if b"\xff\xfe\0\x1b[2J\xc3" not in (result.stdout or b""):
        yield "output was changed"


_WAITID = "init: waitid tells exit and signal apart"
_ACCOUNT = "cgroup: one account for all"
_CPUS = "0.1"
_CPU_SET = str(min(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else "0"
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")


def _harmless(kind: Kind, module: str, name: str, title: str) -> Attack:
    return Attack(name=name, kind=kind, title=title, program=(module, name), harmless=True)


def _all() -> Iterator[Attack]:
    marker = "{marker}"

    def processes(name: str, title: str, *program: str, **rest: Any) -> Attack:
        program = ("processes", *(program or (name,)))
        return Attack(name=name, kind="processes", title=title, program=program, **rest)

    yield processes("fork_bomb", "fork until it fails")
    # With so much memory that nothing but the number of processes stops it.
    yield processes("fork_doubling", "every process forks", limits={"memory": "256MiB"})
    yield processes("thread_bomb", "start threads until it fails")
    yield processes("daemon", "leave a session leader behind that ignores all signals", answer=DIES)
    yield processes("moving_chain", "a process that forks and ends, for ever", answer=DIES)
    yield processes("kill_everything", "signal init and the host", "kill_everything", "{pid}")
    yield processes("touch_init", "trace init, read its memory, take its descriptors")
    yield processes("orphans", "fill the process limit with orphans")
    yield processes("stop_oneself", "SIGSTOP itself", ends=WALL, limits=SHORT_WALL)
    yield processes(
        "asleep_in_vfork", "sleep in the kernel, in vfork", ends=WALL, limits=SHORT_WALL
    )
    yield processes(
        "abort", "SIGABRT as process 1", answer=_WAITID, ends=ends("signaled"), check=_signal(6)
    )
    yield processes("priorities", "nice -20, real time, oom_score_adj")
    yield processes("rlimits", "raise hard limits")
    yield processes("leave_the_cgroup", "find, leave, change its cgroup", harmless=True)

    def memory(name: str, title: str, *program: str, **rest: Any) -> Attack:
        program = ("memory", *(program or (name,)))
        return Attack(name=name, kind="memory", title=title, program=program, **rest)

    yield memory("touch", "page after page", ends=_MEMORY)
    yield memory("populate", "all at once, by MAP_POPULATE", ends=_MEMORY)
    yield memory(
        "stack",
        "grow its stack",
        answer="rlimit: the stack ends",
        limits={"stack": "1MiB"},
        ends=ends("signaled"),
        check=_signal(11),
    )
    yield memory("many_processes", "eight processes, each below the limit", ends=_MEMORY)
    yield memory("fill_box", "fill the working directory", "fill", "/box", ends=_FULL)
    yield memory("fill_tmp", "fill /tmp", "fill", "/tmp", ends=_FULL)  # noqa: S108 - inside
    yield memory("fill_shm", "fill /dev/shm", "fill", "/dev/shm", ends=_FULL)  # noqa: S108
    yield memory("memfds", "anonymous files", ends=_MEMORY)
    yield memory("system_v", "System V shared memory", ends=_FULL)
    yield memory("inodes", "200,000 empty files")
    yield memory("pipes_and_sockets", "fill sockets", ends=_FULL)
    yield memory("descriptors", "every kind of descriptor", ends=_FULL)
    yield memory("timers", "200,000 timers", ends=_FULL)
    yield memory(
        "page_cache",
        "read files far beyond the limit: no offence",
        answer="verdict: only OOM kills count",
    )
    yield memory("dead_child", "hide the peak in a dead child", answer=_ACCOUNT, check=_peak)
    yield memory(
        "reservation",
        "reserve a terabyte and use a page: no offence",
        answer="cgroup: counts what is used",
    )
    yield memory("locked", "lock memory")

    uncounted = partial(_harmless, "memory", "uncounted")
    yield uncounted("uncounted_sockets", "kernel memory behind sockets that no limit counts")
    yield uncounted("uncounted_inodes", "kernel memory behind inodes and more that no limit counts")
    yield uncounted("huge_pages", "huge pages, outside the memory limit")
    yield uncounted("counted_for_root", "what is counted for the host's user and then runs out")

    def time(name: str, title: str, *program: str, **rest: Any) -> Attack:
        program = ("clocks", *(program or (name,)))
        return Attack(name=name, kind="time", title=title, program=program, **rest)

    flooded = ends("output_limit")
    yield time("deaf_loop", "burn and ignore all signals", ends=_CPU, limits=_SHORT_CPU)
    yield time("burning_children", "four children burn", ends=_CPU, limits=_SHORT_CPU)
    yield time("burning_threads", "threads burn", "threads", ends=_CPU, limits=_SHORT_CPU)
    yield time(
        "hidden_cpu",
        "burn in orphans and in unreaped children",
        "hidden",
        answer=_ACCOUNT,
        check=_all_cpu,
    )
    yield time(
        "cpu_of_before",
        "run after one that burnt a second: whose CPU time is told?",
        "tell_cpu",
        door="session",
        before=("clocks", "burn", "1"),
        answer="cgroup: a fresh account",
        check=_its_own_cpu,
    )
    yield time(
        "more_cpus", "burn on all processors", "more_cpus", _CPUS, limits={"cpus": float(_CPUS)}
    )
    yield time(
        "other_cpus", "run on other processors", "other_cpus", _CPU_SET, limits={"cpuset": _CPU_SET}
    )
    yield time("whole_cores", "keep everybody else off its cores")
    yield time("strange_name", "a name that breaks /proc parsers", ends=_CPU, limits=_SHORT_CPU)
    yield time("leader_gone", "burn behind a dead first thread", ends=_CPU, limits=_SHORT_CPU)
    yield time("set_the_clock", "change the clock", ends=WALL, limits=SHORT_WALL)
    yield time("flood_stdout", "endless stdout", "flood", "1", ends=flooded)
    yield time("flood_stderr", "endless stderr", "flood", "2", ends=flooded)
    yield time(
        "held_pipe",
        "a child keeps the output open",
        answer="init: the end is the main process's",
        soon=True,
    )
    yield time("closed_streams", "close all and stay", ends=WALL, limits=SHORT_WALL)
    yield time(
        "unread_input",
        "write much, read nothing",
        answer="host: both ways at once",
        input=b"x" * MIB,
    )
    yield time(
        "broken_text",
        "output that is no text",
        answer="host: bytes all the way",
        check=_bytes_as_they_are,
    )
    yield time(
        "flags_of_pipes",
        "non-blocking, asynchronous streams",
        answer="pipe: the host has ends of its own",
    )
    yield time("truncate_output", "rewrite the output")

    def files(name: str, title: str, *program: str, **rest: Any) -> Attack:
        program = ("files", *(program or (name,)))
        return Attack(name=name, kind="files", title=title, program=program, **rest)

    bait: dict[str, Any] = {
        "collect": ("out.txt", "other.txt", "directory/*"),
        "check": nothing_collected,
        "answer": "host: regular files alone, opened beneath the directory, sizes first",
    }
    yield files("bait_link", "links where the host collects", "bait_link", "{secret}", **bait)
    yield files("bait_special", "a FIFO, a directory, a socket, devices to collect", **bait)
    yield files("bait_sparse", "a huge sparse file to collect", **bait)
    yield files(
        "bait_many",
        "one file under many names to collect",
        **bait | {"check": _within_collect},
    )
    yield files(
        "tangle", "a tree that is hard to remove", answer="mount: a tmpfs that goes as a whole"
    )
    yield files("climb", "above the root")
    yield files("runtime", "overwrite init and the interpreter")
    yield files("devices", "make and open device nodes", harmless=True)
    yield files("set_id", "set-uid programs")
    yield files("hard_links", "hard links to the host's files")
    yield files("proc_and_sys", "write to /proc and /sys", harmless=True)
    yield files("kernel_secrets", "read the kernel's own files", harmless=True)
    yield files("mounts", "mount, remount, unmount")
    yield files("terminal", "type into the terminal")
    yield files(
        "read_fast",
        "read from a disk faster than it may",
        "read_fast",
        str(MIB),
        limits={"io_read_bps": MIB},
    )
    yield files(
        "compile_in",
        "include the host's files by a compiler",
        "compile_in",
        "{secret}",
        marker,
        harmless=True,
    )
    yield files("write_everywhere", "a file in every directory")
    yield files("secrets", "read the host's files", "secrets", "{secret}", marker, harmless=True)

    watching = partial(_harmless, "files", "watching")
    yield watching("watch_files", "see who uses the files that all share")
    yield watching("leases", "make whoever opens a file wait")
    yield watching("flush_disks", "have the host write out all it holds")
    yield watching("file_system_keys", "leave keys in file systems that all share")

    def spaces(name: str, title: str, *program: str, **rest: Any) -> Attack:
        program = ("spaces", *(program or (name,)))
        return Attack(name=name, kind="namespaces", title=title, program=program, **rest)

    yield spaces("nested", "new namespaces")
    yield spaces("join", "enter other namespaces")
    numbers = [f"{{ns_{kind}}}" for kind in _NAMESPACES]
    yield spaces("compare", "share a namespace of the host", "compare", *numbers, harmless=True)
    yield spaces(
        "host_processes", "see the host's processes", "host_processes", marker, harmless=True
    )
    yield spaces("interprocess", "System V objects and keys", "interprocess", "{segment}")
    yield spaces(
        "loopback", "servers of the host", "loopback", "{port}", "{abstract}", harmless=True
    )
    yield spaces("families", "sockets of every family", harmless=True)
    yield spaces("bring_up", "interfaces and packets")
    yield spaces("hostname", "rename the machine")
    traces: dict[str, Any] = {"kind": "between jobs", "program": ("spaces", "find_traces", marker)}
    yield Attack(
        name="consecutive",
        title="find what the job before left",
        before=("spaces", "leave_traces", marker),
        **traces,
    )
    yield Attack(
        name="concurrent",
        title="find what another running job has",
        beside=("spaces", "stay", marker),
        **traces,
    )
    yield Attack(
        name="watch_jobs",
        kind="between jobs",
        title="see what another running job reads of the files that all share",
        program=("watching", "watch_jobs"),
        beside=("watching", "use_a_file"),
    )

    def calls(name: str, title: str, **rest: Any) -> Attack:
        return Attack(name=name, kind="calls", title=title, program=("calls", name), **rest)

    yield calls("dangerous", "calls deep into the kernel")
    yield calls("io_uring", "io_uring", harmless=True)
    yield calls("foreign_numbers", "numbers of x32, and unknown ones")
    yield calls("int80", "calls of 32-bit programs")
    yield calls("second_filter", "loosen the filter by another")
    yield calls("module_requests", "have the kernel load modules", harmless=True)
    yield calls("personalities", "old behaviour, segments", harmless=True)

    def identity(name: str, title: str, *program: str, **rest: Any) -> Attack:
        program = ("identity", *(program or (name,)))
        return Attack(name=name, kind="identity", title=title, program=program, **rest)

    signaled, failed = ends("signaled"), ends("nonzero_exit")
    yield identity("ids", "become root")
    yield identity("capabilities", "find a capability", harmless=True)
    yield identity(
        "environment", "find the caller's environment", "environment", marker, harmless=True
    )
    yield identity("exit_137", "look killed", answer=_WAITID, ends=failed, check=_exit(137))
    yield identity(
        "raise_sigkill", "look out of memory", answer=_WAITID, ends=signaled, check=_signal(9)
    )
    yield identity(
        "raise_sigsys", "look filtered", answer=_WAITID, ends=signaled, check=_signal(31)
    )
    yield identity(
        "raise_sigxcpu", "look out of time", answer=_WAITID, ends=signaled, check=_signal(24)
    )
    yield identity("forged_report", "speak as init", ends=failed, check=_exit(3))
    yield identity("traced", "a trace stop as an end", ends=WALL, limits=SHORT_WALL)
    yield identity("sibling", "a sibling's end", answer=_WAITID, ends=failed, check=_exit(9))
    yield from composed_attacks()


ATTACKS: tuple[Attack, ...] = tuple(_all())

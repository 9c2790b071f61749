"""Where the CPU of a job goes: perf's samples of the whole machine, sorted by what the kernel did.

    python bench/cpu.py [--seconds 5] [--ways isojob,"asyncio exec"]

Needs root and perf (Debian: linux-perf). Four jobs in flight; a sample counts for the first group
below of which any function is on its stack, else for the program that ran. Milliseconds a job.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from driver import WAYS, workers

HERTZ = 2999
GROUPS = {
    "network namespace, made": r"copy_net_ns|setup_net",
    "network namespace, taken away": r"cleanup_net",
    "cgroups, made": r"cgroup_mkdir",
    "cgroups, taken away": r"cgroup_rmdir|css_free_rwork_fn|css_killed_work_fn|css_release_work_fn",
    "cgroups, written and read": r"cgroup_file_write|cgroup_seqfile_show|kernfs_fop_(?:read|write)_iter"
    r"|cgroup_attach_task|cgroup_procs_write_start",
    "IPC namespace": r"copy_ipcs|free_ipc|put_ipc_ns",
    "other namespaces": r"create_user_ns|free_user_ns|copy_pid_ns|copy_utsname|copy_cgroup_ns"
    r"|zap_pid_ns_processes|destroy_pid_namespace",
    "mounts": r"copy_mnt_ns|path_mount|do_mount|put_mnt_ns|cleanup_mnt|mntput_no_expire"
    r"|__(?:do_sys|x64_sys)_(?:mount_setattr|move_mount|open_tree|umount|fsopen|fsmount)"
    r"|delayed_mntput|namespace_unlock",
    "seccomp filter": r"do_seccomp|seccomp_filter_release",
    "privileges": r"__x64_sys_(?:prctl|capset|setres[ug]id|setgroups)|commit_creds|put_cred_rcu",
    "execve": r"bprm_execve|do_execveat_common|begin_new_exec",
    "page faults": r"exc_page_fault|do_user_addr_fault|handle_mm_fault",
    "fork": r"kernel_clone|copy_process",
    "exit": r"do_exit|do_group_exit|release_task|delayed_put_task_struct",
    "memory given back": r"kfree_rcu|kvfree_rcu|rcu_do_batch|rcu_core|rcu_gp|rcu_exp|wait_rcu_exp",
    "sockets and pipes": r"unix_|__sys_sendmsg|__sys_recvmsg|pipe_(?:read|write)|anon_pipe",
    "mmap": r"__x64_sys_(?:mmap|munmap|mprotect|brk)|vm_mmap_pgoff|ksys_mmap_pgoff",
    "files": r"do_sys_openat2|do_filp_open|vfs_fstat|newfstat|path_openat|vfs_read|ksys_read"
    r"|vfs_write|ksys_write|x64_sys_close",
    "scheduling": r"schedule|try_to_wake_up|do_epoll_wait|do_poll|do_sys_poll",
}
_GROUPS = [(name, re.compile(rf"\b(?:{pattern})\w*$")) for name, pattern in GROUPS.items()]


def group(program: str, stack: list[str]) -> str:
    """What a sample counts for."""
    for name, pattern in _GROUPS:
        if any(pattern.match(function) for function in stack):
            return name
    if program.startswith(("kworker", "ksoftirqd", "rcu", "migration")):
        return "rest of the kernel's threads"
    names = {
        "isojob-zygote": "rest of the zygote",
        "isojob-init": "rest of init and launcher",
        "isojob-cell": "rest of init and launcher",
        "true": "rest of the job",
    }
    return names.get(program, "rest of the host process")


def samples(recording: Path) -> Counter[str]:
    """Samples by group, idling left out."""
    text = subprocess.run(
        ["perf", "script", "-i", recording, "-F", "comm,ip,sym"],
        capture_output=True,
        text=True,
        check=True,
        errors="replace",
    ).stdout
    found: Counter[str] = Counter()
    for block in text.split("\n\n"):
        lines = block.strip("\n").splitlines()
        if not lines:
            continue
        program = lines[0].strip()
        if program in ("swapper", "perf", ""):
            continue
        stack = [words[1].partition("+")[0] for line in lines[1:] if len(words := line.split()) > 1]
        found[group(program, stack)] += 1
    return found


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--ways", default="isojob,asyncio exec")
    options = parser.parse_args()
    names = options.ways.split(",")
    columns: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            recording = Path(directory) / "perf.data"
            with workers([WAYS[name]], "true", Path(directory)) as started:
                worker = started[name]
                worker.ask("many 4 1")
                perf = subprocess.Popen(
                    ["perf", "record", "-q", "-a", "-g", "-F", str(HERTZ), "-o", recording],
                    stderr=subprocess.DEVNULL,
                )
                time.sleep(0.5)
                jobs = worker.ask(f"many 4 {options.seconds}") * options.seconds
                time.sleep(0.5)
                perf.terminate()
                perf.wait()
            counted = samples(recording)
            columns[name] = {key: n / HERTZ / jobs * 1e3 for key, n in counted.items()}
    rows = sorted(
        {key for column in columns.values() for key in column},
        key=lambda key: -max(column.get(key, 0) for column in columns.values()),
    )
    print(f"CPU of the machine, ms a job\n\n| | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for key in rows:
        print(f"| {key} | {' | '.join(f'{columns[name].get(key, 0):.3f}' for name in names)} |")
    totals = " | ".join(f"{sum(columns[name].values()):.2f}" for name in names)
    print(f"| all | {totals} |")


if __name__ == "__main__":
    main()

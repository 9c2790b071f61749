"""The C side under libFuzzer, ASan and UBSan; needs clang.

What reads bytes that it has not made, and which target of parsers.c feeds it:

    wire.c      wire_next, wire_string, wire_pair, wire_path_bytes, wire_u64     fields
                wire_receive, also with descriptors                              receive
                wire_map (CONFIG, JOB in a memfd; execute.c, warm.c)             map
    config.c    config_parse, by the zygote, a template and init (execute.c)     config
    cell.c      parse_make                                                       make
    session.c   parse                                                            session
    branch.c    branch (BRANCH of the host)                                      branch
                hear, is_error, listen_to (what a template says)                 template
    warm.c      names_of (BRANCH in a template)                                  names
    handover.c  take, cell_pack (CELL)                                           cell
    job.c       count, parse, take_limit (JOB)                                   job
    rlimit.c    set_rlimit, set_rlimits                                          rlimits
    path.c      open_parent, put_file, put_files (files of a job)                files
    root.c      apply: put_dir, put_link, put_file (the plan)                    plan
                check_mounts (mountinfo, whose paths are others')                mounts
    cgroup.c    take_write (settings), find_number (the kernel's files)          writes, counters
    collect.c   collect_files, search, open_cwd (in what a job has left)         collect

Of the rest, template.c, inside.c, writable.c, copy.c and the mounts of root.c use what these have read,
and talk to the kernel; filter.c reads one byte, greet() a message that it does not look into, init.c what
the kernel fills in. The integration tests run them with ASan and UBSan (scripts/sanitized.sh).

Begins with fuzz/corpus/native and with messages as the host writes them. What it finds it leaves in
build/fuzz/. With the argument ``merge`` it adds to that corpus what build/fuzz has of new ways.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import campaign

from isojob import Limits
from isojob.wire import MessageType, Tag, Writer

HERE = Path(__file__).parent.absolute()
NATIVE = HERE.parent / "isojob" / "native"
BUILD = campaign.BUILD.absolute()
KEPT = campaign.CORPUS.absolute() / "native"
FLAGS = (
    *("-std=c17", "-D_GNU_SOURCE", "-O1", "-g", "-Dmain=zygote_main", f"-I{NATIVE}"),
    *("-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"),
)


def build() -> Path:
    """Compiles; the path of the program."""
    BUILD.mkdir(parents=True, exist_ok=True)
    program = BUILD / "parsers"
    targets = sorted(HERE.glob("*.c"))
    included = {line for path in targets for line in path.read_text().splitlines()}
    sources = [
        path
        for path in sorted(NATIVE.glob("*.c"))
        if f'#include "../isojob/native/{path.name}"' not in included
    ]
    subprocess.run(["clang", *FLAGS, "-o", program, *targets, *sources], check=True)
    return program


def seeds() -> list[bytes]:
    """Messages of each kind, with the byte that chooses the parser."""
    config = Writer(MessageType.CONFIG)
    config.number(Tag.MODE, 0)
    config.number(Tag.UID_BASE, 100000)
    config.number(Tag.SLOTS, 4096)
    config.number(Tag.HIERARCHIES, 1)
    config.text(Tag.HOSTNAME, "isojob")
    config.text(Tag.WORKDIR, "/box")
    config.put(Tag.FILTER, bytes.fromhex("06000000000000ff"), 3)
    config.text(Tag.CG_LIMIT, "memory.max", 0)
    config.text(Tag.CG_EVIDENCE, "memory.events", 0)
    config.pair(Tag.CG_COUNTER, "oom_kill ", "", 0)
    make = Writer(MessageType.MAKE)
    make.number(Tag.CG_MASK, 1)
    make.blob(Tag.CG_WRITE, "memory.max", b"1048576", 0)
    make.number(Tag.DISK, Limits().disk or 0)
    make.number(Tag.INODES, 16384)
    job = Writer(MessageType.JOB)
    for word in ("sh", "-c", "true"):
        job.text(Tag.ARG, word)
    job.text(Tag.ENV, "PATH=/usr/bin")
    job.text(Tag.PATH, "/usr/bin")
    job.text(Tag.CWD, "/box")
    job.number(Tag.WALL, 10**9)
    job.number(Tag.CPU, 10**9, 2)
    job.put(Tag.RLIMIT, bytes(16), 7)
    job.put(Tag.LIMIT, b"1048576", 0)
    job.blob(Tag.PUT, "main.py", b"print(1)", 0o644)
    session = Writer(MessageType.SESSION)
    session.number(Tag.DISK, 1 << 20)
    session.number(Tag.INODES, 1024)
    branch = Writer(MessageType.BRANCH)
    branch.number(Tag.TEMPLATE, 1)
    branch.number(Tag.TEMPLATE_FROM, 0)
    branch.text(Tag.TEMPLATE_ARG, "numpy")
    cell = Writer(MessageType.CELL)
    cell.put(Tag.CELL_FDS, (0b1011).to_bytes(16, "little"))
    cell.number(Tag.DISK, 1 << 20)
    cell.blob(Tag.CG_LIFT, "cpu.max", b"max", 0)
    collect = Writer(MessageType.COLLECT)
    collect.number(Tag.COLLECT_MAX, 100)
    collect.text(Tag.CWD, "/")
    for pattern in (
        "out.txt",
        "*",
        "d/*/file",
        "up/secret",
        "link",
        "fifo",
        "[[]",
        "d/" * 35 + "x",
    ):
        collect.text(Tag.PATTERN, pattern)
    plan = Writer(MessageType.CONFIG)
    plan.put(Tag.ROOT_DIR, b"a/b\0", 0o755)
    plan.put(Tag.ROOT_LINK, b"a/l\0../../beside\0")
    plan.blob(Tag.ROOT_FILE, "a/l/x", b"x", 0o644)
    plan.blob(Tag.ROOT_FILE, "out/x", b"x", 0o644)
    files = Writer(MessageType.JOB)
    for path in ("main.py", "d/e", "out/x", "../beside/x", "d"):
        files.blob(Tag.PUT, path, b"x", 0o600)
    failed = Writer(MessageType.ERROR)
    failed.text(Tag.STAGE, "execute /usr/bin/python3")
    failed.put(Tag.ERRNO, bytes(4))
    counters = b"low 0\noom_kill 3\nsome avg10=0.00 total=12\n"
    mounts = b"29 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n30 29 0:5 / /proc rw - proc proc rw\n"
    # By the number of parsers.c's table.
    return [
        bytes([target]) + data
        for target, data in (
            *((0, config.body()), (1, make.body()), (2, job.body()), (3, counters)),
            *((4, b"\0" + make.message()), (4, b"\2" + job.message()), (5, job.body())),
            *((6, bytes(2) + job.body()), (6, b"\x08\0" + session.body()), (7, make.body())),
            *((8, b"\3" + cell.body()), (9, collect.body()), (10, session.body())),
            *((11, b"R"), (11, b"Inumpy"), (11, b"Enumpy\0why\0trace"), (11, failed.message())),
            *((12, branch.body()), (13, branch.body()), (14, job.body()), (15, mounts)),
            *((16, plan.body()), (17, files.body())),
        )
    ]


def main() -> int:
    """Runs it for $ISOJOB_FUZZ_SECONDS."""
    program, corpus = build(), BUILD / "corpus"
    for folder in (corpus, KEPT):
        folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds()):
        (corpus / f"seed-{number}").write_bytes(data)
    # New finds go to the first of several.
    options: list[str | Path] = [
        f"-max_total_time={int(campaign.SECONDS)}",
        "-print_final_stats=1",
        corpus,
        KEPT,
    ]
    if sys.argv[1:] == ["merge"]:
        # By edges alone, and as few files as cover them.
        options = ["-set_cover_merge=1", "-use_counters=0", KEPT, corpus]
    work = tempfile.mkdtemp(prefix="fuzz-native-")
    try:
        return subprocess.run(
            [
                *(program, f"-seed={campaign.seed()}", *options),
                *("-max_len=4096", "-timeout=10", f"-artifact_prefix={BUILD}/"),
            ],
            check=False,
            cwd=work,
            # The configuration is read once in a zygote's life, and its filter kept.
            env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
        ).returncode
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    sys.exit(main())

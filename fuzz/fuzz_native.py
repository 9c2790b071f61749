"""The C side of the wire under libFuzzer, ASan and UBSan; needs clang.

Begins with messages as the host writes them, so that the fuzzer knows what a good one looks like. What
it finds it leaves in build/fuzz/.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from isojob import Limits
from isojob.wire import MessageType, Tag, Writer

HERE = Path(__file__).parent
NATIVE = HERE.parent / "isojob" / "native"
BUILD = HERE.parent / "build" / "fuzz"
INCLUDED = ("cell.c", "job.c", "cgroup.c")
FLAGS = (
    *("-std=c17", "-D_GNU_SOURCE", "-O1", "-g", "-Dmain=zygote_main"),
    *("-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"),
)


def build() -> Path:
    """Compiles; the path of the program."""
    BUILD.mkdir(parents=True, exist_ok=True)
    program = BUILD / "parsers"
    sources = [path for path in sorted(NATIVE.glob("*.c")) if path.name not in INCLUDED]
    subprocess.run(
        ["clang", *FLAGS, "-o", program, *sorted(HERE.glob("*.c")), *sources], check=True
    )
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
    counters = b"low 0\noom_kill 3\nsome avg10=0.00 total=12\n"
    return [
        b"\0" + config.body(),
        b"\1" + make.body(),
        b"\2" + job.body(),
        b"\3" + counters,
        b"\4" + make.message(),
        b"\4" + job.message(),
        b"\5" + job.body(),
    ]


def main() -> int:
    """Runs it for $ISOJOB_FUZZ_SECONDS."""
    seconds = os.environ.get("ISOJOB_FUZZ_SECONDS", "60")
    program, corpus = build(), BUILD / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    return subprocess.run(
        [
            *(program, corpus),
            *(f"-max_total_time={seconds}", "-max_len=4096", "-timeout=10", "-print_final_stats=1"),
            f"-artifact_prefix={BUILD}/",
        ],
        check=False,
        # The configuration is read once in a zygote's life, and its filter kept.
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
    ).returncode


if __name__ == "__main__":
    sys.exit(main())

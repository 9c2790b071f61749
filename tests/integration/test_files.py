"""files= and collect=."""

from __future__ import annotations

import glob
from pathlib import Path

import pytest

from isojob import Limits, Mount, Sandbox, Status, run_isolated, run_isolated_sync


async def test_files_in(tmp_path: Path) -> None:
    """Bytes, paths, nested names and modes arrive in the working directory."""
    (tmp_path / "tool").write_text("#!/bin/sh\necho tool\n")
    (tmp_path / "tool").chmod(0o755)
    result = await run_isolated(
        ["sh", "-c", "cat a sub/dir/b; ./tool; ./script; stat -c %a a tool script"],
        files={
            "a": b"A",
            "sub/dir/b": b"B\n",
            "tool": tmp_path / "tool",
            "script": (b"#!/bin/sh\necho script\n", 0o700),
        },
    )
    assert result.stdout == b"AB\ntool\nscript\n644\n755\n700\n", result.stderr


async def test_large_file_in() -> None:
    """50 MB go in whole."""
    data = bytes(range(256)) * (50 << 12)
    result = await run_isolated(
        ["sh", "-c", "wc -c < big; tail -c 3 big | od -An -tx1"], files={"big": data}
    )
    assert result.stdout == b"52428800\n fd fe ff\n"


async def test_files_belong_to_the_job() -> None:
    """The job may change and remove what it was given."""
    result = await run_isolated(
        ["sh", "-c", "echo more >> a && mv a b && rm b && rmdir d/e && rmdir d"],
        files={"a": b"", "d/e/f": b""},
        limits=Limits(),
    )
    assert result.exit_code == 1  # d/e is not empty: the rest worked
    assert b"d/e" in (result.stderr or b"")


async def test_collect() -> None:
    """Names and patterns come back; what is missing is named."""
    script = (
        "mkdir -p out; echo 1 > a.txt; echo 2 > out/b.png; echo 3 > out/c.png; echo 4 > .hidden"
    )
    result = await run_isolated(
        ["sh", "-c", script], collect=["a.txt", "out/*.png", "*.txt", "nope", "out/nope/x", "*"]
    )
    assert result.files == {"a.txt": b"1\n", "out/b.png": b"2\n", "out/c.png": b"3\n"}
    assert result.uncollected == {"nope": "not found", "out/nope/x": "not found"}


async def test_collect_names_with_wildcards() -> None:
    """A name that was escaped fits itself alone."""
    for name in ("a[1]*?.txt", "a\\b[1].txt"):
        script = f"echo 1 | tee '{name}' a1.txt 'a[1]x' 'ab[1].txt'"
        result = await run_isolated(["sh", "-c", script], collect=[glob.escape(name)])
        assert (result.files, result.uncollected) == ({name: b"1\n"}, {})


async def test_collect_more_than_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a limit a job may leave such a file: it is one that is not collected."""

    def read(fd: int, size: int) -> bytes:
        raise MemoryError

    monkeypatch.setattr("isojob._cell._read", read)
    limits = Limits(collect=None)
    result = await run_isolated(["touch", "x"], limits=limits, collect=["*"])
    assert (result.ok, result.files) == (True, {})
    assert "memory" in result.uncollected["x"]


def test_messages_of_four_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their lengths have 32 bits: what is longer makes no sense, whatever it is."""
    assert run_isolated_sync(["true"]).ok  # the zygote has its own, longer message
    monkeypatch.setattr("isojob.wire.MAX_LENGTH", 10_000)
    for content in ({"a": bytes(10_001)}, {"a": bytes(6000), "b": bytes(6000)}):
        with pytest.raises(ValueError, match="4 GiB"):
            run_isolated_sync(["true"], files=content)
    assert run_isolated_sync(["true"], files={"a": bytes(6000)}).ok


async def test_collect_is_safe() -> None:
    """Links, FIFOs, directories, sockets and sparse giants are named, not followed or read."""
    script = (
        "ln -s /etc/passwd link; ln -s / rootlink; mkfifo fifo; mkdir dir; "
        "truncate -s 8T sparse 2>/dev/null || truncate -s 60M sparse; "
        "echo secret > closed; chmod 000 closed; ln -s dir dirlink; echo x > dir/x; "
        "python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"sock\")'"
    )
    result = await run_isolated(
        ["sh", "-c", script],
        limits=Limits(collect="1MiB"),
        collect=[
            "link",
            "rootlink/etc/passwd",
            "fifo",
            "dir",
            "sparse",
            "closed",
            "dirlink/x",
            "sock",
            "dir/*",
        ],
    )
    assert result.files == {"closed": b"secret\n", "dir/x": b"x\n"}
    assert result.uncollected["link"] == "a symbolic link"
    assert result.uncollected["rootlink/etc/passwd"] == "behind a symbolic link"
    assert result.uncollected["dirlink/x"] == "behind a symbolic link"
    assert result.uncollected["fifo"] == "a FIFO"
    assert result.uncollected["dir"] == "a directory"
    assert result.uncollected["sock"] == "a socket"
    assert "limits.collect" in result.uncollected["sparse"]
    result = await run_isolated(["true"], cwd="/bin", collect=["x"])
    assert result.uncollected == {"x": "the working directory is behind a symbolic link"}


async def test_collect_by_patterns_behind_links_and_mounts() -> None:
    """What a pattern names is told if it leads away; what its wildcards fit is passed over."""
    mounts = [Mount.tmpfs("/box/mount", size="1MiB"), Mount.bind("/etc/passwd", "/box/dir.txt")]
    sandbox = Sandbox(mounts=mounts)
    script = "mkdir dir; touch dir/a file mount/a; ln -s dir link; mkfifo dir/fifo"
    patterns = ["mount/*", "link/*", "file/*", "none/*", "*/a", "*/dir/*", "[l]*/*", "*/fifo"]
    patterns += ["*.txt", "dir.txt"]
    result = await run_isolated(["sh", "-c", script], sandbox=sandbox, collect=patterns)
    assert result.ok, result.stderr
    assert result.files == {"dir/a": b""}
    assert result.uncollected == {
        "mount/*": "in another mount",
        "link/*": "behind a symbolic link",
        "file/*": "not in a directory",
        "none/*": "not found",
        "dir/fifo": "a FIFO",
        "dir.txt": "in another mount",
    }


async def test_collect_after_a_limit() -> None:
    """What a job wrote before it was ended can be looked at."""
    result = await run_isolated(
        ["sh", "-c", "echo partial > out; sleep 600"],
        limits=Limits(wall_time=0.5),
        collect=["out"],
    )
    assert result.status is Status.WALL_TIME_LIMIT
    assert result.files == {"out": b"partial\n"}


async def test_collect_total_is_capped() -> None:
    """limits.collect is a total."""
    result = await run_isolated(
        ["sh", "-c", "for i in 1 2 3; do head -c 400 /dev/zero > $i; done"],
        limits=Limits(collect=1000),
        collect=["1", "2", "3"],
    )
    assert sorted(result.files) == ["1", "2"]
    assert "limits.collect" in result.uncollected["3"]


async def test_odd_names() -> None:
    """Names are bytes to the kernel: undecodable ones come back as surrogates, and survive JSON."""
    code = "import os; open(b'\\xff\\n', 'w').write('odd')"
    result = await run_isolated(["python3", "-I", "-c", code], collect=["*"])
    assert result.files == {"\udcff\n": b"odd"}
    assert type(result).model_validate_json(result.model_dump_json()) == result


async def test_many_files() -> None:
    """More files than the bound: the first are collected, the rest named."""
    script = "i=0; while [ $i -lt 1100 ]; do : > f$i; i=$((i+1)); done"
    result = await run_isolated(["sh", "-c", script], collect=["*"])
    assert len(result.files) == 1024
    assert set(result.uncollected.values()) == {"too many files"}


async def test_most_that_is_told() -> None:
    """As many files as can be collected, and as many more as are named, and that there are others."""
    code = "for i in range(2100): open(f'{i:04}', 'x')"
    patterns = ["*", "0*", "1*"]
    result = await run_isolated(["python3", "-I", "-c", code], collect=patterns)
    assert len(result.files) == 1024
    assert len(result.uncollected) == 1025 + len(patterns)


@pytest.mark.parametrize("long", [False, True])
async def test_many_that_cannot_be_collected(long: bool) -> None:
    """Their names are the job's: so many are told, of so many bytes, and of each pattern that there are more."""
    depth = 14 if long else 0
    code = (
        "import os\n"
        f"for _ in range({depth}): os.mkdir('d' * 250); os.chdir('d' * 250)\n"
        "os.mkfifo('p')\n"
        "for i in range(2000): os.link('p', f'{i:04}')\n"
    )
    patterns = [f"{'*/' * depth}{last}" for last in ("[0-9]*", "0*", "nope", "?")]
    result = await run_isolated(["python3", "-I", "-c", code], collect=[*patterns, "none"])
    assert result.ok, result.stderr
    told = dict(result.uncollected)
    reason = "more than can be told cannot be collected"
    assert (told.pop(patterns[0]), told.pop(patterns[1])) == (reason, reason)
    assert told.pop("none") == "not found"
    if not long:
        assert told.pop("nope") == "not found"
    assert set(told.values()) == {"a FIFO"}
    assert len(told) < 400 if long else 1024 <= len(told) <= 1026
    assert sum(map(len, told)) < (1 << 20) + len(patterns) * 4096


async def test_names_beyond_what_the_kernel_takes() -> None:
    """A job can make deeper names than open(2) takes: what is left out for that is told, by its name."""
    n = "n" * 255
    top, last = f"{n}/" * 15, "f" * 255
    script = (
        "n=%s; for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do mkdir $n; cd $n; done\n"
        "echo 1 >%s; echo 2 >%sg; mkdir $n; echo 3 >$n/f"
    ) % (n, last, last[:-1])
    assert len(top + last) == 4095
    star = "*/" * 15
    result = await run_isolated(
        ["sh", "-c", script], collect=[f"{star}*", f"{star}[nf]*/f", f"{star}{n}/g"]
    )
    assert result.ok, result.stderr
    assert set(result.files) == {top + last, top + last[:-1] + "g"}
    too_long = "a name of more than 4095 bytes"
    assert result.uncollected == {f"{top}{n}/f": too_long, f"{top}{n}/g": too_long}


async def test_files_beyond_the_disk() -> None:
    """Files that cannot fit are refused before anything starts."""
    with pytest.raises(ValueError, match="limits.disk"):
        await run_isolated(["true"], files={"a": b"x" * 100_000}, limits=Limits(disk="64KiB"))


async def test_collect_of_the_shortest_jobs() -> None:
    """A job that ends before the list of what to collect arrives loses nothing."""
    for _ in range(40):
        result = await run_isolated(["true"], files={"a": b"1"}, collect=["a", "b"])
        assert (result.files, result.uncollected) == ({"a": b"1"}, {"b": "not found"})

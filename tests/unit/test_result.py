"""A result tells the truth in Python, in a log line and over JSON."""

from __future__ import annotations

import pickle
import signal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from isojob.errors import JobFailedError
from isojob.result import Evidence, Posture, Result, Status, Usage
from isojob.verdict import usage, verdict

POSTURE = Posture(
    cgroup="v2",
    privilege="user+ranges",
    kernel="6.12.1",
    namespaces=("user", "pid", "mnt"),
    seccomp="default",
    missing=("io_limit",),
    notes=("no swap accounting",),
)

# What os.fsdecode can give: text, and surrogates for the bytes that are not.
NAMES = st.binary(max_size=12).map(
    lambda raw: raw.replace(b"\0", b"").decode("utf-8", "surrogateescape")
)


def result(evidence: dict[str, Any] | None = None, **fields: Any) -> Result:
    """A result with the status and usage that its evidence gives."""
    counted = Evidence(
        **{"si_code": "exited", "si_status": 0, "wall_ns": 210_000_000, **(evidence or {})}
    )
    return Result(
        **{
            "args": ("prog",),
            "status": verdict(counted),
            "returncode": counted.returncode,
            "usage": usage(counted),
            "evidence": counted,
            "posture": POSTURE,
            **fields,
        }
    )


OOM = {
    "si_code": "killed",
    "si_status": 9,
    "cause": "oom",
    "cpu_ns": 200_000_000,
    "memory_peak": 64 * 2**20,
    "memory_limit": 64 * 2**20,
    "memory_events": {"max": 20, "oom": 1, "oom_kill": 1},
}


def test_status_is_its_own_text() -> None:
    """A status compares with, prints as, and is made from its settled name."""
    assert [str(status) for status in Status] == [
        "ok",
        "nonzero_exit",
        "signaled",
        "cpu_time_limit",
        "wall_time_limit",
        "memory_limit",
        "output_limit",
        "seccomp_violation",
        "killed",
    ]
    assert Status("ok") is Status.OK


@pytest.mark.parametrize(
    ("code", "number", "returncode", "exit_code", "sent"),
    [
        ("exited", 0, 0, 0, None),
        ("exited", 137, 137, 137, None),
        ("killed", 9, -9, None, signal.SIGKILL),
        ("dumped", 11, -11, None, signal.SIGSEGV),
        ("killed", 40, -40, None, 40),
    ],
)
def test_returncode_as_subprocess_has_it(
    code: str, number: int, returncode: int, exit_code: int | None, sent: int | None
) -> None:
    """N for an exit, -N for a signal; exit_code and signal are the two halves."""
    got = result({"si_code": code, "si_status": number})
    assert got.evidence.returncode == got.returncode == returncode
    assert got.exit_code == exit_code
    assert got.signal == sent
    assert isinstance(got.signal, signal.Signals) == (sent is not None and sent != 40)


@pytest.mark.parametrize("status", Status)
def test_only_ok_is_ok(status: Status) -> None:
    """check_returncode raises for every other status, even with exit status 0."""
    got = result(status=status)
    assert got.returncode == 0
    if status is Status.OK:
        assert got.ok
        got.check_returncode()
    else:
        assert not got.ok
        with pytest.raises(JobFailedError) as caught:
            got.check_returncode()
        assert caught.value.result is got
        assert str(status) in str(caught.value)


def test_text_replaces_what_is_not_utf8() -> None:
    """Decoding never fails, and output that was not captured reads as empty."""
    got = result(stdout=b"caf\xc3\xa9 \xff", stderr=None)
    assert got.stdout_text == "café \ufffd"
    assert got.stderr_text == ""


def test_the_log_line_of_a_job_over_its_memory_limit() -> None:
    """One line: status, how it ended, what it used, and why."""
    assert str(result(OOM)) == (
        "memory_limit: SIGKILL after 0.21 s (cpu 0.20 s, peak 64.0 MiB of 64.0 MiB):"
        " the kernel killed 1 process at the job's memory limit of 64 MiB"
    )


def test_the_log_line_leaves_out_what_is_unknown() -> None:
    """Without a cgroup there is no peak, and without a limit no 'of'."""
    assert str(result()) == "ok: exit 0 after 0.21 s"
    assert str(result({"memory_peak": 2**20})) == "ok: exit 0 after 0.21 s (peak 1.0 MiB)"
    assert str(result({"si_code": "killed", "si_status": 40})) == (
        "signaled: signal 40 after 0.21 s: signal 40 ended the job"
    )


def test_bytes_are_base64_in_json() -> None:
    """Output is readable by any base64 decoder for the URL-safe alphabet."""
    dumped = result(stdout=b"\xff\xfe\xfb").model_dump(mode="json")
    assert dumped["stdout"] == "__77"
    assert dumped["stderr"] is None


def test_a_name_that_is_not_utf8_is_escaped_in_json() -> None:
    """A hostile file name cannot make the result unserialisable, nor pass for another name."""
    names = ("a\udcff", "a\ufffdff", "a\ufffd", "plain")
    got = result(files=dict.fromkeys(names, b""))
    dumped = got.model_dump(mode="json")["files"]
    assert list(dumped) == ["a\ufffdff", "a\ufffd\ufffdff", "a\ufffd\ufffd", "plain"]
    assert Result.model_validate_json(got.model_dump_json()) == got


@given(
    args=st.lists(NAMES, max_size=3).map(tuple),
    stdout=st.none() | st.binary(max_size=20),
    stderr=st.none() | st.binary(max_size=20),
    files=st.dictionaries(NAMES, st.binary(max_size=20), max_size=3),
    uncollected=st.dictionaries(NAMES, st.text(max_size=5), max_size=3),
)
def test_results_survive_json_and_pickle(**fields: Any) -> None:
    """Any bytes in output, arguments and file names come back equal."""
    got = result(OOM, stdout_truncated=True, **fields)
    text = got.model_dump_json()
    text.encode()
    assert Result.model_validate_json(text) == got
    assert Result.model_validate(got.model_dump()) == got
    assert pickle.loads(pickle.dumps(got)) == got


def test_repr_is_short() -> None:
    """Loops and debuggers print results by the way: the size is told, not the output."""
    big = result(stdout=b"\0" * 10_000_000, files={"a": b"x" * 9999, "b": b"short"})
    text = repr(big)
    assert len(text) < 10_000
    assert "<10000000 bytes: b'" in text
    assert "<9999 bytes: b'xxx" in text
    assert "b'short'" in text
    assert repr(big.status) in text


def test_full_evidence_survives_json() -> None:
    """Every counter comes back, the nested tables included."""
    counted = Evidence(
        si_code="dumped",
        si_status=11,
        cause="seccomp",
        stop="none",
        syscall="ptrace",
        wall_ns=1,
        memory_events={"oom_kill": 1},
        cpu_stat={"throttled_usec": 3},
        io={"8:0": {"rbytes": 4}},
        pressure={"cpu": {"some_total": 0.1, "full_total": 0.0}},
    )
    assert Evidence.model_validate_json(counted.model_dump_json()) == counted


@pytest.mark.parametrize(
    "fields",
    [
        {"args": ("a", b"b")},
        {"args": ("nul\0",)},
        {"args": ("\ud800",)},
        {"args": "prog"},
        {"status": "ok!"},
        {"returncode": True},
        {"returncode": "0"},
        {"stdout": "text"},
        {"stdout_truncated": 1},
        {"files": {"a": "text"}},
        {"files": {b"a": b""}},
        {"extra": 1},
    ],
)
def test_results_take_no_wrong_types(fields: dict[str, Any]) -> None:
    """Nothing is converted in silence: text is not output, and 1 is not True."""
    with pytest.raises(ValidationError):
        result(**fields)


def test_results_are_frozen() -> None:
    """Nobody turns a failed job into a good one by assignment."""
    with pytest.raises(ValidationError, match="frozen"):
        result(OOM).status = Status.OK  # type: ignore[misc]


def test_a_usage_is_finite() -> None:
    """NaN is no time: it would pass every comparison with a budget."""
    with pytest.raises(ValidationError):
        Usage(wall_time=float("nan"))


def test_posture_hashes_and_survives_json() -> None:
    """Postures can be counted in a dictionary, and come back from JSON equal."""
    assert len({POSTURE, POSTURE.model_copy()}) == 1
    assert Posture.model_validate_json(POSTURE.model_dump_json()) == POSTURE
    with pytest.raises(ValidationError):
        POSTURE.model_copy(update={"cgroup": "v3"})

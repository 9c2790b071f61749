"""Limits mean what they say, and what could mean two things is refused."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from isojob.limits import Limits

BYTE_FIELDS = [
    "memory",
    "output",
    "io_read_bps",
    "io_write_bps",
    "disk",
    "collect",
    "file_size",
    "stack",
    "address_space",
    "core",
]
COUNT_FIELDS = ["processes", "io_read_iops", "io_write_iops", "inodes", "open_files"]
SECOND_FIELDS = ["cpu_time", "wall_time"]

# fmt: off
AMBIGUOUS_SIZES = [
    "64M", "64Mi", "64m", "64mb", "64", "", " ", "MiB", "-64MiB", "+64MiB", "1e3MiB", "1_0MiB",
    " 64MiB", "64MiB ", "64  MiB", "64MiB\n", "0x40MiB", "64.MiB", ".5MiB", "64kiB", "64iB",
    "64PiB", "inf MiB", "nanMiB", "٦٤MiB", "1.5.2MiB", "9" * 19 + "B",
]
NO_DURATIONS: list[object] = [
    True, "2", b"2", "2s", float("nan"), float("inf"), float("-inf"), -1, 0, 0.0, 1e-9, 2e9,
    10**400, -(10**400), timedelta(0), timedelta(seconds=-1), timedelta.max, 1j, [],
]
NO_CPUSETS: list[object] = [
    "", ",", "0,", ",0", "3-1", "-1", "0-", "a", "0 1", "0, 1", "0-1-2", "8192", "99999", "0\n",
    "0-3:1/2", "all", "٣", 0, True, ["0"],
]
# fmt: on


def limits(**fields: Any) -> Limits:
    """Limits from values that the signature would not let pass."""
    return Limits(**fields)


def refusal(**fields: Any) -> str:
    """The text of the refusal that these fields must meet."""
    with pytest.raises(ValidationError) as caught:
        Limits(**fields)
    return str(caught.value)


def test_defaults_are_the_documented_ones() -> None:
    """What is limited without being asked for is a promise, number by number."""
    assert Limits().model_dump() == {
        "cpu_time": 10.0,
        "wall_time": 30.0,
        "memory": 512 * 1024**2,
        "processes": 128,
        "output": 16 * 1024**2,
        "cpus": None,
        "cpuset": None,
        "io_read_bps": None,
        "io_write_bps": None,
        "io_read_iops": None,
        "io_write_iops": None,
        "disk": 128 * 1024**2,
        "inodes": 16384,
        "collect": 16 * 1024**2,
        "file_size": 64 * 1024**2,
        "open_files": 1024,
        "stack": 64 * 1024**2,
        "address_space": None,
        "core": 0,
    }


def test_the_lists_of_fields_are_complete() -> None:
    """Every limit is covered by the tests below, so that a new one cannot be forgotten."""
    covered = {*BYTE_FIELDS, *COUNT_FIELDS, *SECOND_FIELDS, "cpus", "cpuset"}
    assert covered == set(Limits.model_fields)


def test_defaults_pass_their_own_validation() -> None:
    """No default is a value that a caller could not have written."""
    assert Limits(**Limits().model_dump()) == Limits()


def test_none_is_unlimited_everywhere_but_for_core_dumps() -> None:
    """Every limit but `core` takes None and keeps it."""
    names = [name for name in Limits.model_fields if name != "core"]
    unlimited = limits(**dict.fromkeys(names))
    assert all(getattr(unlimited, name) is None for name in names)
    assert "core" in refusal(core=None)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64MiB", 67108864),
        ("64 MiB", 67108864),
        ("64MB", 64000000),
        ("1.5GiB", 1610612736),
        ("2GB", 2000000000),
        ("2048KiB", 2097152),
        ("4000kB", 4000000),
        ("4000KB", 4000000),
        ("4194304B", 4194304),
        ("0.5TiB", 549755813888),
        ("0.1TB", 100000000000),
    ],
)
def test_sizes_with_their_unit_are_exact(text: str, size: int) -> None:
    """A size is computed without rounding; binary and decimal units differ."""
    assert Limits(memory=text).memory == size


@pytest.mark.parametrize("name", BYTE_FIELDS)
@pytest.mark.parametrize(
    "text",
    AMBIGUOUS_SIZES,
)
def test_sizes_that_could_mean_two_things_are_refused(name: str, text: str) -> None:
    """The refusal tells the unambiguous spellings."""
    assert "write the unit out, such as 64MiB (67108864 bytes)" in refusal(**{name: text})


def test_a_fraction_of_a_byte_is_refused() -> None:
    """No size is rounded in silence."""
    assert "not a whole number of bytes" in refusal(memory="2097152.5B")
    assert "not a whole number of bytes" in refusal(memory="2048.0001KiB")


@pytest.mark.parametrize("name", [*BYTE_FIELDS, *COUNT_FIELDS])
@pytest.mark.parametrize("value", [True, False, 4e6, "x", b"4194304", [], -1, 2**63, 10**400])
def test_sizes_and_counts_are_ints_only(name: str, value: object) -> None:
    """A bool, a float, bytes, a negative number or one beyond 64 bits is no size and no count."""
    assert name in refusal(**{name: value})


@pytest.mark.parametrize("name", COUNT_FIELDS)
def test_counts_are_no_strings(name: str) -> None:
    """Even a string of digits is no count."""
    assert "valid integer" in refusal(**{name: "64"})


@pytest.mark.parametrize(
    ("name", "least", "why"),
    [
        ("memory", 2 * 1024**2, "no program starts"),
        ("address_space", 2 * 1024**2, "no program starts"),
        ("processes", 1, "greater than or equal to 1"),
        ("io_read_bps", 1, "None is unlimited"),
        ("io_write_bps", 1, "None is unlimited"),
        ("io_read_iops", 1, "greater than or equal to 1"),
        ("io_write_iops", 1, "greater than or equal to 1"),
        ("disk", 64 * 1024, "tmpfs takes 0 for unlimited"),
        ("inodes", 16, "tmpfs takes 0 for unlimited"),
        ("open_files", 3, "stdin, stdout and stderr"),
        ("stack", 128 * 1024, "arguments and environment"),
        ("output", 0, "must not be negative"),
        ("collect", 0, "must not be negative"),
        ("file_size", 0, "must not be negative"),
        ("core", 0, "must not be negative"),
    ],
)
def test_limits_under_which_nothing_can_work_are_refused(name: str, least: int, why: str) -> None:
    """The least value is taken, one less is refused with the reason."""
    assert getattr(limits(**{name: least}), name) == least
    assert why in refusal(**{name: least - 1})


@pytest.mark.parametrize(
    ("name", "most"),
    [(f"io_{way}_iops", 2**32 - 2) for way in ("read", "write")]
    + [(f"io_{way}_bps", 2**50) for way in ("read", "write")],
)
def test_rates_that_kernels_divide_by(name: str, most: int) -> None:
    """v1 cuts operations to 32 bits, and some kernels multiply bytes by time: what is left may be 0."""
    assert getattr(limits(**{name: most}), name) == most
    assert name in refusal(**{name: most + 1})


def test_no_more_processes_than_the_kernel_can_count() -> None:
    """pids.max refuses more than PID_MAX_LIMIT, so the model does so first."""
    assert Limits(processes=2**22).processes == 2**22
    assert "processes" in refusal(processes=2**22 + 1)


@pytest.mark.parametrize("name", SECOND_FIELDS)
def test_seconds_are_numbers_or_timedeltas(name: str) -> None:
    """Ints, floats and timedeltas all become float seconds."""
    for value in (2, 2.0, timedelta(seconds=2)):
        seconds = getattr(limits(**{name: value}), name)
        assert seconds == 2.0
        assert type(seconds) is float


@pytest.mark.parametrize("name", SECOND_FIELDS)
@pytest.mark.parametrize(
    "value",
    NO_DURATIONS,
)
def test_seconds_no_timer_can_hold_are_refused(name: str, value: object) -> None:
    """No bool, no string, no NaN; 0 would disarm the timer and so lift the limit."""
    assert name in refusal(**{name: value})


@pytest.mark.parametrize("value", [0.01, 0.5, 1, 2.5, 8191])
def test_cpus_is_a_share_of_processors(value: float) -> None:
    """Fractions and whole numbers of processors are taken."""
    assert Limits(cpus=value).cpus == value


@pytest.mark.parametrize(
    "value", [True, "1", 0, -1, 0.009, 8192, float("nan"), float("inf"), 10**400]
)
def test_cpus_the_kernel_cannot_grant_are_refused(value: object) -> None:
    """Neither a bool nor a string, and nothing below the kernel's smallest quota."""
    assert "cpus" in refusal(cpus=value)


@pytest.mark.parametrize("value", ["0", "0-1,3", "0-0", "7,0-2,7", "8191"])
def test_cpuset_lists_are_kept(value: str) -> None:
    """The list format of cpuset(7) is taken as it is."""
    assert Limits(cpuset=value).cpuset == value


@pytest.mark.parametrize(
    "value",
    NO_CPUSETS,
)
def test_cpuset_typos_are_refused(value: object) -> None:
    """What the kernel would refuse, or a reader misread, never reaches it."""
    assert "cpuset" in refusal(cpuset=value)


def test_a_misspelt_limit_is_refused() -> None:
    """A limit that does not exist is an error, not a job without the limit."""
    assert "Extra inputs are not permitted" in refusal(memmory="64MiB")


def test_limits_are_frozen_and_hash_by_value() -> None:
    """Equal limits are one dictionary key, and nobody can change them underneath."""
    assert hash(Limits(memory="64MiB")) == hash(Limits(memory=67108864))
    assert Limits(memory="64MiB") == Limits(memory=67108864)
    with pytest.raises(ValidationError, match="frozen"):
        Limits().memory = 1  # type: ignore[misc]


def test_a_copy_with_changes_is_validated() -> None:
    """model_copy keeps the other fields, reads units, and refuses what the constructor refuses."""
    copy = Limits(cpu_time=1, memory="64MiB").model_copy(update={"memory": "128MiB"})
    assert copy == Limits(cpu_time=1, memory="128MiB")
    assert Limits(cpu_time=1).model_copy() == Limits(cpu_time=1)
    for update in ({"memory": "64M"}, {"memory": True}, {"memmory": 1}):
        with pytest.raises(ValidationError):
            Limits().model_copy(update=update)


def test_limits_survive_json() -> None:
    """A round trip through JSON gives equal limits, None included."""
    some = Limits(wall_time=timedelta(seconds=2), memory="64MiB", disk=None, cpuset="0-1")
    assert Limits.model_validate_json(some.model_dump_json()) == some


def test_json_is_held_to_the_same_rules() -> None:
    """A service's request body may write units out, and may not write true or 64M."""
    assert Limits.model_validate_json('{"memory": "64MiB", "cpu_time": 2}').memory == 67108864
    for body in (
        '{"memory": true}',
        '{"memory": "64M"}',
        '{"processes": "4"}',
        '{"cpu_time": NaN}',
    ):
        with pytest.raises(ValidationError):
            Limits.model_validate_json(body)


@given(st.integers(0, 2**40), st.integers(0, 10**6 - 1), st.sampled_from(["B", "kB", "MiB", "GB"]))
def test_a_size_is_exact_or_refused(whole: int, millionths: int, unit: str) -> None:
    """Whatever the digits, the result is the exact product or an error, never a rounded one."""
    factor = {"B": 1, "kB": 1000, "MiB": 1024**2, "GB": 1000**3}[unit]
    exact = (whole * 10**6 + millionths) * factor
    try:
        size = Limits(output=f"{whole}.{millionths:06}{unit}").output
    except ValidationError:
        assert exact % 10**6 or exact // 10**6 >= 2**63
    else:
        assert size is not None
        assert size * 10**6 == exact


@given(st.text(max_size=12))
def test_no_string_breaks_the_parsers(text: str) -> None:
    """Any text is a size, a set of processors, or a validation error; and never a duration."""
    for name in ("output", "cpuset"):
        try:
            assert json.loads(limits(**{name: text}).model_dump_json())[name] is not None
        except ValidationError:
            continue
    assert "wall_time" in refusal(wall_time=text)

"""Names and numbers of system calls, the binding to libseccomp, and hosts without it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from environment import declared_arguments, declared_bits

import isojob.seccomp
from isojob.errors import HostNotSupportedError
from isojob.seccomp import SeccompProfile, _libseccomp, _names, syscall_name
from isojob.seccomp._architectures import architecture
from isojob.seccomp._arguments import _INT, _LONG_READ_AS_INT, _MODE, argument_bits
from isojob.seccomp._names import Unnumbered, number

X86_64, AARCH64, I386 = 0xC000003E, 0xC00000B7, 0x40000003


@pytest.mark.parametrize(
    ("audit", "nr", "name"),
    [
        (X86_64, 41, "socket"),
        (AARCH64, 198, "socket"),
        (I386, 102, "socketcall"),
        (X86_64, 0x40000000 | 520, "execve"),
        (X86_64, 470, "listns"),
        (AARCH64, 462, "mseal"),
        (X86_64, 335, "uretprobe"),
        (X86_64, 1000, "syscall_1000"),
        (X86_64, 2**32 - 1, "syscall_4294967295"),
        (X86_64, -1, "syscall_-1"),
        (0xDEADBEEF, 1, "syscall_1"),
    ],
)
def test_syscall_name(audit: int, nr: int, name: str) -> None:
    """A recorded call gets its name under its own ABI, and a number where it has none."""
    assert syscall_name(audit, nr) == name


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_own_table_agrees_with_libseccomp(arch: str) -> None:
    """What both tables have, they have under one number."""
    machine = architecture(arch)
    _, lib, _ = _names.library()
    table = _names._newer()
    shared = {
        name: lib.seccomp_syscall_resolve_name_arch(machine.audit, name.encode()) for name in table
    }
    known = {name: nr for name, nr in shared.items() if nr >= 0}
    assert len(known) > 20
    assert known == {name: table[name] for name in known}
    assert sorted(table.values()) == list(range(424, 471))


def test_kinds_of_names() -> None:
    """A name has a number, belongs to another architecture, or is known nowhere."""
    here, there = architecture("x86_64"), architecture("aarch64")
    assert number("open", here) == 2
    assert number("open", there) is Unnumbered.ELSEWHERE
    assert number("uretprobe", here) == 335
    assert number("uretprobe", there) is Unnumbered.ELSEWHERE
    assert number("arm_fadvise64_64", here) is Unnumbered.ELSEWHERE
    assert number("opne", here) is Unnumbered.UNKNOWN


def test_argument_table_names_real_calls() -> None:
    """A misspelt name in the table of widths would leave its arguments at 64 bits."""
    for entry in f"{_INT} {_LONG_READ_AS_INT} {_MODE}".split():
        name, indices = entry.split(":")
        assert number(name, architecture("x86_64")) is not Unnumbered.UNKNOWN, name
        assert re.fullmatch("[0-5]+", indices)
        assert list(indices) == sorted(set(indices))


@pytest.mark.parametrize(
    ("call", "bits"),
    [
        ("socket", [32, 32, 32, 64]),
        ("ioctl", [32, 32, 64]),
        ("prlimit64", [32, 32, 64, 64]),
        ("clone", [32, 64, 64, 64, 64]),
        ("mmap", [64, 64, 64, 64, 32, 64]),
        ("openat", [32, 64, 32, 16]),
        ("ptrace", [64, 32, 64, 64]),
        ("read", [32, 64, 64]),
        ("brk", [64]),
    ],
)
def test_argument_bits(call: str, bits: list[int]) -> None:
    """Arguments are as wide as the kernel's prototype says, file modes 16 bits."""
    assert [argument_bits(call, index) for index in range(len(bits))] == bits


def test_arguments_are_as_declared() -> None:
    """The table of widths says of each call what the kernel's own prototypes say."""
    declared = declared_arguments()
    assert len(declared) > 300
    places = [(call, index) for call in declared for index in range(6)]
    assert {place: argument_bits(*place) for place in places} == {
        place: declared_bits(*place) for place in places
    }


def test_binding_is_up_to_date() -> None:
    """The committed declarations are what the generator writes today."""
    pytest.importorskip("pycparser")
    pytest.importorskip("cffi")
    from isojob.seccomp._build_libseccomp import generate

    path = _libseccomp.__file__
    assert path is not None
    assert Path(path).read_text() == generate()


def test_import_is_light() -> None:
    """Importing the package loads neither libseccomp nor cffi."""
    script = (
        "import sys, isojob.seccomp\n"
        "isojob.seccomp.SeccompProfile.default()\n"
        "assert not {'cffi', '_cffi_backend', 'pycparser'} & set(sys.modules)\n"
        "assert 'libseccomp' not in open('/proc/self/maps').read()\n"
    )
    root = str(Path(isojob.seccomp.__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", script], check=True, env=env)


def test_without_libseccomp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without libseccomp a profile loads and does not compile, with a cure; names are numbers."""
    monkeypatch.setattr(_names, "_SONAME", "libseccomp-absent.so.9")
    _names.library.cache_clear()
    _names.number.cache_clear()
    try:
        profile = SeccompProfile.default()
        with pytest.raises(HostNotSupportedError, match="libseccomp2") as caught:
            profile.compile(kernel=(4, 19))
        assert "libseccomp" in caught.value.missing
        assert syscall_name(X86_64, 41) == "syscall_41"
        assert syscall_name(X86_64, 462) == "mseal"
    finally:
        _names.library.cache_clear()


@pytest.mark.parametrize("machine", ["ppc64le", "i686", "s390x"])
def test_other_machines(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    """A machine whose filters isojob cannot write is refused, given or found."""
    with pytest.raises(HostNotSupportedError, match=machine):
        SeccompProfile.default().compile(machine)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(HostNotSupportedError, match=machine):
        SeccompProfile.default().compile()


def test_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a system without uname(2), compiling for it is refused and not a crash."""
    monkeypatch.delattr(os, "uname")
    with pytest.raises(HostNotSupportedError, match="Linux"):
        SeccompProfile.default().compile("x86_64")

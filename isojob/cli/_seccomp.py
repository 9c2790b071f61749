"""``isojob seccomp``: what a profile does, before a job finds out."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, TypeAlias

import typer
from rich.columns import Columns
from rich.console import Console
from rich.text import Text

from isojob.cli._collected import write_file
from isojob.cli._console import make_console
from isojob.cli._options import OptionError, load_profile
from isojob.errors import ProfileError
from isojob.seccomp import SeccompProfile, syscall_name
from isojob.seccomp._architectures import architecture
from isojob.seccomp._compile import running_kernel
from isojob.seccomp._policy import Policy, build_policy
from isojob.seccomp.evaluator import describe

__all__ = ["seccomp"]

_REFUSED = 1
# The generic table of Linux 6.19 ends at 470; a name is looked for a little beyond.
_NUMBERS = range(512)

seccomp = typer.Typer(
    help="Read, check and compile seccomp profiles in the OCI's and Docker's JSON format.",
    no_args_is_help=True,
)

_Profile: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="PROFILE",
        help="A JSON file, or default, compute or unconfined.",
        show_default=False,
    ),
]
_Arch: TypeAlias = Annotated[
    str | None,
    typer.Option("--arch", metavar="NAME", help="x86_64 or aarch64; this machine's by default."),
]


def _load(name: str) -> SeccompProfile:
    return load_profile("PROFILE", name)


@seccomp.command()
def show(name: _Profile, arch: _Arch = None) -> int:
    """List what a profile allows, allows with some arguments only, denies and does not know."""
    profile = _load(name)
    machine = architecture(arch)
    policy = build_policy(
        profile,
        machine,
        running_kernel(),
        guards="init" if profile == SeccompProfile.unconfined() else "all",
    )
    groups: dict[str, list[str]] = {}
    for nr in _NUMBERS:
        call = syscall_name(machine.audit, nr)
        if not call.startswith("syscall_"):
            groups.setdefault(_answer(policy, nr), []).append(call)
    console = make_console()
    console.print(f"seccomp profile {profile.name!r} on {machine.name}")
    # What is let through first, then by what is answered.
    for answer in sorted(groups, key=lambda text: (not text.startswith("allow"), text)):
        _list(console, answer, groups[answer])
    if policy.unresolved:
        _list(console, "named, but known nowhere here: stays denied", policy.unresolved)
    console.print(
        f"\nany other call: {describe(policy.background(max(_NUMBERS)))}; "
        "calls of another ABI (32-bit, x32): errno ENOSYS",
    )
    return 0


def _answer(policy: Policy, nr: int) -> str:
    answers = [describe(answer.value) for answer in policy.answers(nr)]
    if len(set(answers)) == 1:
        return answers[0]
    others = ", ".join(dict.fromkeys(text for text in answers if text != "allow"))
    if "allow" not in answers:
        return f"depends on the arguments: {others}"
    return f"allow, but with some arguments: {others}"


def _list(console: Console, title: str, names: Iterable[str]) -> None:
    listed = sorted(names)
    console.print(Text(f"\n{title} ({len(listed)})", style="bold"))
    console.print(Columns([Text(name) for name in listed], padding=(0, 2), column_first=True))


@seccomp.command()
def check(name: _Profile, arch: _Arch = None) -> int:
    """Load and compile a profile: status 0 if isojob can enforce it, 1 with the reason if not."""
    try:
        profile = _load(name)
        compiled = profile.compile(arch)
    except ProfileError as error:
        typer.echo(f"isojob: {error}", err=True)
        return _REFUSED
    typer.echo(
        f"{profile.name}: can be enforced, {len(compiled.bpf) // 8} instructions (at most 4096)"
    )
    if compiled.unresolved:
        typer.echo(
            f"{profile.name}: known nowhere here, and so denied: {', '.join(compiled.unresolved)}"
        )
    if compiled.notify:
        typer.echo(
            f"{profile.name}: some calls end the job, with the status seccomp_violation "
            "(needs user notification, seccomp_unotify(2))"
        )
    return 0


@seccomp.command("compile")
def compile_(
    name: _Profile,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where to; - is stdout.")
    ],
    arch: _Arch = None,
) -> int:
    """Write the filter as the kernel takes it: struct sock_filter[] (seccomp(2)).

    It says "notify" where a call is to end the job, so it is of use only with a listener then.
    """
    bpf = _load(name).compile(arch).bpf
    try:
        if str(output) == "-":
            sys.stdout.buffer.write(bpf)
            sys.stdout.buffer.flush()
        else:
            write_file(output, bpf)
    except OSError as error:
        raise OptionError("--output", f"{str(output)!r}: {error.strerror}") from error
    return 0

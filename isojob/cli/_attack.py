"""``isojob attack``: our own attacks on our own sandbox, on this host."""

from __future__ import annotations

import json as _json
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import anyio
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from isojob.attack import ATTACKS, Attack, Finding, Outcome
from isojob.attack import attack as run_attacks
from isojob.cli import _options
from isojob.cli._console import make_console

__all__ = ["attack"]

_NOT_CONTAINED = 1
_STYLES = {
    Outcome.CONTAINED: "green",
    Outcome.ESCAPED: "bold red",
    Outcome.WRONG_VERDICT: "bold yellow",
    Outcome.ERROR: "bold magenta",
}


def attack(
    *,
    only: Annotated[
        str, typer.Option("--only", metavar="REGEX", help="Names or kinds of attacks.")
    ] = "",
    at_once: Annotated[int, typer.Option("--at-once", min=1, max=64, help="How many.")] = 4,
    patience: Annotated[
        float,
        typer.Option(
            "--patience", min=1, help="Allow times so many times as long: a slow machine."
        ),
    ] = 1,
    security_opt: Annotated[
        list[str] | None,
        typer.Option(
            "--security-opt", metavar="seccomp=PROFILE", help="Attack under another profile."
        ),
    ] = None,
    allow_missing: Annotated[
        list[str] | None,
        typer.Option("--allow-missing", metavar="NAME", help="Do without this protection."),
    ] = None,
    warm: Annotated[
        bool, typer.Option("--warm", help="Attack from forks of a warm interpreter.")
    ] = False,
    listed: Annotated[bool, typer.Option("--list", help="Tell the attacks, run none.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the findings as JSON and nothing else.")
    ] = False,
) -> int:
    """Attack the sandbox of this host with over 130 hostile programs, and tell what stopped them.

    They try to break out, to use more than they may, to outlive their end, to forge their verdict
    and to reach other jobs; some are images to import. The exit status is 0 if all were
    contained with the right verdict and nothing is left, else 1.

    What verdict is right is told for profiles that refuse calls, as `default` does. One that kills,
    as `compute`, ends programs at their first forbidden call: such a wrong verdict
    (seccomp_violation) is no escape, but what the program had left to try is not tried.
    """
    try:
        wanted = re.compile(only)
    except re.error as error:
        raise _options.OptionError(
            "--only", f"{only!r} is no regular expression: {error}"
        ) from None
    chosen = [one for one in ATTACKS if wanted.search(one.name) or wanted.search(one.kind)]
    if not chosen:
        raise _options.OptionError("--only", f"no attack is called {only!r}: see --list")
    console = make_console()
    if listed:
        _list(console, chosen)
        return 0
    sandbox = _options.make_sandbox(
        seccomp=_options.profile(security_opt or ()), allow_missing=allow_missing or ()
    )
    with _progress() as progress:
        task = progress.add_task("", total=len(chosen) + 1)

        def found(finding: Finding) -> None:
            progress.update(task, advance=1, description=f"{finding.kind}: {finding.name}")
            if finding.outcome is not Outcome.CONTAINED:
                progress.console.print(_line(finding), soft_wrap=True)

        run = partial(
            run_attacks,
            chosen,
            sandbox=sandbox,
            at_once=at_once,
            patience=patience,
            warm=warm,
            found=found,
        )
        findings = anyio.run(run)
    good = all(finding.outcome is Outcome.CONTAINED for finding in findings)
    if json:
        document = {
            "ok": good,
            "summary": _summary(findings),
            "findings": [finding.model_dump(mode="json") for finding in findings],
        }
        typer.echo(_json.dumps(document, indent=2))
    else:
        _show(console, findings)
    return 0 if good else _NOT_CONTAINED


def _progress() -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=make_console(stderr=True),
        transient=True,
    )


def _line(finding: Finding) -> Text:
    return Text(
        f"{finding.outcome}: {finding.name}: {'; '.join(finding.problems)}",
        style=_STYLES[finding.outcome],
    )


def _list(console: Console, attacks: Sequence[Attack]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("kind", "attack", "what it tries"):
        table.add_column(name)
    for one in attacks:
        table.add_row(one.kind, one.name, one.title)
    console.print(table)


def _show(console: Console, findings: Sequence[Finding]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("attack", no_wrap=True)
    table.add_column("what it tried", overflow="fold")
    table.add_column("stopped by", overflow="fold")
    table.add_column("status", style="dim", no_wrap=True)
    kind = ""
    for finding in findings:
        if finding.kind != kind:
            kind = finding.kind
            table.add_row("", Text(kind, style="bold"))
        table.add_row(
            Text(finding.outcome, style=_STYLES[finding.outcome]),
            finding.name,
            finding.title,
            ", ".join(finding.layers),
            finding.status or "",
        )
    console.print(table)
    console.print()
    for finding in findings:
        if finding.outcome is not Outcome.CONTAINED:
            console.print(_line(finding), soft_wrap=True)
    good = all(finding.outcome is Outcome.CONTAINED for finding in findings)
    console.print(Text(_summary(findings), style="bold green" if good else "bold red"))


def _summary(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.outcome for finding in findings)
    return (
        f"{counts[Outcome.CONTAINED]} contained, {counts[Outcome.ESCAPED]} escaped, "
        f"{counts[Outcome.WRONG_VERDICT]} wrong verdict, {counts[Outcome.ERROR]} error"
    )

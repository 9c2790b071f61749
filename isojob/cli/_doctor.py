"""``isojob doctor``: what this host can do, and what to do about the rest."""

from __future__ import annotations

import json as _json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from isojob.cli._console import make_console
from isojob.host.doctor import POSTURE, Check, examine, holds, summary

__all__ = ["doctor"]

_REFUSED = 1
_MARKS = {True: ("ok", "green"), False: ("FAILED", "bold red"), None: ("absent", "yellow")}


def doctor(
    json: Annotated[
        bool, typer.Option("--json", help="Print the checks as JSON and nothing else.")
    ] = False,
) -> int:
    """Try everything a sandbox is made of on this host, and run a whole job at the end.

    What fails comes with its cure. The exit status is 0 if jobs with the default settings can run
    here with every protection in force, else 1. Nothing is left behind.
    """
    checks = examine()
    good = holds(checks)
    if json:
        document = {
            "ok": good,
            "summary": summary(checks),
            "checks": [check.model_dump(mode="json") for check in checks],
        }
        typer.echo(_json.dumps(document, indent=2))
    else:
        _show(make_console(), checks)
    return 0 if good else _REFUSED


def _show(console: Console, checks: list[Check]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column("")
    table.add_column("what", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("needed for", overflow="fold", style="dim")
    section = ""
    for check in checks:
        if check.name == POSTURE:
            continue  # the last line has it
        if check.section != section:
            section = check.section
            table.add_row("", Text(section, style="bold"))
        mark, style = _MARKS[check.ok]
        table.add_row(
            Text(mark, style=style), Text(check.name), Text(check.found), Text(check.needed_for)
        )
    console.print(table)
    for title, ok in (("What has to be done", False), ("What could be added", None)):
        cures: dict[str, list[str]] = {}
        for check in checks:
            if check.ok is ok and check.cure:
                cures.setdefault(check.cure, []).append(check.name)
        if cures:
            console.print(Text(f"\n{title}", style="bold"))
        # One cause makes many checks fail: its cure is told once.
        for cure, names in cures.items():
            console.print(Text(f"  {cure}"), soft_wrap=True)
            console.print(Text(f"    for: {', '.join(names)}", style="dim"), soft_wrap=True)
    console.print()
    console.print(
        Text(summary(checks), style="bold green" if holds(checks) else "bold red"), soft_wrap=True
    )

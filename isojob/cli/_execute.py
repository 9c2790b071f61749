"""One request of ``isojob run``, carried out: what is told of it, and the exit status."""

from __future__ import annotations

import signal
from pathlib import Path

import anyio
import typer

from isojob.cli import OUR_FAULT
from isojob.cli._account import exit_status, print_account
from isojob.cli._collected import write_files
from isojob.cli._console import make_console
from isojob.cli._live import Foreground, Request
from isojob.result import Result

__all__ = ["execute"]


def execute(request: Request, collect_to: Path | None, *, force: bool, quiet: bool) -> int:
    """Runs it in the foreground; the exit status.

    Args:
        request: The job.
        collect_to: Where its files go.
        force: Whether they replace others there.
        quiet: No account at the end.
    """
    foreground = Foreground(request)
    try:
        result = anyio.run(foreground.run)
    except (ValueError, OSError) as error:
        # Ours say for themselves what they mean; the rest is an argument that makes no sense.
        if type(error).__module__.startswith("isojob."):
            raise
        typer.echo(f"isojob: {error}", err=True)
        return OUR_FAULT
    if foreground.read_error is not None:
        typer.echo(f"isojob: cannot read all of stdin: {foreground.read_error}", err=True)
    if foreground.write_error is not None:
        typer.echo(f"isojob: cannot pass output on: {foreground.write_error}", err=True)
    if result is None:
        return _status(foreground, OUR_FAULT)
    failed = {} if collect_to is None else _write(result, collect_to, force=force)
    lost = result.uncollected
    # What the job itself failed with tells more than what it did not make or read for that.
    half_done = bool(lost) or foreground.read_error is not None
    ended = OUR_FAULT if failed else exit_status(result) or (OUR_FAULT if half_done else 0)
    status = _status(foreground, ended)
    if request.capture:
        try:
            typer.echo(result.model_dump_json())
        except BrokenPipeError:
            return 128 + signal.SIGPIPE
        except OSError as error:
            typer.echo(f"isojob: cannot write the result: {error}", err=True)
            return OUR_FAULT
    elif not quiet:
        console = make_console(stderr=True)
        print_account(console, result, request.limits, failed, to=collect_to, status=status)
    if quiet or request.capture:
        for name, reason in failed.items():
            typer.echo(f"isojob: not written: {name!r}: {reason}", err=True)
        for name, reason in lost.items():
            typer.echo(f"isojob: not collected: {name!r}: {reason}", err=True)
    return status


def _status(foreground: Foreground, otherwise: int) -> int:
    """What ended us counts before how the job ended."""
    if foreground.signal is not None:
        return 128 + foreground.signal
    return OUR_FAULT if foreground.write_error is not None else otherwise


def _write(result: Result, to: Path, *, force: bool) -> dict[str, str]:
    """Writes the collected files; what could not be written, with the reason."""
    try:
        return write_files(result.files, to, force=force)
    except OSError as error:
        return dict.fromkeys(result.files or ("",), f"{to}: {error.strerror}")

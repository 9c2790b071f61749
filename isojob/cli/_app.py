"""The commands, put together, and what their errors mean for the exit status."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

import isojob
from isojob.cli import INTERRUPTED, OUR_FAULT
from isojob.cli._attack import attack
from isojob.cli._doctor import doctor
from isojob.cli._images import image
from isojob.cli._options import OptionError
from isojob.cli._run import HELP, run
from isojob.cli._seccomp import seccomp
from isojob.errors import (
    CommandNotExecutableError,
    CommandNotFoundError,
    HostNotSupportedError,
    IsojobError,
    PoolBrokenError,
    SandboxSetupError,
)

__all__ = ["app", "invoke"]

NOT_FOUND = 127
NOT_EXECUTABLE = 126
_DOCTOR = "`isojob doctor` tells what this host lacks"
# Where a path of the caller's own is no good: the host lacks nothing.
_PATHS = ("bind source", "bind /", "chdir", "mkdir /", "mount target", "open /", "write file")

app = typer.Typer(
    name="isojob",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Everything after the program's name is the program's, as with docker run.
# -h is its --hostname.
app.command(
    "run",
    help=HELP,
    context_settings={"allow_interspersed_args": False, "help_option_names": ["--help"]},
)(run)
app.command("doctor")(doctor)
app.command("attack")(attack)
app.add_typer(seccomp, name="seccomp")
app.add_typer(image, name="image")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"isojob {isojob.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
) -> None:
    """Run untrusted programs in fresh namespaces, under cgroup limits and a seccomp filter."""


def invoke(arguments: Sequence[str]) -> int:
    """Runs one command line.

    Args:
        arguments: Without the program's name.

    Returns:
        The exit status.
    """
    try:
        # Standalone, a mistake in the flags would end the process with 2, as a job may, too.
        status = app(list(arguments), prog_name="isojob", standalone_mode=False)
    except CommandNotFoundError as error:
        return _complain(error, NOT_FOUND)
    except CommandNotExecutableError as error:
        return _complain(error, NOT_EXECUTABLE)
    except (HostNotSupportedError, SandboxSetupError, PoolBrokenError) as error:
        is_path = isinstance(error, SandboxSetupError) and error.stage.startswith(_PATHS)
        return _complain(error, OUR_FAULT, "" if is_path else _DOCTOR)
    except (IsojobError, OptionError) as error:
        return _complain(error, OUR_FAULT)
    except typer.Abort:
        return INTERRUPTED
    except Exception as error:
        # Mistakes in the flags: typer brings its own copy of click, older ones import click.
        show = getattr(error, "show", None)
        if not callable(show):
            raise
        show()
        return OUR_FAULT
    return status if isinstance(status, int) else 0


def _complain(error: Exception, status: int, hint: str = "") -> int:
    typer.echo(f"isojob: {error}", err=True)
    if hint:
        typer.echo(f"isojob: {hint}", err=True)
    return status

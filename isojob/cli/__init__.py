"""The command line: ``isojob run``, ``isojob doctor``, ``isojob seccomp``.

Exit statuses of ``isojob run`` are those of ``docker run``: the job's own; 128 + N if signal N
ended it, or us (130 after Ctrl-C); 137, as after SIGKILL, for every limit; 127 if the program is
not found; 126 if it cannot be executed; 125 if isojob could not do its part, bad options
included.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["INTERRUPTED", "OUR_FAULT", "main"]

OUR_FAULT = 125
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line.

    Args:
        arguments: Without the program's name; those of this process by default.

    Returns:
        The exit status. Never raises, and never lets a traceback's status 1 pass for a job's.
    """
    _open_standard_streams()
    try:
        import rich
        import typer
    except ImportError as error:
        sys.stderr.write(
            f'isojob: the command line needs {error.name}: pip install "isojob[cli]"\n'
        )
        return OUR_FAULT
    del rich, typer
    try:
        from isojob.cli._app import invoke

        return invoke(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:  # noqa: BLE001 - a fault of ours must not look like the job's status
        import traceback

        traceback.print_exc()
        return OUR_FAULT


def _open_standard_streams() -> None:
    """Descriptors 0 to 2 that the caller closed would be given to the job's pipes."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest free descriptor is the one that is missing.
            os.open(os.devnull, os.O_RDONLY if fd == 0 else os.O_WRONLY)

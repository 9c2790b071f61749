"""Where tables go."""

from __future__ import annotations

import os

from rich.console import Console

__all__ = ["make_console"]

_LOG_WIDTH = 120


def make_console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; a log or pipe has no edge, and rich would assume one."""
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _LOG_WIDTH
    return console

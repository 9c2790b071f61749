"""What a job is to somebody who watches it while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from isojob._streams import Meter

if TYPE_CHECKING:
    from isojob._account import Outcome
    from isojob._lease import Lease

__all__ = ["Attended"]


class Attended(Protocol):
    """Somebody who watches a job while it runs, and reads its streams."""

    out: Meter | None
    err: Meter | None
    terminal: bool

    def began(self, lease: Lease, outcome: Outcome) -> None:
        """It was sent to this cell; again to another one, if that turns out to be dead."""
        ...

    def started(self) -> None:
        """Its program has been executed."""
        ...

    def ended(self) -> None:
        """It is over, and nobody writes any more."""
        ...

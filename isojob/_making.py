"""A template on its way, and the calls that wait for it."""

from __future__ import annotations

import copy
import threading

from isojob._branch import Branch, BranchStock
from isojob._loop import Bell

__all__ = ["Call", "Making"]


class Call:
    """One that wants a set of modules.

    Attributes:
        stock: What it holds, which lasts until it lets go.
        making: What it waits for until then.
    """

    def __init__(self) -> None:
        self.stock: BranchStock | None = None
        self.making: Making | None = None
        self._bell: Bell | None = None
        self._error: BaseException | None = None

    def wait_for(self, making: Making) -> None:
        """It is one of those that it is made for; in its event loop."""
        self.making = making
        self._bell = Bell()

    async def held(self) -> BranchStock:
        """The cells, when there are any; the wait can be cancelled at once.

        Raises:
            IsojobError: Why there are none, to each call by an exception of its own.
        """
        if self.stock is None and self._bell is not None:
            await self._bell.wait()
        if self._error is not None:
            raise self._error
        assert self.stock is not None
        return self.stock

    def tell(self, error: BaseException | None) -> bool:
        """Ends the wait, from any thread; False: nobody is there any more."""
        if error is not None:
            # Raising adds to a traceback, and tasks add notes: not to that of the others.
            self._error = copy.copy(error).with_traceback(error.__traceback__)
        assert self._bell is not None
        return self._bell.ring()


class Making:
    """What one thread makes, for all calls that ask for it meanwhile.

    All but `done` is for who has the lock of `Branches`.

    Args:
        key: The modules.
        number: That its template will have.
    """

    def __init__(self, key: tuple[str, ...], number: int) -> None:
        self.key = key
        self.number = number
        self.calls: list[Call] = []
        self.over = False
        """Nobody waits any more, and nobody may begin to."""
        self.done = threading.Event()
        """Its thread has left nothing behind."""
        self._branch: Branch | None = None

    def join(self, call: Call) -> bool:
        """One more waits for it; False: it is over."""
        call.wait_for(self)
        self.calls.append(call)
        # Looked at now: with the call before it, collected as garbage, it may just have ended.
        if self.over:
            self.calls.remove(call)
            call.making = None
        return not self.over

    def adopt(self, branch: Branch) -> bool:
        """What to end when it is over; False: it is."""
        if not self.over:
            self._branch = branch
        return not self.over

    def disown(self) -> None:
        """The thread is about to close it, or has handed it on."""
        self._branch = None

    def end(self) -> None:
        """Has the thread come to its end."""
        self.over = True
        if self._branch is not None:
            self._branch.hang_up()

    def leave(self, call: Call) -> None:
        """One does not wait any more; with the last of them it ends."""
        if call in self.calls:
            self.calls.remove(call)
            if not self.calls:
                self.end()

    def let_go(self) -> None:
        """In a forked child, which has no such thread: closes the descriptor."""
        if self._branch is not None:
            self._branch.let_go()

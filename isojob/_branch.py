"""Further templates: forks of one that import more, and share what they have not changed."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress

from typing_extensions import override

from isojob import wire
from isojob._lease import Lease
from isojob._maker import Maker
from isojob._python_statistics import own_memory
from isojob._session_zygote import ask, hear
from isojob._stock import Stock
from isojob._template import Imports, Template
from isojob._zygote import Zygote
from isojob.errors import PoolBrokenError, PoolClosedError
from isojob.host import failures
from isojob.wire import MessageType, Tag, Writer

__all__ = ["Branch", "BranchStock", "ParentGoneError"]

MAX_BRANCHES = 15
"""Beside the first template; ``MAX_TEMPLATES`` of native/zygote.h."""
UNKNOWN = 1 << 62
"""Bytes of a template whose size nobody tells: more than any budget."""


class ParentGoneError(PoolBrokenError):
    """The template to be forked is dead: nothing was begun."""


class Branch:
    """A template beside the first, asked for; it ends when it is closed.

    Args:
        zygote: Of all of them.
        number: Its own, 1 to `MAX_BRANCHES`.
        parent: Whose fork it is; None: the first's.
        template: What it has imported when it is ready.
        names: What it has to import for that, beyond its parent.

    Raises:
        PoolBrokenError: The zygote is dead, or does not answer.
        PoolClosedError: The pool was closed.
    """

    def __init__(
        self,
        zygote: Zygote,
        number: int,
        parent: Branch | None,
        template: Template,
        names: tuple[str, ...],
    ) -> None:
        self.zygote = zygote
        self.number = number
        self.parent = parent
        self.pid = 0
        self.own = 0
        """What it has beyond its parent, bytes: all that it ever will have, since a template that
        is ready runs nothing but what its modules do around each fork (`os.register_at_fork`)."""
        message = Writer(MessageType.BRANCH)
        message.number(Tag.TEMPLATE, number)
        message.number(Tag.TEMPLATE_FROM, 0 if parent is None else parent.number)
        for name in names:
            message.text(Tag.TEMPLATE_ARG, name)
        self._imports = Imports(template)
        self._socket = ask(zygote, message.message())

    def await_ready(self) -> None:
        """Waits for its imports (blocking), which `hang_up` in another thread ends.

        Raises:
            PreloadError: An import failed.
            ParentGoneError: The parent is dead.
            PoolBrokenError: The zygote is dead.
            SandboxSetupError: It could not be forked; EBUSY: who had the number is not dead yet.
        """
        imports = self._imports
        while True:
            self._socket.settimeout(imports.left)
            try:
                message = hear(self._socket)
            except TimeoutError:
                raise imports.late() from None
            if message.kind is MessageType.READY:
                self.pid = wire.parse_ready(message)
                self._socket.setblocking(False)
                parent = self.zygote.template_pid if self.parent is None else self.parent.pid
                # Before it has forks, which would share what is its own.
                own = own_memory(self.pid, parent)
                self.own = UNKNOWN if own is None else own
                return
            if message.kind is MessageType.PRELOAD:
                imports.hear(message)
                continue
            failure = wire.parse_failure(message)
            if failure.stage == "parent":
                raise ParentGoneError("the pool's template died")
            raise imports.died() if failure.stage == "template" else failures.to_exception(failure)

    @property
    def line(self) -> Iterator[Branch]:
        """It and those it came of, whose memory it shares: it stays while any of them lives."""
        branch: Branch | None = self
        while branch is not None:
            yield branch
            branch = branch.parent

    @property
    def alive(self) -> bool:
        """Whether cells can be made from it."""
        if not self.zygote.alive or self._socket.fileno() < 0:
            return False
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def hang_up(self) -> None:
        """Ends it; cells that came of it go on."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """As `hang_up`, and closes the descriptor. Idempotent."""
        self.hang_up()  # a forked child of ours may hold it, too
        self._socket.close()

    def let_go(self) -> None:
        """In a forked child: closes the descriptor."""
        self._socket.close()


class BranchStock(Stock):
    """The cells of a branch."""

    def __init__(self, of: Stock, branch: Branch) -> None:
        super().__init__(of.sandbox, of.limits, of.wanted_range, of.uid_range)
        self.pins = 0
        """Calls that hold it."""
        self.branch = branch
        self._number = branch.number
        self._open_beside(of, branch.zygote)

    @override
    def start(self) -> Maker:
        if not self.open:
            raise PoolClosedError
        raise PoolBrokenError("the pool's template died")

    @override
    def failed(self, lease: Lease, stage: str) -> None:
        if stage == "template":
            self.branch.close()
        else:
            super().failed(lease, stage)

    @override
    def distrust(self, lease: Lease) -> None:
        self.branch.close()

    @override
    def close(self) -> None:
        self.zygote = None  # it is the pool's
        super().close()
        self.branch.close()

    @override
    def let_go(self) -> None:
        self.zygote = None
        super().let_go()
        self.branch.let_go()

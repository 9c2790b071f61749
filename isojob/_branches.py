"""Which sets of modules a pool keeps warm: a tree of templates, as far as memory allows."""

from __future__ import annotations

import errno
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

from isojob._admission import PoolStatistics
from isojob._branch import MAX_BRANCHES, Branch, BranchStock, memory_of
from isojob._models import Model
from isojob._pool import Pool
from isojob._shield import in_thread
from isojob._stock import Stock
from isojob._template import Template
from isojob._zygote import STOP_SECONDS, Zygote
from isojob.errors import PoolClosedError, QueueFullError, SandboxSetupError

__all__ = ["Branches", "PythonStatistics", "TemplateStatistics"]

Names = tuple[str, ...]


class TemplateStatistics(Model, frozen=True):
    """One warm interpreter.

    Attributes:
        preload: Modules that it has imported.
        pid: Of its process, on the host.
        rss: Its resident memory, bytes; None: it cannot be read.
        pss: Of that its share: what n processes have in common counts an nth for each.
        jobs: That run on it now.
    """

    preload: tuple[str, ...]
    pid: int
    rss: int | None
    pss: int | None
    jobs: int


class PythonStatistics(PoolStatistics, frozen=True):
    """A snapshot of a Python pool.

    Attributes:
        templates: The first, and its branches, the longest unused first.
    """

    templates: tuple[TemplateStatistics, ...] = ()


class Branches:
    """The templates of a pool beside its first.

    Args:
        pool: Whose.
        template: Its first.
        budget: Bytes that the branches may have of their own together (the sum of their PSS).
    """

    def __init__(self, pool: Pool, template: Template, budget: int) -> None:
        self._pool = pool
        self._template = template
        self._budget = budget
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._stocks: OrderedDict[Names, BranchStock] = OrderedDict()
        self._old: list[BranchStock] = []
        """Of an earlier zygote or a dead template, with jobs that may end."""
        self._last = 0

    @asynccontextmanager
    async def stock(self, preload: Names) -> AsyncIterator[Stock | None]:
        """The cells of the template with these modules; None: those of the first.

        It is made if there is none, and stays while the block lasts.

        Raises:
            PreloadError: An import failed.
            QueueFullError: All templates that there may be are in use.
        """
        key = tuple(dict.fromkeys(n for n in preload if n not in self._template.preload))
        if not key:
            yield None
            return
        held: list[BranchStock] = []  # a cancelled call, too, knows what was made for it
        try:
            if (found := self._pinned(key)) is not None:
                held.append(found)
            else:
                await in_thread(lambda: held.append(self._make(key)))
            yield held[0]
        finally:
            for stock in held:
                await self._unpin(stock)

    async def _unpin(self, stock: BranchStock) -> None:
        with self._lock:
            stock.pins -= 1
            over = stock.pins == 0 and stock in self._old
            if over:
                self._old.remove(stock)
        if over:
            await in_thread(lambda: self._end(stock))
            await self._pool.stock.bury()

    def _pinned(self, key: Names) -> BranchStock | None:
        with self._lock:
            stock = self._stocks.get(key)
            if stock is None or self._is_over(stock):
                return None
            self._stocks.move_to_end(key)
            stock.pins += 1
            return stock

    def _is_over(self, stock: BranchStock) -> bool:
        return stock.zygote is not self._pool.stock.zygote or not stock.branch.alive

    def _make(self, key: Names) -> BranchStock:
        with self._making:
            if (stock := self._pinned(key)) is not None:
                return stock
            zygote = self._pool.stock.start()
            assert isinstance(zygote, Zygote)
            self.forget_old()
            branch = self._grow(zygote, key)
            stock = BranchStock(self._pool.stock, branch)
            stock.pins = 1
            self._pool.stock.guests.append(zygote)  # not to be closed while jobs of ours run
            with self._lock:
                self._stocks[key] = stock
            if not self._pool.stock.open:
                self.close()
                raise PoolClosedError
            self._keep_to_budget()
            return stock

    def _end(self, stock: BranchStock) -> None:
        stock.close()
        with suppress(ValueError):
            self._pool.stock.guests.remove(stock.branch.zygote)

    def _grow(self, zygote: Zygote, key: Names) -> Branch:
        template = replace(self._template, preload=(*self._template.preload, *key))
        deadline = time.monotonic() + STOP_SECONDS
        while True:
            self._last = number = self._free_number()
            parent, known = self._parent(key)
            try:
                return Branch(zygote, number, parent, template, key[known:])
            except SandboxSetupError as error:
                # Who had the number before is still on the way out.
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.005)

    def forget_old(self) -> None:
        """Ends those of an earlier zygote and those that died, or has them end with their jobs."""
        with self._lock:
            gone = [key for key, stock in self._stocks.items() if self._is_over(stock)]
            stocks = [self._stocks.pop(key) for key in gone]
            self._old += [stock for stock in stocks if stock.pins]
        for stock in stocks:
            if not stock.pins:
                self._end(stock)

    def _parent(self, key: Names) -> tuple[int, int]:
        """The template that has imported most of it, and how many of its modules."""
        with self._lock:
            for length in range(len(key) - 1, 0, -1):
                if (stock := self._stocks.get(key[:length])) is not None:
                    return stock.branch.number, length
        return 0, 0

    def _free_number(self) -> int:
        while True:
            with self._lock:
                stocks = (*self._stocks.values(), *self._old)
                taken = {stock.branch.number for stock in stocks}
            for step in range(MAX_BRANCHES):
                number = (self._last + step) % MAX_BRANCHES + 1
                if number not in taken:
                    return number
            if not self._evict():
                raise QueueFullError(f"{MAX_BRANCHES} sets of preloads are in use")

    def _keep_to_budget(self) -> None:
        while True:
            with self._lock:
                used = sum(stock.branch.own for stock in self._stocks.values())
            if used <= self._budget or not self._evict():
                return

    def _evict(self) -> bool:
        """Ends the one that was not used for longest; False: all are in use."""
        with self._lock:
            idle = next((key for key, stock in self._stocks.items() if not stock.pins), None)
            if idle is None:
                return False
            stock = self._stocks.pop(idle)
        self._end(stock)
        return True

    def close(self) -> None:
        """Ends all of them (blocking)."""
        for stock in self._all():
            self._end(stock)

    def let_go(self) -> None:
        """In a forked child: closes the descriptors; cells and templates are the parent's."""
        # Another thread of the parent may have held them.
        self._lock, self._making = threading.Lock(), threading.Lock()
        for stock in self._all():
            stock.let_go()

    def _all(self) -> list[BranchStock]:
        with self._lock:
            stocks = [*self._stocks.values(), *self._old]
            self._stocks.clear()
            self._old.clear()
            return stocks

    def statistics(self) -> PythonStatistics:
        """A snapshot."""
        templates = []
        main = self._pool.stock
        if isinstance(main.zygote, Zygote):
            templates.append((self._template.preload, main.zygote.template_pid, len(main.active)))
        with self._lock:
            stocks = list(self._stocks.items())
        for key, stock in stocks:
            modules = (*self._template.preload, *key)
            templates.append((modules, stock.branch.pid, len(stock.active)))
        found = []
        for modules, pid, jobs in templates:
            rss, pss = memory_of(pid) or (None, None)
            found.append(TemplateStatistics(preload=modules, pid=pid, rss=rss, pss=pss, jobs=jobs))
        plain = self._pool.statistics()
        return PythonStatistics.trusted(
            **{name: getattr(plain, name) for name in PoolStatistics.model_fields},
            templates=tuple(found),
        )

"""Which sets of modules a pool keeps warm: a tree of templates, as far as memory allows."""

from __future__ import annotations

import errno
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import count

from isojob._admission import PoolStatistics
from isojob._branch import MAX_BRANCHES, Branch, BranchStock, ParentGoneError
from isojob._loop import soon
from isojob._making import Call, Making
from isojob._pool import Pool
from isojob._python_statistics import PythonStatistics, TemplateStatistics, memory_of
from isojob._shield import in_thread
from isojob._stock import Stock
from isojob._template import Template
from isojob._zygote import STOP_SECONDS, Zygote
from isojob.errors import PoolClosedError, QueueFullError, SandboxSetupError

__all__ = ["Branches"]

Names = tuple[str, ...]

FORKS = 3
"""Of a template that does not fork, before it is said."""


class Branches:
    """The templates of a pool beside its first.

    Each is made by a thread of its own, for all calls that want it meanwhile: they wait in their
    event loops, and hold up neither one another nor those that want something else. The thread
    ends, and what it made with it, when the last of them is cancelled.

    Args:
        pool: Whose.
        template: Its first.
        budget: Bytes that the branches may have beyond the first together (`Branch.own`).
    """

    def __init__(self, pool: Pool, template: Template, budget: int) -> None:
        self._pool = pool
        self._template = template
        self._budget = budget
        # Reentrant: allocating under it may collect garbage, and that an abandoned call.
        self._lock = threading.RLock()
        self._closed = False
        self._stocks: OrderedDict[Names, BranchStock] = OrderedDict()
        self._makings: list[Making] = []
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
            IsojobError: The pool was closed, or its zygote died.
        """
        key = tuple(dict.fromkeys(n for n in preload if n not in self._template.preload))
        if not key:
            yield None
            return
        call = self._call(key)
        try:
            yield await call.held()
        finally:
            await self._leave(call)

    def _call(self, key: Names) -> Call:
        call = Call()
        with self._lock:
            if self._closed:
                raise PoolClosedError
            stock = self._stocks.get(key)
            if stock is not None and not self._is_over(stock):
                self._stocks.move_to_end(key)
                stock.pins += 1
                call.stock = stock
                return call
            if any(making.key == key and making.join(call) for making in self._makings):
                return call
            # What it is to be forked from is not what makes room for it.
            for length in range(1, len(key)):
                if key[:length] in self._stocks:
                    self._stocks.move_to_end(key[:length])
            number, evicted = self._free_number()
            making = Making(key, number)
            making.join(call)
            self._makings.append(making)
        if evicted is not None:
            self._end(evicted)
        work = partial(self._work, making)
        try:
            threading.Thread(target=work, name="isojob-branch", daemon=True).start()
        except RuntimeError:  # none can be started: as in_thread
            work()
        return call

    async def _leave(self, call: Call) -> None:
        stock = self._dropped(call)
        if stock is not None or self._surplus() is not None:
            await in_thread(partial(self._end_all, [] if stock is None else [stock]))
            await self._pool.stock.bury()

    def _dropped(self, call: Call) -> BranchStock | None:
        """A call is over: what is to be ended with it, said once however often it is over."""
        with self._lock:
            stock, call.stock = call.stock, None
            making, call.making = call.making, None
            if making is not None:
                making.leave(call)
        return stock if stock is not None and self._unpin(stock) else None

    def _unpin(self, stock: BranchStock) -> bool:
        """One holds it no longer; True: it is to be ended."""
        with self._lock:
            stock.pins -= 1
            over = stock.pins == 0 and stock in self._old
            if over:
                self._old.remove(stock)
            return over

    def _is_over(self, stock: BranchStock) -> bool:
        return stock.zygote is not self._pool.stock.zygote or not stock.branch.alive

    def _work(self, making: Making) -> None:
        """The thread's: in the end all calls are told, and all that was made has an owner."""
        calls: list[Call] = []
        stock: BranchStock | None = None
        problem: BaseException | None = None
        try:
            try:
                try:
                    stock = self._make(making)
                except ParentGoneError:  # nothing was begun: once more, with another zygote
                    stock = self._make(making)
            except BaseException as error:  # noqa: BLE001 - raised by those who wait
                problem = error
            with self._lock:
                if self._closed or not self._pool.stock.open:
                    problem = PoolClosedError()
                unwanted = problem is not None or making.over
                making.over = True
                making.disown()
                calls, making.calls = making.calls, []
                if stock is not None and not unwanted:
                    self._stocks[making.key] = stock
                    stock.pins = len(calls)
                    for call in calls:
                        call.stock = stock
            if stock is not None and unwanted:
                self._end(stock)
            self._end_all([])
            self._pool.stock.bury_now()
        finally:
            for call in calls:
                # Its event loop may be gone; should its coroutine be collected, that is not twice.
                if not call.tell(problem) and (left := self._dropped(call)) is not None:
                    self._end(left)
            with self._lock:
                self._makings.remove(making)
            making.done.set()
            problem = None  # whose traceback has this frame

    def _make(self, making: Making) -> BranchStock:
        zygote = self._visit()
        branch = None
        try:
            self.forget_old()
            branch = self._grow(zygote, making)
            return BranchStock(self._pool.stock, branch)
        except BaseException:
            if branch is not None:
                self._close(making, branch)
            self._pool.stock.guests.remove(zygote)
            raise

    def _visit(self) -> Zygote:
        """The zygote, which is not closed from now on though another may take its place."""
        stock = self._pool.stock
        while True:
            with stock.starts.awaited():
                zygote = stock.start()
            assert isinstance(zygote, Zygote)
            stock.guests.append(zygote)
            if zygote is stock.zygote:
                return zygote
            stock.guests.remove(zygote)  # one has, and this one may be closed by now

    def _end(self, stock: BranchStock) -> None:
        stock.close()
        with suppress(ValueError):
            self._pool.stock.guests.remove(stock.branch.zygote)

    def _grow(self, zygote: Zygote, making: Making) -> Branch:
        deadline = time.monotonic() + STOP_SECONDS
        for attempt in count(1):
            parent, known = self._parent(making.key, zygote)
            try:
                return self._fork(zygote, making, None if parent is None else parent.branch, known)
            except SandboxSetupError as error:
                # Who had the number before is still on the way out; or there was no fork, for want
                # of processes, or since the parent was killed just now.
                again = error.errno == errno.EBUSY or (
                    error.errno == errno.ECHILD and attempt < FORKS
                )
                if not again or time.monotonic() > deadline:
                    raise
            except ParentGoneError:
                if parent is None:
                    zygote.broken = True
                if parent is None or time.monotonic() > deadline:
                    raise
            finally:
                if parent is not None and self._unpin(parent):
                    self._end(parent)
            if making.over:
                raise PoolClosedError
            time.sleep(0.005)
        raise AssertionError

    def _fork(self, zygote: Zygote, making: Making, parent: Branch | None, known: int) -> Branch:
        template = replace(self._template, preload=(*self._template.preload, *making.key))
        branch = Branch(zygote, making.number, parent, template, making.key[known:])
        try:
            with self._lock:
                wanted = making.adopt(branch)
            if not wanted:
                raise PoolClosedError
            branch.await_ready()
        except BaseException:
            self._close(making, branch)
            raise
        return branch

    def _close(self, making: Making, branch: Branch) -> None:
        with self._lock:  # who ends it may be about to use the descriptor
            making.disown()
        branch.close()

    def forget_old(self) -> None:
        """Ends those of an earlier zygote and those that died, or has them end with their jobs."""
        with self._lock:
            gone = [key for key, stock in self._stocks.items() if self._is_over(stock)]
            stocks = [self._stocks.pop(key) for key in gone]
            self._old += [stock for stock in stocks if stock.pins]
            idle = [stock for stock in stocks if not stock.pins]
        for stock in idle:
            self._end(stock)

    def _parent(self, key: Names, zygote: Zygote) -> tuple[BranchStock | None, int]:
        """The one that has imported most of it, pinned (None: the first), and how many of it."""
        with self._lock:
            for length in range(len(key) - 1, 0, -1):
                stock = self._stocks.get(key[:length])
                if stock is not None and stock.zygote is zygote and stock.branch.alive:
                    stock.pins += 1
                    return stock, length
        return None, 0

    def _free_number(self) -> tuple[int, BranchStock | None]:
        """With the lock: a number, and what is to be ended for it.

        A dead template's number is not free while it has calls: their cells would be of another.
        """
        now = self._pool.stock.zygote
        stocks = (*self._stocks.values(), *self._old)
        taken = {stock.branch.number for stock in stocks if stock.zygote is now}
        taken.update(making.number for making in self._makings)
        for step in range(MAX_BRANCHES):
            number = (self._last + step) % MAX_BRANCHES + 1
            if number not in taken:
                self._last = number
                return number, None
        key = self._unused()
        if key is None:
            raise QueueFullError(f"{MAX_BRANCHES} sets of preloads are in use")
        evicted = self._stocks.pop(key)
        self._last = evicted.branch.number
        return self._last, evicted

    def _end_all(self, stocks: list[BranchStock]) -> None:
        for stock in stocks:
            self._end(stock)
        while (evicted := self._excess()) is not None:
            self._end(evicted)

    def _excess(self) -> BranchStock | None:
        with self._lock:
            key = self._surplus()
            return None if key is None else self._stocks.pop(key)

    def _surplus(self) -> Names | None:
        """What is to be ended to keep to the budget; the last used stays, whatever its size."""
        with self._lock:
            # One that has ended counts while a fork of it has its memory.
            held = {b for stock in self._stocks.values() for b in stock.branch.line}
            over = sum(branch.own for branch in held) > self._budget
            return self._unused(leaf=True) if over else None

    def _unused(self, *, leaf: bool = False) -> Names | None:
        """With the lock: the longest unused; None: all are in use.

        Args:
            leaf: One without forks: the end of another frees no memory. Not the last used.
        """
        lines = (list(stock.branch.line)[1:] for stock in self._stocks.values() if leaf)
        spared = {branch for line in lines for branch in line}
        if leaf and self._stocks:
            spared.add(next(reversed(self._stocks.values())).branch)
        for key, stock in self._stocks.items():
            if not stock.pins and stock.branch not in spared:
                return key
        return None

    def tidy(self) -> None:
        """Has those without jobs look at how many cells they should keep."""
        with self._lock, suppress(RuntimeError):  # no event loop, or one that is closing
            for stock in self._stocks.values():
                if not stock.pins:
                    soon(stock.clean_up)

    def shut(self) -> None:
        """No verdict of a job on them is true from now on: the zygote may end before they do."""
        with self._lock:
            self._closed = True
            for stock in (*self._stocks.values(), *self._old):
                stock.open = False

    def close(self) -> None:
        """Ends all of them, and waits for the threads that make some (blocking, bounded)."""
        with self._lock:
            self._closed = True
            makings = list(self._makings)
            for making in makings:
                making.end()
        for making in makings:
            making.done.wait(STOP_SECONDS)
        for stock in self._all():
            self._end(stock)

    def let_go(self) -> None:
        """In a forked child: closes the descriptors; cells and templates are the parent's."""
        # Another thread of the parent may have held it.
        self._lock = threading.RLock()
        for making in self._makings:
            making.let_go()
        self._makings = []
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
            jobs = sum(lease.zygote is main.zygote for lease in list(main.active))
            templates.append((self._template.preload, main.zygote.template_pid, jobs))
        with self._lock:
            stocks = list(self._stocks.items())
            others = [*self._stocks.values(), *self._old]
        for key, stock in stocks:
            modules = (*self._template.preload, *key)
            templates.append((modules, stock.branch.pid, len(stock.active)))
        found = []
        for modules, pid, jobs in templates:
            rss, pss, _ = memory_of(pid)
            found.append(TemplateStatistics(preload=modules, pid=pid, rss=rss, pss=pss, jobs=jobs))
        plain = self._pool.statistics()
        given = {name: getattr(plain, name) for name in PoolStatistics.model_fields}
        given["parked"] += sum(stock.parked for stock in others)
        given["parked_target"] += sum(stock.wanted for stock in others)
        return PythonStatistics.trusted(**given, templates=tuple(found))

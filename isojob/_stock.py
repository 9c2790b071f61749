"""A pool's zygote, the cells it has parked, and what is left of the zygotes before it."""

from __future__ import annotations

import copy
import threading
import time
from collections import OrderedDict
from contextlib import suppress

import anyio

from isojob._cell import STUCK_SECONDS
from isojob._lease import Lease
from isojob._loop import later, soon
from isojob._maker import Maker
from isojob._shelf import Level, Shelf, was_unfinished
from isojob._shield import in_thread, on_thread
from isojob._shutdown import each, starting
from isojob._spec import CellSpec
from isojob._starts import Starts
from isojob._template import Template
from isojob._watch import Watch
from isojob._zygote import Zygote
from isojob.errors import IsojobError, PoolBrokenError, PoolClosedError
from isojob.host import kernel
from isojob.host.posture import check_limits, find_driver, posture
from isojob.host.rootfs import block_devices
from isojob.limits import Limits
from isojob.result import Posture
from isojob.sandbox import Sandbox

__all__ = ["Stock"]

FULL_SECONDS = 0.02
PIPED = 64
KINDS = 8
"""Kinds of cells that are kept besides the pool's own: the last ones asked for."""


class Stock:
    """Hands out leases, from any thread or event loop, while it is open.

    Args:
        sandbox: The template of all cells.
        limits: Those that cells are parked with.
        parked: Cells of one kind to keep ready, at least and at most.
        uid_range: Host uids and gids to take a block from, as root.
        template: A warm interpreter that launchers are forked from.
    """

    closed = "the pool is not open"
    """What is to be said of it when it is not."""
    _private = False
    _number = 0  # of the template

    def __init__(
        self,
        sandbox: Sandbox,
        limits: Limits,
        parked: tuple[int, int],
        uid_range: range,
        template: Template | None = None,
    ) -> None:
        self.template = template
        self.sandbox = sandbox
        self.limits = limits
        self.open = False
        self.zygote: Maker | None = None
        self.started = 0
        """Zygotes so far."""
        self.active: set[Lease] = set()
        """Leases with a job."""
        self.retired: list[Maker] = []
        """Dead or broken: their jobs may still run and report."""
        self.guests: list[Maker] = []
        """Zygotes with open sessions: as good as with running jobs."""
        self.wanted_range = parked
        self.uid_range = uid_range
        self.starts = Starts()
        self._failure: IsojobError | None = None
        """Of the last start that failed."""
        self._lock = threading.Lock()
        self._spent: list[Lease] = []
        self._shelf: Shelf | None = None
        """Of cells with the pool's own limits."""
        self._others: OrderedDict[tuple[object, ...], Shelf] = OrderedDict()
        """Of cells with limits that jobs brought, the last used at the end."""
        self._posture: Posture | None = None
        self.devices: tuple[str, ...] = ()
        """Block devices behind what is bound in."""

    @property
    def parked(self) -> int:
        """Cells ready for a job."""
        return sum(len(shelf.cells) for shelf in self._shelves())

    @property
    def wanted(self) -> int:
        """Cells that should be ready."""
        return sum(shelf.level.wanted for shelf in self._shelves())

    def _shelves(self) -> list[Shelf]:
        others = list(self._others.values())
        return others if self._shelf is None else [self._shelf, *others]

    @property
    def posture(self) -> Posture:
        """What holds for the cells of the zygote."""
        assert self._posture is not None
        return self._posture

    async def ready(self) -> Maker:
        """As `start`; the wait can be cancelled at once."""
        with self.starts.awaited():
            try:
                return await on_thread(self.start, abandon_on_cancel=True, many=True)
            except RuntimeError:  # no thread can be started: as in_thread
                return self.start()

    def start(self) -> Maker:
        """The zygote, started if there is none that lives (blocking).

        Raises:
            IsojobError: It cannot be started, or the stock is closed. All who wait for one start
                are told by that.
        """
        before = self._failure
        with starting(), self._lock:
            if not self.open:
                raise PoolClosedError(self.closed)
            if self.zygote is not None and self.zygote.alive:
                return self.zygote
            if (failure := self._failure) is not None and failure is not before:
                raise copy.copy(failure)
            if self.zygote is not None:
                self._discard(self.zygote)
            try:
                return self._install(self._start())
            except PoolClosedError:  # who waits for the next start has nothing to do with this one
                raise
            except IsojobError as error:
                self._failure = copy.copy(error)  # without its traceback, and what that keeps
                raise

    def _start(self) -> Zygote:
        kernel.check()
        accepted = self.sandbox.allow_missing
        driver = find_driver(accepted)
        sandbox = self.sandbox
        if self.template is not None:
            sandbox = self.template.sandbox(sandbox)
            check_limits(driver, self.template.limits, None, accepted, "preload_limits")
        self.devices = block_devices(sandbox)
        check_limits(driver, self.limits, self.devices, accepted)
        return Zygote(sandbox, driver, self.uid_range, self.template, self.starts)

    def _install(self, zygote: Zygote) -> Zygote:
        self._shelf = Shelf(self._spec(zygote, self.limits), Level(*self.wanted_range))
        self._posture = posture(self.sandbox, zygote.driver, zygote.privilege, self.devices)
        self.zygote = zygote
        self.started += 1
        return zygote

    def renew(self) -> None:
        """Another zygote in the place of the one that there is, whose jobs may end (blocking).

        Raises:
            IsojobError: It cannot be started; the old one stays.
        """
        with starting(), self.starts.awaited():
            zygote = self._start()
            with self._lock:
                if self.open:
                    if self.zygote is not None:
                        self._discard(self.zygote)
                    self._install(zygote)
                    return
            zygote.close()

    def _open_beside(self, of: Stock, zygote: Maker) -> None:
        """Opens it where the other one is open, with a zygote that is there and is not replaced."""
        check_limits(zygote.driver, self.limits, of.devices, self.sandbox.allow_missing)
        self.devices = of.devices
        self.template = of.template
        self._posture = of.posture
        self.zygote = zygote
        most = self.wanted_range[1]
        self._shelf = Shelf(self._spec(zygote, self.limits), Level(min(1, most), most))
        self.open = True

    def _spec(self, zygote: Maker, limits: Limits) -> CellSpec:
        return CellSpec(
            zygote.driver,
            limits,
            self.devices,
            own_ids=zygote.own_ids,
            private=self._private,
            template=self._number,
            left=self.template.limits if self.template else None,
        )

    def _discard(self, zygote: Maker) -> None:
        self._empty_shelves()
        self.zygote = None
        self.retired.append(zygote)

    def _empty_shelves(self) -> None:
        for shelf in self._shelves():
            shelf.empty()
        self._shelf = None
        self._others = OrderedDict()

    def take_parked(self, limits: Limits) -> tuple[Lease, Shelf] | None:
        """An active lease of a parked cell, and where it was, if there is one that fits.

        Args:
            limits: Those of the job.

        Raises:
            PoolClosedError: The stock is closed.
        """
        if not self.open:
            raise PoolClosedError(self.closed)
        shelf, zygote = self._shelf, self.zygote
        if zygote is None or shelf is None or zygote.broken:
            return None
        if not shelf.spec.fits(limits):
            key = CellSpec.key_of(limits)
            shelf = self._others.get(key)
            if shelf is None:
                return None
            with suppress(KeyError):
                self._others.move_to_end(key)
        try:
            lease = shelf.cells.popleft()
        except IndexError:
            return None
        self.active.add(lease)
        # Should its zygote be dead by now, the cell says so.
        return lease, shelf

    async def make(self, limits: Limits) -> tuple[Lease, Shelf]:
        """An active lease of a cell that is made now, and where such cells are kept.

        Args:
            limits: Those of the job.

        Raises:
            HostNotSupportedError: These limits cannot be enforced here.
            PoolBrokenError: The zygote does not answer.
            PoolClosedError: The stock is closed.
        """
        if not self.open:
            raise PoolClosedError(self.closed)
        zygote = self.zygote
        if zygote is None or not zygote.alive:
            zygote = await self.ready()
        shelf = self._shelf_for(limits, zygote)
        shelf.level.lacked(time.monotonic_ns())
        with anyio.move_on_after(STUCK_SECONDS):
            while True:
                try:
                    lease = Lease.make(zygote, shelf.spec, piped=True)
                except BlockingIOError:
                    await anyio.sleep(0.001)
                    continue
                self.active.add(lease)
                return lease, shelf
        zygote.kill()
        raise PoolBrokenError("the pool's zygote does not answer")

    def _shelf_for(self, limits: Limits, zygote: Maker) -> Shelf:
        shelf = self._shelf
        if shelf is None:
            raise PoolBrokenError("the pool's zygote died") if self.open else PoolClosedError
        if shelf.spec.fits(limits):
            return shelf
        key = CellSpec.key_of(limits)
        shelf = self._others.pop(key, None)
        if shelf is None:
            check_limits(zygote.driver, limits, self.devices, self.sandbox.allow_missing)
            shelf = Shelf(self._spec(zygote, limits), Level(-1, self.wanted_range[1]))
        # Without the lock, which may be held for long; of two threads' shelves one stays.
        return self._others.setdefault(key, shelf)

    @staticmethod
    def learn(shelf: Shelf, asked_ns: int, sent_ns: int, received_ns: int) -> None:
        """Notes how a job found the cell that was made ahead of time (`was_unfinished`)."""
        if was_unfinished(asked_ns, sent_ns, received_ns):
            shelf.level.lacked(time.monotonic_ns())

    def failed(self, lease: Lease, stage: str) -> None:
        """Draws the conclusions from a cell that could not be made at this stage."""
        if stage in ("zygote", "template") or not lease.zygote.listens:
            lease.zygote.broken = True

    def distrust(self, lease: Lease) -> None:
        """Asks the template no more whose fork, as a cell's init, has spoken nonsense."""
        if self.template is not None:
            lease.zygote.broken = True

    def give_back(self, lease: Lease) -> None:
        """Ends an active lease; what that means happens when its caller has the result."""
        self.active.discard(lease)
        self._spent.append(lease)
        if self.open:
            try:
                soon(self.clean_up)
            except RuntimeError:  # this loop takes nothing any more
                self.clean_up()
        else:  # close() may have looked before
            self._let_go_of_spent()

    async def bury(self) -> None:
        """Closes retired zygotes whose last job has ended: until then their cgroups are ours."""
        if over := self._over():
            await in_thread(lambda: self._close_all(over))  # all of them, whatever cancel comes

    def bury_now(self) -> None:
        """As `bury`, blocking."""
        self._close_all(self._over())

    @staticmethod
    def _close_all(zygotes: list[Maker]) -> None:
        each(zygote.close for zygote in zygotes)

    def _over(self) -> list[Maker]:
        # Who holds the lock is slow: then the next one looks.
        if not self._lock.acquire(blocking=False):
            return []
        try:
            held = {other.zygote for other in list(self.active)} | set(self.guests)
            over = [zygote for zygote in self.retired if zygote not in held]
            self.retired = [zygote for zygote in self.retired if zygote in held]
            return over
        finally:
            self._lock.release()

    def clean_up(self) -> None:
        """Lets go of cells and has others made: not while a job runs that shares the CPU."""
        self._let_go_of_spent()
        # Who holds the lock starts a zygote, for a while, or closes: nothing to do then.
        if not self._lock.acquire(blocking=False):
            return
        try:
            zygote, now_ns = self.zygote, time.monotonic_ns()
            if zygote is None or not self.open:
                return
            while len(self._others) > KINDS:
                self._others.popitem(last=False)[1].empty()
            for shelf in self._shelves():
                shelf.level.forget(now_ns)
                wanted = shelf.level.wanted
                if len(shelf.cells) > wanted:
                    with suppress(IndexError):  # another thread took it
                        shelf.cells.pop().close()
                while (parked := len(shelf.cells)) < wanted:
                    # Two more descriptors each: for those that are next, not for thousands.
                    lease = Lease.make(zygote, shelf.spec, piped=parked < PIPED)
                    Watch.add_here(lease)
                    shelf.cells.append(lease)
        except BlockingIOError:  # so many requests are under way: in a moment there is room
            with suppress(RuntimeError):  # called where no event loop is
                later(FULL_SECONDS, self.clean_up)
        except (OSError, PoolBrokenError):
            pass  # the next job that finds none parked says why
        finally:
            self._lock.release()

    def _let_go_of_spent(self) -> None:
        with suppress(IndexError):
            while True:
                self._spent.pop().close()

    def close(self) -> None:
        """Ends every cell and zygote, and waits for that (blocking, bounded)."""
        self.open = False
        self.starts.close()
        with self._lock:
            zygotes, self.retired = self.retired, []
            if self.zygote is not None:
                zygotes.append(self.zygote)
                self.zygote = None
            self._empty_shelves()
        self._let_go_of_spent()
        # The cells of a zygote that died earlier listen to nobody else.
        for lease in list(self.active):
            lease.stop()
        self._close_all(zygotes)

    def let_go(self) -> None:
        """In a forked child: closes the descriptors; cells and zygotes are the parent's."""
        self._empty_shelves()
        for lease in (*self.active, *self._spent):
            lease.close()
        for zygote in (*self.retired, *([] if self.zygote is None else [self.zygote])):
            zygote.let_go()
        self.starts.let_go()

"""One job on a stock of cells: in a parked one or a new one, and again if that was dead."""

from __future__ import annotations

from isojob import wire
from isojob._account import Outcome
from isojob._cell import CellFailedError, CellGoneError, Run
from isojob._job import Job
from isojob._maker import Maker
from isojob._stock import Stock
from isojob.errors import IsojobError, PoolBrokenError, PoolClosedError
from isojob.host import failures
from isojob.wire import Failure

__all__ = ["ATTEMPTS", "attempt"]

ATTEMPTS = 3
"""To begin something, where a zygote may be about to die."""
_MAKERS = ("zygote", "template")
_CLOSED = "the pool was closed while the job ran"


async def attempt(stock: Stock, job: Job) -> Outcome:
    for number in range(ATTEMPTS):
        taken = stock.take_parked(job.limits) if number == 0 else None
        try:
            lease, shelf = taken or await stock.make(job.limits)
        except PoolBrokenError:
            if number == ATTEMPTS - 1:
                raise
            continue  # with a new zygote
        run = Run(lease, job)
        try:
            outcome = await run.run(shelf.spec)
        except CellFailedError as error:
            if run.was_started:
                raise _why_gone(stock, lease.zygote, error) from None
            # A parked cell may have failed long ago, for a reason that has passed.
            stock.failed(lease, error.failure.stage)
            # And a maker may die under the next, too: then there is another one.
            last = number > 0 and error.failure.stage not in _MAKERS
            if last or number == ATTEMPTS - 1 or not stock.open:
                raise _why_failed(stock, error.failure) from None
        except (CellGoneError, wire.WireError) as error:
            if isinstance(error, wire.WireError):
                stock.distrust(lease)
            raise _why_gone(stock, lease.zygote, error) from None
        else:
            assert outcome.raw is not None
            if taken:
                stock.learn(shelf, lease.asked_ns, outcome.host.sent_ns, outcome.raw.received_ns)
            if not stock.open:
                # Closing ends what runs, by more than one way: no verdict is true any more.
                raise PoolClosedError(_CLOSED)
            return outcome
        finally:
            stock.give_back(lease)
            if stock.retired:
                await stock.bury()
    raise AssertionError


def _why_failed(stock: Stock, failure: Failure) -> IsojobError:
    if not stock.open:
        return PoolClosedError("the pool was closed before the job ran")
    if failure.stage in _MAKERS:
        return PoolBrokenError(f"the pool's {failure.stage} died, and those after it")
    return failures.to_exception(failure)


def _why_gone(stock: Stock, zygote: Maker, error: Exception) -> IsojobError:
    if not stock.open:
        return PoolClosedError(_CLOSED)
    if isinstance(error, wire.WireError):
        return PoolBrokenError(f"the cell's init sent nonsense: {error}")
    return zygote.diagnose()

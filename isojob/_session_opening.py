"""How a session begins and ends: `Pool.session`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from isojob._attempt import ATTEMPTS
from isojob._cache import Cache
from isojob._job import Content, check_files
from isojob._models import parse_bytes
from isojob._session import Session
from isojob._session_zygote import SessionZygote
from isojob._shield import in_thread
from isojob._zygote import Zygote
from isojob.errors import PoolBrokenError, PoolClosedError
from isojob.limits import Limits
from isojob.mounts import MIN_TMPFS

if TYPE_CHECKING:
    from isojob._pool import Pool

__all__ = ["opened_session"]


@asynccontextmanager
async def opened_session(
    pool: Pool,
    sessions: set[Session],
    *,
    files: Mapping[str, Content] | None,
    limits: Limits | None,
    disk: int | str | None,
    inodes: int | None,
    cache: Cache | None,
) -> AsyncIterator[Session]:
    """`Pool.session`."""
    limits = pool.limits if limits is None else limits
    if not isinstance(limits, Limits):
        raise TypeError(f"limits must be isojob.Limits, not {type(limits).__name__}")
    if cache is not None and not isinstance(cache, Cache):
        raise TypeError(f"cache must be isojob.Cache, not {type(cache).__name__}")
    size = limits.disk if disk is None else parse_bytes(disk)
    most = limits.inodes if inodes is None else inodes
    if size is None or most is None:
        raise ValueError("a session's directory has a size: give disk= and inodes=")
    if size < MIN_TMPFS:
        raise ValueError(f"disk must be at least {MIN_TMPFS}: tmpfs takes 0 for unlimited")
    if isinstance(most, bool) or not isinstance(most, int):
        raise TypeError(f"inodes must be an int, not {type(most).__name__}")
    if not 1 <= most < 2**31:
        raise ValueError("inodes must be at least 1, and less than 2**31")
    if files is not None:
        files = check_files(files, limits.model_copy(update={"disk": size}))
    stock = pool.stock  # the pool has another when it is closed and opened again meanwhile
    if not stock.open:
        raise PoolClosedError
    for number in range(1, ATTEMPTS + 1):
        zygote = await stock.ready()
        assert isinstance(zygote, Zygote)
        made: list[SessionZygote] = []
        session: Session | None = None
        begun = False
        stock.guests.append(zygote)
        try:
            # A cancel may come after it was made.
            await in_thread(partial(_make, made, zygote, size, most))
            session = Session(pool, made[0], limits, cache)
            sessions.add(session)
            if files:
                await session.put(files)
            begun = True
            yield session
        except PoolBrokenError:
            if not zygote.listens:
                zygote.broken = True
            if begun or number == ATTEMPTS:
                raise
        else:
            return
        finally:
            stock.guests.remove(zygote)
            if session is not None:
                sessions.discard(session)
                await session.aclose()
            else:
                for one in made:
                    await in_thread(one.close)
            if stock.retired:  # what only this session has kept
                await stock.bury()


def _make(made: list[SessionZygote], parent: Zygote, disk: int, inodes: int) -> None:
    made.append(SessionZygote(parent, disk, inodes))

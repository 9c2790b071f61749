"""Fixtures of all tests: both backends, and a look at what is left behind."""

from __future__ import annotations

import gc
import os

import pytest
from environment import SLOW

BOTH = ("test_run",)
"""Modules whose tests run on both backends on a slow machine, too."""
ONLY = os.environ.get("ISOJOB_TEST_BACKEND", "")
"""The one backend to run on, where another run has the other."""


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Every async test runs on asyncio and on trio."""
    backend: str = request.param
    return backend


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On an emulated CPU most tests run on one backend: as root on asyncio, else on trio."""
    if SLOW == 1 and not ONLY:
        return
    one = ONLY or ("asyncio" if os.geteuid() == 0 else "trio")
    other = "trio" if one == "asyncio" else "asyncio"

    def left_out(item: pytest.Item) -> bool:
        callspec = getattr(item, "callspec", None)
        backend = callspec.params.get("anyio_backend") if callspec is not None else None
        return backend == other and (bool(ONLY) or item.path.stem not in BOTH)

    config.hook.pytest_deselected(items=[item for item in items if left_out(item)])
    items[:] = [item for item in items if not left_out(item)]


def pytest_collection_finish() -> None:
    """What is there before the first test is no garbage: `no_leaks` does not look through it each time.

    That was a third of the time of all tests (100 ms, twice a test).
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Hypothesis may be imported yet, by its plugin, and trio's hook there asks who refers to what."""
    gc.unfreeze()

"""Fixtures of all tests: both backends, and a look at what is left behind."""

from __future__ import annotations

import gc
import os

import pytest

ONLY = os.environ.get("ISOJOB_TEST_BACKEND", "")
"""The one backend to run on, where another run has the other."""


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Every async test runs on asyncio and on trio."""
    backend: str = request.param
    return backend


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is for the other backend."""
    if not ONLY:
        return

    def left_out(item: pytest.Item) -> bool:
        callspec = getattr(item, "callspec", None)
        backend = callspec.params.get("anyio_backend") if callspec is not None else None
        return backend not in (None, ONLY)

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

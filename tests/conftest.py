"""Fixtures of all tests: both backends, and a look at what is left behind."""

from __future__ import annotations

import os

import pytest
from environment import SLOW

BOTH = ("test_run", "test_limits", "test_lifecycle", "test_files")
"""Modules whose tests run on both backends on a slow machine, too."""


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Every async test runs on asyncio and on trio."""
    backend: str = request.param
    return backend


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On an emulated CPU most tests run on one backend: as root on asyncio, else on trio."""
    if SLOW == 1:
        return
    other = "trio" if os.geteuid() == 0 else "asyncio"

    def left_out(item: pytest.Item) -> bool:
        callspec = getattr(item, "callspec", None)
        backend = callspec.params.get("anyio_backend") if callspec is not None else None
        return backend == other and item.path.stem not in BOTH

    config.hook.pytest_deselected(items=[item for item in items if left_out(item)])
    items[:] = [item for item in items if not left_out(item)]

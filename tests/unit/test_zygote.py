"""The zygote's start without a zygote: what helpers of the host may do."""

from __future__ import annotations

import errno
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from isojob import SandboxSetupError
from isojob._zygote import Zygote
from isojob.host import ids


@pytest.mark.parametrize("late", ["newuidmap", "newgidmap"])
def test_a_helper_that_hangs(late: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """newuidmap(1) that does not come back (a name service that hangs) is named in the error."""

    def run(command: list[str], **options: Any) -> Any:
        if command[0] == late:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(ids, "subordinate", lambda: ids.SubordinateIds(100_000, 100_000, 65536))
    monkeypatch.setattr(subprocess, "run", run)
    zygote = Zygote.__new__(Zygote)
    zygote._process = SimpleNamespace(pid=1)  # type: ignore[assignment]
    with pytest.raises(SandboxSetupError) as caught:
        zygote._map_ids()
    assert (caught.value.stage, caught.value.errno) == (late, errno.ETIMEDOUT)


def test_some_of_the_subordinate_ids() -> None:
    """Pairs, wholly in the range, and not always the same."""
    few = ids.SubordinateIds(100000, 100000, 100)
    found = {few.some(8) for _ in range(2000)}
    assert found == set(range(1, 94, 2))
    assert {ids.SubordinateIds(1, 1, count).some(count // 2 * 2) for count in (2, 3, 4, 5)} <= {1}

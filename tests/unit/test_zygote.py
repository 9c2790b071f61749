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


def refused() -> tuple[str, int | None]:
    """Stage and errno of a mapping of ids that fails."""
    zygote = Zygote.__new__(Zygote)
    zygote._process = SimpleNamespace(pid=1)  # type: ignore[assignment]
    zygote._subordinate = ids.SubordinateIds(100_000, 100_000, 65536)
    with pytest.raises(SandboxSetupError) as caught:
        zygote._map_ids()
    return caught.value.stage, caught.value.errno


@pytest.mark.parametrize("bad", ["newuidmap", "newgidmap"])
@pytest.mark.parametrize(
    ("raised", "number"),
    [
        # A name service that hangs; a package that is removed meanwhile; a mount without exec.
        (subprocess.TimeoutExpired("", 10), errno.ETIMEDOUT),
        (FileNotFoundError(errno.ENOENT, "No such file"), errno.ENOENT),
        (PermissionError(errno.EACCES, "Permission denied"), errno.EACCES),
    ],
)
def test_a_helper_that_does_not_help(
    bad: str, raised: Exception, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """newuidmap(1) that does not come back, or cannot be started, is named in the error."""

    def run(command: list[str], **options: Any) -> Any:
        if command[0] == bad:
            raise raised
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    assert refused() == (bad, number)


def test_some_of_the_subordinate_ids() -> None:
    """Pairs, wholly in the range, and not always the same."""
    few = ids.SubordinateIds(100000, 100000, 100)
    found = {few.some(8) for _ in range(2000)}
    assert found == set(range(1, 94, 2))
    assert {ids.SubordinateIds(1, 1, count).some(count // 2 * 2) for count in (2, 3, 4, 5)} <= {1}

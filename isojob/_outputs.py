"""What a step of a session has made and the session keeps.

Names and sizes are of the job's choosing: none of them is an error of the caller's.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from isojob._job import is_too_long
from isojob.errors import SandboxSetupError
from isojob.result import Result

__all__ = ["is_among", "misfits", "refused", "without"]


def is_among(name: str, patterns: Sequence[str]) -> bool:
    """Whether a collected name is one that these patterns ask for, component by component.

    What of a pattern was not looked at is named by the pattern itself.
    """
    parts = name.split("/")
    return any(
        len(parts) == len(wanted) and all(map(_fits, parts, wanted))
        for wanted in (pattern.split("/") for pattern in patterns)
    )


def _fits(part: str, wanted: str) -> bool:
    return part == wanted or fnmatch.fnmatchcase(part, wanted)


def misfits(files: Mapping[str, tuple[bytes, int]], room: int | None) -> dict[str, str]:
    """Those that cannot be put into a directory of this size, by name, with the reason."""
    reasons: dict[str, str] = {}
    for name, (data, _) in files.items():
        if is_too_long(name):
            reasons[name] = "too long"
        elif room is not None and len(data) > room:
            reasons[name] = f"{len(data)} bytes, more than the session's disk has"
        elif room is not None:
            room -= len(data)
    return reasons


def refused(files: Mapping[str, object], error: SandboxSetupError) -> dict[str, str]:
    """The same, where writing them has failed for what they are.

    No room, a directory in the way, or more memory than the session's limits allow.

    Raises:
        SandboxSetupError: It failed for another reason.
    """
    if not error.stage.startswith(("write file", "launcher")):
        raise error
    return dict.fromkeys(files, str(error))


def without(result: Result, reasons: Mapping[str, str]) -> Result:
    """The result, with files that are not kept moved to `Result.uncollected`."""
    if not reasons:
        return result
    files = {name: data for name, data in result.files.items() if name not in reasons}
    return result.model_copy(
        update={"files": files, "uncollected": {**result.uncollected, **reasons}}
    )

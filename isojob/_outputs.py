"""What a step of a session has made and the session keeps.

Names and sizes are of the job's choosing: none of them is an error of the caller's.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping

from isojob import wire
from isojob._job import is_too_long
from isojob.errors import SandboxSetupError
from isojob.result import Result

__all__ = ["below", "misfits", "refused", "without"]

MOST = wire.MAX_LENGTH - (16 << 20)
"""Bytes of files that are put at once, with their names and what else goes along."""
_ABOUT_FILES = {
    *(errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.ENAMETOOLONG),
    *(errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM),
}


def below(cwd: str | None, workdir: str) -> str:
    """What the names that are collected in `cwd` begin with in the session's directory.

    Raises:
        ValueError: It is not in that directory.
    """
    inside = os.path.relpath(cwd or workdir, workdir)
    if inside == ".":
        return ""
    if inside.split("/")[0] == "..":
        raise ValueError(f"outputs= with cwd={cwd!r}: not in the session's directory, {workdir}")
    return f"{inside}/"


def misfits(files: Mapping[str, tuple[bytes, int]], room: int | None) -> dict[str, str]:
    """Those that cannot be put into a directory of this size, by name, with the reason."""
    reasons: dict[str, str] = {}
    room = MOST if room is None else min(room, MOST)
    for name, (data, _) in files.items():
        if is_too_long(name):
            reasons[name] = "too long"
        elif len(data) > room:
            reasons[name] = f"{len(data)} bytes, more than there is room for"
        else:
            room -= len(data)
    return reasons


def refused(files: Mapping[str, object], error: SandboxSetupError) -> dict[str, str]:
    """The same, where writing them has failed for what they are.

    No room, or a directory in the way, or one that is closed.

    Raises:
        SandboxSetupError: It failed for another reason.
    """
    if not error.stage.startswith("write file ") or error.errno not in _ABOUT_FILES:
        raise error
    # Names of the job's that the kernel's answer is about: JSON has no surrogates.
    why = str(error).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return dict.fromkeys(files, why)


def without(result: Result, reasons: Mapping[str, str]) -> Result:
    """The result, with files that are not kept moved to `Result.uncollected`."""
    if not reasons:
        return result
    files = {name: data for name, data in result.files.items() if name not in reasons}
    return result.model_copy(
        update={"files": files, "uncollected": {**result.uncollected, **reasons}}
    )

"""What ``--workdir`` means: a directory that is there, or one of the job's own."""

from __future__ import annotations

import os
from collections.abc import Sequence

from isojob.cli._options import OptionError
from isojob.host.rootfs import TOOLCHAIN
from isojob.mounts import Mount, below

__all__ = ["place"]

_ALWAYS = ("", "dev", "etc", "proc", "tmp")


def place(text: str, root: str | None, mounts: Sequence[Mount]) -> tuple[str | None, str | None]:
    """`Sandbox.workdir` where nothing is there that its tmpfs would hide, or else ``cwd=``.

    Args:
        text: A path inside the sandbox.
        root: The directory that the job's root is made from; None: the host's toolchain.
        mounts: What is mounted besides.

    Raises:
        OptionError: It is not absolute.
    """
    if not text.startswith("/"):
        raise OptionError("--workdir", f"{text!r}: must be an absolute path")
    path = os.path.normpath(f"/{text.lstrip('/')}")
    return (path, None) if _is_free(path, root, mounts) else (None, path)


def _is_free(path: str, root: str | None, mounts: Sequence[Mount]) -> bool:
    if any(path == one.target or below(path, one.target) for one in mounts):
        return False
    # No further than the top: links below it are the image's, and lead elsewhere on the host.
    top = path.split("/")[1]
    if top in _ALWAYS:
        return False
    if root is None:
        shown = {name.partition("/")[0] for name in TOOLCHAIN}
        return not (top in shown and os.path.lexists(f"/{top}"))
    there = f"{root}/{top}"
    try:
        return not (os.path.lexists(there) and (os.path.islink(there) or os.listdir(there)))
    except OSError:
        return False

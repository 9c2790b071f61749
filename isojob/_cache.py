"""Results of compiles and the like, remembered across sessions: bounded, in this process."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

from isojob._job import Job, read_content
from isojob._models import parse_bytes
from isojob.result import Result

__all__ = ["Cache"]


class Cache:
    """Remembers what jobs of sessions that were ``ok`` made, the last used longest.

    A key covers everything that the job was given: command, environment, input, files, limits,
    sandbox, and how the session's directory came about, and its size. A job with streams of the
    caller's is neither looked for nor remembered. It does not cover what is bound in from the
    host: empty the cache when a compiler was replaced. Of no event loop; may be shared by threads.

    Args:
        size: Bytes of files, names and output to keep at most, or a string such as ``"256MiB"``.

    Attributes:
        hits: How often something was found.
        misses: How often not.

    Raises:
        ValueError: The size makes no sense.
    """

    def __init__(self, size: int | str = "256MiB") -> None:
        self._size = parse_bytes(size)
        self._used = 0
        self._found: OrderedDict[bytes, tuple[Result, dict[str, tuple[bytes, int]]]] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        """Results that are remembered."""
        return len(self._found)

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._found.clear()
            self._used = 0

    @staticmethod
    def key(before: bytes, job: Job, outputs: int = 0) -> bytes:
        """A digest of a job, and of what went before it.

        Args:
            before: The history of the directory it works on.
            job: The job.
            outputs: How many of what it collects, the last, are kept in the directory.
        """
        digest = hashlib.sha256()

        def add(part: bytes) -> None:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)

        add(before)
        add(str(len(job.argv)).encode())
        for argument in job.argv:
            add(argument)
        add(job.environment.fields)
        add((job.cwd or "").encode("utf-8", "surrogateescape"))
        add(job.limits.model_dump_json().encode())
        add(f"{job.stdout} {job.stderr} {job.no_exec}".encode())
        add(str(outputs).encode())
        add(repr(job.collect).encode("utf-8", "surrogateescape"))
        add(b"" if job.input is None else b"=" + job.input)
        for name, content in sorted(job.files.items()):
            mode, data = read_content(content)
            add(name.encode("utf-8", "surrogateescape"))
            add(mode.to_bytes(4, "little"))
            add(data)
        return digest.digest()

    def get(self, key: bytes) -> tuple[Result, dict[str, tuple[bytes, int]]] | None:
        """What was put there, or None."""
        with self._lock:
            found = self._found.get(key)
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._found.move_to_end(key)
        result, files = found
        return _own(result), files

    def put(self, key: bytes, result: Result, files: dict[str, tuple[bytes, int]]) -> None:
        """Remembers a result, and forgets others for it if it fits at all."""
        size = _size(result)
        with self._lock:
            if size > self._size or key in self._found:
                return
            self._found[key] = (_own(result), files)
            self._used += size
            while self._used > self._size:
                _, (old, _) = self._found.popitem(last=False)
                self._used -= _size(old)


def _own(result: Result) -> Result:
    """The same, with dictionaries that nobody else changes."""
    changeable = {"files": dict(result.files), "uncollected": dict(result.uncollected)}
    return result.model_copy(update=changeable)


def _size(result: Result) -> int:
    """Of all that a result holds, what is remembered of its files among it."""
    output = len(result.stdout or b"") + len(result.stderr or b"")
    told = (*result.args, *result.files, *result.uncollected, *result.uncollected.values())
    # Four bytes for a character, and of each the object and its places: what Python may take.
    words = 4 * sum(map(len, told)) + 512 * len(told)
    return 4096 + output + words + sum(map(len, result.files.values()))

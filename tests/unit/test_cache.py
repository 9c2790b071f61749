"""What a cache of steps remembers, and for how much."""

from __future__ import annotations

import sys

from environment import result_of

from isojob import Cache, Pool


def key(**given: object) -> bytes:
    """Of a job that was given this."""
    job = Pool().job(["step"], None, **given)
    return Cache.key(b"", job, 0)


def test_no_input_is_not_empty_input() -> None:
    """The one is /dev/null, the other a pipe: a program can tell, and some do."""
    assert len({key(), key(input=b""), key(input=b"="), key(input=b"x")}) == 4


def test_names_count() -> None:
    """A build that leaves many empty files with long names is no small thing to remember."""
    files = {"\udcff" * 200 + str(number): b"" for number in range(1000)}
    held = sum(sys.getsizeof(name) for name in files)
    cache = Cache(held)
    cache.put(b"1", result_of(b"", files=files), dict.fromkeys(files, (b"", 420)))
    assert cache.get(b"1") is None
    cache = Cache(4 * held)
    cache.put(b"1", result_of(b"", files=files), dict.fromkeys(files, (b"", 420)))
    assert cache.get(b"1") is not None

"""What a Python job says of itself is hostile: it is read to the letter, or not at all."""

from __future__ import annotations

import json
from typing import Any

import pytest

from isojob import PythonResult, Result
from isojob._python_result import understand


def read(data: bytes) -> PythonResult:
    return understand(Result.trusted(), data, 1 << 20)


@pytest.mark.parametrize("size", [True, -1, 1.5, "7", None, [7], int("9" * 4000)])
def test_size_is_a_size(size: Any) -> None:
    """How large a value is that did not fit is a number of bytes, or nothing is said about it."""
    problem = read(json.dumps({"value": None, "too_large": size}).encode()).value_problem
    assert problem is None


def test_size_of_what_did_not_fit() -> None:
    """The caller is told how much it was."""
    assert read(b'{"value": null, "too_large": 7}').value_problem == (
        "7 bytes of JSON, more than max_value"
    )

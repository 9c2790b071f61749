"""docs/threat-model.md names tests and attacks: are they there, and does it name every attack?"""

from __future__ import annotations

import re
from pathlib import Path

from isojob.attack import ATTACKS

TESTS = Path(__file__).parent.parent
TEXT = (TESTS.parent / "docs" / "threat-model.md").read_text()
NAMED = {
    name
    for line in TEXT.splitlines()
    if line.startswith("|")
    for names in re.findall(r"\bA (\*[^|;]+)", line)
    for name in re.findall(r"\*(\w*…?\w*)\*", names)
}
"""``image_…`` and ``…_ring`` are all that begin or end so."""


def fits(named: str, name: str) -> bool:
    return re.fullmatch(named.replace("…", r"\w+"), name) is not None


def test_every_test_exists() -> None:
    """A threat whose test was renamed or deleted has none."""
    there = {path.stem for path in TESTS.rglob("test_*.py")}
    for path in TESTS.rglob("test_*.py"):
        there |= set(re.findall(r"^\s*(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE))
    assert set(re.findall(r"\btest_\w+", TEXT)) - there == set()


def test_every_named_attack_exists() -> None:
    """So has one whose attack is gone."""
    assert len(NAMED) > 50
    assert [a for a in NAMED if not any(fits(a, one.name) for one in ATTACKS)] == []


def test_every_attack_is_named() -> None:
    """What the suite tries is answered."""
    assert [one.name for one in ATTACKS if not any(fits(a, one.name) for a in NAMED)] == []

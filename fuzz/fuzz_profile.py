"""Seccomp profiles: any JSON is a profile that compiles or a named error, and nothing is loosened.

The shipped profiles are changed at random places. What still loads must refuse at least the calls by which
a job could reach init, and its filter must pass the kernel's checks.
"""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import campaign

from isojob.errors import HostNotSupportedError, ProfileError
from isojob.seccomp import _profile, evaluator

ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 2**32, 2**64, 1.5, "", "x", [], {}, [None], [[]]),
    *("SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_CMP_MASKED_EQ", "read", "openat"),
)

SHIPPED = [json.loads(_profile.shipped_text(name)) for name in ("default", "compute")]


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every place in a document: its container and key."""
    found = []
    if isinstance(node, dict | list):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            found.append((node, key))
            found += places(node[key])
    return found


def spoil(document: Any, chance: random.Random) -> None:
    """Changes something."""
    for _ in range(chance.randrange(1, 4)):
        container, key = chance.choice(places(document))
        match chance.randrange(4):
            case 0:
                container[key] = copy.deepcopy(chance.choice(ODD))
            case 1 if isinstance(container, list):
                container.insert(
                    chance.randrange(len(container) + 1), copy.deepcopy(container[key])
                )
            case 2 if len(container) > 1:
                del container[key]
            case _ if isinstance(container, dict):
                container[chance.choice(("names", "action", "args", "x", "errnoRet"))] = (
                    chance.choice(ODD)
                )


def make(chance: random.Random) -> bytes:
    """A shipped profile with something wrong, sometimes no JSON."""
    document = copy.deepcopy(chance.choice(SHIPPED))
    spoil(document, chance)
    text = json.dumps(document).encode()
    if chance.random() < 0.05:
        at = chance.randrange(len(text))
        text = text[:at] + chance.randbytes(3) + text[at + 3 :]
    return text


def check(text: bytes) -> bool:
    """Reads and compiles it; whether there is a filter."""
    try:
        filtered = _profile._parse("fuzzed", text).compile()
    except (ProfileError, HostNotSupportedError):
        return False
    evaluator.check(filtered.bpf)
    return True


def main() -> None:
    """Runs for $ISOJOB_FUZZ_SECONDS."""
    tried, compiled = campaign.run("profile", make, check)
    print(f"{tried} documents, {compiled} filters")


if __name__ == "__main__":
    main()

"""Seccomp profiles: any JSON is a profile that compiles or a named error, and nothing is loosened.

The shipped profiles are changed at random places. What still loads must refuse at least the calls by which
a job could reach init, and its filter must pass the kernel's checks. The seed is printed.
"""

from __future__ import annotations

import copy
import json
import os
import random
import time
from typing import Any

from isojob.errors import HostNotSupportedError, ProfileError
from isojob.seccomp import _profile, evaluator

ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 2**32, 2**64, 1.5, "", "x", [], {}, [None], [[]]),
    *("SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_CMP_MASKED_EQ", "read", "openat"),
)


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


def main() -> None:
    """Runs for $ISOJOB_FUZZ_SECONDS."""
    seed = int(os.environ.get("ISOJOB_FUZZ_SEED", random.randrange(2**32)))
    chance = random.Random(seed)
    end = time.monotonic() + float(os.environ.get("ISOJOB_FUZZ_SECONDS", "60"))
    shipped = [json.loads(_profile.shipped_text(name)) for name in ("default", "compute")]
    tried = loaded = compiled = 0
    print(f"seed {seed}")
    while time.monotonic() < end:
        document = copy.deepcopy(chance.choice(shipped))
        spoil(document, chance)
        text = json.dumps(document).encode()
        if chance.random() < 0.05:
            at = chance.randrange(len(text))
            text = text[:at] + chance.randbytes(3) + text[at + 3 :]
        tried += 1
        try:
            profile = _profile._parse("fuzzed", text)
            loaded += 1
            filtered = profile.compile()
        except (ProfileError, HostNotSupportedError):
            continue
        compiled += 1
        evaluator.check(filtered.bpf)
    print(f"{tried} documents, {loaded} profiles, {compiled} filters")


if __name__ == "__main__":
    main()

"""Attacks through what jobs are composed with: sessions, terminals, partners, images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from isojob.attack._attack import (
    DIES,
    SHORT_WALL,
    WALL,
    Attack,
    Door,
    nothing_collected,
)
from isojob.attack._images import IMAGES

__all__ = ["composed_attacks"]


def composed_attacks() -> Iterator[Attack]:
    """All of them."""

    def composed(name: str, title: str, door: Door, *program: str, **rest: Any) -> Attack:
        program = ("composed", *(program or (name,)))
        return Attack(name=name, kind="composed", title=title, door=door, program=program, **rest)

    secret, marker = "{secret}", "{marker}"
    yield composed(
        "traps",
        "leave traps for the next job of a session, and for the host",
        "session",
        "find_traps",
        secret,
        before=("composed", "leave_traps", secret),
        collect=("out.txt", "other.txt", "directory/*", "null", "disk"),
        check=nothing_collected,
    )
    yield composed(
        "layer_marks",
        "mark a session's directory for overlayfs",
        "session",
        "see_marks",
        before=("composed", "mark_layers"),
    )
    yield composed(
        "private_view",
        "change what the next job of a session sees",
        "session",
        "as_it_was",
        marker,
        before=("composed", "change_the_original", marker),
        keep=False,
    )
    for name, when in (("session_after", "before"), ("session_beside", "beside")):
        yield Attack(
            name=name,
            kind="composed",
            title=f"find what another job of the session, {when} it, has in its view",
            door="session",
            program=("spaces", "find_traces", marker),
            keep=False,
            before=("spaces", "leave_traces", marker) if when == "before" else (),
            beside=("spaces", "stay", marker) if when == "beside" else (),
        )
    for name, when in (("root_after", "before"), ("root_beside", "beside")):
        yield composed(
            name,
            f"leave a root that it may write to, and see what a job {when} it did to its own",
            "writable",
            "leave_the_root",
            marker,
            before=("composed", "change_the_root", marker) if when == "before" else (),
            beside=("composed", "stay_in_a_changed_root", marker) if when == "beside" else (),
        )
    yield composed("on_a_terminal", "type into its terminal, find others", "terminal")
    yield composed(
        "hang_up", "close its terminal and stay", "terminal", ends=WALL, limits=SHORT_WALL
    )
    partner = ("composed", "partner")
    doors: tuple[tuple[str, Door], ...] = (("", "pair"), ("_relayed", "relayed"), ("_ring", "ring"))
    for ending, door in doors:
        yield composed(
            f"reach_partner{ending}",
            f"reach its partner past the pipes ({door})",
            door,
            "reach_partner",
            beside=partner,
        )
        yield composed(
            f"hold_pipes{ending}",
            f"leave children that hold its partner's pipes ({door})",
            door,
            "hold_pipes",
            beside=partner,
            answer=DIES,
            soon=True,
        )
        yield composed(
            f"talk_on{ending}",
            f"talk without end to a partner that has gone ({door})",
            door,
            "talk_on",
            beside=("composed", "leaves"),
            soon=True,
        )
    for name, title in IMAGES.items():
        yield Attack(
            name=f"image_{name}", kind="composed", title=title, door="image", program=("", name)
        )

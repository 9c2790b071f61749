"""Our own attacks on our own sandbox, for any user to run: ``isojob attack``.

programs/     what runs inside: hostile programs that say what they reached and what stopped them
_attack       what an attack is
_catalogue    which attacks there are, what each may use, and how each has to end; in
              _composed those through sessions, terminals, pairs and images
_scene        what is put on the host for the programs to reach, and what must not be left
_doors        how their jobs are let in; _images makes hostile images
_suite        runs them and judges
"""

from __future__ import annotations

from isojob.attack._attack import Attack
from isojob.attack._catalogue import ATTACKS
from isojob.attack._suite import Finding, Outcome, attack

__all__ = ["ATTACKS", "Attack", "Finding", "Outcome", "attack"]

"""``python -m isojob.cli``."""

from __future__ import annotations

import sys

from isojob.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m fusenms`, and the console script."""

from __future__ import annotations

import sys


def run() -> int:
    """The command line, from its import on: an interrupt while that lasts is none of a user's traceback."""
    try:
        from fusenms.cli import main

        return main()
    except KeyboardInterrupt:
        print("fusenms: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run())

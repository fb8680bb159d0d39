"""`python -m fusenms`, and the console script."""

from __future__ import annotations

import os
import sys
import traceback

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # PyTorch's threads wait without a busy loop, so that ONNX Runtime's have the cores


def run() -> int:
    """Import and run the command line. An interrupt during the import prints no traceback either."""
    try:
        from fusenms.cli.terminal import fill_descriptors, standard_streams

        fill_descriptors()
        try:
            from fusenms.cli import main

            return main()
        except Exception:  # a bug in fusenms; the traceback may contain names from a file
            from fusenms.safety.text import printable_lines

            with standard_streams():
                print(printable_lines(traceback.format_exc()), file=sys.stderr)
                print("fusenms: this is a bug in fusenms; please report it with the lines above", file=sys.stderr)
            return 1
    except KeyboardInterrupt:
        print("fusenms: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run())

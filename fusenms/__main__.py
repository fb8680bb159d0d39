"""`python -m fusenms`."""

import sys

from fusenms.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m sglfast` = the command `sglfast`."""

import sys

from sglfast.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""``python -m fmcore``."""

import sys

from fmcore.cli import main

if __name__ == "__main__":
    sys.exit(main())

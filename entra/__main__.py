"""`python -m entra` is `entra`."""

import sys

from entra.cli import main

if __name__ == "__main__":
    sys.exit(main())

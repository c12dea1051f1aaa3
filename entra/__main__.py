"""`python -m entra` is `entra`."""

import sys

from entra.start import main

if __name__ == "__main__":
    sys.exit(main())

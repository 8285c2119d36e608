"""python -m pykern: the same as the command pykern."""

import sys

from pykern.cli import main

if __name__ == "__main__":
    sys.exit(main())

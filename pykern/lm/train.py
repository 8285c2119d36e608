"""python -m pykern.lm.train: `pykern train`, as torchrun starts it on every rank."""

import sys

from pykern.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

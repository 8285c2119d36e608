"""python -m pykern.lm.train: `pykern train`, as torchrun starts it on every rank."""

import os
import sys

from pykern.cli import main

if __name__ == "__main__":
    code = main(["train", *sys.argv[1:]])
    if "TORCHELASTIC_RUN_ID" in os.environ:  # gloo's threads may ask for the interpreter while it ends, and abort then
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

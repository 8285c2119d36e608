"""Trains a small GPT for 3.5 minutes on the source of Python's own standard library, beside an n-gram baseline.

    python examples/demo.py                    (make demo)
    python examples/demo.py --steps 5          a short run, to see that everything works
    python examples/demo.py --minutes 10 --n-embd 256

Options are those of `pykern train`; they override the recipe below.
"""

import shlex
import sys
from pathlib import Path

from pykern.cli import main as pykern
from pykern.lm import corpus, ngram
from pykern.lm.plot import plot, read_rows

RECIPE = (
    "--data stdlib --tokenizer bpe --vocab-size 1024 --minutes 3.5 "
    "--n-layer 4 --n-head 4 --n-embd 128 --block-size 128 --batch-size 16 "
    "--positions rope --norm rmsnorm --activation swiglu --qk-norm --residual-init zero "
    "--dtype bfloat16 --lr 4e-3 --schedule linear --final-lr 0 --warmup 50 --weight-decay 0.1 --eval-every 500"
)


def free_folder() -> Path:
    """out/demo, or out/demo-2, out/demo-3, ... when earlier runs have taken it."""
    folders = (Path("out", "demo" if n == 1 else f"demo-{n}") for n in range(1, sys.maxsize))
    return next(folder for folder in folders if not folder.exists())


def main(options: list[str]) -> int:
    text = corpus.load("stdlib")
    print(f"{text.description}, SHA-256 {text.sha256[:16]}…")
    print(f"{text.train_bytes:,} bytes to train on, {text.val_bytes:,} held out", flush=True)
    levels = ngram.baseline(text.train_texts, text.val_texts)
    best = min(levels, key=levels.__getitem__)
    print(
        f"the baseline, interpolated n-grams: {', '.join(f'order {n} {bits:.3f}' for n, bits in levels.items())}",
        flush=True,
    )

    out = free_folder()
    if code := pykern(["train", "--out", str(out), *shlex.split(RECIPE), *options]):
        return code
    bits = float(read_rows(out / "loss.csv")[-1]["val_bits_per_byte"])
    plot(
        out / "loss.csv",
        out / "loss.png",
        title=text.description,
        baselines={f"n-gram of order {best}": levels[best]},
    )
    margin = levels[best] - bits
    print(f"\nheld-out bits per byte: GPT {bits:.3f}, best n-gram (order {best}) {levels[best]:.3f}: ", end="")
    print(f"the GPT is {'ahead' if margin > 0 else 'behind'} by {abs(margin):.3f}")
    print("\na completion of 'def ':\n", flush=True)
    code = pykern(["generate", "--model", str(out), "--prompt", "def ", "--max-new-tokens", "400", "--seed", "0"])
    print(f"\ncheckpoint: {out}    curves: {out / 'loss.png'}")
    print(f"more: pykern generate --model {out} --prompt 'class '")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

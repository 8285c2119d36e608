"""What an installed pykern must do where numpy is all there is: a program, not a test file, for a fresh environment.

    python tests/wheel_smoke.py        (of an environment with pykern and numpy, and without torch)

It imports pykern, prints show_config(), compares gradients of a small Transformer with finite differences and trains a
network on the exclusive or, on every ISA that was built and runs here. tests/test_packaging.py runs it in an
environment that it makes; cibuildwheel runs it on each wheel (pyproject.toml).
"""

import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path


def require(holds: bool, words: str) -> None:
    if not holds:
        raise SystemExit(f"wheel_smoke: {words}")


def the_installed_one() -> None:
    """pykern comes from this environment and not from a checkout, and has numpy to live on."""
    import pykern

    place = Path(pykern.__file__).resolve()
    require(place.is_relative_to(Path(sys.prefix).resolve()), f"pykern is {place}, expected one below {sys.prefix}")
    require(
        importlib.util.find_spec("torch") is None, "torch is installed here, so nothing is shown about going without"
    )
    require("numpy" not in sys.modules, "import pykern has imported numpy, expected nothing before first use")
    version = metadata.version("pykern")
    require(pykern.__version__ == version, f"pykern is {pykern.__version__}, its metadata say {version}")
    needs = [line for line in metadata.requires("pykern") or [] if "extra ==" not in line]
    require([line[:5] for line in needs] == ["numpy"], f"the wheel asks for {needs}, expected numpy alone")


def trains() -> None:
    """Gradients of a Transformer as finite differences have them, and a network that learns."""
    import numpy as np

    import pykern
    from pykern.tape import AdamW, NeuralNetwork, TransformerLM, check_gradients, no_tape, tape_bwd

    pykern.set_num_threads(1)  # the matrices are tiny
    ids = np.array([[0, 1, 2]])
    check_gradients(TransformerLM(3, 3, n_layer=1, n_head=2, n_embd=4, rng=0), ids, np.roll(ids, -1, axis=1))

    x, labels = np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), np.array([0, 1, 1, 0])
    network = NeuralNetwork(2, 8, 2, rng=0)
    optimizer, losses = AdamW(network.parameters(), lr=0.1), []
    for _ in range(200):
        loss = network.apply_fwd(x, labels)
        tape_bwd()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.out_tensor))
    require(
        losses[-1] < 0.05 < losses[0], f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}, expected below 0.05"
    )
    with no_tape():
        answers = network.apply_fwd(x).out_tensor.argmax(1)
    require(answers.tolist() == labels.tolist(), f"the network answers {answers.tolist()}, expected {labels.tolist()}")
    require("torch" not in sys.modules, "torch was imported")


def main() -> None:
    if sys.argv[1:] == ["--one-isa"]:
        from pykern import _C

        trains()
        print(f"trained on isa {_C.isa()}")
        return
    the_installed_one()
    import pykern
    from pykern import _C

    pykern.show_config()
    for isa in [name for name, here in _C.isas() if here]:
        run = subprocess.run(
            [sys.executable, "-I", __file__, "--one-isa"],
            env={**os.environ, "PYKERN_ISA": isa},
            text=True,
            capture_output=True,
            check=False,
        )
        require(run.returncode == 0, f"on isa {isa}: {run.stdout}{run.stderr}")
        require(run.stdout == f"trained on isa {isa}\n", f"PYKERN_ISA={isa} printed {run.stdout!r}")
        print(run.stdout, end="")


if __name__ == "__main__":
    main()

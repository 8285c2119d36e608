"""The command line: pykern train | finetune | classify | generate | prompt | evaluate | tokenize | prepare |
order | digits | export | import | bench | check | info.

Results go to stdout, progress and refusals to stderr. A refusal is one line, exit code 2 for the command line itself
and 1 for what it names; Ctrl-C is 130.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pykern.cli.attention import add_attention
from pykern.cli.classify import add_classify
from pykern.cli.digits import add_digits
from pykern.cli.evaluate import add_evaluate
from pykern.cli.export import add_export, add_import
from pykern.cli.finetune import add_finetune
from pykern.cli.generate import add_generate
from pykern.cli.order import add_order
from pykern.cli.parts import Parser
from pykern.cli.prepare import add_prepare
from pykern.cli.prompt import add_prompt
from pykern.cli.tokenize import add_tokenize
from pykern.cli.train import add_train

OF_LM = ("torch", "tokenizers", "safetensors", "rich", "matplotlib")  # what pykern[lm] installs
USER_ERRORS = (ValueError, IndexError, OSError, ImportError, FloatingPointError, MemoryError)


def check(rest: list[str]) -> int:
    from pykern.testing.ratios import main as ratios

    return ratios(rest) or 0


def bench(rest: list[str]) -> int:
    """`decode` is in the package; everything else is the benchmarks of the checkout."""
    if rest[:1] == ["decode"]:
        from pykern.cli.bench import bench_decode

        return bench_decode(rest[1:])
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "benchmarks" / "__main__.py").is_file():
        raise ValueError("the benchmarks are not installed with the package: run this in a checkout of the repository")
    paths = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "benchmarks", *rest]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, check=False).returncode


def info(arguments: argparse.Namespace) -> int:
    import pykern

    pykern.show_config()
    return 0


PASSED_ON: dict[str, tuple[Callable[[list[str]], int], str]] = {  # these have a command line of their own
    "check": (check, "error of every op beside torch's, for each dtype"),
    "bench": (bench, "time of every op beside torch's and the machine's limit; bench decode: of a model"),
}


def make_parser() -> Parser:
    parser = Parser(
        prog="pykern", description="Fused Transformer kernels and a language model on them.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser, dest="command")
    for add in (
        add_train,
        add_finetune,
        add_classify,
        add_generate,
        add_prompt,
        add_evaluate,
        add_tokenize,
        add_prepare,
        add_order,
        add_digits,
        add_export,
        add_import,
        add_attention,
    ):
        add(commands)
    for name, (_, text) in PASSED_ON.items():
        commands.add_parser(name, help=text, add_help=False)
    commands.add_parser("info", help="what this installation can do").set_defaults(run=info)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else ""
    try:
        if name in PASSED_ON:
            return PASSED_ON[name][0](argv[1:])
        arguments = make_parser().parse_args(argv)
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print(f"pykern {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except USER_ERRORS as error:
        message = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ModuleNotFoundError) and error.name in OF_LM and "pip install" not in message:
            message += ": pip install 'pykern[lm]'"
        print(f"pykern {name}: {message}", file=sys.stderr)
        return 1

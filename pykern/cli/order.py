"""pykern order: what attention without positions cannot tell, worked with four small inputs."""

import argparse
from typing import Any


def add_order(commands: Any) -> None:
    parser = commands.add_parser(
        "order", help="show that attention without positions cannot tell order", allow_abbrev=False
    )
    parser.add_argument("--plot", metavar="FILE", help="also draw it, as a PNG")
    parser.set_defaults(run=order)


def order(arguments: argparse.Namespace) -> int:
    from pykern.lm.order import plot, worked

    if arguments.plot is not None:
        plot(arguments.plot)
    print(worked())
    return 0

"""``taylor-cuda bench``: measure the ops and whole steps against their peers, on this machine."""

from __future__ import annotations

import argparse
from typing import Any

from taylor_cuda.bench.options import add_options


def add_parser(commands: Any) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser("bench", help="measure this package against its peers here", allow_abbrev=False)
    add_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the measurements."""
    from taylor_cuda.bench.command import run as measure

    code: int = measure(options)
    return code

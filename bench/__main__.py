"""``python -m taylor_cuda.bench``: ``taylor-cuda bench`` without the other commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from taylor_cuda.bench.command import run
from taylor_cuda.bench.options import add_options
from taylor_cuda.errors import TaylorError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when everything that ran was right, and with ``--check`` fast enough."""
    parser = argparse.ArgumentParser(prog="python -m taylor_cuda.bench")
    add_options(parser)
    try:
        return run(parser.parse_args(arguments))
    except TaylorError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""``taylor-cuda info``: what is installed and which backend serves which op."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser("info", help="versions, what was built, the backend of every op")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the report."""
    del options
    from taylor_cuda.info import main

    main()
    return 0

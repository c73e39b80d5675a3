"""The options of a run, for ``python -m taylor_cuda.bench`` and for ``taylor-cuda bench``: one list for both."""

from __future__ import annotations

import argparse
from pathlib import Path

SUITES = (
    "scoring",
    "relu",
    "batch_norm_relu",
    "rank",
    "network",
    "step",
    "profile",
    "throughput",
    "conv",
    "curvature",
    "gather",
    "modes",
    "planner",
    "graph",
)

DESCRIPTION = """\
Measure this package against its peers. Every result is checked against float64 before anything is timed.

Prints a table: our median, GB/s, its share of the copy rate measured in the same run, and how many times longer each
peer took. A run that isn't --quick appends its rows to files in DIR: in a source tree bench/results, else the same
folder under the working directory. A peer that isn't installed is named and left out.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add them to a parser."""
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES), help="default: all of them")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, to see that everything works; rows with --results only"
    )
    parser.add_argument(
        "--check", action="store_true", help="only the cases with a promised figure; exit code 1 if one is missed"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="FILE",
        help="draw the rows as a roofline (default: roofline.png beside the rows); with --table those stored",
    )
    parser.add_argument("--table", action="store_true", help="print the newest rows as Markdown and measure nothing")
    parser.add_argument("--list", action="store_true", help="print what would run")
    parser.add_argument("--time-limit", type=float, metavar="S", help="begin no race that would probably end later")
    parser.add_argument("--seconds", type=float, metavar="S", help="spend this long on the rounds of one race")
    parser.add_argument("--results", type=Path, metavar="DIR", help="folder of the rows")

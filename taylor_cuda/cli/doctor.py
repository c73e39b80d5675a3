"""``taylor-cuda doctor``: what can be pruned in a model, what can't and why, how far it could go. Needs no data."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import time
from typing import Any

import torch

from taylor_cuda.cli.options import parse_round_to
from taylor_cuda.errors import InputError
from taylor_cuda.graph import trace
from taylor_cuda.report.doctor import doctor_text
from taylor_cuda.report.examine import examine
from taylor_cuda.train.models import SPEC_FORMS, default_input_shape, load_model

DESCRIPTION = f"""\
Trace a model and say what could be removed from it: seconds, no data, no training.

MODEL is {SPEC_FORMS}.
MACs and parameters of a group are what would go if the whole group went; groups that share a layer both count it.
The lowest budget is the least that --budget of taylor-cuda prune can meet with the same floors.

--json prints model (as given), input (the shape of one example), seconds (of the trace), and the facts that
taylor_cuda.report.examine.examine describes: cost, groups, frozen, best_case, traps, notes.
"""


def add_parser(commands: Any) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser(
        "doctor",
        help="what can be pruned in a model, what can't and why",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument(
        "--input", metavar="C,H,W", help="shape of one example (default: the model's own, else 3,224,224)"
    )
    parser.add_argument("--num-classes", type=int, metavar="N", help="outputs of the head (default: the model's own)")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="GLOB", help="modules whose outputs stay; may be repeated"
    )
    parser.add_argument(
        "--min-keep", type=int, default=1, metavar="N", help="channels that every group keeps (default: 1)"
    )
    parser.add_argument(
        "--max-ratio", type=float, default=1.0, metavar="X", help="largest share of a group that may go (default: 1)"
    )
    parser.add_argument(
        "--round-to", default="auto", metavar="N", help="widths that shrink are multiples of N (default: auto)"
    )
    parser.add_argument("--full", action="store_true", help="wrap long lines instead of cutting them off")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def input_shape(text: str) -> tuple[int, ...]:
    """``"3,224,224"`` as numbers.

    Raises:
        InputError: it isn't a list of positive whole numbers.
    """
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise InputError(f"input: wanted whole numbers above 0 like 3,224,224, got {text!r}")
    return shape


def run(options: argparse.Namespace) -> int:
    """Trace the model and print what was found."""
    try:
        # what a model's own code prints must not end up in the middle of a table or of JSON
        with contextlib.redirect_stdout(sys.stderr):
            found = _found(options)
    except InputError as error:
        raise type(error)(" ".join(str(error).split())) from error
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print(doctor_text(found, shutil.get_terminal_size((100, 24)).columns, options.full))
    return 0


def _found(options: argparse.Namespace) -> dict[str, Any]:
    model = load_model(options.model, options.num_classes)
    shape = input_shape(options.input) if options.input else default_input_shape(options.model, model)
    start = time.perf_counter()
    groups = trace(model, torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)), ignore=options.ignore)
    seconds = time.perf_counter() - start
    facts = examine(model, groups, options.min_keep, options.max_ratio, parse_round_to(options.round_to))
    return {"model": options.model, "input": list(shape), "seconds": seconds, **facts}

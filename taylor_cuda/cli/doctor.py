"""``taylor-cuda doctor``: what can be pruned in a model, what can't and why, how far it could go. Needs no data."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from typing import Any

import torch

from taylor_cuda.errors import InputError
from taylor_cuda.graph import trace
from taylor_cuda.graph.groups import Groups
from taylor_cuda.planning.cost import Cost, model_cost
from taylor_cuda.text import table
from taylor_cuda.train.models import SPEC_FORMS, default_input_shape, load_model

DESCRIPTION = f"""\
Trace a model and say what could be removed from it: seconds, no data, no training.

MODEL is {SPEC_FORMS}.
A share is that of all layers that write or read the group: what would go if the whole group went. Shares overlap.
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
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


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


def examine(model: torch.nn.Module, groups: Groups, min_keep: int) -> dict[str, Any]:
    """Groups with their shares of the cost, frozen channels with the reason, and the best case: plain values."""
    if min_keep < 1:
        raise InputError(f"min_keep: wanted a number of at least 1, got {min_keep}")
    whole = model_cost(model, groups)
    floor = {group.name: min(min_keep, group.size) for group in groups}
    rows = []
    for group in groups:
        without = model_cost(model, groups, {group.name: 0})
        layers = sorted(
            {member.tensor.rpartition(".")[0] for member in group.members if member.role in ("write", "read")}
        )
        rows.append(
            {
                "name": group.name,
                "size": group.size,
                "layers": layers,
                "macs_share": _share(whole.macs - without.macs, whole.macs),
                "params_share": _share(whole.params - without.params, whole.params),
            }
        )
    return {
        "cost": asdict(whole),
        "groups": rows,
        "frozen": [asdict(frozen) for frozen in groups.frozen],
        "notes": list(groups.notes),
        "min_keep": min_keep,
        "best_case": asdict(model_cost(model, groups, floor)),
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def report(found: dict[str, Any]) -> str:
    """The tables."""
    cost, best = Cost(**found["cost"]), Cost(**found["best_case"])
    rows = [
        (
            group["name"],
            group["size"],
            len(group["layers"]),
            f"{group['macs_share']:.1%}",
            f"{group['params_share']:.1%}",
        )
        for group in found["groups"]
    ]
    shape = "×".join(str(length) for length in found["input"])
    parts = [
        f"{found['model']}, input {shape}: {cost.macs:,} MACs, {cost.params:,} parameters, "
        f"{cost.channels:,} channels in {len(rows)} groups can go",
        table(("group", "channels", "layers", "MACs", "parameters"), rows),
    ]
    if found["frozen"]:
        stays = [(frozen["name"], frozen["size"]) for frozen in found["frozen"]]
        lines = table(("stays", "channels"), stays).splitlines()
        reasons = ["why", "---", *(frozen["reason"] for frozen in found["frozen"])]
        parts.append("\n".join(f"{line}  {reason}" for line, reason in zip(lines, reasons, strict=True)))
    parts.extend(f"note: {note}" for note in found["notes"])
    parts.append(
        f"best case, every group at {found['min_keep']}: {best.macs:,} MACs ({_share(best.macs, cost.macs):.1%}), "
        f"{best.params:,} parameters ({_share(best.params, cost.params):.1%})"
    )
    parts.append(f"traced in {found['seconds']:.1f} s")
    return "\n\n".join(parts)


def run(options: argparse.Namespace) -> int:
    """Trace the model and print what was found."""
    model = load_model(options.model, options.num_classes)
    shape = input_shape(options.input) if options.input else default_input_shape(options.model, model)
    start = time.perf_counter()
    groups = trace(model, torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)), ignore=options.ignore)
    seconds = time.perf_counter() - start
    found = {
        "model": options.model,
        "input": list(shape),
        "seconds": seconds,
        **examine(model, groups, options.min_keep),
    }
    print(json.dumps(found, indent=2) if options.json else report(found))
    return 0

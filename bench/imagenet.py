"""``python -m taylor_cuda.bench.imagenet``: run the recipes on ImageNet, beside what is published.

Where ImageNet is at hand, one command fills the table, recipe after recipe::

    torchrun --nproc-per-node 8 -m taylor_cuda.bench.imagenet --data /imagenet

Each recipe appends one row to ``imagenet.jsonl`` and is skipped once it has one; ``imagenet.md`` is written anew from
the rows after each. A run that was interrupted goes on from its newest checkpoint when the same command is given again.
Trained weights are downloaded, or taken from ``TORCH_HOME``.

Without ImageNet it is a dry run: ``--data synthetic --steps-limit 2 --weights none``. Its rows are marked as one, and
the table takes nothing from them. So it is with other sizes of images and minibatches than the recipe's.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from taylor_cuda.bench.coverage.table import append
from taylor_cuda.bench.environment import environment
from taylor_cuda.bench.report import table_line
from taylor_cuda.bench.rows import RESULTS, Row, commit_of, read_rows
from taylor_cuda.errors import InputError, TaylorError
from taylor_cuda.report import write_summary
from taylor_cuda.train import RunConfig, Summary
from taylor_cuda.train import run as run_pruning
from taylor_cuda.train.launch import launched, rank_of_environment
from taylor_cuda.train.recipes import Figures, Recipe, load, names
from taylor_cuda.train.stopping import RunInterruptedError

SUITE = "imagenet"

MACHINE = ("data", "batch", "workers", "device", "compile")
"""Options that say how a recipe is run here, and leave it that recipe."""

TRIAL = ("weights", "steps_limit", "image_size", "global_batch")
"""Options that make a dry run of it, unless they say what the recipe says."""

HEADER = (
    *("recipe", "GFLOPs", "measured", "parameters", "measured", "top-1 error before, %", "measured"),
    *("top-1 error after, %", "measured", "hours", "where"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 where a recipe failed, 2 for options that can't be used, 130 after Ctrl-C."""
    parser = _parser()
    try:
        return run(parser.parse_args(arguments))
    except RunInterruptedError as interrupted:
        print(f"{parser.prog}: {interrupted}; the same command goes on", file=sys.stderr)
        return 130
    except InputError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2


def run(asked: argparse.Namespace) -> int:
    """Run what the options say."""
    if asked.table:
        write(asked.results)
        return 0
    given = {key: value for key, value in vars(asked).items() if key in (*MACHINE, *TRIAL)}
    points = [point_of(load(name), given, asked.work) for name in asked.recipes or names()]
    # one group of processes for all runs, and rows read once: every rank has to skip the same recipes
    with launched(given.get("device", "auto")) as launch:
        stored = read_rows(asked.results)
        return 1 if sum(not _run(point, stored, asked.results, launch.first) for point in points) else 0


def _run(point: Point, stored: Sequence[Row], results: Path, first: bool) -> bool:
    """Run one recipe unless it has a row; whether it went well."""
    name, dry = point.row["case"], ", a dry run" if point.row["dry_run"] else ""
    has_row = finished(stored, point.row)
    if first:
        print(f"{name}: {'it has a row' if has_row else load(name).title}{dry}", flush=True)
    if has_row:
        return True
    try:
        run_pruning(
            point.config,
            "auto",
            tell=lambda line: print(f"  {line}", flush=True),
            finish=lambda summary: record(point, summary, results),
            progress=True,
        )
    except RunInterruptedError:
        raise
    except TaylorError as error:
        print(f"{name} FAILED: {error}", file=sys.stderr)
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Point:
    """A recipe as it is run here, and what its row says before it has run."""

    config: RunConfig
    row: Row


def point_of(recipe: Recipe, given: dict[str, Any], work: Path) -> Point:
    """The run of a recipe under what the command line gives.

    Raises:
        InputError: the two don't go together.
    """
    changes = {**given, "out": work / recipe.name}
    config = RunConfig(**{**recipe.under(changes), **changes})
    dry = config.data == "synthetic" or any(given[key] != recipe.settings.get(key) for key in TRIAL if key in given)
    # of what is measured only the data's place and the machine's part may differ from one run to another
    settings = {key: value for key, value in config.identity().items() if key not in MACHINE}
    row = {
        "suite": SUITE,
        "op": "prune",
        "provider": "ours",
        "case": recipe.name,
        "dtype": {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}[config.amp],
        "layout": "channels_last" if config.channels_last else "nchw",
        "dry_run": dry,
        "settings": settings | {"global_batch": config.global_batch},
        "published": None if recipe.published is None else dataclasses.asdict(recipe.published),
        "ranks": rank_of_environment()[1],
    }
    return Point(config, row)


def measured(summary: Summary) -> Row:
    """What a run found out, in the units of the published table."""
    return {
        "gflops_before": summary.macs_before / 1e9,
        "gflops": summary.macs_after / 1e9,
        "params_before": summary.params_before,
        "params": summary.params_after,
        "top1_error_before": 100 * (1 - summary.base_accuracy),
        "top1_error_cut": 100 * (1 - summary.cut_accuracy),
        "top1_error": 100 * (1 - summary.pruned_accuracy),
        "hours": summary.seconds / 3600,
    }


def record(point: Point, summary: Summary, results: Path) -> None:
    """Append the row of a run, write its summary, and the table anew unless it is a dry run."""
    row = point.row | measured(summary) | environment(summary.environment["device"])
    append([row], results)
    write_summary(summary, point.config.out / "summary.json")
    print(f"{row['case']}: {_told(row)}", flush=True)
    if not row["dry_run"]:
        write(results)


def finished(rows: Iterable[Row], point: Row) -> bool:
    """Whether one of the rows is of this recipe with these settings."""
    return any(all(row.get(key) == point[key] for key in ("suite", "case", "dry_run", "settings")) for row in rows)


def write(results: Path) -> None:
    """Write the table of the newest rows."""
    path = results / f"{SUITE}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown(read_rows(results)), encoding="utf-8")
    print(f"written: {path}")


def markdown(rows: Iterable[Row]) -> str:
    """The table: a line for each recipe of the package, with the newest of its rows that is no dry run.

    Args:
        rows: of any suite; only those of this one are used.
    """
    real = [row for row in rows if row["suite"] == SUITE and not row["dry_run"]]
    newest = {row["case"]: row for row in sorted(real, key=lambda row: str(row["time"]))}
    lines = ["# Recipes on ImageNet", "", table_line(HEADER), table_line(["---"] * len(HEADER))]
    lines += [table_line(_cells(load(name), newest.get(name))) for name in names()]
    lines += [
        "",
        "Beside each published figure stands what was measured here. A recipe's file says where its settings are from, "
        "and where its run differs from the original one. GFLOPs are 1e9 multiply-adds of one image. Errors are those "
        "of the validation set, one view of each image. Hours are those of the whole run.",
        "",
        "Written by `python -m taylor_cuda.bench.imagenet`, whose docstring says how to fill it.",
    ]
    return "\n".join(lines) + "\n"


def _cells(recipe: Recipe, row: Row | None) -> list[str]:
    published = recipe.published
    beside = [_figures(None, None) if published is None else _figures(published, published.unpruned)]
    if row is None:
        last = ["", recipe.status]
        beside.append(_figures(None, None))
    else:
        where = f"{row['ranks']} × {row['device_name']}, {row['time'][:10]}, torch {row['torch']}, {commit_of(row)}"
        last = [f"{row['hours']:.1f}", where]
        before = Figures(row["gflops_before"], row["params_before"], row["top1_error_before"])
        beside.append(_figures(Figures(row["gflops"], row["params"], row["top1_error"]), before))
    return [recipe.name, *(cell for pair in zip(*beside, strict=True) for cell in pair), *last]


def _figures(after: Figures | None, before: Figures | None) -> list[str]:
    """GFLOPs, parameters, error before, error after."""
    if after is None or before is None:
        return [""] * 4
    return [
        f"{after.gflops:.2f} of {before.gflops:.2f}",
        f"{after.params / 1e7:.2f}e7 of {before.params / 1e7:.2f}e7",
        f"{before.top1_error:.2f}",
        f"{after.top1_error:.2f}",
    ]


def _told(row: Row) -> str:
    return (
        f"{row['gflops']:.2f} of {row['gflops_before']:.2f} GFLOPs, {row['params'] / 1e7:.2f}e7 parameters, "
        f"top-1 error {row['top1_error_before']:.2f} → {row['top1_error']:.2f} %, {row['hours']:.2f} h"
        + (" (a dry run: not in the table)" if row["dry_run"] else "")
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m taylor_cuda.bench.imagenet",
        description="Run the recipes on ImageNet, and put what came out beside what is published",
    )
    add = parser.add_argument
    add("--data", default=argparse.SUPPRESS, metavar="DATA", help="folder of ImageNet, train/CLASS/* and val/CLASS/*")
    add("--recipes", nargs="+", choices=names(), metavar="NAME", help=f"some of {', '.join(names())} (default: all)")
    add("--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the rows and the table")
    add("--work", type=Path, default=Path("runs/imagenet"), metavar="DIR", help="of the runs: checkpoints, networks")
    add("--table", action="store_true", help="only write the table of the rows there are")
    here = parser.add_argument_group("this machine", argument_default=argparse.SUPPRESS)
    here.add_argument("--batch", type=int, metavar="N", help="examples in one forward pass of one rank")
    here.add_argument("--workers", type=int, metavar="N", help="processes of each rank that read images (default: 2)")
    here.add_argument("--device", metavar="NAME", help="default: a GPU if there is one")
    here.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: as the recipe says)"
    )
    trial = parser.add_argument_group("dry run", argument_default=argparse.SUPPRESS)
    trial.add_argument("--weights", type=_no_weights, metavar="none", help="random weights")
    trial.add_argument("--steps-limit", type=int, metavar="N", help="at most N minibatches an epoch; two epochs")
    trial.add_argument("--image-size", type=int, metavar="N", help="height and width of images")
    trial.add_argument("--global-batch", type=int, metavar="N", help="examples in a minibatch")
    return parser


def _no_weights(text: str) -> None:
    if text != "none":
        raise argparse.ArgumentTypeError(f"wanted none, got {text!r}")


if __name__ == "__main__":
    sys.exit(main())

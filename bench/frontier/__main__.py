"""``python -m taylor_cuda.bench.frontier``: run the points that are missing, append rows, write table and figure."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from taylor_cuda.bench.coverage.table import append
from taylor_cuda.bench.environment import device_name, environment
from taylor_cuda.bench.frontier.figure import write_figure
from taylor_cuda.bench.frontier.forms import FORMS, Form, find_form
from taylor_cuda.bench.frontier.methods import Method, methods
from taylor_cuda.bench.frontier.point import Task, base_network, run_point
from taylor_cuda.bench.frontier.table import SUITE, finished, markdown, newest
from taylor_cuda.bench.rows import RESULTS, Row, read_rows, results_file
from taylor_cuda.bench.suites.peers import installed
from taylor_cuda.errors import InputError, TaylorError
from taylor_cuda.train.environment import find_device


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when every point that was begun has a row, 2 for options that can't be used."""
    parser = _parser()
    try:
        return run(parser.parse_args(arguments))
    except InputError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2


def run(asked: argparse.Namespace) -> int:
    """Run what the options say."""
    form = _chosen(asked)
    device = find_device(asked.device)
    name = device_name(device.type)
    if asked.table:
        write(form, name, asked.results)
        return 0
    chosen, peer = _methods(asked.methods), installed("torch_pruning")
    task, failed, left_out = Task(form, device, asked.work), 0, 0
    record = {
        "suite": SUITE,
        "op": "prune",
        "case": form.name,
        "dtype": "float32",
        "layout": "nchw",
        "settings": task.settings,
        "torch_pruning": None if peer is None else metadata.version("torch-pruning"),
        **environment(device.type),
    }
    stored = read_rows(asked.results)
    deadline = time.monotonic() + asked.time_limit if asked.time_limit else float("inf")
    longest = 0.0
    for seed in form.seeds:
        if time.monotonic() > deadline:
            left_out += len(form.budgets) * len(chosen)
            continue
        base, digest = base_network(task, seed, asked.work)
        quality = task.quality(base)
        for budget in form.budgets:
            for provider, method in chosen.items():
                point = record | {"base": digest, "seed": seed, "budget": budget, "provider": provider}
                if finished(stored, point):
                    continue
                started = time.monotonic()
                if started + 1.2 * longest > deadline:
                    left_out += 1
                    continue
                try:
                    row = point | run_point(task, base, quality, seed, method, budget)
                except TaylorError as error:
                    print(f"{_name(point)} FAILED: {error}", file=sys.stderr)
                    failed += 1
                    continue
                longest = max(longest, time.monotonic() - started)
                append([row], asked.results)
                _report(row)
    if left_out:
        print(f"{left_out} points left out, the time limit is near: the same command goes on with them")
    try:
        write(form, name, asked.results)
    except InputError as error:
        print(error, file=sys.stderr)  # what was measured counts more than its picture
    return 1 if failed else 0


def write(form: Form, name: str, results: Path) -> None:
    """The table of every form that this device has rows of, then their figures."""
    stored, order = read_rows(results), list(methods())
    cases = dict.fromkeys((*FORMS, form.name))
    found = {case: rows for case in cases if (rows := newest(stored, case, name))}
    if not found:
        raise InputError(f"results: wanted rows of {name} under {results}, got none")
    folder = results_file(next(iter(found.values()))[0], results).parent
    title = "# Accuracy against MACs\n\nWritten by `python -m taylor_cuda.bench.frontier`, whose docstring says how.\n"
    path = folder / f"{SUITE}.md"
    path.write_text("\n".join([title, *(markdown(rows, order) for rows in found.values())]), encoding="utf-8")
    print(f"written: {path}")
    for case, rows in found.items():
        path = folder / f"{SUITE}-{case}.png"
        write_figure(rows, path)
        print(f"written: {path}")


def _chosen(asked: argparse.Namespace) -> Form:
    form = find_form(asked.form)
    if asked.time_limit is not None and not asked.time_limit > 0:
        raise InputError(f"time_limit: wanted a number above 0, got {asked.time_limit}")
    form = dataclasses.replace(
        form, seeds=tuple(asked.seeds or form.seeds), budgets=tuple(asked.budgets or form.budgets)
    )
    for budget in form.budgets:
        if not 0 < budget < 1:
            raise InputError(f"budgets: wanted shares of the MACs between 0 and 1, got {budget}")
    return form


def _methods(names: Sequence[str] | None) -> dict[str, Method]:
    known = methods()
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise InputError(f"methods: wanted some of {', '.join(known)}, got {', '.join(unknown)}")
    chosen = {name: method for name, method in known.items() if names is None or name in names}
    if installed("torch_pruning") is None:
        peers = [name for name in chosen if name.startswith("torch-pruning")]
        for name in peers:
            print(f"{name} left out: torch-pruning isn't installed")
            del chosen[name]
    return chosen


def _name(point: Row) -> str:
    return f"seed {point['seed']}  {point['budget']:4.0%}  {point['provider']:24}"


def _report(row: Row) -> None:
    print(
        f"{_name(row)} {row['accuracy_base']:.1%} → {row['accuracy_cut']:.1%} → {row['accuracy']:.1%} at "
        f"{row['macs']:.2%} of the MACs; removals {row['seconds_removing']:.1f} s of {row['seconds']:.1f} s",
        flush=True,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m taylor_cuda.bench.frontier", description="Accuracy against MACs, ours beside Torch-Pruning"
    )
    options: dict[str, dict[str, Any]] = {
        "--form": {"default": "small", "help": f"of {', '.join(FORMS)} (default: small; full wants a GPU)"},
        "--device": {"default": "auto", "help": "default: the GPU where there is one"},
        "--seeds": {"nargs": "+", "type": int, "metavar": "N", "help": "others than the form's"},
        "--budgets": {"nargs": "+", "type": float, "metavar": "SHARE", "help": "others than the form's"},
        "--methods": {"nargs": "+", "metavar": "NAME", "help": f"some of {', '.join(methods())}"},
        "--time-limit": {"type": float, "metavar": "S", "help": "begin no point that would probably end later"},
        "--results": {"type": Path, "default": RESULTS, "metavar": "DIR", "help": "folder of the rows"},
        "--work": {
            "type": Path,
            "default": Path("runs/frontier"),
            "metavar": "DIR",
            "help": "of glyphs and base networks",
        },
    }
    for name, how in options.items():
        parser.add_argument(name, **how)
    parser.add_argument("--table", action="store_true", help="only write table and figure of the rows there are")
    return parser


if __name__ == "__main__":
    sys.exit(main())

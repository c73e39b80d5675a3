"""``python -m taylor_cuda.bench``: measure, append the rows, print what came out."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from taylor_cuda.bench.check import judge, needed
from taylor_cuda.bench.environment import environment
from taylor_cuda.bench.measure import Ceilings, measure_ceilings, run_race
from taylor_cuda.bench.race import Entry, Options, WrongResultError
from taylor_cuda.bench.report import markdown
from taylor_cuda.bench.rows import RESULTS, Row, append_rows, read_rows
from taylor_cuda.bench.suites import SUITES, entries
from taylor_cuda.bench.suites.networks import MissingPeerError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when everything that ran was right, and with ``--check`` fast enough."""
    started = time.monotonic()
    asked = _parser().parse_args(arguments)
    if asked.table:
        print(markdown(read_rows(asked.results or RESULTS)))
        return 0
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: this machine has no GPU that PyTorch can use", file=sys.stderr)
        return 2
    seconds = asked.seconds or (0.05 if asked.quick else 0.4 if asked.device == "cuda" else 2.0)
    options = Options(asked.device, asked.quick, seconds)
    chosen = [entry for entry in entries(options) if entry.key.suite in asked.suite]
    if asked.check:
        chosen = needed(chosen)
    if asked.list:
        print("\n".join(f"{entry.key}  ({', '.join(entry.providers)})" for entry in chosen))
        return 0
    deadline = started + asked.time_limit if asked.time_limit else float("inf")
    # A quick run is for seeing that everything works: its figures go nowhere unless a folder was named.
    results = asked.results or (None if asked.quick else RESULTS)
    rows, wrong = _run(chosen, options, results, deadline)
    kept = True
    if asked.check:
        print()
        for good, sentence in judge(rows):
            kept &= good
            print(f"{'kept  ' if good else 'MISSED'}  {sentence}")
    return 0 if kept and not wrong else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m taylor_cuda.bench", description="Measure taylor_cuda against its peers."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES), help="default: all of them")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny shapes, to see that everything works; writes no rows without --results",
    )
    parser.add_argument("--time-limit", type=float, metavar="S", help="begin no race that would probably end later")
    parser.add_argument("--seconds", type=float, metavar="S", help="spend this long on the rounds of one race")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="append rows under this folder (default: bench/results)"
    )
    parser.add_argument(
        "--check", action="store_true", help="only the cases with a promised figure; exit code 1 if one is missed"
    )
    parser.add_argument("--table", action="store_true", help="print the newest rows as Markdown and measure nothing")
    parser.add_argument("--list", action="store_true", help="print what would run")
    return parser


def _run(chosen: list[Entry], options: Options, results: Path | None, deadline: float) -> tuple[list[Row], bool]:
    record = environment(options.device)
    ceilings = measure_ceilings(options)
    threads = f", {record['threads']} threads" if options.device == "cpu" else ""
    print(
        f"{record['device_name']}{threads}, torch {record['torch']}: "
        f"copy {ceilings.gb_per_s:.0f} GB/s, product {ceilings.tflops:.3g} TFLOP/s"
    )
    rows: list[Row] = []
    wrong = False
    for entry in chosen:
        if time.monotonic() + entry.seconds > deadline:
            print(f"{entry.key}: left out, the time limit is near")
            continue
        begin = time.monotonic()
        try:
            measured = _race(entry, options, ceilings, record)
        except WrongResultError as error:
            print(f"{entry.key}: WRONG, not timed: {error}", file=sys.stderr)
            wrong = True
            continue
        except MissingPeerError as error:
            print(f"{entry.key}: left out, {error}")
            continue
        if results is not None:
            append_rows(measured, results)
        rows += measured
        print(f"    ({time.monotonic() - begin:.1f} s)")
    return rows, wrong


def _race(entry: Entry, options: Options, ceilings: Ceilings, record: dict[str, Any]) -> list[Row]:
    print(entry.key, flush=True)
    race = entry.build(entry.key)
    rows, left_out = run_race(race, options, ceilings, record)
    for row in rows:
        rate = f"{row['gb_per_s']:8.1f} GB/s" if row["gb_per_s"] else " " * 13
        ratios = "  ".join(f"{ratio:.2f}x {peer}" for peer, ratio in row["ratios"].items())
        print(f"    {row['provider']:18}{row['timer']:6}{row['median_us']:14.1f} us {rate}  {ratios}")
    for reason in left_out:
        print(f"    without {reason}")
    del race
    gc.collect()
    if options.cuda:
        torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    sys.exit(main())

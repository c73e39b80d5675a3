"""Measure, append the rows, print what came out."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch

from taylor_cuda.bench.check import judge, needed
from taylor_cuda.bench.dispatch import recommendation
from taylor_cuda.bench.environment import environment
from taylor_cuda.bench.measure import Ceilings, Raced, measure_ceilings, run_race
from taylor_cuda.bench.plot import write_roofline
from taylor_cuda.bench.promises import promises
from taylor_cuda.bench.race import Entry, Options, WrongResultError
from taylor_cuda.bench.report import markdown, text
from taylor_cuda.bench.rows import RESULTS, Row, append_rows, newest_rows, read_rows, results_file
from taylor_cuda.bench.suites import entries
from taylor_cuda.bench.suites.networks import MissingPeerError
from taylor_cuda.errors import InputError

SECONDS = {"cpu": 2.0, "cuda": 0.25}
"""For the rounds of one race."""


def run(asked: argparse.Namespace) -> int:
    """Run what the options say.

    Returns:
        0 when everything that ran was right, and with ``--check`` fast enough; else 1.

    Raises:
        InputError: no GPU for ``--device cuda``, numbers that aren't positive, nothing to draw, or no matplotlib.
    """
    started = time.monotonic()
    for name, value in (("time_limit", asked.time_limit), ("seconds", asked.seconds)):
        if value is not None and not value > 0:
            raise InputError(f"{name}: wanted a number above 0, got {value}")
    if asked.results is not None and asked.results.exists() and not asked.results.is_dir():
        raise InputError(f"results: wanted a folder, got {asked.results}, which is a file")
    if asked.table:
        stored = read_rows(asked.results or RESULTS)
        print(markdown(stored))
        _draw(asked, [row for row in newest_rows(stored) if row["device"] == asked.device])
        return 0
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: 'cuda' was asked for, but this machine has no GPU that PyTorch can use")
    seconds = asked.seconds or (0.05 if asked.quick else SECONDS[asked.device])
    options = Options(asked.device, asked.quick, seconds)
    chosen = [entry for entry in entries(options) if entry.key.suite in asked.suite]
    if asked.check:
        chosen = needed(chosen, promises(asked.device))
    if asked.list:
        print("\n".join(f"{entry.key}  ({', '.join(entry.providers)})" for entry in chosen))
        return 0
    deadline = started + asked.time_limit if asked.time_limit else float("inf")
    # A quick run is for seeing that everything works: its figures go nowhere unless a folder was named.
    results = asked.results or (None if asked.quick else RESULTS)
    # As training loops have it: every convolution, whoever calls it, is the fastest of those that cuDNN has.
    torch.backends.cudnn.benchmark = options.cuda
    rows, wrong = measure(chosen, options, results, deadline)
    print("\n" + text(rows))
    try:
        _draw(asked, rows)
    except InputError as error:
        print(error, file=sys.stderr)  # what was measured counts more than its picture
    kept = report(rows, options, asked.check)
    return 0 if kept and not wrong else 1


def report(rows: list[Row], options: Options, check: bool) -> bool:
    """Print the promises about what was measured, and on a GPU which backend won; whether every promise was kept.

    Without ``check`` promises about cases that were not run are no news, and none is held against the run.
    """
    kept = True
    if check or (options.cuda and not options.quick):
        print()
        for good, sentence in judge(rows, promises(options.device), only_measured=not check):
            kept &= good
            print(f"{'kept  ' if good else 'MISSED'}  {sentence}")
    if options.cuda:
        print("\n" + recommendation(rows))
    return kept or not check


def measure(chosen: list[Entry], options: Options, results: Path | None, deadline: float) -> tuple[list[Row], bool]:
    """Run the races in turn and append their rows.

    Args:
        chosen: in this order.
        options: of the run.
        results: folder of the rows; ``None`` writes none.
        deadline: on the clock of ``time.monotonic``; no race is begun that would probably end later.

    Returns:
        The rows, and whether anything of ours was wrong or raised.
    """
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
        except Exception as error:
            # One race that fails must not cost the rows of all that come after it.
            print(f"{entry.key}: FAILED, {type(error).__name__}: {error}", file=sys.stderr)
            wrong = True
            continue
        wrong |= bool(measured.broken)
        if results is not None:
            append_rows(measured.rows, results)
        rows += measured.rows
        print(f"    ({time.monotonic() - begin:.1f} s)")
    return rows, wrong


def _race(entry: Entry, options: Options, ceilings: Ceilings, record: dict[str, Any]) -> Raced:
    print(entry.key, flush=True)
    race = entry.build(entry.key)
    raced = run_race(race, options, ceilings, record)
    for row in raced.rows:
        rate = f"{row['gb_per_s']:8.1f} GB/s" if row["gb_per_s"] else " " * 13
        ratios = "  ".join(f"{ratio:.2f}x {peer}" for peer, ratio in row["ratios"].items())
        print(f"    {row['provider']:24}{row['timer']:6}{row['median_us']:14.1f} us {rate}  {ratios}")
    for reason in raced.left_out:
        print(f"    without {reason}")
    for reason in raced.broken:
        print(f"    BROKEN {reason}", file=sys.stderr)
    del race
    if not options.quick:
        gc.collect()
    if options.cuda:
        torch.cuda.empty_cache()
    return raced


def _draw(asked: argparse.Namespace, rows: list[Row]) -> None:
    if asked.plot is None:
        return
    if not rows:
        raise InputError(f"plot: there are no rows of a {asked.device} run to draw")
    beside = results_file(rows[0], asked.results or RESULTS).with_name("roofline.png")
    path = beside if asked.plot == Path() else asked.plot
    write_roofline(rows, path)
    print(f"written: {path}")

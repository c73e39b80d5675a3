"""One JSON object a line, appended and never edited: what a row holds, how it is written and read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from types import NoneType
from typing import Any

from taylor_cuda.bench.environment import IN_SOURCE_TREE, ROOT

RESULTS = (ROOT if IN_SOURCE_TREE else Path()) / "bench" / "results"
"""Where rows go unless another folder is named: into the source tree; once installed, under the working directory."""

Row = dict[str, Any]

# Every row has these. "ratio" is the median of "peer" divided by ours, in the same run, and stands on our rows only.
KEYS: dict[str, tuple[type, ...]] = {
    "suite": (str,),
    "op": (str,),
    "provider": (str,),
    "case": (str,),
    "dtype": (str,),
    "layout": (str,),
    "device": (str,),
    "device_name": (str,),
    "median_us": (float,),
    "p20_us": (float,),
    "p80_us": (float,),
    "bytes": (int,),
    "flops": (int,),
    "gb_per_s": (float, NoneType),
    "ceiling_gb_per_s": (float,),
    "ceiling_tflops": (float,),
    "ratio": (float, NoneType),
    "peer": (str, NoneType),
    "run_id": (str,),
    "commit": (str, NoneType),
    "dirty": (bool, NoneType),
    "torch": (str,),
    "triton": (str, NoneType),
    "cuda": (str, NoneType),
    "driver": (str, NoneType),
    "time": (str,),
}

# Rows have these too: the same ratio for every peer of the race, with its 95 % interval, how it was timed, how far the
# checked result was from the reference (as a share of what was allowed), the memory a call took for itself and gave
# back, the memory that the provider keeps (its network and optimizer, what it collects), both beyond what others hold,
# what the microseconds of a call are spent on, the images of a call over its median, and the multiply-accumulates of
# the provider's network as a share of those of the whole one.
MORE_KEYS: dict[str, tuple[type, ...]] = {
    "ratios": (dict,),
    "intervals": (dict,),
    "timer": (str,),
    "rounds": (int,),
    "error": (float,),
    "peak_bytes": (int, NoneType),
    "held_bytes": (int, NoneType),
    "split": (dict, NoneType),
    "images_per_s": (float, NoneType),
    "macs_ratio": (float, NoneType),
    "note": (str,),
    "quick": (bool,),
    "python": (str,),
    "cpu_name": (str,),
    "threads": (int,),
}

IDENTITY = ("suite", "op", "case", "dtype", "layout", "device", "device_name", "timer")


def check_row(row: Row) -> None:
    """Raise ``ValueError`` unless ``row`` has every key of ``KEYS``, no unknown one, and the right types."""
    missing = [key for key in KEYS if key not in row]
    unknown = [key for key in row if key not in KEYS and key not in MORE_KEYS]
    # Not isinstance: a bool is an int, and a wrong one would pass for a count.
    wrong = [
        f"{key}={row[key]!r} ({type(row[key]).__name__})"
        for key, types in (KEYS | MORE_KEYS).items()
        if key in row and type(row[key]) not in types
    ]
    if missing or unknown or wrong:
        raise ValueError(f"row: missing {missing}, unknown {unknown}, wrong type {wrong}")


def results_file(row: Row, results: Path = RESULTS) -> Path:
    """``results/cpu/SUITE.jsonl`` or ``results/GPU-NAME/SUITE.jsonl``."""
    folder = "cpu" if row["device"] == "cpu" else re.sub(r"[^a-z0-9]+", "-", row["device_name"].lower()).strip("-")
    return results / folder / f"{row['suite']}.jsonl"


def append_rows(rows: Iterable[Row], results: Path = RESULTS) -> None:
    """Add rows at the end of their files; what is there stays as it is."""
    for row in rows:
        check_row(row)
        path = results_file(row, results)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A run that was killed may have left a line without its end.
        torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(results: Path = RESULTS) -> list[Row]:
    """Every whole row under ``results``, file by file, oldest first within a file."""
    rows = []
    for path in sorted(results.rglob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def newest_rows(rows: Iterable[Row]) -> list[Row]:
    """For each race on each device, the rows of the latest run that has it."""
    latest: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row.get(name) for name in IDENTITY)
        held = latest.setdefault(key, [])
        if held and held[0]["run_id"] != row["run_id"]:
            if row["time"] < held[0]["time"]:
                continue
            held.clear()
        held.append(row)
    return [row for held in latest.values() for row in held]


def commit_of(row: Row) -> str:
    """``commit 0123456ab (changed)``."""
    return f"commit {(row['commit'] or 'unknown')[:9]}{' (changed)' if row['dirty'] else ''}"

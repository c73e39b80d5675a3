"""Rows of the coverage table: appended as JSON, written as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from taylor_cuda.bench.coverage.outcome import BUDGET, TRACE_SECONDS, WITHIN
from taylor_cuda.bench.report import table_line
from taylor_cuda.bench.rows import Row, commit_of, newest_rows, results_file

HEADER = ("network", "input", "trace", "parameters", f"MACs (asked {BUDGET:g})", "cut vs masked", "verdict")
PEER_HEADER = ("Torch-Pruning", "groups in", "parameters", "cut vs masked")


def append(rows: Iterable[Row], results: Path) -> None:
    """Add rows at the end of ``results/cpu/coverage.jsonl``."""
    for row in rows:
        path = results_file(row, results)
        path.parent.mkdir(parents=True, exist_ok=True)
        # a run that was killed may have left a line without its end
        torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(row, ensure_ascii=False) + "\n")


def markdown(rows: Sequence[Row], order: Sequence[str]) -> str:
    """The table of the newest rows.

    Args:
        rows: of any suite; only those of this one are used.
        order: the networks, in the order of the table.
    """
    found = [row for row in rows if row["suite"] == "coverage"]
    ours, theirs = ({row["case"]: row for row in newest_rows(part)} for part in _by_provider(found))
    lines = ["# What can be pruned, and is it right?", "", table_line([*HEADER, *PEER_HEADER])]
    lines.append(table_line(["---"] * (len(HEADER) + len(PEER_HEADER))))
    shown = [name for name in order if name in ours]
    lines += [table_line([*_our_cells(ours[name]), *_peer_cells(theirs.get(name))]) for name in shown]
    lines += [
        "",
        "Written by `python -m taylor_cuda.bench.coverage`, whose docstring says what each column is. " + _promise(),
    ]
    lines += [_runs([*ours.values(), *theirs.values()]), "", "## What stays, besides the outputs", ""]
    for name in shown:
        for reason, size in ours[name]["frozen"]:
            lines.append(f"- {name}: {size:,} channels, {reason}")
    for title, rows_by_name in (("Notes on our rows", ours), ("What Torch-Pruning ran into", theirs)):
        notes = [f"- {name}: {rows_by_name[name]['note']}" for name in shown if rows_by_name.get(name, {}).get("note")]
        if notes:
            lines += ["", f"## {title}", "", *notes]
    return "\n".join(lines) + "\n"


def _by_provider(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    return [row for row in rows if row["provider"] == "ours"], [row for row in rows if row["provider"] != "ours"]


def _our_cells(row: Row) -> list[str]:
    return [
        row["case"],
        row["shape"],
        _seconds(row),
        _percent(row["share"]),
        "" if row["macs"] is None else f"{row['macs']:.3f}",
        _error(row["difference"]),
        row["verdict"],
    ]


def _peer_cells(row: Row | None) -> list[str]:
    if row is None:
        return [""] * len(PEER_HEADER)
    return [row["verdict"], _seconds(row), _percent(row["share"]), _error(row["difference"])]


def _seconds(row: Row) -> str:
    wall, cpu = row["seconds"], row.get("cpu_seconds")
    if wall is None:
        return ""
    # a process that waits for nothing but a processor: what is missing, others had
    return f"{wall:.2f} s" if cpu is None or cpu > 0.8 * wall else f"{wall:.2f} s ({cpu:.2f} s of processor)"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def _promise() -> str:
    return f"Promised: every trace within {TRACE_SECONDS:g} s, every budget within {WITHIN:.0%}, no wrong row of ours."


def _runs(rows: Sequence[Row]) -> str:
    runs = {
        f"run {row['run_id']} of {row['time'][:10]} on {row['device_name']}, {row['threads']} threads, "
        f"torch {row['torch']}, {commit_of(row)}"
        for row in rows
    }
    return "; ".join(sorted(runs)) + "."

"""The newest rows as Markdown, one table a suite and a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from taylor_cuda.bench.rows import IDENTITY, Row, commit_of, newest_rows
from taylor_cuda.text import table


def markdown(rows: Sequence[Row]) -> str:
    """Tables of the newest timings: our median, its share of the run's copy rate, and each peer's ratio to it."""
    newest = [row for row in newest_rows(rows) if "median_us" in row and not row.get("quick")]
    tables: dict[tuple[str, str], list[Row]] = {}
    for row in newest:
        tables.setdefault((row["device_name"], row["suite"]), []).append(row)
    return "\n\n".join(_table(device, suite, found) for (device, suite), found in sorted(tables.items()))


def _table(device: str, suite: str, rows: list[Row]) -> str:
    mine = [row for row in rows if row["provider"].startswith("ours")]
    mine.sort(key=_identity)
    peers = list(dict.fromkeys(peer for row in mine for peer in row.get("ratios", {})))
    bandwidth = any(row["gb_per_s"] for row in mine)
    header = ["op", "case", "dtype", "layout", "provider", "timer", "median"]
    header += ["GB/s", "of copy"] if bandwidth else []
    images = any(row.get("images_per_s") for row in mine)
    header += IMAGES if images else []
    header += [f"vs {peer}" for peer in peers]
    lines = [f"### {suite} on {device}", "", table_line(header), table_line(["---"] * len(header))]
    # Images per second of the peer are what a reader looks for too.
    for row in sorted(rows, key=_identity) if images else mine:
        cells = [
            row["op"],
            row["case"],
            row["dtype"],
            row["layout"],
            row["provider"],
            row.get("timer", ""),
            _duration(row["median_us"]),
        ]
        if bandwidth:
            rate = row["gb_per_s"]
            cells += [f"{rate:.0f}", f"{rate / row['ceiling_gb_per_s']:.0%}"] if rate else ["", ""]
        cells += _images(row) if images else []
        cells += [_ratio(row, peer) for peer in peers]
        lines.append(table_line(cells))
    lines += ["", f"Ratios are the peer's median ÷ ours in the same run. {_runs(rows)}"]
    return "\n".join(lines)


IMAGES = ["images/s", "of the MACs", "peak GB"]
"""Columns of whole networks."""


def _images(row: Row) -> list[str]:
    rate, share = row.get("images_per_s"), row.get("macs_ratio")
    peak, held = row.get("peak_bytes"), row.get("held_bytes")
    return [
        f"{rate:,.0f}" if rate else "",
        f"{share:.3f}" if share is not None else "",
        f"{(peak + held) * 1e-9:.2f}" if rate and peak is not None and held is not None else "",
    ]


def _identity(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in IDENTITY)


def text(rows: Sequence[Row]) -> str:
    """The rows of one run for a terminal: a table for each suite and device, the same columns."""
    tables: dict[str, list[Row]] = {}
    for row in rows:
        tables.setdefault(row["suite"], []).append(row)
    return "\n\n".join(_text_table(suite, found) for suite, found in tables.items())


def _text_table(suite: str, rows: list[Row]) -> str:
    mine = [row for row in rows if row["provider"].startswith("ours")]
    peers = list(dict.fromkeys(peer for row in mine for peer in row["ratios"]))
    classes = list(dict.fromkeys(name for row in rows for name in row.get("split") or ()))
    header = [suite, "provider", "timer", "median", "GB/s", "of copy", *IMAGES]
    header += [*(f"vs {peer}" for peer in peers), *classes]
    cells = []
    # A split and images per second say something about the plain step too.
    everybody = classes or not mine or any(row.get("images_per_s") for row in rows)
    for row in rows if everybody else mine:
        rate, split = row["gb_per_s"], row.get("split") or {}
        case = " ".join((row["op"], row["case"], row["dtype"], row["layout"]))
        cells.append(
            [
                case,
                row["provider"].removeprefix("ours:"),
                row["timer"],
                _duration(row["median_us"]),
                f"{rate:.0f}" if rate else "",
                f"{rate / row['ceiling_gb_per_s']:.0%}" if rate else "",
                *_images(row),
                *(_ratio(row, peer) for peer in peers),
                *(_duration(split[name]) if name in split else "" for name in classes),
            ]
        )
    empty = [column for column in range(len(header)) if not any(row[column] for row in cells)]
    kept = [column for column in range(len(header)) if column not in empty]
    return table([header[column] for column in kept], [[row[column] for column in kept] for row in cells])


def table_line(cells: Sequence[Any]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def _ratio(row: Row, peer: str) -> str:
    ratio = row.get("ratios", {}).get(peer)
    if ratio is None:
        return ""
    if row["suite"] in ("step", "profile", "throughput"):
        return f"{ratio:.3f}×"
    return f"{ratio:.1f}×" if ratio >= 10 else f"{ratio:.2f}×"


def _duration(microseconds: float) -> str:
    if microseconds < 1e3:
        return f"{microseconds:.1f} µs"
    return f"{microseconds * 1e-3:.2f} ms" if microseconds < 1e6 else f"{microseconds * 1e-6:.2f} s"


def _runs(rows: Sequence[Row]) -> str:
    runs = {
        f"run {row['run_id']} of {row['time'][:10]}, "
        f"{commit_of(row)}, "
        f"torch {row['torch']}, {row.get('threads', '?')} threads, copy {row['ceiling_gb_per_s']:.0f} GB/s"
        for row in rows
    }
    return "; ".join(sorted(runs)) + "."

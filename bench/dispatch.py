"""Which of two kernels an op should run on a GPU, from the rows of a run in which they raced."""

from __future__ import annotations

from collections.abc import Sequence

from taylor_cuda.bench.race import PACKED
from taylor_cuda.bench.rows import Row
from taylor_cuda.ops import backends

BACKENDS = {"ours:cuda": "native", "ours:triton": "triton"}
KINDS = ("1x1", "3x3", "7x7", "depthwise")
"""What tells convolutions apart, by a word in the name of a case."""

TIMER = "graph"
"""What keeps the device busy; how long the host takes to launch is not the kernel's."""

Pair = tuple[Row, Row]
"""The rows of ``ours:cuda`` and of ``ours:triton`` in one race, or of their packed forms."""


def races(rows: Sequence[Row]) -> dict[tuple[str, str], list[Pair]]:
    """``{(op, class): pairs}`` of the races in which both took part; a reduction or a skip is the op's own.

    A class is a layout, and for convolutions also their kind and whether tensors are packed.
    """
    by_race: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        provider, packed, _ = row["provider"].partition(PACKED)
        if row["device"] == "cuda" and row.get("timer") == TIMER and provider in BACKENDS:
            race = (*(row[name] for name in ("suite", "op", "case", "dtype", "layout")), packed)
            by_race.setdefault(race, {})[provider] = row
    found: dict[tuple[str, str], list[Pair]] = {}
    for pair in by_race.values():
        if len(pair) == len(BACKENDS):
            first, second = (pair[name] for name in BACKENDS)
            op = first["op"].partition(":")[0]
            if op in backends.OPS:
                found.setdefault((op, class_of(first)), []).append((first, second))
    return found


def class_of(row: Row) -> str:
    """``"channels_last"``; of a convolution ``"channels_last 3x3 packed"``."""
    kinds = [word for word in row["case"].split() if word in KINDS] if "conv" in row["op"] else []
    return " ".join([row["layout"], *kinds, *(["packed"] if row["provider"].endswith(PACKED) else [])])


def decided(pairs: Sequence[Pair]) -> tuple[str, str]:
    """The faster backend over all races together, by the sum of medians, and a sentence with the row that decided."""
    sums = [sum(pair[which]["median_us"] for pair in pairs) for which in (0, 1)]
    winner = 0 if sums[0] <= sums[1] else 1
    # The race in which it gained the most microseconds.
    best = max(pairs, key=lambda pair: pair[1 - winner]["median_us"] - pair[winner]["median_us"])
    row, other = best[winner], best[1 - winner]
    name, loser = (BACKENDS[one["provider"].removesuffix(PACKED)] for one in (row, other))
    sentence = (
        f"{name} takes {sums[winner] / sums[1 - winner]:.3f} of the time of {loser} over {len(pairs)} "
        f"race{'s' if len(pairs) > 1 else ''}; most in {row['op']} {row['case']} {row['dtype']}: "
        f"{row['median_us']:.1f} us against {other['median_us']:.1f} us (run {row['run_id']})"
    )
    return name, sentence


def recommendation(rows: Sequence[Row]) -> str:
    """The lines for ``PREFERENCE_OF_OP`` in ``taylor_cuda/ops/backends.py``, with the rows that decided as comments."""
    found = races(rows)
    if not found:
        return "# PREFERENCE_OF_OP: no race in which both kernels of an op took part"
    lines = ["# PREFERENCE_OF_OP, by these rows:"]
    for op in dict.fromkeys(op for op, _ in found):
        classes = {kind: pairs for (name, kind), pairs in found.items() if name == op}
        winners = set()
        for kind, pairs in sorted(classes.items()):
            winner, sentence = decided(pairs)
            winners.add(winner)
            lines.append(f"# {kind}: {sentence}")
        winner, _ = decided([pair for pairs in classes.values() for pair in pairs])
        order = (winner, *(name for name in BACKENDS.values() if name != winner), "reference")
        note = "  # the classes disagree" if len(winners) > 1 else ""
        lines.append(f'("{op}", "cuda"): {order!r},{note}'.replace("'", '"'))
    return "\n".join(lines)

"""The points' rows: which are finished, and the table of the newest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from taylor_cuda.bench.report import table_line
from taylor_cuda.bench.rows import Row, commit_of

SUITE = "frontier"
IDENTITY = ("case", "device", "device_name", "settings", "base", "seed", "provider", "budget")
"""What says which point a row is of."""

BASE = "base network"


def finished(rows: Iterable[Row], point: Row) -> bool:
    """Whether one of the rows is of this point; ``point`` has the keys of ``IDENTITY``."""
    return any(row["suite"] == SUITE and all(row.get(key) == point[key] for key in IDENTITY) for row in rows)


def newest(rows: Iterable[Row], case: str, device_name: str) -> list[Row]:
    """The last row of each seed, method and budget, of the seeds that got furthest.

    Only rows with the settings of the last one, and with the newest base network of their seed.
    """
    found = [row for row in rows if row["suite"] == SUITE and row["case"] == case and row["device_name"] == device_name]
    found.sort(key=lambda row: str(row["time"]))
    bases = {row["seed"]: row["base"] for row in found}
    comparable = [
        row for row in found if row["settings"] == found[-1]["settings"] and row["base"] == bases[row["seed"]]
    ]
    points = list({(row["seed"], row["provider"], row["budget"]): row for row in comparable}.values())
    # a mean over other seeds for one method than for another would compare the seeds
    count = Counter(row["seed"] for row in points)
    return [row for row in points if count[row["seed"]] == max(count.values())]


@dataclass(frozen=True)
class Spread:
    """A figure over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the seeds."""
        return fmean(self.values)

    def percent(self) -> str:
        """The mean, with the extremes where there are several seeds."""
        low, high = min(self.values), max(self.values)
        return f"{self.mean:.1%}" + (f" ({100 * low:.1f}…{100 * high:.1f})" if len(self.values) > 1 else "")


def curves(rows: Sequence[Row], what: str) -> dict[str, dict[float, Spread]]:
    """``{provider: {budget: figure over seeds}}``, budgets from the greatest, only those that every seed has.

    Args:
        rows: of one form on one device, each point once.
        what: a key of the rows.
    """
    seeds = {row["seed"] for row in rows}
    cells: dict[tuple[str, float], dict[int, float]] = {}
    for row in rows:
        cells.setdefault((row["provider"], row["budget"]), {})[row["seed"]] = row[what]
    found: dict[str, dict[float, Spread]] = {}
    for (provider, budget), values in sorted(cells.items(), key=lambda item: -item[0][1]):
        if set(values) == seeds:
            found.setdefault(provider, {})[budget] = Spread(tuple(values[seed] for seed in sorted(seeds)))
    return found


def markdown(rows: Sequence[Row], order: Sequence[str]) -> str:
    """The tables of one form on one device.

    Args:
        rows: each point once.
        order: the providers, in the order of the table.
    """
    after, cut = curves(rows, "accuracy"), curves(rows, "accuracy_cut")
    removing, pruning = curves(rows, "seconds_removing"), curves(rows, "seconds_pruning")
    shown = [name for name in order if name in after]
    budgets = sorted({budget for name in shown for budget in after[name]}, reverse=True)
    base = Spread(tuple({row["seed"]: row["accuracy_base"] for row in rows}.values()))
    parts = [_heading(rows, base)]
    for title, found in (("After fine-tuning", after), ("Right after the last removal", cut)):
        lines = [table_line(["accuracy", *(f"{budget:.0%} of the MACs" for budget in budgets)])]
        lines.append(table_line(["---"] * (1 + len(budgets))))
        for name in shown:
            best = [max(found[one][b].mean for one in shown if b in found[one]) for b in budgets]
            cells = [found[name].get(budget) for budget in budgets]
            texts = [_strong(cell, top) for cell, top in zip(cells, best, strict=True)]
            lines.append(table_line([name, *texts]))
        parts.append(f"**{title}**\n\n" + "\n".join(lines))
    lines = [table_line(["seconds", "removals", "pruning phase, with its steps"]), table_line(["---"] * 3)]
    for name in shown:
        figures = [fmean(spread.mean for spread in found[name].values()) for found in (removing, pruning)]
        lines.append(table_line([name, *(f"{figure:.2f}" for figure in figures)]))
    parts.append("**Seconds of one point, mean over budgets and seeds**\n\n" + "\n".join(lines))
    furthest = max(abs(row["macs"] / row["budget"] - 1) for row in rows)
    parts.append(f"Every network costs what was asked to within {furthest:.1%}. {_runs(rows)}")
    return "\n\n".join(parts) + "\n"


def _heading(rows: Sequence[Row], base: Spread) -> str:
    row = rows[-1]
    chosen: dict[str, Any] = row["settings"]
    seeds = len(base.values)
    return (
        f"## {row['case']}, {row['device_name']}\n\n"
        f"ResNet-18, {chosen['width']} channels in the first stage, {chosen['classes']} classes, images of "
        f"{chosen['size']} × {chosen['size']}; {chosen['every'] * chosen['prune_steps']} steps of pruning and "
        f"{chosen['finetune_steps']} of fine-tuning with {chosen['batch']} images; {seeds} "
        f"seed{'s' if seeds > 1 else ''}: mean (least…greatest). {BASE.capitalize()}: {base.percent()}, "
        f"{row['macs_before'] / 1e6:.1f} M MACs."
    )


def _strong(cell: Spread | None, best: float) -> str:
    if cell is None:
        return ""
    return f"**{cell.percent()}**" if cell.mean == best else cell.percent()


def _runs(rows: Sequence[Row]) -> str:
    runs = {
        f"run {row['run_id']} of {row['time'][:10]}, {row['threads']} threads, torch {row['torch']}, {commit_of(row)}"
        for row in rows
    }
    return "; ".join(sorted(runs)) + "."

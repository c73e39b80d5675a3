"""The study as a table and as a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from taylor_cuda.bench.report import table_line
from taylor_cuda.bench.rows import commit_of
from taylor_cuda.report.compare_plots import COLOURS, FAINT, INK, REST, png

KINDS = {"pearson": "Pearson", "spearman": "Spearman", "kendall": "Kendall"}
TITLES = {
    "lenet": "LeNet with BatchNorm",
    "residual": "Residual network",
    "early": "Residual network after two epochs",
}


def means(study: dict[str, Any], network: str) -> list[dict[str, Any]]:
    """One entry a criterion, best mean Spearman first: mean values over seeds, and Spearman by seed.

    A criterion that could not be had has a ``reason`` and comes last; a correlation that isn't defined is NaN.
    """
    runs = list(study["networks"][network].values())
    found = []
    for name in runs[0]["criteria"]:
        rows = [run["criteria"][name] for run in runs]
        missing = next((row["reason"] for row in rows if "overall" not in row), "")
        entry: dict[str, Any] = {"criterion": name, "reason": missing}
        if not missing:
            for part in ("overall", "layers"):
                entry[part] = {kind: statistics.fmean(_number(row[part][kind]) for row in rows) for kind in KINDS}
            entry["seconds"] = statistics.fmean(row["seconds"] for row in rows)
            entry["relative"] = statistics.fmean(row["relative"] for row in rows)
            entry["spearman"] = [_number(row["overall"]["spearman"]) for row in rows]
        found.append(entry)
    return sorted(found, key=_rank)


def _rank(entry: dict[str, Any]) -> tuple[bool, float]:
    value = math.nan if entry["reason"] else entry["overall"]["spearman"]
    return bool(entry["reason"]), math.inf if math.isnan(value) else -value


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def markdown(study: dict[str, Any], promises: Sequence[tuple[str, bool]]) -> str:
    """A table for each network, what was promised, and where it was measured."""
    lines = ["# Which criterion is right?", ""]
    lines.append(
        "Correlation of every criterion's scores with the squared change of the loss that removing each unit really "
        "makes, and the seconds of its one pass over the training set. Mean over seeds; for Spearman over all layers, "
        "each seed too. Written by `python -m taylor_cuda.bench.study`, whose docstring says what was done."
    )
    for network, runs in study["networks"].items():
        one = next(iter(runs.values()))
        units, seconds = sum(one["units"].values()), [run["oracle_seconds"] for run in runs.values()]
        passes = statistics.fmean(run["pass_seconds"] for run in runs.values())
        lines += [
            "",
            f"## {TITLES[network]}",
            "",
            f"{units} units in {len(one['units'])} layers or coupled groups, {one['examples']:,} images, seeds "
            f"{', '.join(runs)}. Loss on them: {statistics.fmean(run['loss'] for run in runs.values()):.2g}. "
            f"Plain forward and backward passes: {passes:.2f} s. The oracle: "
            f"{statistics.fmean(seconds):.0f} s.",
            "",
            table_line(["criterion", *(f"{k}, all" for k in KINDS.values()), *(f"{k}, layer" for k in KINDS.values()),
                   "Spearman by seed", "seconds", "× passes"]),
            table_line(["---"] * 10),
        ]  # fmt: skip
        lines += [table_line(_cells(entry)) for entry in means(study, network)]
    lines += ["", "## Promises", "", *(f"- {'kept' if good else '**missed**'}: {text}" for text, good in promises)]
    where = study["environment"]
    lines += [
        "",
        f"{where['time'][:10]}, {where['device_name']}, {where['threads']} threads, torch {where['torch']}, "
        f"{commit_of(where)}.",
    ]
    return "\n".join(lines) + "\n"


def _cells(entry: dict[str, Any]) -> list[str]:
    if entry["reason"]:
        return [entry["criterion"], *[""] * 6, entry["reason"], "", ""]
    values = [entry[part][kind] for part in ("overall", "layers") for kind in KINDS]
    seeds = " / ".join(_shown(value) for value in entry["spearman"])
    return [entry["criterion"], *map(_shown, values), seeds, f"{entry['seconds']:.2f}", f"{entry['relative']:.2f}"]


def _shown(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def write_picture(study: dict[str, Any], path: Path) -> None:
    """A panel for each network, a line for each criterion: a dot for each seed's Spearman, and the cost at the end.

    Raises:
        InputError: matplotlib isn't installed.
    """
    networks = list(study["networks"])
    entries = {network: [e for e in means(study, network) if not e["reason"]] for network in networks}
    tallest = max(len(found) for found in entries.values())
    with png(path, (6.2 * len(networks), 1.6 + 0.27 * tallest)) as figure:
        for panel, network in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True):
            _panel(panel, entries[network])
            panel.set_title(TITLES[network], fontsize=10, loc="left", color=INK)
        figure.suptitle(
            "Rank correlation with the true change of the loss: a dot for each seed, a bar for their mean",
            color=INK,
            fontsize=11,
        )


def _panel(panel: Any, entries: Sequence[dict[str, Any]]) -> None:
    shown = [value for entry in entries for value in entry["spearman"] if not math.isnan(value)]
    least = min([0.0, *shown]) - 0.04
    for line, entry in enumerate(entries):
        colour = COLOURS.get(entry["criterion"], REST)
        panel.axhline(line, color=FAINT, linewidth=0.6, zorder=0)
        mean = entry["overall"]["spearman"]
        panel.plot(
            entry["spearman"], [line] * len(entry["spearman"]), "o", color=colour, markersize=5, alpha=0.6, linewidth=0
        )
        panel.plot([mean], [line], "|", color=colour, markersize=14, markeredgewidth=2)
        cost = f"{_shown(mean)}   {entry['relative']:.1f} ×"
        panel.annotate(cost, (1.03, line), va="center", fontsize=8, color=INK, annotation_clip=False)
    panel.annotate("mean   cost", (1.03, -0.9), va="center", fontsize=8, color=INK, annotation_clip=False)
    panel.set_yticks(range(len(entries)), [entry["criterion"] for entry in entries], fontsize=9)
    for label, entry in zip(panel.get_yticklabels(), entries, strict=True):
        label.set_color(COLOURS.get(entry["criterion"], INK))
    panel.set_ylim(len(entries) - 0.4, -0.6)
    panel.set_xlim(least, 1.02)
    panel.set_xlabel("Spearman's ρ over the units of all layers; cost in plain forward and backward passes", fontsize=8)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)

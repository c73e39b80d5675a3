"""The picture of the curves: accuracy against MACs, a line a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taylor_cuda.bench.frontier.table import Spread, curves
from taylor_cuda.bench.rows import Row
from taylor_cuda.errors import InputError
from taylor_cuda.report.compare_plots import COLOURS, FAINT, INK, REST, png

# A criterion has its colour of the other pictures; the peer's lines are broken, the floor is grey.
STYLES = {
    "ours:taylor_fo": (COLOURS["taylor_fo"], "-", "o"),
    "ours:taylor_so": (COLOURS["taylor_so"], "-", "s"),
    "ours:fisher": (COLOURS["fisher"], "-", "^"),
    "ours:magnitude": (COLOURS["magnitude"], "-", "D"),
    "ours:random": (REST, ":", "x"),
    "torch-pruning:taylor": ("#000000", "--", "v"),
    "torch-pruning:magnitude": ("#B8860B", "--", "P"),
}
OTHER = ("#666666", "-", ".")


def write_figure(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows of one form on one device: after fine-tuning, and right after the last removal.

    A line is the mean over seeds, a mark one seed.

    Args:
        rows: each point once.
        path: the ``.png`` to write, whole or not at all.

    Raises:
        InputError: matplotlib isn't installed, or there is no point that every seed has.
    """
    panels = [
        ("After equal fine-tuning", curves(rows, "accuracy")),
        ("Right after the last removal, before fine-tuning", curves(rows, "accuracy_cut")),
    ]
    if not panels[0][1]:
        raise InputError("plot: there is no point that every seed has, so there is nothing to draw")
    base = Spread(tuple({row["seed"]: row["accuracy_base"] for row in rows}.values()))
    row = rows[-1]
    chosen = row["settings"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with png(path, (13, 5.6)) as figure:
        for axes, (title, found) in zip(figure.subplots(1, 2), panels, strict=True):
            _panel(axes, title, found, base)
        figure.suptitle(
            f"Accuracy against MACs: ResNet-18, width {chosen['width']}, {chosen['classes']} classes of glyphs in "
            f"faces never trained on; {len(base.values)} "
            f"seed{'s' if len(base.values) > 1 else ''}, {row['device_name']}",
            fontsize=11,
            color=INK,
        )


def _panel(axes: Any, title: str, found: Mapping[str, Mapping[float, Spread]], base: Spread) -> None:
    ends = {}
    for provider, curve in found.items():
        colour, line, mark = STYLES.get(provider, OTHER)
        shares = [1.0, *curve]
        means = [base.mean, *(spread.mean for spread in curve.values())]
        axes.plot(shares, means, line, color=colour, linewidth=2)
        for share, spread in curve.items():
            axes.plot([share] * len(spread.values), spread.values, mark, color=colour, markersize=4, alpha=0.6)
        ends[provider] = (shares[-1], means[-1])
    axes.plot([1.0] * len(base.values), base.values, "o", color=INK, markersize=4)
    budgets = sorted({1.0} | {budget for curve in found.values() for budget in curve})
    axes.set_xlim(1.02, budgets[0] - 0.02)
    axes.set_xticks(budgets, [f"{budget:.0%}" for budget in budgets])
    axes.yaxis.set_major_formatter(lambda value, _place: f"{value:.0%}")
    axes.set_xlabel("MACs that are left")
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.grid(True, axis="y", color=FAINT, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    low, high = axes.get_ylim()
    heights = spaced([height for _, height in ends.values()], 0.05 * (high - low))
    for (provider, (share, height)), place in zip(ends.items(), heights, strict=True):
        axes.annotate(
            provider.replace("torch-pruning:", "Torch-Pruning ").replace("ours:", ""),
            (share, height),
            xytext=(budgets[0] - 0.05, place),
            color=STYLES.get(provider, OTHER)[0],
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.8},
        )


def spaced(heights: Sequence[float], apart: float) -> list[float]:
    """Places for labels, near their heights, in the same order and at least ``apart`` from each other."""
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    # blocks of labels that touch: each is centred on the mean of its own heights
    blocks: list[list[int]] = []

    def bottom(block: list[int]) -> float:
        return sum(heights[place] for place in block) / len(block) - 0.5 * apart * (len(block) - 1)

    for place in order:
        blocks.append([place])
        while len(blocks) > 1 and bottom(blocks[-1]) < bottom(blocks[-2]) + apart * len(blocks[-2]):
            last = blocks.pop()
            blocks[-1] += last
    found = [0.0] * len(heights)
    for block in blocks:
        for rank, place in enumerate(block):
            found[place] = bottom(block) + rank * apart
    return found

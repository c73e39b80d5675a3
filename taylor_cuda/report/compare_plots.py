"""Pictures of ``tc.compare`` and ``tc.sensitivity``: estimate against truth, loss against budget and width."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taylor_cuda.errors import InputError
from taylor_cuda.files import replacing
from taylor_cuda.study.comparison import After, Comparison, Row
from taylor_cuda.study.sensitivity import Sensitivity

INK, FAINT, REST = "#333333", "#d5d9e0", "#8a909a"

# Okabe and Ito's palette, which people with every kind of colour vision tell apart. Who has no colour is grey.
COLOURS = {
    "taylor_so": "#0072b2",
    "taylor_so_hessian": "#56b4e9",
    "taylor_fo": "#d55e00",
    "fisher": "#009e73",
    "magnitude": "#cc79a7",
}


@contextmanager
def png(path: Path, size: tuple[float, float], dpi: int = 130) -> Iterator[Any]:
    """A figure to draw in, written to ``path`` if the block ends well, whole or not at all.

    Args:
        path: the ``.png`` to write.
        size: width and height in inches.
        dpi: pixels an inch.

    Raises:
        InputError: matplotlib isn't installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"{path.name}: the picture needs matplotlib ({error}); pip install matplotlib") from error
    # Without pyplot, so no display is looked for and no global state is left behind.
    figure = Figure(figsize=size, layout="constrained", dpi=dpi)
    FigureCanvasAgg(figure)
    yield figure
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def write_scatter_png(comparison: Comparison, path: Path, title: str = "") -> None:
    """One panel a criterion, best first: √score of every unit against the size of the true change of the loss.

    Both axes are logarithmic. On the line the estimate is the truth; criteria with a scale of their own have no line,
    for only their order counts.

    Args:
        comparison: what ``tc.compare`` found.
        path: the ``.png`` to write.
        title: a line above.

    Raises:
        InputError: matplotlib isn't installed.
    """
    rows = [row for row in comparison.rows if row.agreement is not None]
    columns = min(4, max(1, len(rows)))
    lines = max(1, math.ceil(len(rows) / columns))
    with png(path, (2.5 * columns + 0.4, 2.5 * lines + 0.7)) as figure:
        panels = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
        for panel in panels[len(rows) :]:
            panel.set_visible(False)
        for panel, row in zip(panels, rows, strict=False):
            _scatter(panel, row, comparison.truth)
        figure.supxlabel("|true change of the loss| when the unit is removed", fontsize=10, color=INK)
        figure.supylabel("√score: the estimate", fontsize=10, color=INK)
        text = title or "What each criterion says of every unit, against what is true"
        figure.suptitle(f"{text}  (line: estimate = truth; ρ: rank correlation)", fontsize=11, color=INK)


def _scatter(panel: Any, row: Row, truth: Mapping[str, Tensor]) -> None:
    assert row.agreement is not None
    true = torch.cat([truth[name].abs() for name in truth])
    estimate = torch.cat([row.scores[name].double().abs().sqrt() for name in truth])
    x, y = (_above_zero(values) for values in (true, estimate))
    panel.scatter(x.tolist(), y.tolist(), s=7, color=COLOURS.get(row.criterion, REST), alpha=0.55, linewidths=0)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.yaxis.set_minor_formatter(lambda _value, _place: "")
    if 0.05 < float(y.median() / x.median()) < 20:
        panel.axline((1, 1), (10, 10), color=INK, linewidth=0.8, zorder=0)
        y = torch.cat([x, y])  # one scale on both axes
    panel.set_xlim(float(x.min()) / 1.6, float(x.max()) * 1.6)
    panel.set_ylim(float(y.min()) / 1.6, float(y.max()) * 1.6)
    rho = row.agreement.overall.spearman
    shown = "undefined" if math.isnan(rho) else f"{rho:.3f}"
    panel.set_title(f"{row.criterion}   ρ {shown}", fontsize=9, loc="left", color=INK)
    panel.tick_params(labelsize=7, colors=INK, which="both")
    panel.grid(True, color=FAINT, linewidth=0.4)
    panel.spines[["top", "right"]].set_visible(False)


def _above_zero(values: Tensor) -> Tensor:
    """For a logarithmic axis: what is below 1e-6 of the greatest value lies there, zeros with the least above them."""
    if not bool((values > 0).any()):
        return torch.ones_like(values)
    floor = max(float(values[values > 0].min()), 1e-6 * float(values.max()))
    return values.clamp_min(floor)


def write_removal_png(comparison: Comparison, path: Path, title: str = "") -> None:
    """The loss right after removal, without fine-tuning, against what is left; a panel for each kind of budget.

    The oracle is the thick line; well-known criteria have a colour, all have their name at the end of their line.

    Args:
        comparison: what ``tc.compare`` found, with budgets.
        path: the ``.png`` to write.
        title: a line above.

    Raises:
        InputError: matplotlib isn't installed, or there was no budget.
    """
    kinds: dict[str, list[str]] = {}
    for label in comparison.oracle_after:
        kinds.setdefault(label.partition("=")[0], []).append(label)
    if not kinds:
        raise InputError(f"{path.name}: nothing was removed, so there is no loss against a budget to draw")
    lines = {row.criterion: row.after for row in comparison.rows if row.agreement is not None}
    lines["oracle"] = comparison.oracle_after
    with png(path, (6.4 * len(kinds), 2.6 + 0.2 * len(lines))) as figure:
        for panel, (kind, labels) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds.items(), strict=True):
            _removal(panel, kind, labels, lines, comparison.intact)
        figure.suptitle(title or "Loss right after removal, nothing fine-tuned", fontsize=11, color=INK)


def _removal(
    panel: Any, kind: str, labels: Sequence[str], lines: Mapping[str, Mapping[str, After | None]], intact: After
) -> None:
    ends: list[tuple[float, float, str]] = []
    for name, after in lines.items():
        points = [(1.0, intact.loss)]
        for label in labels:
            left = after[label]
            if left is not None and math.isfinite(left.loss):
                points.append((float(label.partition("=")[2]), left.loss))
        points.sort(reverse=True)
        style = {"color": INK, "linewidth": 3.0, "zorder": 3} if name == "oracle" else _line(name)
        panel.plot(*zip(*points, strict=True), marker="o", markersize=3.5, **style)
        ends.append((points[-1][1], points[-1][0], name))
    everything = [y for line in panel.get_lines() for y in line.get_ydata()]
    if min(everything) > 0:
        panel.set_yscale("log")
    least = min(float(label.partition("=")[2]) for label in labels)
    panel.set_xlim(1.0 + 0.03 * (1 - least), least - 0.4 * (1 - least))
    _name_ends(panel, ends)
    panel.set_xticks([1.0, *(float(label.partition("=")[2]) for label in labels)])
    panel.xaxis.set_major_formatter(lambda value, _place: f"{value:.0%}")
    panel.set_xlabel(f"{'MACs' if kind == 'macs' else kind} left", color=INK)
    panel.set_ylabel("mean loss", color=INK)
    panel.grid(True, axis="y", color=FAINT, linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)


def _line(name: str) -> dict[str, Any]:
    if name in COLOURS:
        return {"color": COLOURS[name], "linewidth": 1.8, "zorder": 2}
    return {"color": REST, "linewidth": 0.9, "zorder": 1}


def _name_ends(panel: Any, ends: Sequence[tuple[float, float, str]]) -> None:
    """Names beside the ends of lines, moved apart along the axis where they would lie on one another."""
    low, high = panel.get_ylim()
    log = panel.get_yscale() == "log"
    place = (lambda y: math.log(y / low) / math.log(high / low)) if log else (lambda y: (y - low) / (high - low))
    wanted = sorted((place(y), x, name) for y, x, name in ends)
    gap = min(0.048, 1.0 / len(wanted))
    at = [where for where, _, _ in wanted]
    for index in range(1, len(at)):
        at[index] = max(at[index], at[index - 1] + gap)
    over = at[-1] - 1.0
    if over > 0:
        at[-1] = 1.0
        for index in range(len(at) - 2, -1, -1):
            at[index] = min(at[index], at[index + 1] - gap)
    least = min(x for _, x, _ in wanted)
    names_at = least - 0.07 * (1 - least)
    for height, (where, x, name) in zip(at, wanted, strict=True):
        colour = INK if name == "oracle" else COLOURS.get(name, REST)
        bold = "bold" if name == "oracle" or name in COLOURS else "normal"
        axes = panel.get_xaxis_transform()
        panel.plot([x, names_at], [where, height], color=colour, linewidth=0.5, transform=axes, clip_on=False)
        panel.text(names_at, height, f" {name}", transform=axes, va="center", fontsize=8, color=colour, fontweight=bold)


def write_sensitivity_png(sensitivity: Sensitivity, path: Path, title: str = "") -> None:
    """A map with a line for each group and a column for each width: the darker, the more the loss grew.

    Args:
        sensitivity: what ``tc.sensitivity`` found.
        path: the ``.png`` to write.
        title: a line above.

    Raises:
        InputError: matplotlib isn't installed.
    """
    names, fractions = list(sensitivity.losses), sensitivity.fractions
    losses = torch.tensor([sensitivity.losses[name] for name in names], dtype=torch.float64).reshape(-1, len(fractions))
    with png(path, (3.2 + 0.62 * len(fractions), 1.7 + 0.27 * len(names))) as figure:
        panel = figure.add_subplot()
        there = losses[losses.isfinite()]
        top = float(there.max()) if there.numel() else 1.0
        shown = losses.nan_to_num(nan=top, posinf=top)
        # From the loss of the whole model at the light end: a loss that falls is as light.
        least = sensitivity.intact
        image = panel.imshow(shown.tolist(), cmap="Blues", aspect="auto", vmin=least, vmax=max(top, least))
        for line, row in enumerate(losses.tolist()):
            for column, loss in enumerate(row):
                dark = image.norm(shown[line, column].item()) > 0.55
                text = "–" if math.isnan(loss) else f"{loss:.2g}"
                panel.text(column, line, text, ha="center", va="center", fontsize=7, color="white" if dark else INK)
        panel.set_xticks(range(len(fractions)), [f"{fraction:.0%}" for fraction in fractions], fontsize=8)
        panel.set_yticks(range(len(names)), [f"{name}  ({sensitivity.sizes[name]})" for name in names], fontsize=8)
        panel.set_xlabel("units of this group kept, all other groups whole", color=INK)
        panel.tick_params(length=0, colors=INK)
        panel.spines[:].set_visible(False)
        panel.set_title(
            title or f"Loss when one group alone is narrowed (intact {sensitivity.intact:.2g})",
            fontsize=10,
            loc="left",
            color=INK,
        )

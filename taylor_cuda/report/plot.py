"""The picture of the widths, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from taylor_cuda.errors import InputError
from taylor_cuda.files import replacing

GONE, KEPT, INK = "#d5d9e0", "#2b6cb0", "#333333"


def write_widths_svg(widths: Mapping[str, tuple[int, int]], path: Path, title: str = "") -> None:
    """One horizontal bar a layer: its outputs before pruning, and on top of it what is left.

    Args:
        widths: outputs before and after by layer name, in the order they are drawn from the top.
        path: the ``.svg`` to write, whole or not at all.
        title: a line above.

    Raises:
        InputError: matplotlib isn't installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise InputError(f"{path.name}: the picture needs matplotlib ({error}); pip install matplotlib") from error
    names = list(widths)
    before = [widths[name][0] for name in names]
    after = [widths[name][1] for name in names]
    rows = range(len(names))
    # Without pyplot, so no display is looked for and no global state is left behind.
    figure = Figure(figsize=(7.5, 1.2 + 0.26 * max(len(names), 3)), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.barh(rows, before, height=0.72, color=GONE, label="removed")
    axes.barh(rows, after, height=0.72, color=KEPT, label="kept")
    for row, (was, now) in enumerate(zip(before, after, strict=True)):
        text = f"{now} of {was}" if now != was else f"{was}"
        axes.annotate(text, (was, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
    axes.set_yticks(list(rows), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.16 * max(before, default=1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("outputs of the layer")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower right", ncols=2, frameon=False, fontsize=8)
    # Text as text, which can be searched; the same widths give the same file.
    with replacing(path) as temporary, rc_context({"svg.fonttype": "none", "svg.hashsalt": "widths"}):
        figure.savefig(temporary, format="svg", metadata={"Date": None})

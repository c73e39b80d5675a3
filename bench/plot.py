"""A picture of one device's rows: the roofline, and every case's share of what a copy reaches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from taylor_cuda.bench.rows import Row
from taylor_cuda.errors import InputError

INK, FAINT = "#333333", "#c9ced6"

# Colour and mark of a provider; ours are filled.
STYLES = {
    "ours:native": ("#1f5fa8", "o"),
    "ours:cuda": ("#1f5fa8", "o"),
    "ours:triton": ("#d9601a", "s"),
    "ours:native:packed": ("#5fa3e6", "o"),
    "ours:cuda:packed": ("#5fa3e6", "o"),
    "ours:triton:packed": ("#f0a878", "s"),
    "ours:activations": ("#1f5fa8", "D"),
    "torch": ("#6b7078", "x"),
    "torch.compile": ("#2b8a4b", "P"),
    "torch.foreach": ("#6b7078", "1"),
    "torch.dot": ("#111111", "|"),
    "nvlabs-style": ("#9b59b6", "^"),
    "hooks": ("#c0392b", "v"),
    "hook.float32": ("#c0392b", "<"),
    "threshold_backward": ("#6b7078", "+"),
    "threshold_backward+sums": ("#c0392b", "+"),
    "four calls": ("#8c6d31", "*"),
    "torch:mask": ("#c0392b", "x"),
    "torch-pruning": ("#2b8a4b", "v"),
    "torch-pruning:aligned": ("#2b8a4b", "^"),
    "torch.cast": ("#111111", "|"),
}
OTHER = ("#a0a4ab", ".")


def write_roofline(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows of one device that move a known number of bytes.

    On the left the roofline: FLOP/s over FLOP/byte, under the copy rate and the matrix product that the same run
    measured. On the right, for each op, dtype and layout, every case's rate as a share of the copy rate.

    Args:
        rows: of one device; where a race was timed in several ways, those of the first.
        path: the ``.png`` to write, whole or not at all.

    Raises:
        InputError: matplotlib isn't installed, or no row has a rate.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"plot: the picture needs matplotlib ({error}); pip install matplotlib") from error
    shown = drawn(rows)
    if not shown:
        raise InputError("plot: no row moves a known number of bytes, so there is no rate to draw")
    kinds = list(dict.fromkeys(_kind(row) for row in shown))
    # Without pyplot, so no display is looked for and no global state is left behind.
    figure = Figure(figsize=(12, max(4.6, 2.2 + 0.32 * len(kinds))), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.7))
    _roof(left, shown)
    _shares(right, shown, kinds)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), frameon=False, fontsize=9)
    newest = max(shown, key=lambda row: str(row["time"]))
    figure.suptitle(
        f"{newest['device_name']}, torch {newest['torch']}, {newest['time'][:10]}: a copy moves "
        f"{newest['ceiling_gb_per_s']:,.0f} GB/s, a matrix product {newest['ceiling_tflops']:,.3g} TFLOP/s",
        fontsize=11,
        color=INK,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png", metadata={"Software": None})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def drawn(rows: Sequence[Row]) -> list[Row]:
    """Rows with a rate, in the order of their ops; of a race that was timed in several ways, those of the first."""
    timer: dict[tuple[Any, ...], str] = {}
    found = []
    for row in rows:
        race = tuple(row[name] for name in ("suite", "op", "case", "dtype", "layout"))
        if row.get("gb_per_s") and timer.setdefault(race, row["timer"]) == row["timer"]:
            found.append(row)
    return sorted(found, key=lambda row: (row["suite"] != "scoring", _kind(row)))


def style_of(provider: str) -> tuple[str, str]:
    """Colour and mark."""
    return STYLES.get(provider, OTHER)


def _kind(row: Row) -> str:
    return f"{row['op']}  {row['dtype']}  {row['layout']}"


def _roof(axes: Any, rows: Sequence[Row]) -> None:
    """Marks under the two ceilings, both axes logarithmic."""
    newest = max(rows, key=lambda row: str(row["time"]))
    copy, product = newest["ceiling_gb_per_s"], newest["ceiling_tflops"] * 1e3
    ridge = product / copy
    axes.plot([0.05, ridge, 4 * ridge], [0.05 * copy, product, product], color=INK, linewidth=1.5)
    axes.annotate(f"matrix product\n{product:,.0f} GFLOP/s", (ridge, product), (-6, -4), ha="right", **_TEXT)
    axes.annotate(f"copy\n{copy:,.0f} GB/s", (ridge**0.5, ridge**0.5 * copy), (8, -14), ha="left", **_TEXT)
    for row in rows:
        if row["flops"]:
            intensity = row["flops"] / row["bytes"]
            colour, mark = style_of(row["provider"])
            axes.plot(intensity, intensity * row["gb_per_s"], mark, color=colour, markersize=5, alpha=0.75)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte that has to be moved")
    axes.set_ylabel("GFLOP/s")
    axes.set_title("Roofline: memory is the bound", fontsize=10, loc="left", color=INK)
    axes.grid(True, which="major", color=FAINT, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


_TEXT: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": INK}


def _shares(axes: Any, rows: Sequence[Row], kinds: Sequence[str]) -> None:
    """One line for each kind of race, one mark for each case and provider."""
    named: set[str] = set()
    for row in rows:
        provider = row["provider"]
        colour, mark = style_of(provider)
        name = provider if provider in STYLES else "others"
        share = row["gb_per_s"] / row["ceiling_gb_per_s"]
        ours = provider.startswith("ours")
        axes.plot(
            share,
            kinds.index(_kind(row)) + (0.2 if not ours else -0.04 if provider == "ours:triton" else -0.22),
            mark,
            color=colour,
            markersize=7,
            alpha=0.85,
            zorder=3 if ours else 2,
            label=name if name not in named else None,
        )
        named.add(name)
    for number in range(len(kinds)):
        axes.axhline(number, color=FAINT, linewidth=0.5, zorder=0)
    axes.axvline(1.0, color=INK, linewidth=1.5, zorder=1)
    axes.annotate("copy", (1.0, len(kinds) - 0.45), (4, 2), **_TEXT)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _place: f"{value:.0%}")
    axes.set_xlabel("share of the copy rate of the same run; a mark for each shape")
    axes.set_title("Rate: the least bytes there are to move, over the time taken", fontsize=10, loc="left", color=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)

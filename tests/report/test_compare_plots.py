import itertools
import math
import sys

import pytest
import torch

from taylor_cuda.errors import InputError
from taylor_cuda.report import compare_plots
from taylor_cuda.report.compare_plots import write_removal_png, write_scatter_png, write_sensitivity_png
from taylor_cuda.study.comparison import After, Comparison, Row
from taylor_cuda.study.correlation import agreement
from taylor_cuda.study.sensitivity import Sensitivity

TRUTH = {"a": torch.tensor([0.1, -0.2, 0.0, 0.4]).double(), "b": torch.tensor([1.0, 2.0, 3.0]).double()}


def some_comparison(**changes):
    squares = {name: change.square() for name, change in TRUTH.items()}

    def row(name, scores, losses):
        after = {f"macs={f}": None if loss is None else After(loss) for f, loss in zip((0.9, 0.5), losses, strict=True)}
        return Row(name, "", 1.0, 0.5, agreement(scores, squares), after, scores)

    rows = (
        row("taylor_so", squares, (0.2, 0.4)),
        row("magnitude", {name: torch.ones(len(change)) for name, change in TRUTH.items()}, (2.0, None)),
        Row("bn_scale", "no scale"),
    )
    values = {
        "rows": rows, "truth": TRUTH, "intact": After(0.1),
        "oracle_after": {"macs=0.9": After(0.15), "macs=0.5": After(0.3)},
        "examples": 7, "batches": 2, "oracle_seconds": 3.0,
    }  # fmt: skip
    return Comparison(**{**values, **changes})


def some_sensitivity():
    losses = {"a": [0.2, 1.5, math.nan], "b": [0.1, 0.11, 0.3]}
    return Sensitivity(0.1, (0.75, 0.5, 0.25), {"a": 4, "b": 4}, {"a": [3, 2, 1], "b": [3, 2, 1]}, losses)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, kept."""
    figures, png = [], compare_plots.png

    class Kept:
        def __init__(self, *arguments):
            self.context = png(*arguments)

        def __enter__(self):
            figures.append(self.context.__enter__())
            return figures[-1]

        def __exit__(self, *error):
            return self.context.__exit__(*error)

    monkeypatch.setattr(compare_plots, "png", Kept)
    return figures


def test_scatter_has_a_panel_for_each_criterion_and_every_unit(tmp_path, drawn):
    write_scatter_png(some_comparison(), tmp_path / "s.png", "a title")
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.png"]
    panels = [panel for panel in drawn[0].axes if panel.get_visible()]
    assert [panel.get_title("left").split()[0] for panel in panels] == ["taylor_so", "magnitude"]
    assert "1.000" in panels[0].get_title("left")
    assert "undefined" in panels[1].get_title("left")
    points = panels[0].collections[0].get_offsets()
    # at zero there is no logarithm: that unit lies where the least one above zero does
    assert points[:, 0].tolist() == pytest.approx([0.1, 0.2, 0.1, 0.4, 1, 2, 3])
    assert points[:, 1].tolist() == pytest.approx([0.1, 0.2, 0.1, 0.4, 1, 2, 3])
    assert panels[0].get_xscale() == panels[0].get_yscale() == "log"
    assert "a title" in drawn[0].get_suptitle()


def test_removal_curves_begin_intact_and_end_with_their_names(tmp_path, drawn):
    write_removal_png(some_comparison(), tmp_path / "r.png")
    (panel,) = drawn[0].axes
    every = [list(line.get_ydata()) for line in panel.get_lines() if line.get_marker() == "o"]
    assert every == [[0.1, 0.2, 0.4], [0.1, 2.0], [0.1, 0.15, 0.3]]
    assert [text.get_text().strip() for text in panel.texts] == ["oracle", "taylor_so", "magnitude"]  # as they end
    heights = [text.get_position()[1] for text in panel.texts]
    assert heights == sorted(heights)
    with pytest.raises(InputError, match="nothing was removed"):
        write_removal_png(some_comparison(oracle_after={}), tmp_path / "none.png")
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.png"]


def test_names_keep_apart(tmp_path, drawn):
    rows = tuple(
        Row(f"criterion {i}", "", 1.0, 0.5, some_comparison().rows[0].agreement, {"macs=0.5": After(1.0)})
        for i in range(15)
    )
    write_removal_png(some_comparison(rows=rows, oracle_after={"macs=0.5": After(1.0)}), tmp_path / "r.png")
    heights = sorted(text.get_position()[1] for text in drawn[0].axes[0].texts)
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 0.047
    assert heights[0] > -0.05
    assert heights[-1] <= 1.0


def test_sensitivity_shows_every_loss(tmp_path, drawn):
    write_sensitivity_png(some_sensitivity(), tmp_path / "w.png")
    (panel,) = drawn[0].axes
    assert [text.get_text() for text in panel.texts] == ["0.2", "1.5", "–", "0.1", "0.11", "0.3"]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["a  (4)", "b  (4)"]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["75%", "50%", "25%"]


@pytest.mark.parametrize(
    ("write", "value"),
    [
        (write_scatter_png, some_comparison()),
        (write_removal_png, some_comparison()),
        (write_sensitivity_png, some_sensitivity()),
    ],
)
def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch, write, value):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"p\.png: the picture needs matplotlib .*pip install matplotlib"):
        write(value, tmp_path / "p.png")
    assert list(tmp_path.iterdir()) == []

import json
import sys
import xml.etree.ElementTree as ET

import pytest

from taylor_cuda.errors import InputError
from taylor_cuda.report import measured_lines, run_table, write_summary, write_widths_svg
from tests.report.summaries import some_summary


def test_table_has_every_layer_and_total():
    lines = run_table(some_summary()).splitlines()
    cells = {line.split("  ")[0]: line.split()[-3:] for line in lines if line}
    assert cells["conv"] == ["32", "20", "0.625"]
    assert cells["head"] == ["10", "10", "1.000"]
    assert cells["MACs per example"] == ["1,000", "480", "0.480"]
    assert cells["parameters"] == ["200", "100", "0.500"]
    assert cells["accuracy"] == ["0.9900", "0.9850", "-0.0050"]
    assert [line.split()[-1] for line in lines if "latency" in line] == ["0.800", "0.750"]
    assert lines[0].startswith("outputs of layer")


def test_latency_that_did_not_fit_is_said():
    table = run_table(some_summary(latency_ms_before=None, latency_ms_after=None))
    assert "out of memory" in next(line for line in table.splitlines() if "batch 256" in line)


def test_measured_lines():
    assert measured_lines(some_summary()) == [
        "cut == masked: greatest difference 1.5e-06 (outputs up to 9, 4 cuts)",
        "scores from parameters vs from activations: greatest relative difference 2e-07",
        "scoring cost: 1.2 % of a step (20.0 ms)",
        "training step after pruning, mode cut: 12.0 ms",
        "estimate vs oracle: Spearman 0.95 (magnitude 0.41), 192 training images",
    ]
    lines = measured_lines(some_summary(source_difference=None, source_note="frozen parameters"))
    assert lines[1] == "scores from parameters vs from activations: not compared: frozen parameters"
    for note, says in (("no scale", "no scale"), (None, "--oracle N compares them on N minibatches")):
        lines = measured_lines(some_summary(estimate_spearman=None, oracle_note=note))
        assert lines[-1] == f"estimate vs oracle: not compared: {says}"
    lines = measured_lines(some_summary(magnitude_spearman=None))
    assert lines[-1] == "estimate vs oracle: Spearman 0.95 (magnitude -), 192 training images"


def test_summary_is_json_with_what_is_promised(tmp_path):
    path = tmp_path / "summary.json"
    write_summary(some_summary(scoring_percent=float("nan")), path)
    found = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    promised = (
        "base_accuracy pruned_accuracy macs_before macs_after params_before params_after latency_ms_before "
        "latency_ms_after latency_ms_batch1_before latency_ms_batch1_after seconds seed criterion budget environment"
    )
    assert set(promised.split()) <= set(found)
    assert found["widths"] == {"conv": [32, 20], "head": [10, 10]}
    assert found["scoring_percent"] is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def bar_lengths(path):
    """Lengths of the drawn bars in points, in drawing order: every bar is a closed rectangle within an axes patch."""
    lengths = []
    for element in ET.parse(path).getroot().iter("{http://www.w3.org/2000/svg}path"):
        if "clip-path" in element.attrib and element.get("d", "").rstrip().endswith("z"):
            numbers = [float(word) for word in element.get("d").replace("\n", " ").split() if word[-1].isdigit()]
            lengths.append(max(numbers[0::2]) - min(numbers[0::2]))
    return lengths


def test_picture_draws_widths_to_scale(tmp_path):
    path = tmp_path / "widths.svg"
    write_widths_svg({"conv1": (32, 20), "conv2": (64, 16), "head": (10, 10)}, path, "a title")
    lengths = bar_lengths(path)
    assert len(lengths) == 6  # all "before" bars, then all "after" bars
    unit = lengths[0] / 32
    assert [length / unit for length in lengths] == pytest.approx([32, 64, 10, 20, 16, 10], rel=1e-3)
    text = path.read_text(encoding="utf-8")
    for words in ("a title", "conv1", "20 of 32", "16 of 64", "removed", "kept"):
        assert words in text
    assert [entry.name for entry in tmp_path.iterdir()] == ["widths.svg"]


def test_picture_is_the_same_file_twice(tmp_path):
    for name in ("a.svg", "b.svg"):
        write_widths_svg({"conv1": (32, 20)}, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_picture_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"widths\.svg: the picture needs matplotlib .*pip install matplotlib"):
        write_widths_svg({"conv": (2, 1)}, tmp_path / "widths.svg")
    assert list(tmp_path.iterdir()) == []

from __future__ import annotations

import json

import pytest

from taylor_cuda.bench.rows import MORE_KEYS, append_rows, check_row, newest_rows, read_rows, results_file


def make_row(**changes):
    """A row with every key of the design's list and no other one: users of the rows rely on these names."""
    row = {
        "suite": "scoring",
        "op": "channel_importance",
        "provider": "ours:native",
        "case": "2x3x4x4",
        "dtype": "float32",
        "layout": "nchw",
        "device": "cpu",
        "device_name": "Some CPU",
        "median_us": 2.0,
        "p20_us": 1.0,
        "p80_us": 3.0,
        "bytes": 768,
        "flops": 192,
        "gb_per_s": 0.384,
        "ceiling_gb_per_s": 20.0,
        "ceiling_tflops": 0.1,
        "ratio": 4.0,
        "peer": "torch",
        "run_id": "a",
        "commit": None,
        "dirty": None,
        "torch": "2.11.0",
        "triton": None,
        "cuda": None,
        "driver": None,
        "time": "2026-11-20T10:00:00+00:00",
    }
    return row | changes


def test_every_key_of_the_design_is_required():
    check_row(make_row())
    for key in make_row():
        row = make_row()
        del row[key]
        with pytest.raises(ValueError, match=f"missing \\['{key}'\\]"):
            check_row(row)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("median_us", 2),
        ("bytes", 768.0),
        ("flops", True),
        ("dirty", 0),
        ("device_name", None),
        ("ratio", "4"),
        ("commit", 5),
        ("threads", None),
        ("surprise", 1),
    ],
)
def test_a_wrong_type_or_an_unknown_key_is_refused(key, value):
    with pytest.raises(ValueError, match=key):
        check_row(make_row(**{key: value}))


def test_files_are_named_by_device_and_suite(tmp_path):
    assert results_file(make_row(), tmp_path) == tmp_path / "cpu" / "scoring.jsonl"
    gpu = make_row(device="cuda", device_name="NVIDIA H200", suite="step")
    assert results_file(gpu, tmp_path) == tmp_path / "nvidia-h200" / "step.jsonl"


def test_rows_are_appended_and_what_is_there_stays(tmp_path):
    append_rows([make_row(), make_row(provider="torch", ratio=None, peer=None)], tmp_path)
    path = tmp_path / "cpu" / "scoring.jsonl"
    before = path.read_bytes()
    append_rows([make_row(run_id="b")], tmp_path)
    after = path.read_bytes()
    assert after.startswith(before)
    assert [row["run_id"] for row in read_rows(tmp_path)] == ["a", "a", "b"]
    assert json.loads(after.splitlines()[-1]) == make_row(run_id="b")


def test_a_refused_row_leaves_the_file_alone(tmp_path):
    append_rows([make_row()], tmp_path)
    before = (tmp_path / "cpu" / "scoring.jsonl").read_bytes()
    with pytest.raises(ValueError, match="bytes"):
        append_rows([make_row(bytes=1.5)], tmp_path)
    assert (tmp_path / "cpu" / "scoring.jsonl").read_bytes() == before


def test_a_torn_last_line_does_not_swallow_the_next_row(tmp_path):
    append_rows([make_row()], tmp_path)
    path = tmp_path / "cpu" / "scoring.jsonl"
    with path.open("a") as file:
        file.write('{"suite": "scor')
    append_rows([make_row(run_id="b")], tmp_path)
    assert [row["run_id"] for row in read_rows(tmp_path)] == ["a", "b"]


def test_the_newest_run_of_each_race_wins():
    old = [make_row(run_id="old"), make_row(run_id="old", provider="torch")]
    new = [make_row(run_id="new", time="2026-11-21T10:00:00+00:00")]
    other = [make_row(run_id="old", case="8x8")]
    for rows in (old + new + other, new + other + old):
        found = {(row["run_id"], row["case"], row["provider"]) for row in newest_rows(rows)}
        assert found == {("new", "2x3x4x4", "ours:native"), ("old", "8x8", "ours:native")}


def test_optional_keys_do_not_repeat_required_ones():
    assert not set(MORE_KEYS) & set(make_row())

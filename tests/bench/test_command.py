"""``taylor-cuda bench``: options, errors, exit codes, what is printed and where rows go."""

from __future__ import annotations

import builtins
import dataclasses
import importlib.util
import math
from pathlib import Path

import pytest
import torch

from taylor_cuda.bench import __main__ as module
from taylor_cuda.bench import command, environment
from taylor_cuda.bench.environment import ROOT
from taylor_cuda.bench.race import Options
from taylor_cuda.bench.report import markdown, text
from taylor_cuda.bench.rows import append_rows, read_rows
from taylor_cuda.bench.suites import entries
from taylor_cuda.cli.main import main as command_line
from tests.bench.test_rows import make_row


def run(capsys, *arguments):
    """Both ways to the same command say and return the same."""
    code = command_line(["bench", *map(str, arguments)])
    first = capsys.readouterr()
    assert "Traceback" not in first.err
    return code, first.out, first.err


def row(**changes):
    """A whole row, as a run makes it."""
    more = {"ratios": {"torch": 4.0}, "intervals": {"torch": [3.9, 4.1]}, "timer": "wall", "rounds": 9, "quick": False}
    return make_row(**(more | {"peak_bytes": None, "held_bytes": None, "split": None, "note": ""} | changes))


def nothing(*_arguments):
    return [], False


@pytest.mark.parametrize(("verdicts", "code"), [([(True, "good")], 0), ([(True, "good"), (False, "slow")], 1)])
def test_the_exit_code_of_a_check(verdicts, code, monkeypatch, capsys):
    monkeypatch.setattr(command, "needed", lambda *_: [])
    monkeypatch.setattr(command, "judge", lambda *_, **__: verdicts)
    monkeypatch.setattr(command, "measure", nothing)
    assert run(capsys, "--quick", "--check")[0] == code
    assert module.main(["--quick", "--check"]) == code
    assert ("MISSED  slow" in capsys.readouterr().out) == bool(code)


def test_a_missed_promise_is_reported_and_fails_no_run_on_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(command, "judge", lambda *_, **__: [(False, "slow")])
    assert command.report([], Options("cuda"), check=False)
    assert "MISSED  slow" in capsys.readouterr().out
    assert not command.report([], Options("cuda"), check=True)
    assert command.report([], Options(), check=False)


def test_a_wrong_result_fails_the_run(monkeypatch, capsys):
    monkeypatch.setattr(command, "measure", lambda *_: ([], True))
    assert run(capsys, "--quick")[0] == 1


def test_a_race_that_raises_fails_the_run_and_costs_no_other_row(monkeypatch, capsys):
    (good,) = (entry for entry in entries(Options(quick=True)) if entry.key.suite == "rank")

    def broken(_key):
        raise RuntimeError("illegal memory access")

    bad = dataclasses.replace(good, key=dataclasses.replace(good.key, case="bad"), build=broken)
    rows, wrong = command.measure([bad, good], Options(quick=True, seconds=0.001), None, math.inf)
    assert wrong
    assert {row["case"] for row in rows} == {"tiny"}
    assert "rank/keep_mask/bad/float32/scores: FAILED, RuntimeError: illegal memory access" in capsys.readouterr().err


def test_nothing_begins_that_the_time_limit_would_cut(capsys):
    code, out, _ = run(capsys, "--quick", "--suite", "rank", "--time-limit", "0.001")
    assert code == 0
    assert "left out, the time limit is near" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "cuda"), "device: 'cuda' was asked for, but this machine has no GPU"),
        (("--seconds", "0"), "seconds: wanted a number above 0, got 0.0"),
        (("--time-limit", "-1"), "time_limit: wanted a number above 0, got -1.0"),
        (("--suite", "speed"), "invalid choice: 'speed'"),
        (("--device", "tpu"), "invalid choice: 'tpu'"),
        (("--results", "FILE", "--table"), "results: wanted a folder"),
        (("--results", "EMPTY", "--table", "--plot"), "plot: there are no rows of a cpu run to draw"),
    ],
)
def test_what_is_refused(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").write_text("mine")
    places = {"FILE": tmp_path / "file", "EMPTY": tmp_path}
    code, _, err = run(capsys, *(places.get(argument, argument) for argument in arguments))
    assert code == 2
    assert message in err
    if "invalid choice" not in message:
        assert module.main([str(places.get(argument, argument)) for argument in arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_list_names_the_races_and_runs_none(capsys, monkeypatch):
    monkeypatch.setattr(command, "measure", None)
    code, out, _ = run(capsys, "--list", "--suite", "rank", "scoring")
    assert code == 0
    assert "rank/keep_mask/resnet50/float32/scores  (ours:native, torch.topk, torch.kthvalue)" in out
    assert "step/" not in out


def test_the_help_says_where_rows_go(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for word in ("--plot", "--suite", "bench/results", "left out"):
        assert word in out


def test_a_run_prints_a_table_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "roofline.png"
    quick = ("--quick", "--seconds", "0.001", "--results", tmp_path)
    code, out, _ = run(capsys, *quick, "--suite", "rank", "relu", "--plot", picture)
    assert code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {row["suite"] for row in read_rows(tmp_path)} == {"rank", "relu"}
    header = next(line for line in out.splitlines() if line.startswith("rank  "))
    assert header.split()[1:] == ["provider", "timer", "median", "vs", "torch.topk", "vs", "torch.kthvalue"]


def test_stored_rows_are_drawn_beside_themselves(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    append_rows([row()], tmp_path)
    code, out, _ = run(capsys, "--table", "--plot", "--results", tmp_path)
    assert code == 0
    assert (tmp_path / "cpu" / "roofline.png").is_file()
    assert f"written: {tmp_path / 'cpu' / 'roofline.png'}" in out


def test_without_matplotlib_the_rows_are_there_and_the_picture_is_not(tmp_path, capsys, monkeypatch):
    append_rows([row()], tmp_path)
    imported = builtins.__import__

    def missing(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    # A measurement is not lost for want of a picture.
    monkeypatch.setattr(command, "measure", lambda *_: ([row()], False))
    code, out, err = run(capsys, "--quick", "--plot", tmp_path / "x.png")
    assert code == 0
    assert "plot: the picture needs matplotlib" in out + err
    assert not (tmp_path / "x.png").exists()


def test_the_table_shows_the_newest_rows_and_no_quick_ones():
    rows = [
        make_row(run_id="old", median_us=9999.0, ratios={"torch": 1.0}),
        make_row(run_id="new", time="2026-11-21T10:00:00+00:00", ratios={"torch": 4.0, "torch.dot": 0.9}),
        make_row(run_id="new", time="2026-11-21T10:00:00+00:00", provider="torch", ratio=None, peer=None),
        make_row(suite="step", quick=True, ratios={}),
    ]
    table = markdown(rows)
    assert (
        "| channel_importance | 2x3x4x4 | float32 | nchw | ours:native |  | 2.0 µs | 0 | 2% | 4.00× | 0.90× |" in table
    )
    assert "9999" not in table
    assert "step" not in table
    assert "run new" in table


def test_the_text_of_a_run():
    profile = row(suite="profile", op="split", split={"conv": 1.5, "other": 2000.0}, gb_per_s=None)
    plain = row(suite="profile", op="split", provider="torch", ratios={}, split={"conv": 1.0}, gb_per_s=None)
    lines = text([row(), row(provider="torch", ratios={}), profile, plain]).splitlines()
    assert lines[0].split() == ["scoring", "provider", "timer", "median", "GB/s", "of", "copy", "vs", "torch"]
    assert lines[2].split()[4:] == ["native", "wall", "2.0", "µs", "0", "2%", "4.00×"]
    assert len([line for line in lines if line.startswith("channel_importance")]) == 1
    assert lines[4].split() == ["profile", "provider", "timer", "median", "vs", "torch", "conv", "other"]
    assert lines[6].split()[4:] == ["native", "wall", "2.0", "µs", "4.000×", "1.5", "µs", "2.00", "ms"]
    assert lines[7].split()[4:] == ["torch", "wall", "2.0", "µs", "1.0", "µs"]
    assert text([]) == ""


def loaded(path):
    spec = importlib.util.spec_from_file_location("loaded", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_installed_rows_go_under_the_working_directory(tmp_path, monkeypatch):
    """The package elsewhere than in a source tree: no git is asked, no site-packages written to."""
    moved = tmp_path / "site-packages" / "bench" / "environment.py"
    moved.parent.mkdir(parents=True)
    moved.write_text((ROOT / "bench" / "environment.py").read_text())
    assert not loaded(moved).IN_SOURCE_TREE
    assert loaded(moved).repository_state() == (None, None)
    monkeypatch.setattr(environment, "IN_SOURCE_TREE", False)
    assert Path("bench") / "results" == loaded(ROOT / "bench" / "rows.py").RESULTS
    monkeypatch.setattr(environment, "IN_SOURCE_TREE", True)
    assert loaded(ROOT / "bench" / "rows.py").RESULTS == ROOT / "bench" / "results"

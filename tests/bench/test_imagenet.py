"""The table of the recipes on ImageNet: what goes into it, what is skipped, what is only a dry run."""

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from taylor_cuda.bench import imagenet
from taylor_cuda.bench.environment import environment
from taylor_cuda.bench.imagenet import main, markdown, measured, point_of
from taylor_cuda.bench.rows import RESULTS, read_rows
from taylor_cuda.errors import TaylorError
from taylor_cuda.train.launch import Launch
from taylor_cuda.train.recipes import load, names
from taylor_cuda.train.summary import Summary

HEADLINE = "resnet101-75"
DRY = ("--data", "synthetic", "--steps-limit", "2", "--weights", "none")


def summary(**changes):
    """What a run might have found out, without running it."""
    values = {entry.name: None for entry in dataclasses.fields(Summary)}
    values |= {
        "macs_before": 7_801_000_000, "macs_after": 4_712_000_000, "params_before": 44_549_160,
        "params_after": 31_300_000, "base_accuracy": 0.77374, "cut_accuracy": 0.5, "pruned_accuracy": 0.7712,
        "seconds": 9000.0, "environment": {"device": "cpu"},
    }  # fmt: skip
    return Summary(**{**values, **changes})


@pytest.fixture
def runs(monkeypatch):
    """The configurations that would have been run."""
    seen = []

    def run(config, resume, tell, finish, progress):
        assert resume == "auto"
        assert progress
        tell("a line")
        seen.append(config)
        config.out.mkdir(parents=True, exist_ok=True)
        if imagenet.rank_of_environment()[0] == 0:
            finish(summary())

    monkeypatch.setattr(imagenet, "run_pruning", run)
    return seen


def call(tmp_path, *arguments):
    return main([*arguments, "--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")])


def line_of(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def table(tmp_path):
    return (tmp_path / "results" / "imagenet.md").read_text(encoding="utf-8")


def test_every_recipe_gets_a_row_once(runs, tmp_path, capsys):
    assert call(tmp_path, "--data", "/imagenet", "--recipes", HEADLINE) == 0
    (config,) = runs
    recipe = load(HEADLINE)
    assert {key: getattr(config, key) for key in recipe.settings} == {**recipe.settings, "data": "/imagenet"}
    assert config.out == tmp_path / "work" / HEADLINE
    (row,) = read_rows(tmp_path / "results")
    assert (row["dry_run"], row["case"], row["ranks"], row["dtype"]) == (False, HEADLINE, 1, "float32")
    assert row["published"] == dataclasses.asdict(recipe.published)
    assert set(environment("cpu")) <= set(row)
    assert json.loads((config.out / "summary.json").read_text(encoding="utf-8"))["macs_after"] == 4_712_000_000
    # On another disk and in smaller passes it is the same run, and all the others are still missing.
    assert call(tmp_path, "--data", "/elsewhere", "--batch", "32", "--workers", "8", "--no-compile") == 0
    assert f"{HEADLINE}: it has a row" in capsys.readouterr().out
    assert [config.out.name for config in runs[1:]] == [name for name in names() if name != HEADLINE]
    assert len(read_rows(tmp_path / "results")) == len(names())


def test_the_table_has_published_and_measured_side_by_side(runs, tmp_path):
    assert call(tmp_path, "--recipes", HEADLINE) == 0
    cells = line_of(table(tmp_path), HEADLINE)
    assert cells[:-1] == [
        HEADLINE, "4.70 of 7.80", "4.71 of 7.80", "3.12e7 of 4.45e7", "3.13e7 of 4.45e7", "22.63", "22.63", "22.65",
        "22.88", "2.5",
    ]  # fmt: skip
    assert cells[-1].startswith("1 × ")
    assert line_of(table(tmp_path), "resnet50-56") == [
        "resnet50-56", "1.34 of 4.09", "", "0.79e7 of 2.56e7", "", "23.90", "", "28.31", "", "", "not run here",
    ]  # fmt: skip
    assert line_of(table(tmp_path), "resnet50-modern-50")[1:] == [*[""] * 9, "not run here"]


def test_the_newest_row_counts(runs, tmp_path):
    assert call(tmp_path, "--recipes", HEADLINE) == 0
    (row,) = read_rows(tmp_path / "results")
    newer = {**row, "top1_error": 11.11, "time": "2999-01-01"}
    for rows in ([row, newer], [newer, row]):
        assert line_of(markdown(rows), HEADLINE)[8] == "11.11"
    assert line_of(markdown([row, {**newer, "dry_run": True}, {**newer, "suite": "frontier"}]), HEADLINE)[8] == "22.88"


def test_a_dry_run_stays_out_of_the_table(runs, tmp_path, capsys):
    assert call(tmp_path, *DRY, "--recipes", HEADLINE) == 0
    (config,) = runs
    assert (config.data, config.weights, config.steps, config.every, config.total_epochs) == (
        "synthetic",
        None,
        2,
        1,
        2,
    )
    (row,) = read_rows(tmp_path / "results")
    assert row["dry_run"]
    assert "a dry run: not in the table" in capsys.readouterr().out
    assert not (tmp_path / "results" / "imagenet.md").exists()
    assert call(tmp_path, "--table") == 0
    assert line_of(table(tmp_path), HEADLINE)[-1] == "not run here"
    assert call(tmp_path, "--recipes", HEADLINE) == 0  # and it stands in no real run's way
    assert len(runs) == 2
    assert call(tmp_path, *DRY, "--recipes", HEADLINE) == 0
    assert len(runs) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"data": "synthetic"},
        {"steps_limit": 100},
        {"weights": None},
        {"image_size": 128},
        {"global_batch": 512},
    ],
)
def test_what_makes_a_dry_run(arguments):
    recipe = load(HEADLINE)
    assert point_of(recipe, arguments, Path("work")).row["dry_run"]
    assert not point_of(recipe, {}, Path("work")).row["dry_run"]
    same = {key: recipe.settings[key] for key in arguments if key in recipe.settings and key != "weights"}
    assert not point_of(recipe, {**same, "batch": 2, "compile": True}, Path("work")).row["dry_run"]


def test_other_settings_are_another_run(runs, tmp_path):
    row = point_of(load(HEADLINE), {}, tmp_path).row
    stored = json.loads(json.dumps(row))
    assert imagenet.finished([stored], row)
    changed = {**stored, "settings": {**stored["settings"], "steps": 51}}
    assert not imagenet.finished([changed], row)
    smaller, larger, noise = (
        point_of(load(HEADLINE), given, tmp_path).row
        for given in ({"global_batch": 128}, {"global_batch": 512}, {"data": "synthetic"})
    )
    assert not imagenet.finished([smaller], larger)
    assert not imagenet.finished([noise], row)


def test_units():
    found = measured(summary())
    assert found["gflops"] == 4.712
    assert found["top1_error_before"] == pytest.approx(22.626)
    assert found["top1_error"] == pytest.approx(22.88)
    assert found["top1_error_cut"] == 50.0
    assert found["hours"] == 2.5


def test_one_that_fails_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    def run(config, *_, finish, **__):
        if config.out.name == HEADLINE:
            raise TaylorError("diverged")
        config.out.mkdir(parents=True)
        finish(summary())

    monkeypatch.setattr(imagenet, "run_pruning", run)
    assert call(tmp_path, "--recipes", HEADLINE, "resnet50-91") == 1
    assert f"{HEADLINE} FAILED: diverged" in capsys.readouterr().err
    assert [row["case"] for row in read_rows(tmp_path / "results")] == ["resnet50-91"]


def test_ctrl_c_says_how_to_go_on(monkeypatch, tmp_path, capsys):
    def run(*_, **__):
        raise imagenet.RunInterruptedError("interrupted")

    monkeypatch.setattr(imagenet, "run_pruning", run)
    assert call(tmp_path, "--recipes", HEADLINE) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert read_rows(tmp_path / "results") == []


def test_bad_options(tmp_path, capsys):
    for arguments, message in (
        (("--recipes", "resnet101-76"), "invalid choice: 'resnet101-76'"),
        (("--weights", "w.pt"), "wanted none, got 'w.pt'"),
    ):
        with pytest.raises(SystemExit):
            call(tmp_path, *arguments)
        assert message in capsys.readouterr().err
    assert call(tmp_path, "--batch", "0") == 2
    assert "batch: wanted a number of at least 1, got 0" in capsys.readouterr().err


def test_another_rank_writes_nothing(runs, tmp_path, monkeypatch, capsys):
    for rank in (1, 0):
        launch = Launch(torch.device("cpu"), rank, 2)
        monkeypatch.setattr(imagenet, "launched", lambda device, launch=launch: nullcontext(launch))
        monkeypatch.setattr(imagenet, "rank_of_environment", lambda rank=rank: (rank, 2))
        assert call(tmp_path, "--recipes", HEADLINE) == 0
        assert (tmp_path / "results").exists() == (rank == 0)
        assert (f"{HEADLINE}: ResNet-101" in capsys.readouterr().out) == (rank == 0)
    assert [row["ranks"] for row in read_rows(tmp_path / "results")] == [2]
    assert len(runs) == 2


def test_the_table_in_the_tree_is_that_of_its_rows():
    assert (RESULTS / "imagenet.md").read_text(encoding="utf-8") == markdown(read_rows(RESULTS))

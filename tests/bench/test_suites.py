from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from taylor_cuda.bench import __main__ as command
from taylor_cuda.bench import check as promises
from taylor_cuda.bench.check import THRESHOLDS, Threshold, judge, needed
from taylor_cuda.bench.environment import ROOT
from taylor_cuda.bench.race import Key, Options
from taylor_cuda.bench.report import markdown
from taylor_cuda.bench.rows import check_row, read_rows
from taylor_cuda.bench.suites import entries, graph, network, networks, planner
from tests.bench.test_rows import make_row

QUICK = Options(quick=True, seconds=0.01)


def run_bench(*arguments, module="taylor_cuda.bench"):
    # One thread: on a busy machine two of them wait for each other, and nothing here is about speed.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command_line = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command_line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_a_quick_run_writes_whole_rows_and_a_second_appends(tmp_path):
    """Tiny shapes through everything: command line, check, rounds, rows, table."""
    quick = ("--quick", "--suite", "scoring", "--results", tmp_path, "--seconds", 0.01)
    done = run_bench(*quick)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "cpu" / "scoring.jsonl"
    first = path.read_bytes()
    rows = read_rows(tmp_path)
    assert len(first.splitlines()) == len(rows)
    races = {}
    for row in rows:
        check_row(row)
        assert (row["device"], row["quick"]) == ("cpu", True)
        races.setdefault((row["op"], row["case"], row["dtype"], row["layout"]), {})[row["provider"]] = row
    for race in races.values():
        ours, peer = race["ours:native"], race["torch"]
        assert ours["peer"] == "torch"
        assert ours["ratio"] == pytest.approx(peer["median_us"] / ours["median_us"], rel=1e-5)
        assert "torch.dot" in ours["ratios"]
        assert peer["ratio"] is None
    assert {key[0] for key in races} >= {"channel_importance", "channel_sums", "weight_importance"}
    assert {key[3] for key in races} == {"nchw", "channels_last", "tokens", "rows", "parameters"}
    command._run([entry for entry in entries(QUICK) if entry.key.layout == "rows"], QUICK, tmp_path, math.inf)
    assert path.read_bytes().startswith(first)
    assert len(path.read_bytes()) > len(first)
    assert len({row["run_id"] for row in read_rows(tmp_path)}) == 2


def test_a_wrong_kernel_fails_the_command_and_leaves_no_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "taylor_cuda.bench.suites.scoring.our_op", lambda op: lambda inputs: inputs[0].sum((0, 2, 3)).square()
    )
    chosen = [entry for entry in entries(QUICK) if entry.key.op == "channel_importance" and entry.key.layout == "nchw"]
    rows, wrong = command._run(chosen[:1], QUICK, tmp_path, math.inf)
    assert wrong
    assert rows == []
    assert read_rows(tmp_path) == []
    assert "WRONG, not timed" in capsys.readouterr().err


def test_pytest_benchmark_runs_the_same_cases(tmp_path):
    pytest.importorskip("pytest_benchmark")
    report = tmp_path / "report.json"
    options = ("bench", "-q", "-p", "no:cacheprovider", "--benchmark-only", f"--benchmark-json={report}")
    done = run_bench(*options, "-k", "rows or tiny-readers", module="pytest")
    assert done.returncode == 0, done.stdout
    benchmarks = json.loads(report.read_text())["benchmarks"]
    assert {one["extra_info"]["provider"] for one in benchmarks} >= {"ours:native", "torch", "torch.dot"}
    for one in benchmarks:
        row = one["extra_info"]
        check_row(row)
        assert row["median_us"] == pytest.approx(one["stats"]["median"] * 1e6, rel=1e-5)


@pytest.mark.parametrize(
    "options", [Options(), Options(quick=True), Options(device="cuda")], ids=["cpu", "quick", "cuda"]
)
def test_every_race_has_a_key_of_its_own_and_names_its_providers(options):
    found = entries(options)
    assert len({entry.key for entry in found}) == len(found)
    assert all(any(name.startswith("ours") for name in entry.providers) for entry in found)
    assert [entry.priority for entry in found] == sorted(entry.priority for entry in found)


def test_a_built_race_has_the_providers_that_were_announced():
    for entry in entries(QUICK):
        if entry.key.suite == "scoring":
            race = entry.build(entry.key)
            there = [provider.name for provider in race.providers] + [name for name, _ in race.skipped]
            assert sorted(there) == sorted(entry.providers)


def test_every_promise_is_about_a_race_and_a_peer_that_exist():
    found = {entry.key: entry for entry in entries(Options())}
    for threshold in THRESHOLDS:
        assert threshold.key in found
        assert threshold.peer is None or threshold.peer in found[threshold.key].providers
    assert {entry.key for entry in needed(list(found.values()))} == {threshold.key for threshold in THRESHOLDS}


def test_the_promised_figures():
    """The issue's numbers, written out again."""
    asked = {(one.key.op, one.key.case, one.key.layout, one.peer): (one.least, one.most_ms) for one in THRESHOLDS}
    shape, within = "64x256x28x28", pytest.approx(1 / 1.3)
    for layout in ("nchw", "channels_last"):
        assert asked["channel_importance", shape, layout, "torch"][0] == 3.5
        assert asked["channel_importance", shape, layout, "torch.dot"][0] == within
    for side in ("readers", "writers"):
        assert asked["weight_importance", f"resnet50:{side}", "parameters", "torch.dot"][0] == within
        assert asked["weight_importance", f"resnet50:{side}", "parameters", "torch"][0] == 1.3
    assert asked["taylor_fo", "resnet50", "parameters", "torch-pruning"][0] == 15
    assert asked["plan", "resnet101", "parameters", None][1] == 50
    assert asked["trace", "resnet50", "parameters", None][1] == 1000
    assert asked["trace", "densenet201", "parameters", None][1] == 3000


def test_verdicts():
    key = Key("scoring", "channel_importance", "2x3x4x4", "float32", "nchw")
    fast = make_row(ratios={"torch": 4.0}, median_us=900.0)
    for threshold, kept in (
        (Threshold(key, "torch", 3.5), True),
        (Threshold(key, "torch", 4.5), False),
        (Threshold(key, "torch.dot", 0.1), False),  # a peer that wasn't there proves nothing
        (Threshold(key, most_ms=1.0), True),
        (Threshold(key, most_ms=0.8), False),
        (Threshold(Key("graph", "trace", "resnet50"), most_ms=1.0), False),
    ):
        assert threshold.verdict([fast])[0] is kept
    activations = make_row(provider="ours:activations", ratios={"torch": 4.0})
    assert not Threshold(key, "torch", 1.0).verdict([activations])[0]


@pytest.mark.parametrize(("verdicts", "code"), [([(True, "good")], 0), ([(True, "good"), (False, "slow")], 1)])
def test_the_exit_code_of_a_check(verdicts, code, monkeypatch, capsys):
    monkeypatch.setattr(command, "needed", lambda _chosen: [])
    monkeypatch.setattr(command, "judge", lambda _rows: verdicts)
    assert command.main(["--quick", "--check"]) == code
    assert ("MISSED  slow" in capsys.readouterr().out) == bool(code)


def test_nothing_begins_that_the_time_limit_would_cut(monkeypatch, capsys):
    assert command.main(["--quick", "--suite", "scoring", "--time-limit", "0.001"]) == 0
    assert "left out, the time limit is near" in capsys.readouterr().out


def test_a_gpu_that_is_not_there_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--device", "cuda"]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_the_table_shows_the_newest_rows_and_no_quick_ones():
    rows = [
        make_row(run_id="old", median_us=9999.0, ratios={"torch": 1.0}),
        make_row(run_id="new", time="2026-11-21T10:00:00+00:00", ratios={"torch": 4.0, "torch.dot": 0.9}),
        make_row(run_id="new", time="2026-11-21T10:00:00+00:00", provider="torch", ratio=None, peer=None),
        make_row(suite="step", quick=True, ratios={}),
    ]
    text = markdown(rows)
    assert (
        "| channel_importance | 2x3x4x4 | float32 | nchw | ours:native |  | 2.0 µs | 0 | 2% | 4.00× | 0.90× |" in text
    )
    assert "9999" not in text
    assert "step" not in text
    assert "run new" in text


@pytest.mark.parametrize("suite", [graph, network])
def test_without_torch_pruning_the_peer_is_skipped_with_the_reason(suite, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setattr(suite, "installed", lambda _name: None)
    entry = next(entry for entry in suite.entries(QUICK) if "torch-pruning" in entry.providers)
    race = entry.build(entry.key)
    assert ("torch-pruning", "not installed") in race.skipped
    assert "torch-pruning" not in [provider.name for provider in race.providers]


def test_without_torchvision_its_networks_are_left_out_and_ours_are_not(monkeypatch, capsys):
    monkeypatch.setattr(networks, "installed", lambda _name: None)
    chosen = [entry for entry in entries(Options()) if entry.key.case == "densenet201"]
    rows, wrong = command._run(chosen, QUICK, None, math.inf)
    assert (rows, wrong) == ([], False)
    assert "left out, densenet201 is torchvision's, which is not installed" in capsys.readouterr().out
    assert networks.make("resnet18")(networks.images(2, 32)).shape == (2, 1000)


@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_our_residual_networks_are_torchvisions(network):
    models = pytest.importorskip("torchvision.models")
    ours, theirs = networks.make(network).eval(), getattr(models, network)(weights=None).eval()
    theirs.load_state_dict(ours.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    x = networks.images(1, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_a_plan_over_budget_or_with_a_wrong_cost_is_refused():
    pytest.importorskip("torchvision")
    entry = next(entry for entry in planner.entries(QUICK))
    provider = entry.build(entry.key).providers[0]
    plan = provider.run(None)
    assert 0.9 < provider.check(plan, 0) <= 1
    wrong_cost = copy.copy(plan)
    object.__setattr__(wrong_cost, "cost", type(plan.cost)(plan.cost.macs - 1, plan.cost.params, plan.cost.channels))
    assert provider.check(wrong_cost, 0) == math.inf


def test_scores_and_groups_that_are_off_are_refused():
    pytest.importorskip("torchvision")
    entry = next(entry for entry in network.entries(QUICK) if entry.key.op == "taylor_fo")
    race = entry.build(entry.key)
    ours = race.providers[0]
    scores = ours.run(None)
    assert ours.check(scores, 0) <= 1
    name = next(iter(scores))
    for wrong in (scores[name].roll(1), scores[name] * (1 + 1e-3)):
        assert ours.check(scores | {name: wrong}, 0) > 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_quick_run_on_a_gpu(tmp_path):
    done = run_bench("--device", "cuda", "--quick", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path)
    for row in rows:
        check_row(row)
    assert {row["timer"] for row in rows} == {"graph", "eager"}
    assert {row["provider"] for row in rows} >= {"ours:cuda", "ours:triton", "torch"}
    assert all(row["driver"] for row in rows)


def test_judge_takes_the_promises_of_its_module():
    assert len(judge([])) == len(promises.THRESHOLDS)
    assert not any(kept for kept, _ in judge([]))

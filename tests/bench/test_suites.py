from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from taylor_cuda.bench import command
from taylor_cuda.bench.__main__ import main
from taylor_cuda.bench.environment import ROOT
from taylor_cuda.bench.race import Options
from taylor_cuda.bench.rows import check_row, read_rows
from taylor_cuda.bench.suites import batch_norm_relu, entries, graph, network, networks, planner, rank, relu

QUICK = Options(quick=True, seconds=0.01)


def run_bench(*arguments, module="taylor_cuda.bench"):
    # One thread: on a busy machine two of them wait for each other, and nothing here is about speed.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)  # beside which pytest-benchmark measures nothing
    command_line = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command_line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.usefixtures("one_thread")
def test_a_quick_run_writes_whole_rows_and_a_second_appends(tmp_path):
    """Tiny shapes through everything: command line, check, rounds, rows, table."""
    assert main(["--quick", "--suite", "scoring", "--results", str(tmp_path), "--seconds", "0.01"]) == 0
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
    command.measure([entry for entry in entries(QUICK) if entry.key.layout == "rows"], QUICK, tmp_path, math.inf)
    assert path.read_bytes().startswith(first)
    assert len(path.read_bytes()) > len(first)
    assert len({row["run_id"] for row in read_rows(tmp_path)}) == 2


def test_a_wrong_kernel_fails_the_command_and_leaves_no_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "taylor_cuda.bench.suites.scoring.our_op", lambda op: lambda inputs: inputs[0].sum((0, 2, 3)).square()
    )
    chosen = [entry for entry in entries(QUICK) if entry.key.op == "channel_importance" and entry.key.layout == "nchw"]
    rows, wrong = command.measure(chosen[:1], QUICK, tmp_path, math.inf)
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
        if entry.key.suite in ("scoring", "relu", "rank", "batch_norm_relu", "conv", "gather", "modes", "throughput"):
            race = entry.build(entry.key)
            there = [provider.name for provider in race.providers] + [name for name, _ in race.skipped]
            assert sorted(there) == sorted(entry.providers)


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
    rows, wrong = command.measure(chosen, QUICK, None, math.inf)
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


def test_a_relu_that_loses_a_sum_or_a_gradient_is_refused():
    entry = next(entry for entry in relu.entries(QUICK) if entry.key.op.endswith(":skip"))
    race = entry.build(entry.key)
    apart = next(provider for provider in race.providers if provider.name == relu.APART)
    given = race.inputs[0]

    def result():
        with apart.context():
            return apart.run(given)

    assert apart.check(result(), 0) <= 1
    apart.run(given)
    assert apart.check(result(), 0) <= 1  # sums start at zero again
    for broken in (given.sums, given.skip_sums):
        gx, _ = result()
        broken[0, 0] = math.nan
        assert not apart.check((gx, given), 0) <= 1
    gx, _ = result()
    assert apart.check((gx.clone(memory_format=torch.channels_last), given), 0) == math.inf
    gx[0, 0, 0, 0] += 1
    assert apart.check((gx, given), 0) == math.inf
    alone = next(provider for provider in race.providers if provider.name == relu.ALONE)
    assert alone.check(alone.run(given), 0) == 0


def test_a_mask_with_one_score_too_few_is_refused():
    (entry,) = rank.entries(QUICK)
    race = entry.build(entry.key)
    for provider in race.providers:
        with provider.context():
            mask = provider.run(race.inputs[0])
        assert provider.check(mask, 0) == 0
        mask[mask.nonzero()[0]] = False
        assert provider.check(mask, 0) == math.inf


@pytest.mark.parametrize("entry", batch_norm_relu.entries(QUICK), ids=lambda entry: entry.key.op)
def test_a_normalisation_with_a_wrong_gradient_or_sum_is_refused(entry):
    race = entry.build(entry.key)
    backward = "back" in entry.key.op
    with_sums = next(provider for provider in race.providers if provider.name == batch_norm_relu.WITH_SUMS)
    mine = dataclasses.replace(
        with_sums,
        name="ours",
        run=lambda given: batch_norm_relu.pass_of(batch_norm_relu.ours, given, backward=backward),
    )
    for provider in (*race.providers, mine):
        with provider.context():
            tensors, given = provider.run(race.inputs[0])
        assert provider.check((tensors, given), 0) <= 1, provider.name
        for number, tensor in enumerate(tensors):
            wrong = [*tensors[:number], tensor.flip(1) if tensor.dim() > 1 else tensor.flip(0), *tensors[number + 1 :]]
            assert provider.check((wrong, given), 0) > 1, provider.name
        if backward and provider.name != "torch":
            given.sums[1:].zero_()
            assert provider.check((tensors, given), 0) > 1, provider.name

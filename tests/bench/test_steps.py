"""Whole training steps: what is compared, what memory is counted, what time is split into."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch._C._autograd import DeviceType

from taylor_cuda.bench import command
from taylor_cuda.bench.environment import environment
from taylor_cuda.bench.measure import Ceilings, check, run_race
from taylor_cuda.bench.profile import CLASSES, by_class
from taylor_cuda.bench.race import Key, Options, Provider, Race
from taylor_cuda.bench.rows import check_row
from taylor_cuda.bench.suites import entries, step
from taylor_cuda.bench.suites.networks import make
from taylor_cuda.bench.training import RepeatedStep, examples
from tests.bench.pretended import Pretended, install

QUICK = Options(quick=True, seconds=0.01)


def race_of(op, options=QUICK):
    (entry,) = [entry for entry in step.entries(options) if entry.key.op == op]
    race = entry.build(entry.key)
    assert tuple(provider.name for provider in race.providers) == tuple(entry.providers)
    return race


def first_error(provider):
    with provider.context():
        loss = provider.run(None)
    return provider.check(loss, 0)


@pytest.mark.parametrize("op", [op for op in step.CRITERIA if op != "split"])
def test_every_step_moves_the_weights_as_the_plain_one(op, monkeypatch):
    if ":compiled" in op:
        # What a compiler does is not at stake here, and takes long.
        monkeypatch.setattr(torch, "compile", lambda model, backend: model)
    race = race_of(op)
    assert len(race.providers) == 1 + len(step.CRITERIA[op])
    for provider in race.providers:
        assert first_error(provider) <= 1
        assert provider.check(provider.run(None), 0) > 1  # the second step moves them on


def test_gates_sum_the_squares_of_each_steps_own_gradient():
    repeated = RepeatedStep(make("tiny"), examples(2, 64, QUICK), QUICK).gated()
    repeated.optimizer.param_groups[0]["lr"] = 0.0
    repeated()
    first = torch.cat([sums.flatten() for sums in repeated.gates.window])
    assert (first > 0).any()
    repeated()
    torch.testing.assert_close(torch.cat([sums.flatten() for sums in repeated.gates.window]), 2 * first)


def test_compiled_steps_share_a_network_where_scores_leave_it_alone(monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda model, backend: made.append(model) or model)
    race_of("training_step:compiled")
    assert len(made) == 1
    made.clear()
    race_of("training_step:compiled_activations")
    assert len(made) == 3


def test_the_split_is_in_the_rows_and_its_classes_have_what_they_should():
    race = race_of("split")
    raced = run_race(race, QUICK, Ceilings(10.0, 0.5), environment("cpu"))
    assert raced.left_out == raced.broken == []
    by_provider = {row["provider"]: row for row in raced.rows}
    for row in raced.rows:
        check_row(row)
        assert tuple(row["split"]) == CLASSES
        assert all(row["split"][name] > 0 for name in ("conv", "batch_norm", "relu", "add", "optimizer", "other"))
    assert by_provider["torch"]["split"]["scoring"] == 0
    assert by_provider["ours:taylor_fo"]["split"]["scoring"] > 0
    assert by_provider["ours:taylor_fg"]["split"]["scoring"] > 0


def event(name, own=0.0, kernels=(), parent=None, device=DeviceType.CPU):
    return SimpleNamespace(
        name=name,
        self_cpu_time_total=own,
        kernels=[SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels],
        cpu_parent=parent,
        device_type=device,
        time_range=SimpleNamespace(elapsed_us=lambda: own),
    )


def test_kernels_belong_to_the_ops_that_launched_them():
    optimizer = event("Optimizer.step#SGD.step", kernels=[("Optimizer.step#SGD.step", 500.0)])
    scoring = event("scoring", kernels=[("scoring", 70.0)])
    events = [
        optimizer,
        scoring,
        event("aten::cudnn_convolution", kernels=[("sm90_xmma_fprop", 30.0)]),
        event("aten::convolution_backward", kernels=[("dgrad", 20.0), ("wgrad", 25.0)]),
        event("aten::cudnn_batch_norm", kernels=[("bn_fw_tr", 11.0)]),
        event("aten::clamp_min_", kernels=[("vectorized_elementwise", 5.0)]),
        event("aten::threshold_backward", kernels=[("threshold", 6.0)]),
        event("aten::add_", kernels=[("vectorized_elementwise", 4.0)]),
        event("aten::add_", kernels=[("multi_tensor_apply", 9.0)], parent=optimizer),
        event("aten::square", kernels=[("vectorized_elementwise", 2.0)], parent=scoring),
        event("taylor_cuda_native::accumulate_channel_sums", kernels=[("column_sums", 3.0)]),
        event("aten::copy_", kernels=[("direct_copy", 8.0)]),
        # on the device: all of the above, one kernel that nobody is known to have launched, and shadows of the ranges
        event("everything above", own=123.0, device=DeviceType.CUDA),
        event("memset", own=7.0, device=DeviceType.CUDA),
        event("scoring", own=70.0, device=DeviceType.CUDA),
        event("Optimizer.step#SGD.step", own=500.0, device=DeviceType.CUDA),
    ]
    expected = {"conv": 75, "batch_norm": 11, "relu": 11, "add": 4, "optimizer": 9, "scoring": 5, "other": 15}
    assert by_class(events, on_gpu=True) == expected


def test_memory_is_what_a_step_takes_and_what_it_leaves_behind(monkeypatch):
    memory = install(monkeypatch)
    calls = []

    def run(_inputs):
        calls.append(None)
        if len(calls) == 1:
            memory.hold(300)  # gradients and momenta, once
        memory.pass_through(5000)
        return 0.0

    provider = Provider("ours", run, lambda result, _: result, built_bytes=1000)
    found = check(Race(Key("step", "op", "case"), [provider]), provider, Pretended(quick=True))
    assert (found.peak_bytes, found.held_bytes) == (5000, 1300)
    assert check(Race(Key("step", "op", "case"), [provider]), provider, QUICK).held_bytes is None


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_what_making_a_step_takes_is_counted(monkeypatch):
    memory = install(monkeypatch)
    start = step.RepeatedStep.__init__

    def counted(self, *arguments):
        memory.hold(1000)
        start(self, *arguments)

    monkeypatch.setattr(step.RepeatedStep, "__init__", counted)
    race = race_of("training_step", Pretended(quick=True))
    assert [provider.built_bytes for provider in race.providers] == [1000] * 4


def test_two_hundred_pairs_whatever_they_take(monkeypatch):
    assert step.PAIRS >= 200
    key = Key("step", "training_step", step.ON_A_GPU, "bfloat16", "channels_last")
    made = SimpleNamespace(key=key, provider=lambda criterion: Provider(str(criterion), id, lambda *_: 0.0))
    monkeypatch.setattr(step, "Steps", lambda *_: made)
    monkeypatch.setattr(step, "trace", lambda *_: None)
    monkeypatch.setattr(step, "make", lambda _network: None)
    monkeypatch.setattr(step, "examples", lambda *_: None)
    race = step.build(key, "resnet50", 256, 224, Options("cuda"))
    assert (race.least, race.rounds) == (step.PAIRS, step.PAIRS)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_every_branch_of_a_run_on_a_gpu(monkeypatch, capsys):
    """Captured and eager, memory and events, on a GPU that is pretended; compilers left out."""
    install(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda model, backend=None, **_: model)
    monkeypatch.setattr(command, "measure_ceilings", lambda _options: Ceilings(10.0, 0.5))
    options = Pretended(quick=True, seconds=0.001)
    # What a compiled step is has tests of its own.
    chosen = [entry for entry in entries(options) if entry.key.suite != "profile" and ":compiled" not in entry.key.op]
    suites = {"scoring", "relu", "batch_norm_relu", "rank", "network", "step", "conv", "gather", "modes", "curvature"}
    suites |= {"throughput"}
    assert {entry.key.suite for entry in chosen} == suites
    seen, kept = set(), []
    for entry in chosen:
        # one of each kind is enough
        if (entry.key.suite, entry.key.op) not in seen:
            seen.add((entry.key.suite, entry.key.op))
            kept.append(entry)
    rows, wrong = command.measure(kept, options, None, math.inf)
    assert not wrong
    assert {row["timer"] for row in rows} == {"graph", "eager"}
    assert "ours:cuda" in {row["provider"] for row in rows}
    for row in rows:
        check_row(row)
        assert row["peak_bytes"] == 0
        assert row["held_bytes"] == 0
    assert {row["op"] for row in rows} == {op for _, op in seen}
    command.report(rows, options, check=False)
    assert "PREFERENCE_OF_OP" in capsys.readouterr().out

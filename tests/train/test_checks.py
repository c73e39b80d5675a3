import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from taylor_cuda.graph import trace
from taylor_cuda.importance import Importance
from taylor_cuda.planning import plan
from taylor_cuda.study import compare
from taylor_cuda.surgery import cut
from taylor_cuda.train import latency
from taylor_cuda.train.checks import CutWitness, SourceComparison, oracle_agreement, scoring_cost
from taylor_cuda.train.latency import latency_ms
from taylor_cuda.train.models import DigitsResNet

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(8, 1, 8, 8, generator=GENERATOR)
LABELS = torch.randint(0, 10, (8,), generator=GENERATOR)


def small_net():
    torch.manual_seed(0)
    return DigitsResNet(width=8)


def random_plan(model, groups, channels, seed=0):
    scores = Importance(model, groups, "random", seed=seed).scores()
    return plan(model, groups, scores, {"channels": channels})


def test_witness_agrees_with_real_cuts_one_after_another():
    model = small_net()
    groups = trace(model, IMAGES)
    witness = CutWitness(small_net(), groups, IMAGES)
    for channels in (0.8, 0.5):
        with torch.no_grad():  # trained in between: the witness takes the weights over
            for value in model.parameters():
                value.add_(0.01 * torch.randn_like(value))
        decided = random_plan(model, groups, channels)
        witness.before(model)
        cut(model, groups, decided, verify=False)
        difference, scale = witness.after(model, dict(decided.keep))
        assert difference <= 1e-5 * scale
        assert scale > 0
        assert model.training


def test_witness_sees_a_cut_that_is_wrong():
    model = small_net()
    groups = trace(model, IMAGES)
    witness = CutWitness(small_net(), groups, IMAGES)
    decided = random_plan(model, groups, 0.7)
    witness.before(model)
    cut(model, groups, decided, verify=False)
    with torch.no_grad():
        model.stage2[0].bn1.weight[0] += 0.1
    difference, scale = witness.after(model, dict(decided.keep))
    assert difference > 1e-4 * scale


def test_witness_catches_up_with_an_earlier_run():
    model = small_net()
    groups = trace(model, IMAGES)
    late = CutWitness(small_net(), groups, IMAGES)
    first = random_plan(model, groups, 0.8)
    cut(model, groups, first)
    late.follow(first.keep)
    second = random_plan(model, groups, 0.6)
    late.before(model)
    cut(model, groups, second)
    difference, scale = late.after(model, dict(second.keep))
    assert difference <= 1e-5 * scale


def train_steps(model, comparison, steps=3):
    for step in range(steps):
        F.cross_entropy(model(IMAGES + step), LABELS).backward()
        comparison.update()
        model.zero_grad()


def test_sources_agree():
    model = small_net()
    comparison = SourceComparison(model, trace(model, IMAGES))
    assert comparison.greatest_difference() is None
    train_steps(model, comparison)
    assert 0 < comparison.greatest_difference() < 1e-4
    comparison.close()
    assert not model._forward_pre_hooks


def test_sources_that_disagree_are_seen():
    model = small_net()
    comparison = SourceComparison(model, trace(model, IMAGES))
    train_steps(model, comparison)
    comparison._estimators[0]._window[3] *= 1.01
    assert comparison.greatest_difference() == pytest.approx(0.01 / 1.01, rel=0.01)
    comparison.close()


def test_sources_that_cannot_be_compared_say_why():
    model = small_net()
    model.stage2[1].requires_grad_(False)
    comparison = SourceComparison(model, trace(model, IMAGES))
    train_steps(model, comparison)
    assert comparison.greatest_difference() is None
    assert "frozen parameters" in comparison.reason
    assert not model._forward_pre_hooks


def test_scoring_cost_is_what_scoring_adds(monkeypatch):
    model = small_net()
    groups = trace(model, IMAGES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    update = Importance.update

    def slow(self, grad_scale=1.0):
        time.sleep(0.25)
        torch.rand(1)  # as dropout would
        update(self, grad_scale)

    monkeypatch.setattr(Importance, "update", slow)
    numbers = torch.get_rng_state()
    cost = scoring_cost(model, groups, (IMAGES, LABELS), "taylor_fo", pairs=5)
    assert cost.step_ms > 0
    # A quarter of a second on top of a step of a few milliseconds, however busy the machine is.
    assert cost.percent * cost.step_ms / 100 > 200
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())
    assert torch.equal(torch.get_rng_state(), numbers)


def test_oracle_agreement_is_that_of_compare():
    model = small_net()
    groups, batches = trace(model, IMAGES), [(IMAGES, LABELS)]
    found = oracle_agreement(model, groups, batches, "taylor_fg")
    expected = compare(model, groups, F.cross_entropy, batches, ["taylor_fg", "magnitude"], budgets={})
    assert found.estimate == expected["taylor_fg"].agreement.overall.spearman
    assert found.magnitude == expected["magnitude"].agreement.overall.spearman
    assert found.note is None
    assert oracle_agreement(model, groups, batches, "magnitude").estimate == found.magnitude


def test_oracle_agreement_says_why_there_is_none():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 10))
    found = oracle_agreement(model, trace(model, IMAGES), [(IMAGES, LABELS)], "bn_scale")
    assert found.estimate is None
    assert found.magnitude is not None
    assert "no normalisation with a scale" in found.note
    assert oracle_agreement(model, trace(model, IMAGES), [], "magnitude").note == (
        "oracle: batches: wanted at least one example, got none"
    )


def test_oracle_agreement_can_be_stopped():
    def stop():
        raise KeyboardInterrupt

    model = small_net()
    with pytest.raises(KeyboardInterrupt):
        oracle_agreement(model, trace(model, IMAGES), [(IMAGES, LABELS)], "taylor_fo", check=stop)
    assert model.training


class Sleeper(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.calls = seconds, 0

    def forward(self, x):
        assert not self.training
        assert x.shape == (4, 2, 3)
        self.calls += 1
        time.sleep(self.seconds)
        return x


def test_latency_is_measured_in_turns_and_leaves_modes_alone():
    models = {"quick": Sleeper(0.002).train(), "slow": Sleeper(0.06).eval()}
    found = latency_ms(models, (2, 3), 4, CPU, seconds=10, repeats=5)
    assert found["slow"] >= 60
    assert 2 <= found["quick"] < found["slow"]
    assert [model.calls for model in models.values()] == [6, 6]
    assert [model.training for model in models.values()] == [True, False]


def test_latency_stops_when_the_time_is_over():
    model = Sleeper(0.05)
    latency_ms({"model": model}, (2, 3), 4, CPU, seconds=0.0, repeats=50)
    assert model.calls == 2


def test_latency_without_memory_is_none(monkeypatch):
    def too_much(*_):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(latency, "_forward_ms", too_much)
    assert latency_ms({"model": Sleeper(0.0)}, (2, 3), 4, CPU) is None

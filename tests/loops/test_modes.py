"""``tc.Pruner`` in its three modes: the same masks, the same training, and the same network at the end."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_cuda as tc
from taylor_cuda.errors import BudgetError, InputError
from tests.loops.loop import Net, batches

EPS = torch.finfo(torch.float64).eps
HELD = ["compact", "mask"]
CRITERIA = ["taylor_fo", "taylor_fg", "taylor_weight", "taylor_output", "magnitude", "random"]


class Run:
    """One training with a pruner in it, in float64."""

    def __init__(self, mode: str, count: int = 20, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = Net().double()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        self.data = [(x.double(), y) for x, y in batches(count)]
        chosen = {"every": 3, "steps": 4, "budget": {"macs": 0.5}, **options}
        self.pruner = tc.Pruner(self.model, self.data[0][0][:2], self.optimizer, mode=mode, **chosen)
        self.losses: list[Tensor] = []
        self.plans: list[str] = []

    def train(self, begin: int = 0, end: int | None = None) -> Run:
        for x, y in self.data[begin:end]:
            outputs = self.model(x)
            loss = F.cross_entropy(outputs, y)
            self.pruner.backward(loss, outputs)
            self.optimizer.step()
            self.optimizer.zero_grad()
            plan = self.pruner.step()
            self.losses.append(loss.detach())
            self.plans += [] if plan is None else [plan.digest]
        return self

    def end(self) -> Tensor:
        self.pruner.finish()
        return self.model.eval()(self.data[0][0])


@pytest.fixture(scope="module")
def cut_runs() -> dict[str, Run]:
    return {criterion: Run("cut", criterion=criterion).train() for criterion in CRITERIA}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("mode", HELD)
def test_same_masks_same_losses_same_network(mode, criterion, cut_runs):
    expected, run = copy.deepcopy(cut_runs[criterion]), Run(mode, criterion=criterion).train()
    assert run.pruner.done
    assert run.plans == expected.plans
    assert run.pruner.history == expected.pruner.history
    assert len(expected.plans) == 4
    losses, others = torch.stack(expected.losses), torch.stack(run.losses)
    # one more rounding a step in each of a few hundred terms, magnified by training
    assert ((losses - others).abs() <= 1e5 * EPS * losses).all()
    assert run.pruner.cost == expected.pruner.cost
    widths = [p.shape for p in run.model.parameters()]
    assert widths != [p.shape for p in expected.model.parameters()]
    output = run.end()
    assert [p.shape for p in run.model.parameters()] == [p.shape for p in expected.model.parameters()]
    assert (output - expected.end()).abs().max() <= 1e6 * EPS * output.abs().max()
    assert run.pruner.cost == expected.pruner.cost
    assert run.pruner.groups.sizes() == expected.pruner.groups.sizes()
    scores = run.pruner.importance.scores()
    assert {name: score.numel() for name, score in scores.items()} == run.pruner.groups.sizes()


@pytest.mark.parametrize("mode", HELD)
def test_kept_is_a_plan_of_the_dense_model(mode):
    run = Run(mode).train(0, 9)
    dense = {group.name: group.size for group in run.pruner.groups}
    assert run.pruner.groups.sizes() == dense
    kept = run.pruner.keep
    assert any(kept[name].numel() < size for name, size in dense.items())
    twin = copy.deepcopy(run.model)
    assert torch.equal(twin.eval()(run.data[0][0]), run.model.eval()(run.data[0][0]))
    if mode == "mask":
        return
    # the compact twin is cut by the plan, and computes what it did
    groups, expected = copy.copy(run.pruner.groups), twin(run.data[0][0])
    tc.cut(twin, groups, kept)
    assert (twin(run.data[0][0]) - expected).abs().max() <= 1e4 * EPS * expected.abs().max()


@pytest.mark.parametrize("mode", HELD)
def test_training_goes_on_in_the_mode_until_it_is_finished(mode):
    run = Run(mode).train()
    width = run.model.state_dict()
    assert all(p.shape == width[name].shape for name, p in Net().named_parameters())
    momentum = run.optimizer.state[next(run.model.parameters())]["momentum_buffer"]
    assert momentum.shape == next(run.model.parameters()).shape
    run.end()
    run.pruner.finish()
    first = next(run.model.parameters())
    assert run.optimizer.state[first]["momentum_buffer"].shape == first.shape
    assert "forward" not in vars(run.model)
    run.model.train()
    run.train(0, 2)


@pytest.mark.parametrize("mode", ["cut", *HELD])
@pytest.mark.parametrize("stop", [7, 14, 20])
def test_saving_in_the_middle_gives_the_same_bits(mode, stop):
    whole = Run(mode).train()
    if stop == 20:
        whole.pruner.finish()
    first = Run(mode).train(0, stop)
    if stop == 20:
        first.pruner.finish()
    state = {
        "pruner": copy.deepcopy(first.pruner.state_dict()),
        "model": copy.deepcopy(first.model.state_dict()),
        "optimizer": copy.deepcopy(first.optimizer.state_dict()),
    }
    second = Run(mode)
    second.pruner.load_state_dict(state["pruner"])
    second.model.load_state_dict(state["model"])
    second.optimizer.load_state_dict(state["optimizer"])
    second.train(stop)
    assert all(torch.equal(a, b) for a, b in zip(first.losses + second.losses, whole.losses, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True))
    assert second.pruner.finished is whole.pruner.finished


def test_a_state_of_another_mode_is_refused():
    state = Run("cut").train(0, 4).pruner.state_dict()
    with pytest.raises(InputError, match="mode is 'cut' there and 'mask' here"):
        Run("mask").pruner.load_state_dict(state)


@pytest.mark.parametrize("mode", HELD)
def test_compiled_models(mode):
    plain, run = Run(mode).train(), Run(mode)
    model, run.model = run.model, torch.compile(run.model, backend="eager")
    run.train()
    assert run.plans == plain.plans
    losses, others = torch.stack(plain.losses), torch.stack(run.losses)
    assert ((losses - others).abs() <= 1e5 * EPS * losses).all()
    run.pruner.finish()
    assert [p.shape for p in model.parameters()] != [p.shape for p in Net().parameters()]


@pytest.mark.parametrize("mode", HELD)
def test_a_forward_pass_that_goes_past_it_is_noticed(mode):
    run = Run(mode)
    original = type(run.model).forward
    run.train(0, 3)
    assert run.plans

    class Elsewhere(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return original(self.model, x)

    run.model = Elsewhere(run.model)
    with pytest.raises(InputError, match="no forward pass went through it since channels were left out"):
        run.train(3, 4)


@pytest.mark.parametrize("mode", HELD)
def test_a_last_cut_that_fails_leaves_everything_as_it_ran(mode, monkeypatch):
    run = Run(mode).train()
    run.model.eval()
    expected = run.model(run.data[0][0])

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("taylor_cuda.surgery.shrink.Shrinking.apply", broken)
    with pytest.raises(KeyboardInterrupt):
        run.pruner.finish()
    assert torch.equal(run.model(run.data[0][0]), expected)
    assert not run.pruner.finished
    monkeypatch.undo()
    run.pruner.finish()
    output = run.model(run.data[0][0])
    assert (output - expected).abs().max() <= 1e4 * EPS * expected.abs().max()


@pytest.mark.parametrize("mode", HELD)
def test_an_average_of_the_weights_is_cut_at_the_end(mode):
    torch.manual_seed(0)
    run = Run(mode)
    average = copy.deepcopy(run.model)
    run.pruner = tc.Pruner(run.model, run.data[0][0][:2], run.optimizer, every=3, steps=4, mode=mode, ema=average)
    run.train()
    assert [p.shape for p in average.parameters()] == [p.shape for p in Net().parameters()]
    run.pruner.finish()
    assert [p.shape for p in average.parameters()] == [p.shape for p in run.model.parameters()]


def test_bad_input():
    with pytest.raises(InputError, match="mode: wanted one of 'cut', 'compact', 'mask', got 'zero'"):
        Run("zero")
    with pytest.raises(InputError, match="norm_term: wanted mode='cut' with it, got mode='mask'"):
        Run("mask", norm_term=True)
    with pytest.raises(BudgetError):
        Run("compact", budget={"macs": 1e-4})
    run = Run("compact").train(0, 4)
    with pytest.raises(InputError, match="finish: wanted it after the last prune step, got it after 1 of 4"):
        run.pruner.finish()

"""The loop: schedule, resume, and watching somebody else's training."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taylor_cuda as tc
from tests.importance.gated_nets import ConvBN, GatedNet, Residual, make


class Wide(GatedNet):
    """Three convolutions with channels to spare."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
            *(nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


def batches(count: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    data = []
    for _ in range(count):
        target = torch.randint(0, 4, (16,), generator=generator)
        x = torch.randn(16, 3, 8, 8, generator=generator)
        x[torch.arange(16), target % 3] += target.view(-1, 1, 1)
        data.append((x, target))
    return data


def train(model, optimizer, pruner, data) -> list[float]:
    losses = []
    for x, target in data:
        outputs = model(x)
        loss = F.cross_entropy(outputs, target)
        pruner.backward(loss, outputs)
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
        losses.append(loss.item())
    return losses


def start(seed: int = 0, **options):
    torch.manual_seed(seed)
    model = Wide()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = tc.Pruner(model, torch.zeros(2, 3, 8, 8), optimizer, **{"every": 3, "steps": 4, **options})
    return model, optimizer, pruner


@pytest.mark.parametrize("schedule", ["linear", "cubic"])
def test_meets_the_budget_on_schedule_and_goes_on_training(schedule: str) -> None:
    model, optimizer, pruner = start(budget={"macs": 0.5, "params": 0.6}, schedule=schedule)
    original = pruner.groups.original_macs / pruner.groups.batch_size
    parameters = sum(p.numel() for p in model.parameters())
    owned = [id(p) for p in model.parameters()]
    train(model, optimizer, pruner, batches(12))
    assert pruner.done
    assert [entry["batch"] for entry in pruner.history] == [3, 6, 9, 12]
    macs = [entry["macs"] for entry in pruner.history]
    assert macs == sorted(macs, reverse=True)
    for entry in pruner.history:
        assert entry["macs"] <= entry["budget"]["macs"] * original
    assert macs[-1] <= 0.5 * original
    assert sum(p.numel() for p in model.parameters()) <= 0.6 * parameters
    assert [id(p) for p in model.parameters()] == owned
    before = [p.detach().clone() for p in model.parameters()]
    losses = train(model, optimizer, pruner, batches(30, seed=1))
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert sum(losses[-5:]) < sum(losses[:5])
    assert pruner.step() is None


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fg", "random", "magnitude"])
def test_resume_equals_an_uninterrupted_run(criterion: str) -> None:
    data = batches(20)
    model, optimizer, pruner = start(criterion=criterion)
    train(model, optimizer, pruner, data)

    first, first_optimizer, first_pruner = start(criterion=criterion)
    train(first, first_optimizer, first_pruner, data[:8])  # in the middle of a window, after two prune steps
    saved = copy.deepcopy((first.state_dict(), first_optimizer.state_dict(), first_pruner.state_dict()))

    again, again_optimizer, again_pruner = start(seed=1, criterion=criterion)
    again_pruner.load_state_dict(saved[2])
    again.load_state_dict(saved[0])
    again_optimizer.load_state_dict(saved[1])
    train(again, again_optimizer, again_pruner, data[8:])
    assert again_pruner.history == pruner.history
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_each_prune_step_ends_a_window() -> None:
    model, optimizer, pruner = start()
    train(model, optimizer, pruner, batches(3))
    assert (pruner.prunes, pruner.importance.steps) == (1, 0)
    train(model, optimizer, pruner, batches(2))
    assert (pruner.prunes, pruner.importance.steps) == (1, 2)


def test_backward_and_update_agree() -> None:
    model, optimizer, pruner = start()
    other, other_optimizer, other_pruner = start()
    data = batches(12)
    train(model, optimizer, pruner, data)
    for x, target in data:
        F.cross_entropy(other(x), target).backward()
        other_pruner.update()
        other_optimizer.step()
        other_optimizer.zero_grad()
        other_pruner.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_an_overflowing_window_waits_for_a_good_step() -> None:
    model, _, pruner = start()
    (x, target), *_ = batches(1)
    for _ in range(3):
        pruner.backward(F.cross_entropy(model(x), target) * float("nan"))
        model.zero_grad()
        assert pruner.step() is None
    assert pruner.prunes == 0
    pruner.backward(F.cross_entropy(model(x), target))
    assert pruner.step() is not None
    assert pruner.prunes == 1


def test_bad_input_is_named_before_anything_is_done() -> None:
    model, x, _ = make(ConvBN, torch.float32)
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(tc.BudgetError, match="macs"):
        tc.Pruner(model, x, budget={"macs": 0.001})
    with pytest.raises(tc.InputError, match="budget"):
        tc.Pruner(model, x, budget={"macs": 0.0})
    with pytest.raises(tc.InputError, match="steps"):
        tc.Pruner(model, x, steps=0)
    with pytest.raises(tc.InputError, match="schedule"):
        tc.Pruner(model, x, schedule="quintic")
    pruner = tc.Pruner(model, x, every=1)
    with pytest.raises(tc.InputError, match="no scores in the last"):
        pruner.step()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_a_state_of_another_model_is_refused() -> None:
    _, _, pruner = start()
    other, x, _ = make(Residual, torch.float32)
    with pytest.raises(tc.InputError, match="another model"):
        tc.Pruner(other, x, budget={"macs": 0.8}).load_state_dict(pruner.state_dict())


def test_watch_scores_a_loop_without_changing_it() -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for x, target in batches(5):
            F.cross_entropy(model(x), target).backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = Wide()
        return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    plain, plain_optimizer = fresh()
    loop(plain, plain_optimizer)
    model, optimizer = fresh()
    with tc.watch(model, torch.zeros(2, 3, 8, 8)) as watched:
        loop(model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    assert watched.steps == 5
    loop(model, optimizer)
    assert watched.steps == 5  # the hook went with the block
    table = watched.table()
    assert "body.0" in table
    assert len(table.splitlines()) == 2 + 3

    model, optimizer = fresh()
    pruner = tc.Pruner(model, torch.zeros(2, 3, 8, 8), optimizer, every=100)
    train(model, optimizer, pruner, batches(5))
    for name, score in pruner.importance.scores().items():
        assert torch.equal(score, watched.scores()[name])


def test_watch_follows_one_optimizer_only() -> None:
    torch.manual_seed(0)
    model, other = Wide(), nn.Linear(2, 2)
    first = torch.optim.SGD(model.body.parameters(), lr=0.1)
    second = torch.optim.SGD(model.head.parameters(), lr=0.1)
    foreign = torch.optim.SGD(other.parameters(), lr=0.1)
    with tc.watch(model, torch.zeros(2, 3, 8, 8)) as watched:
        (x, target), *_ = batches(1)
        F.cross_entropy(model(x), target).backward()
        for optimizer in (foreign, first, second):
            optimizer.step()
    assert watched.steps == 1

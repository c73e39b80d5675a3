"""A scoring step reads no number on the host: on a GPU that would wait for everything that is still running there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import taylor_cuda as tc
from tests.importance.gated_nets import Residual, make
from tests.importance.weighted_nets import Stream
from tests.importance.weighted_nets import make as make_weighted

# What makes the host wait: a number, or a shape that depends on numbers.
WAITING = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "bincount"}


class NothingWaits(TorchDispatchMode):
    """Raises on an operation that would wait for a GPU, or that moves a tensor to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op: torch._ops.OpOverload, types: object, args: Any = (), kwargs: Any = None) -> Any:
        name = op.name().split("::")[1].split(".")[0]
        self.seen.append(name)
        by_mask = name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        counted = name == "repeat_interleave" and "output_size" not in (kwargs or {})
        if name in WAITING or by_mask or counted:
            raise AssertionError(f"{op} makes the host wait")
        result = op(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            assert result.device == (args[1] if name == "copy_" else args[0]).device, f"{op} moves to another device"
        return result


def test_the_mode_notices() -> None:
    x = torch.ones(3)
    for waits in (lambda: x.sum().item(), lambda: bool(x[0]), lambda: x[x > 0], x.nonzero):
        with pytest.raises(AssertionError, match="makes the host wait"), NothingWaits():
            waits()


def frozen_reader(model: Residual) -> None:
    model.b1.weight.requires_grad_(False)


CASES: dict[str, tuple[dict[str, Any], Callable[[Residual], object]]] = {
    "taylor_fo": ({}, lambda model: None),
    "taylor_fo from activations": ({"source": "activations"}, lambda model: None),
    "taylor_fo, one reader frozen": ({}, frozen_reader),
    "taylor_fo, one reader without a gradient": ({}, lambda model: setattr(model, "head", Unused(model.head))),
    "taylor_fg": ({"criterion": "taylor_fg"}, lambda model: None),
    "taylor_weight": ({"criterion": "taylor_weight"}, lambda model: None),
    "taylor_output": ({"criterion": "taylor_output"}, lambda model: None),
}


class Unused(torch.nn.Module):
    """A layer whose second, equal one reads as well but leaves no trace in the loss."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.layer, self.other = layer, torch.nn.Linear(layer.in_features, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.training:
            return self.layer(x)
        return self.layer(x) + self.other(x)


@pytest.mark.parametrize("scaled", ["", "scaler", "tensor", "tensor, unscaled", "number"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_nothing(case: str, scaled: str) -> None:
    options, change = CASES[case]
    model, x, target = make(Residual, torch.float32)
    change(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    est = tc.Importance(model, tc.trace(model, x), **options)

    def step() -> None:
        loss = F.cross_entropy(model(x), target)
        if scaled in ("", "scaler"):
            est.backward(loss, scaler=scaler if scaled else None)
            return
        (loss * 4).backward()
        factor = 4.0 if scaled == "number" else torch.tensor(4.0)
        if scaled == "tensor, unscaled":
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= 4
        est.update(factor, unscaled=scaled == "tensor, unscaled")

    expected = tc.Importance(model, est._groups, **options)
    F.cross_entropy(model(x), target).backward()
    expected.update()
    est.reset()  # the pass above went through its gates too
    model.zero_grad()
    step()
    model.zero_grad()
    with NothingWaits() as mode:
        step()
    assert mode.seen.count("accumulate_importance") == (2 if case == "taylor_output" else 1)
    assert (est.steps, est.skipped) == (2, 0)
    for name, score in expected.scores().items():
        torch.testing.assert_close(est.scores()[name], score, rtol=1e-4, atol=1e-12)


def test_the_number_of_operations_does_not_grow_with_the_groups() -> None:
    """Besides what each gate does in the passes: taylor_fg took several launches for each group."""
    counts = {}
    for criterion in ("taylor_fo", "taylor_fg", "taylor_weight", "taylor_output"):
        model, x, target = make(Residual, torch.float32)
        est = tc.Importance(model, tc.trace(model, x), criterion)
        for _ in range(2):
            F.cross_entropy(model(x), target).backward()
            with NothingWaits() as mode:
                est.update()
        counts[criterion] = [name for name in mode.seen if name not in ("detach", "split_with_sizes", "split")]
    assert counts["taylor_fo"] == ["weight_importance", "accumulate_importance"]
    assert counts["taylor_weight"] == ["weight_importance", "accumulate_importance"]
    assert counts["taylor_fg"] == ["accumulate_importance"]
    assert len(counts["taylor_output"]) <= 12


def test_the_norm_term_waits_for_nothing() -> None:
    model, x, target = make_weighted(Stream)
    model, x = model.float(), x.float()
    est = tc.Importance(model, tc.trace(model, x), norm_term=True)
    est.backward(F.cross_entropy(model(x), target))
    with NothingWaits():
        est.backward(F.cross_entropy(model(x), target))
    assert est.steps == 2


def test_a_pruner_waits_only_where_it_decides() -> None:
    model, x, target = make(Residual, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner = tc.Pruner(model, x, optimizer, {"macs": 0.8}, every=3, steps=1)

    def step() -> object:
        pruner.backward(F.cross_entropy(model(x), target))
        optimizer.step()
        optimizer.zero_grad()
        return pruner.step()

    assert step() is None
    with NothingWaits():
        assert step() is None
    assert step() is not None


@pytest.mark.parametrize("source", ["parameters", "activations"])
def test_watching_waits_for_nothing(source: str) -> None:
    model, x, target = make(Residual, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    known = scaler if source == "activations" else None
    with tc.watch(model, x, source=source, scaler=known) as scores:
        for _ in range(2):
            scaler.scale(F.cross_entropy(model(x), target)).backward()
            with NothingWaits():
                scaler.step(optimizer)  # of a fused optimizer, which asks for no number either
            scaler.update()
        assert scores.steps == 2

"""The oracle by its definition, one masked model after another, for these tests to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import taylor_cuda as tc
from taylor_cuda.graph.groups import call_arguments
from taylor_cuda.graph.mask import MaskedForward
from taylor_cuda.graph.recorder import leaves


def squares(outputs: Any, _targets: Any) -> Tensor:
    """A loss of any outputs, not symmetric in their elements."""
    total = torch.zeros(())
    for tensor in leaves(outputs):
        if tensor.is_floating_point():
            weights = torch.linspace(0.5, 1.5, tensor[0].numel(), dtype=tensor.dtype).view(tensor[0].shape)
            total = total + (weights * tensor).square().mean()
    return total


def loss_without(
    model: nn.Module, groups: tc.Groups, loss_fn: Callable[..., Tensor], inputs: Any, targets: Any, off: dict[str, list]
) -> float:
    keep = {
        name: torch.tensor([unit for unit in range(groups[name].size) if unit not in units], dtype=torch.int64)
        for name, units in off.items()
    }
    args, kwargs = call_arguments(inputs)
    with torch.no_grad(), MaskedForward(model, groups, keep):
        return loss_fn(model(*args, **kwargs), targets).item()


def changes(
    model: nn.Module, groups: tc.Groups, loss_fn: Callable[..., Tensor], batches: Sequence[Any]
) -> dict[str, Tensor]:
    """float64 ``[batches, size]`` for each group: the signed change on each batch."""
    found = {}
    for group in groups:
        rows = []
        for inputs, targets in batches:
            base = loss_without(model, groups, loss_fn, inputs, targets, {})
            each = (
                loss_without(model, groups, loss_fn, inputs, targets, {group.name: [unit]})
                for unit in range(group.size)
            )
            rows.append([loss - base for loss in each])
        found[group.name] = torch.tensor(rows, dtype=torch.float64)
    return found

"""Comparing a masked model with a cut copy, without anything of ``prove.py``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taylor_cuda.graph.groups import ChannelGroup, Groups
from taylor_cuda.graph.mask import masked
from taylor_cuda.graph.slicing import slice_model


def outputs(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [tensor for item in items for tensor in outputs(item)]


def run(model: nn.Module, groups: Groups) -> list[Tensor]:
    args, kwargs = groups.example_inputs
    with torch.no_grad():
        return outputs(model(*args, **kwargs))


def random_plan(groups: Groups, seed: int) -> dict[str, Tensor]:
    """Keep a random number of random units of every group, at least one."""
    generator = torch.Generator().manual_seed(seed)
    plan = {}
    for group in groups:
        count = int(torch.randint(1, group.size + 1, (1,), generator=generator))
        plan[group.name] = torch.randperm(group.size, generator=generator)[:count].sort().values
    return plan


def no_zeros(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values for every vector, so that no normalisation or layer scale hides a channel."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.dim() < 4 and not name.endswith(("fc.weight", ".w")):
            values = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensor.data = values + 0.5 if tensor.dim() == 1 or not bool(tensor.any()) else tensor.data
    return model


def cut_copy(model: nn.Module, groups: Groups, plan: Mapping[str, Tensor]) -> nn.Module:
    small = copy.deepcopy(model)
    slice_model(small, groups, plan)
    return small


def cut_error(model: nn.Module, groups: Groups, plan: Mapping[str, Tensor]) -> float:
    """Greatest difference of any output, relative to the greatest value of that output."""
    with masked(model, groups, dict(plan)):
        expected = run(model, groups)
    actual = run(cut_copy(model, groups, plan), groups)
    assert len(expected) == len(actual)
    errors = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, actual, strict=True)]
    assert all(error == error for error in errors)
    return max(errors)


def places(group: ChannelGroup) -> str:
    """The members of a group as ``expected.py`` writes them."""
    return " ".join(f"{m.tensor}:{m.dim}{m.role[0]}" + (f"*{m.width}" if m.width > 1 else "") for m in group.members)

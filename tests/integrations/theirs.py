"""Torch-Pruning's groups, and which of our units their channels are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taylor_cuda as tc

tp: Any = pytest.importorskip("torch_pruning")


def scattered(model: nn.Module) -> nn.Module:
    """In float64, without the ones and zeros that normalisations begin with."""
    for parameter in model.double().parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


def groups_of(model: nn.Module, x: Tensor, ignored: list[nn.Module] | None = None) -> dict[str, Any]:
    """Torch-Pruning's groups by the name of each layer that writes into them."""
    mode = model.training
    pruner = tp.pruner.BasePruner(model, x, importance=None, ignored_layers=ignored or [])
    model.train(mode)
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for group in pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types):
        for dep, _ in group:
            if dep.target.module in names and pruner.DG.is_out_channel_pruning_fn(dep.handler):
                found[names[dep.target.module]] = group
    return found


def units(model: nn.Module, groups: tc.Groups) -> dict[tuple[str, int], tuple[str, int]]:
    """``{(layer, output channel): (group, unit)}`` of ours."""
    found = {}
    for group in groups:
        for member in group.role("write"):
            name, _, kind = member.tensor.rpartition(".")
            writes = 1 if isinstance(model.get_submodule(name), nn.ConvTranspose2d) else 0
            if kind == "weight" and member.dim == writes:
                for unit, row in enumerate(member.index.tolist()):
                    found.update({(name, channel): (group.name, unit) for channel in row})
    return found


def in_their_order(model: nn.Module, groups: tc.Groups, group: Any, scores: dict[str, Tensor]) -> Tensor:
    """Ours, for the channels of a group of Torch-Pruning's."""
    names = {module: name for name, module in model.named_modules()}
    where, root = units(model, groups), names[group[0].dep.target.module]
    found = [where[root, channel] for channel in group[0].idxs]
    return torch.stack([scores[name][unit] for name, unit in found]).double()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().mean())

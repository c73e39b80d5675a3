"""Widths and costs layer by layer, before and after: the rows of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod

from torch import nn

from taylor_cuda.graph.groups import Groups
from taylor_cuda.planning.cost import Lengths, kept_counts

__all__ = ["LayerCost", "layer_costs"]


@dataclass
class LayerCost:
    """One module that owns parameters or spends MACs.

    Attributes:
        module: its name; empty for the model itself.
        kind: its class.
        width: channels it puts out, as ``(before, after)``; 0 where it owns no parameter.
        macs: for one example, as ``(before, after)``.
        params: elements of its own parameters, as ``(before, after)``.
    """

    module: str
    kind: str
    width: tuple[int, int] = (0, 0)
    macs: tuple[float, float] = (0, 0)
    params: tuple[int, int] = (0, 0)


@dataclass
class _Sums:
    tensors: list[str] = field(default_factory=list)
    macs: list[int] = field(default_factory=lambda: [0, 0])


def layer_costs(model: nn.Module, groups: Groups, sizes: Mapping[str, int] | None = None) -> list[LayerCost]:
    """One row for every module that owns parameters or spends MACs, in the order of the model.

    Args:
        model: the traced module.
        groups: from ``tc.trace`` of this model.
        sizes: kept units by group name, what "after" means; groups that are left out stay as they are.

    Raises:
        InputError: an unknown group, a count out of range, or groups of another model.
    """
    lengths = Lengths(model, groups)
    states = (kept_counts(groups, None), kept_counts(groups, sizes))
    sums: dict[str, _Sums] = {}
    for name in lengths.parameters:
        sums.setdefault(_owner(name), _Sums()).tensors.append(name)
    for call in groups.calls:
        # A weight's MACs belong to the module that owns it; what has no weight, to the module that computes it.
        entry = sums.setdefault(_owner(call.weight) if call.weight else call.module, _Sums())
        for position, counts in enumerate(states):
            shape_of = partial(_shape, lengths, counts=counts)
            entry.macs[position] += call.macs_per_weight * call.elements(shape_of)
    batch = max(groups.batch_size, 1)
    written = {(m.tensor, m.dim) for group in groups for m in group.role("write")}
    modules = dict(model.named_modules())
    rows = []
    for name in [*(name for name in modules if name in sums), *(name for name in sums if name not in modules)]:
        module, entry = modules.get(name), sums[name]
        row = LayerCost(name, type(module).__name__ if module is not None else "")
        shapes = [[_shape(lengths, tensor, counts) for tensor in entry.tensors] for counts in states]
        row.params = (sum(map(prod, shapes[0])), sum(map(prod, shapes[1])))
        row.macs = (entry.macs[0] / batch, entry.macs[1] / batch)
        if entry.tensors and shapes[0][0]:
            dim = _output_dim(module, entry.tensors[0], written)
            row.width = (shapes[0][0][dim], shapes[1][0][dim])
        rows.append(row)
    return rows


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _shape(lengths: Lengths, name: str, counts: Sequence[int]) -> list[int]:
    return [factor.at(counts) for factor in lengths.dimensions(name)]


def _output_dim(module: nn.Module | None, tensor: str, written: set[tuple[str, int]]) -> int:
    """The dimension along which a layer's first parameter counts the layer's outputs."""
    for dim in (0, 1):
        if (tensor, dim) in written:
            return dim
    # A transposed convolution that nothing prunes still has its outputs second.
    return 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) and tensor.endswith("weight") else 0

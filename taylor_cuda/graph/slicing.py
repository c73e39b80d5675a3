"""What a plan means for every tensor and every layer: which positions stay, and what the sizes become.

The parts are separate so that a transaction can be built from them: :func:`tensor_keeps` and :func:`shrink_groups`
only compute, :func:`slice_tensor` returns a new tensor, :func:`update_attributes` returns what it replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from taylor_cuda.graph.groups import ChannelGroup, Groups, Member, Role, named_tensors
from taylor_cuda.ops.reference_conv import strides_laid_as

__all__ = [
    "Sliced",
    "layer_sizes",
    "numbers_after",
    "set_numbers",
    "shrink_groups",
    "slice_model",
    "slice_tensor",
    "stays",
    "tensor_keeps",
    "update_attributes",
]

Keeps = dict[str, dict[int, Tensor]]
"""``{tensor name: {dimension: sorted int64 positions that stay}}``, on the CPU; where all stay, nothing."""


def stays(
    model: nn.Module, groups: Iterable[ChannelGroup], keep: Mapping[str, Tensor], role: Role | None = None
) -> dict[tuple[str, int], np.ndarray[Any, np.dtype[np.bool_]]]:
    """For every dimension that shrinks, ``(tensor name, dimension)``: a bool for each position, True = it stays.

    Args:
        model: the model as it is now; only the shapes of its tensors are read.
        groups: its groups as they are now.
        keep: ``{group name: sorted int64 unit indices}``; a group that isn't named keeps all.
        role: only of members with this role.
    """
    tensors = named_tensors(model)
    found: dict[tuple[str, int], np.ndarray[Any, np.dtype[np.bool_]]] = {}
    for group in groups:
        kept = keep.get(group.name)
        if kept is None or kept.numel() == group.size:
            continue
        dropped = np.ones(group.size, dtype=bool)
        dropped[kept.cpu().numpy()] = False
        for member in group.members if role is None else group.role(role):
            place = (member.tensor, member.dim)
            if place not in found:
                found[place] = np.ones(tensors[member.tensor].shape[member.dim], dtype=bool)
            found[place][member.index.numpy()[dropped]] = False
    return found


def tensor_keeps(model: nn.Module, groups: Groups, keep: Mapping[str, Tensor]) -> Keeps:
    """Positions that stay along every dimension that shrinks.

    Args:
        model: the model as it is now; only the shapes of its tensors are read.
        groups: its groups as they are now.
        keep: ``{group name: sorted int64 unit indices}``; a group that isn't named keeps all.

    Returns:
        ``{tensor name: {dimension: sorted int64 [positions kept]}}``.
    """
    keeps: Keeps = {}
    for (name, dim), mask in stays(model, groups, keep).items():
        keeps.setdefault(name, {})[dim] = torch.from_numpy(np.flatnonzero(mask))
    return keeps


def slice_tensor(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """A new tensor with only the ``kept`` positions of each dimension; same dtype, device and memory format.

    Args:
        tensor: any shape.
        kept: ``{dimension: int64 positions}``.
    """
    result = tensor.detach()
    for dim, positions in kept.items():
        result = result.index_select(dim, positions.to(tensor.device))
    if tensor.layout != torch.strided:
        return result
    strides = tuple(strides_laid_as(tensor, result.shape))
    if result.stride() == strides:
        return result
    return torch.empty_strided(result.shape, strides, dtype=result.dtype, device=result.device).copy_(result)


def _moved(member: Member, kept_units: Tensor, keeps: Keeps) -> Member:
    index = member.index[kept_units]
    positions = keeps.get(member.tensor, {}).get(member.dim)
    if positions is not None:
        index = torch.from_numpy(np.searchsorted(positions.numpy(), index.numpy()))
    return replace(member, index=index)


def shrink_groups(groups: Groups, keep: Mapping[str, Tensor], keeps: Keeps) -> tuple[ChannelGroup, ...]:
    """The groups of the smaller model: kept units only, positions renumbered in every dimension that shrank.

    Args:
        groups: the groups before.
        keep: ``{group name: sorted int64 unit indices}``; a group that isn't named keeps all.
        keeps: :func:`tensor_keeps` of the same plan. Positions shift in every group that shares a dimension with one
            that shrinks.
    """
    result = []
    for group in groups:
        kept = keep.get(group.name)
        kept = torch.arange(group.size) if kept is None else kept.cpu()
        moved = {id(member): _moved(member, kept, keeps) for member in group.members}
        result.append(
            replace(
                group,
                members=tuple(moved[id(member)] for member in group.members),
                kept=group.kept[kept],
                affine=tuple(moved.get(id(member)) or _moved(member, kept, keeps) for member in group.affine),
            )
        )
    return tuple(result)


def _conv_sizes(module: _ConvNd, weight: Tensor) -> dict[str, Any]:
    first, second = weight.shape[:2]
    if module.groups == 1:
        sizes = (second, first) if module.transposed else (first, second)
        return {"out_channels": sizes[0], "in_channels": sizes[1]}
    # a grouped convolution loses whole convolution groups: channels per group stay
    if module.transposed:
        count = first // (module.in_channels // module.groups)
        return {"groups": count, "in_channels": first, "out_channels": second * count}
    count = first // (module.out_channels // module.groups)
    return {"groups": count, "out_channels": first, "in_channels": second * count}


def layer_sizes(module: nn.Module) -> dict[str, Any]:
    """The size attributes of a layer that follow from the shapes its tensors have now; empty for other modules.

    ``module``'s own attributes must still be those of before (a convolution's channels per group are read from them).
    """
    weight: Tensor | None = module._parameters.get("weight", module._parameters.get("weight_v"))
    if weight is None and is_parametrized(module, "weight"):
        weight = cast(Tensor, module.weight)
    if isinstance(module, _NormBase):
        stat = weight if weight is not None else module._buffers.get("running_mean")
        return {} if stat is None else {"num_features": stat.shape[0]}
    if weight is None:
        return {}
    if isinstance(module, _ConvNd):
        return _conv_sizes(module, weight)
    if isinstance(module, nn.Linear):
        return {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {"normalized_shape": tuple(weight.shape)}
    if isinstance(module, nn.GroupNorm):
        per_group = module.num_channels // module.num_groups
        return {"num_channels": weight.shape[0], "num_groups": weight.shape[0] // per_group}
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return {"num_embeddings": weight.shape[0], "embedding_dim": weight.shape[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": weight.shape[0]}
    return {}


def update_attributes(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Make every layer's sizes follow its tensors; returns ``(module, attribute, old value)`` of what changed."""
    changed = []
    for module in model.modules():
        for name, value in layer_sizes(module).items():
            old = getattr(module, name)
            if old != value:
                changed.append((module, name, old))
                setattr(module, name, value)
    return changed


def numbers_after(groups: Iterable[ChannelGroup], keep: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """``{module: {attribute: value}}`` of the attributes that count units, once only ``keep`` is left of the groups."""
    found: dict[str, dict[str, int]] = {}
    for group in groups:
        kept = keep.get(group.name)
        if kept is None or kept.numel() == group.size:
            continue
        for number in group.numbers:
            found.setdefault(number.module, {})[number.name] = number.per_unit * kept.numel()
    return found


def set_numbers(model: nn.Module, numbers: Mapping[str, Mapping[str, int]]) -> list[tuple[nn.Module, str, Any]]:
    """Set attributes of modules by name; returns ``(module, attribute, old value)`` of what was there."""
    changed = []
    for path, values in numbers.items():
        module = model.get_submodule(path)
        for name, value in values.items():
            changed.append((module, name, getattr(module, name)))
            setattr(module, name, value)
    return changed


@dataclass
class Sliced:
    """What :func:`slice_model` replaced, by reference. :meth:`restore` puts it back."""

    tensors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    attributes: list[tuple[nn.Module, str, Any]] = field(default_factory=list)

    def restore(self) -> None:
        """Put back tensors and attributes."""
        for tensor, data in self.tensors:
            tensor.data = data
        for module, name, old in self.attributes:
            setattr(module, name, old)


def slice_model(model: nn.Module, groups: Groups, keep: Mapping[str, Tensor], keeps: Keeps | None = None) -> Sliced:
    """Slice parameters and buffers of ``model`` in place (the same objects) and update its layers' attributes.

    This is the bare cut: no gradients, no optimizer, no verification, ``groups`` unchanged. ``keeps`` is
    :func:`tensor_keeps` of the same plan, where it's there already.

    Returns:
        What was replaced; ``.restore()`` undoes it.
    """
    tensors = named_tensors(model)
    done = Sliced()
    for name, kept in (tensor_keeps(model, groups, keep) if keeps is None else keeps).items():
        tensor = tensors[name]
        done.tensors.append((tensor, tensor.data))
        tensor.data = slice_tensor(tensor.data, kept)
    done.attributes = update_attributes(model) + set_numbers(model, numbers_after(groups, keep))
    return done

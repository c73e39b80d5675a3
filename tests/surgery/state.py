"""The whole state of a training run, to be compared bit by bit, and a cut made by other means than the package's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taylor_cuda.graph.groups import Groups

SIZES = {"in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "normalized_shape"}


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def fingerprint(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    ema: Any = None,
    groups: Groups | None = None,
) -> dict[str, Any]:
    """Copies of every value and the identity of every object that must survive a failed cut."""
    state: dict[str, Any] = {"random": torch.get_rng_state()}
    for title, root in (("model", model), ("ema", ema)):
        if isinstance(root, nn.Module):
            for name, tensor in all_tensors(root).items():
                state[f"{title} {name}"] = _tensor_state(tensor)
            for name, module in root.named_modules():
                state[f"{title} attributes {name}"] = {
                    key: copy.deepcopy(value) for key, value in vars(module).items() if not key.startswith("_")
                }
        elif root is not None:
            for name, tensor in root.items():
                state[f"{title} {name}"] = _tensor_state(tensor)
    if optimizer is not None:
        state["owned"] = [id(p) for one in optimizer.param_groups for p in one["params"]]
        for i, (p, entries) in enumerate(optimizer.state.items()):
            state[f"state of {i}"] = (id(p), {k: v.clone() if isinstance(v, Tensor) else v for k, v in entries.items()})
    if groups is not None:
        state["groups"] = (groups.sizes(), [id(group) for group in groups], groups.verified, list(groups.notes))
    return state


def _tensor_state(tensor: Tensor) -> dict[str, Any]:
    return {
        "object": id(tensor),
        "memory": tensor.data_ptr(),
        "strides": tensor.stride(),
        "requires_grad": tensor.requires_grad,
        "values": tensor.detach().clone(),
        "gradient object": id(tensor.grad),
        "gradient": None if tensor.grad is None else tensor.grad.clone(),
    }


def same(a: Any, b: Any) -> bool:
    """Bit-equal, through containers."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [key for key in {**a, **b} if key not in a or key not in b or not same(a[key], b[key])]


def kept_positions(
    groups: Groups, keep: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, dict[int, list[int]]]:
    """By definition, position by position: what stays of each tensor along each dimension that shrinks."""
    dropped: dict[str, dict[int, set[int]]] = {}
    for group in groups:
        kept = set(keep[group.name].tolist()) if group.name in keep else set(range(group.size))
        for member in group.members:
            for unit in range(group.size):
                if unit not in kept:
                    dropped.setdefault(member.tensor, {}).setdefault(member.dim, set()).update(
                        member.index[unit].tolist()
                    )
    return {
        name: {dim: [i for i in range(tensors[name].shape[dim]) if i not in gone] for dim, gone in dims.items()}
        for name, dims in dropped.items()
    }


def pick(tensor: Tensor, kept: Mapping[int, list[int]]) -> Tensor:
    for dim, positions in kept.items():
        tensor = torch.stack([tensor.select(dim, i) for i in positions], dim)
    return tensor.clone()


def rebuilt(model: nn.Module, kept: Mapping[str, Mapping[int, list[int]]]) -> nn.Module:
    """A new model of new, smaller parameters."""
    small = copy.deepcopy(model)
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in small.modules():
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is not None:
                places.setdefault(id(value), []).append((module, name))
    for name, tensor in all_tensors(small).items():
        values = pick(tensor.detach(), kept.get(name, {}))
        new = nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
        for module, attribute in places[id(tensor)]:
            setattr(module, attribute, new)
    for module in small.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            module.groups = module.weight.shape[0] // (module.out_channels // module.groups)
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = tuple(module.weight.shape)
    return small

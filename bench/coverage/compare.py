"""Is a network that was cut the one whose dropped channels are zero? Without this package's own masking."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from taylor_cuda.graph.groups import ChannelGroup, named_tensors

ALLOWED = 1e-4
"""Relative to the greatest output. Sums in another order through a hundred layers: 5e-6 was seen."""

Kept = Mapping[str, Tensor]
"""int64 positions of the channels that stay, by the name of a tensor."""


@torch.no_grad()
def enliven(model: nn.Module, x: Tensor, seed: int = 0) -> None:
    """Random numbers, in place, wherever a network starts at constants; BatchNorm with the statistics of ``x``."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in named_tensors(model).values():
        if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
            constant = float(tensor.flatten()[0])
            noise = torch.randn(tensor.shape, generator=generator)
            # gains and variances stay positive; zeros and layer scales of 1e-6 become something that matters
            tensor.copy_(constant * (0.3 * noise).exp() if abs(constant) > 0.1 else 0.2 * noise)
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    model.eval()
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 1.0
        layer.train()
    model(x)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()
        mean, variance = layer.running_mean, layer.running_var
        assert mean is not None
        assert variance is not None
        variance.clamp_min_(0.1 * float(variance.mean()))
        mean.add_(0.1 * variance.sqrt() * torch.randn(mean.shape, generator=generator))
        variance.mul_((0.2 * torch.randn(mean.shape, generator=generator)).exp())


def outputs(model: nn.Module, x: Tensor, training: bool = False) -> list[Tensor]:
    """Every tensor that a forward pass returns, without dropout."""
    model.train(training)
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.eval()
    with torch.no_grad():
        found = [leaf for leaf in pytree.tree_leaves(model(x)) if isinstance(leaf, Tensor)]
    model.eval()
    return found


def modes(model: nn.Module, x: Tensor) -> tuple[bool, ...]:
    """What ``training`` to compare with: eval mode, and train mode where that returns more."""
    twin = copy.deepcopy(model)
    return (False, True) if len(outputs(twin, x, True)) != len(outputs(twin, x)) else (False,)


def furthest(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """The greatest difference, relative to the greatest value of each tensor; infinite where shapes differ, or NaN."""
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in actual]:
        return float("inf")
    worst = 0.0
    for one, other in zip(expected, actual, strict=True):
        scale = float(one.abs().max())
        error = float((one - other).abs().max())
        share = error / scale if scale > 0 else float("inf")
        worst = max(worst, share if share == share else float("inf"))
    return worst


def count_macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of a forward pass in eval mode."""
    # with gradients: without them nn.MultiheadAttention runs as one op that isn't counted. As two products, which every
    # release counts, where some don't count every fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    return int(counter.get_total_flops()) // 2


def dropped_columns(groups: Sequence[ChannelGroup], keep: Kept) -> dict[tuple[str, int], Tensor]:
    """The positions that ``keep`` drops at readers, by tensor and dimension."""
    found: dict[tuple[str, int], list[Tensor]] = {}
    for group in groups:
        gone = torch.ones(group.size, dtype=torch.bool)
        gone[keep[group.name]] = False
        for member in group.role("read"):
            found.setdefault((member.tensor, member.dim), []).append(member.index[gone].flatten())
    return {place: torch.cat(parts) for place, parts in found.items()}


def kept_in_norms(model: nn.Module, groups: Sequence[ChannelGroup], keep: Kept) -> dict[str, Tensor]:
    """The positions that ``keep`` leaves in the parameters of normalisations."""
    tensors, stays = named_tensors(model), dict[str, Tensor]()
    for group in groups:
        gone = torch.ones(group.size, dtype=torch.bool)
        gone[keep[group.name]] = False
        for member in group.role("norm"):
            mask = stays.setdefault(member.tensor, torch.ones(tensors[member.tensor].shape[0], dtype=torch.bool))
            mask[member.index[gone].flatten()] = False
    return {name: mask.nonzero().flatten() for name, mask in stays.items()}


class Zeroed:
    """A copy of a network in which the readers of dropped channels have zeros for them.

    Args:
        model: copied, not changed.
        columns: int64 positions to zero, by ``(tensor, dimension)``.
        norms: int64 positions that stay, by the name of a LayerNorm's weight.
    """

    def __init__(self, model: nn.Module, columns: Mapping[tuple[str, int], Tensor], norms: Kept) -> None:
        self.model = copy.deepcopy(model)
        tensors = named_tensors(self.model)
        with torch.no_grad():
            for (name, dim), positions in columns.items():
                tensors[name].index_fill_(dim, positions, 0.0)
        self._norms = {id(tensors[name]): kept for name, kept in norms.items()}

    def outputs(self, x: Tensor, training: bool) -> list[Tensor]:
        """Of a forward pass in which each LayerNorm sees the channels that stay only."""
        with _NormOfKept(self._norms):
            return outputs(self.model, x, training)


class _NormOfKept(TorchFunctionMode):
    def __init__(self, kept: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._kept = kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.layer_norm:
            return self._layer_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _layer_norm(
        self, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> Tensor:
        kept = self._kept.get(id(weight))
        if kept is None:
            return F.layer_norm(input, normalized_shape, weight, bias, eps)
        result = torch.zeros_like(input)
        gain, shift = weight[kept], bias[kept] if bias is not None else None
        result[..., kept] = F.layer_norm(input[..., kept], (kept.numel(),), gain, shift, eps)
        return result

"""Everything that is said to torch.library: schemas, fakes, and how each op meets autograd.

The ops exist as ``torch.ops.taylor_cuda.*`` whatever was built; which code runs is for ``backends`` to say.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from taylor_cuda.ops import backends, reference

_LIBRARY = torch.library.Library("taylor_cuda", "DEF")


def _define(op: Callable[..., Any], fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> None:
    """Register one op. The annotations of its reference function are its schema, and it has no gradient of its own."""
    name = op.__name__
    _LIBRARY.define(name + torch.library.infer_schema(op, mutates_args=mutates))

    def run(*args: Any) -> Any:
        first = args[0] if isinstance(args[0], Tensor) else next(iter(args[0]), None)
        device = "cpu" if first is None else first.device.type
        with torch.no_grad():
            return backends.select(name, device)(*args)

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    if mutates:
        _LIBRARY.impl(name, _bump_versions(op, mutates), "ADInplaceOrView", with_keyset=True)
    torch.library.register_fake(f"taylor_cuda::{name}", fake, lib=_LIBRARY)


def _bump_versions(op: Callable[..., Any], mutates: tuple[str, ...]) -> Callable[..., Any]:
    """Tell autograd that arguments changed, as in-place ops of PyTorch do, so that a stale saved tensor raises."""
    positions = [list(inspect.signature(op).parameters).index(name) for name in mutates]

    def run(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        overload = getattr(torch.ops.taylor_cuda, op.__name__).default
        result = overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)
        for position in positions:
            torch.autograd.graph.increment_version(args[position])
        return result

    return run


def _fake_channel_importance(activation: Tensor, gradient: Tensor, reduction: str = "batch") -> Tensor:
    torch._check(activation.shape == gradient.shape)
    return activation.new_empty(activation.shape[1], dtype=reference.result_dtype(activation.dtype))


def _fake_channel_sums(activation: Tensor, gradient: Tensor) -> Tensor:
    torch._check(activation.shape == gradient.shape)
    return activation.new_empty(activation.shape[:2], dtype=reference.result_dtype(activation.dtype))


def _fake_accumulate_channel_sums(activation: Tensor, gradient: Tensor, sums: Tensor) -> None:
    torch._check(activation.shape == gradient.shape)


def _fake_weight_importance(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], dims: Sequence[int], reduction: str = "sum"
) -> list[Tensor]:
    torch._check(len(weights) == len(gradients) == len(dims))
    return [
        weight.new_empty(weight.shape[dim], dtype=reference.result_dtype(weight.dtype))
        for weight, dim in zip(weights, dims, strict=True)
    ]


_define(reference.channel_importance, _fake_channel_importance)
_define(reference.channel_sums, _fake_channel_sums)
_define(reference.accumulate_channel_sums, _fake_accumulate_channel_sums, mutates=("sums",))
_define(reference.weight_importance, _fake_weight_importance)

channel_importance = torch.ops.taylor_cuda.channel_importance.default
channel_sums = torch.ops.taylor_cuda.channel_sums.default
accumulate_channel_sums = torch.ops.taylor_cuda.accumulate_channel_sums.default
weight_importance = torch.ops.taylor_cuda.weight_importance.default

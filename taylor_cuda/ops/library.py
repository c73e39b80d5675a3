"""Everything that is said to torch.library: schemas, fakes, and how each op meets autograd.

The ops exist as ``torch.ops.taylor_cuda.*`` whatever was built; which code runs is for ``backends`` to say. The
functions of this module call them, or, where nothing would see the difference, the code itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from taylor_cuda.ops import backends, checks, reference

_LIBRARY = torch.library.Library("taylor_cuda", "DEF")
_PLAIN = frozenset({Tensor, Parameter})


def _define(op: Callable[..., Any], fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Register one op. The annotations of its reference function are its schema, and it has no gradient of its own.

    Returns:
        What the package calls: the op, or, for a plain eager call, what it would run. The dispatcher's way through
        Python takes as long as the sums of a small feature map.
    """
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
    overload: Callable[..., Any] = getattr(torch.ops.taylor_cuda, name).default
    if mutates:
        return overload  # autograd has to hear of it
    return lambda *args: overload(*args) if _is_watched() or not _are_plain(args) else run(*args)


def _is_watched() -> bool:
    """Whether the compiler, a dispatch mode or a function transform has to see the op that is called."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _are_plain(args: Sequence[Any]) -> bool:
    """Whether the op's two tensors, or lists of them, are of no class that may want to see the call."""
    if isinstance(args[0], Tensor):
        return type(args[0]) in _PLAIN and type(args[1]) in _PLAIN
    return _PLAIN.issuperset(map(type, args[0])) and _PLAIN.issuperset(map(type, args[1]))


def _bump_versions(op: Callable[..., Any], mutates: tuple[str, ...]) -> Callable[..., Any]:
    """Tell autograd that arguments changed, as in-place ops of PyTorch do, so that a stale saved tensor raises."""
    positions = [list(inspect.signature(op).parameters).index(name) for name in mutates]

    def run(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        overload = getattr(torch.ops.taylor_cuda, op.__name__).default
        result = overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)
        for position in positions:
            if position < len(args) and args[position] is not None:
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
    checks.check_weight_lists(weights, gradients, dims)
    checks.check_weight_pairs(weights, gradients, dims)
    return [
        weight.new_empty(weight.shape[dim], dtype=reference.result_dtype(weight.dtype))
        for weight, dim in zip(weights, dims, strict=True)
    ]


channel_importance = _define(reference.channel_importance, _fake_channel_importance)
channel_sums = _define(reference.channel_sums, _fake_channel_sums)
accumulate_channel_sums = _define(reference.accumulate_channel_sums, _fake_accumulate_channel_sums, mutates=("sums",))
weight_importance = _define(reference.weight_importance, _fake_weight_importance)


def _fake_batch_norm_relu_forward(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[1], dtype=reference.result_dtype(x.dtype))
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _fake_batch_norm_relu_backward(
    gradient: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor | None,
    training: bool,
    relu: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch._check(gradient.shape == x.shape)
    images = [torch.empty_like(x) if needed else x.new_empty(0) for needed in needs[:2]]
    vectors = [
        torch.empty_like(mean if like is None else like) if needed else mean.new_empty(0)
        for like, needed in zip((weight, bias), needs[2:], strict=True)
    ]
    return images[0], images[1], vectors[0], vectors[1]


batch_norm_relu_forward = _define(
    reference.batch_norm_relu_forward, _fake_batch_norm_relu_forward, mutates=("running_mean", "running_var")
)
batch_norm_relu_backward = _define(
    reference.batch_norm_relu_backward, _fake_batch_norm_relu_backward, mutates=("sums",)
)

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

from taylor_cuda.ops import backends, checks, reference, reference_conv

_LIBRARY = torch.library.Library("taylor_cuda", "DEF")
_PLAIN = frozenset({Tensor, Parameter})


def _define(op: Callable[..., Any], fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Register one op. The annotations of its reference function are its schema, and it has no gradient of its own.

    Args:
        op: the reference function.
        fake: checks shapes, and makes results without numbers in them.
        mutates: names of the arguments that it changes.

    Returns:
        What the package calls: the op, or, for a plain eager call, what it would run. The dispatcher's way through
        Python takes as long as the sums of a small feature map.
    """
    name = op.__name__
    _LIBRARY.define(name + torch.library.infer_schema(op, mutates_args=mutates))

    def run(*args: Any) -> Any:
        device = _device_of(args)
        with torch.no_grad():
            # Where nothing says on which device, there is nothing to compute either, and native code can't be reached.
            return op(*args) if device is None else backends.select(name, device, args)(*args)

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    changed = [list(inspect.signature(op).parameters).index(argument) for argument in mutates]
    if mutates:
        _LIBRARY.impl(name, _redispatch_and_bump(name, changed), "ADInplaceOrView", with_keyset=True)
    torch.library.register_fake(f"taylor_cuda::{name}", fake, lib=_LIBRARY)
    overload: Callable[..., Any] = getattr(torch.ops.taylor_cuda, name).default

    def call(*args: Any) -> Any:
        if is_watched() or not _are_plain(args):
            return overload(*args)
        result = run(*args)
        _bump(args, changed)
        return result

    return call


def _device_of(args: Sequence[Any]) -> str | None:
    """The type of device of the first tensor among the arguments and in their lists."""
    for value in args:
        first = next(iter(value), None) if isinstance(value, (list, tuple)) else value
        if isinstance(first, Tensor):
            return first.device.type
    return None


def is_watched() -> bool:
    """Whether the compiler, a dispatch mode or a function transform has to see the op that is called."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _are_plain(args: Sequence[Any]) -> bool:
    """Whether no tensor, alone or in a list, is of a class that may want to see the call."""
    kinds: set[type] = set()
    for value in args:
        if isinstance(value, (list, tuple)):
            kinds.update(map(type, value))
        else:
            kinds.add(type(value))
    return not any(issubclass(kind, Tensor) for kind in kinds - _PLAIN)


def _redispatch_and_bump(name: str, changed: Sequence[int]) -> Callable[..., Any]:
    def run(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        overload = getattr(torch.ops.taylor_cuda, name).default
        result = overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)
        _bump(args, changed)
        return result

    return run


def _bump(args: Sequence[Any], changed: Sequence[int]) -> None:
    """Tell autograd that arguments changed, as in-place ops of PyTorch do, so that a stale saved tensor raises."""
    given = [args[position] for position in changed if position < len(args)]  # the dispatcher leaves defaults out
    for tensor in [each for value in given for each in (value if isinstance(value, (list, tuple)) else [value])]:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _fake_channel_importance(activation: Tensor, gradient: Tensor, reduction: str = "batch") -> Tensor:
    torch._check(activation.shape == gradient.shape)
    rows = (len(reference.CHANNEL_REDUCTIONS),) if reduction == "all" else ()
    return activation.new_empty((*rows, activation.shape[1]), dtype=reference.result_dtype(activation.dtype))


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


def _fake_accumulate_importance(
    sums: Sequence[Tensor], entries: Tensor, offsets: Tensor, window: Tensor, *others: Any
) -> None:
    checks.check_units(sums, entries, offsets, window, *others[:5])


def _fake_keep_mask(scores: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    torch._check(keep.dim() == 0)
    return scores.new_empty(scores.shape, dtype=torch.bool), scores.new_empty(())


def _fake_score_relu_backward(
    output: Tensor, gradient: Tensor, sums: Tensor, skip: Tensor | None = None, skip_sums: Tensor | None = None
) -> Tensor:
    torch._check(output.shape == gradient.shape)
    return torch.empty_like(output)


channel_importance = _define(reference.channel_importance, _fake_channel_importance)
channel_sums = _define(reference.channel_sums, _fake_channel_sums)
accumulate_channel_sums = _define(reference.accumulate_channel_sums, _fake_accumulate_channel_sums, mutates=("sums",))
weight_importance = _define(reference.weight_importance, _fake_weight_importance)
accumulate_importance = _define(
    reference.accumulate_importance, _fake_accumulate_importance, mutates=("window", "counts")
)
keep_mask = _define(reference.keep_mask, _fake_keep_mask)
score_relu_backward = _define(reference.score_relu_backward, _fake_score_relu_backward, mutates=("sums", "skip_sums"))


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


def _fake_pack_channels(x: Tensor, keep: Tensor) -> Tensor:
    torch._check(keep.dim() == 1)
    return reference_conv.empty_laid_as(x, (x.shape[0], keep.shape[0], *x.shape[2:]))


def _fake_unpack_channels(x: Tensor, keep: Tensor, channels: int) -> Tensor:
    torch._check(keep.dim() == 1)
    torch._check(keep.shape[0] == x.shape[1])
    return reference_conv.empty_laid_as(x, (x.shape[0], channels, *x.shape[2:]))


def _fake_gather_kept(
    tensors: Sequence[Tensor], keep: Tensor, bounds: Sequence[int], cast: Sequence[bool], dtype: torch.dtype
) -> list[Tensor]:
    checks.check_kept_lists(tensors, keep, bounds)
    results = []
    for i, tensor in enumerate(tensors):
        shape = list(tensor.shape)
        for dim, kept in enumerate(reference_conv.lists_of(keep, bounds, i)):
            if kept is not None:
                shape[dim] = kept.shape[0]
        results.append(reference_conv.empty_laid_as(tensor, shape, dtype if cast[i] else tensor.dtype))
    return results


def _fake_scatter_kept(
    values: Sequence[Tensor], targets: Sequence[Tensor], keep: Tensor, bounds: Sequence[int], clear: bool
) -> None:
    checks.check_kept_lists(targets, keep, bounds, "targets")
    torch._check(len(values) == len(targets))


pack_channels = _define(reference.pack_channels, _fake_pack_channels)
unpack_channels = _define(reference.unpack_channels, _fake_unpack_channels)
gather_kept = _define(reference.gather_kept, _fake_gather_kept)
scatter_kept = _define(reference.scatter_kept, _fake_scatter_kept, mutates=("targets",))


def _fake_masked_conv2d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keep_out: Tensor | None,
    keep_in: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    packed: bool,
    scale: Tensor | None,
    relu: bool,
) -> Tensor:
    channels = weight.shape[1] * groups
    whole = x.new_empty((x.shape[0], channels, *x.shape[2:])) if packed and keep_in is not None else x
    y = torch.conv2d(whole, weight, None, stride, padding, dilation, groups)
    kept = keep_out.shape[0] if packed and keep_out is not None else y.shape[1]
    return reference_conv.empty_laid_as(x, (y.shape[0], kept, *y.shape[2:]))


def _fake_masked_conv2d_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    keep_out: Tensor | None,
    keep_in: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    packed: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    none = x.new_empty(0)
    return (
        torch.empty_like(x) if needs[0] else none,
        torch.empty_like(weight) if needs[1] else none,
        weight.new_empty(weight.shape[0]) if needs[2] else none,
    )


masked_conv2d_forward = _define(reference.masked_conv2d_forward, _fake_masked_conv2d_forward)
masked_conv2d_backward = _define(reference.masked_conv2d_backward, _fake_masked_conv2d_backward)

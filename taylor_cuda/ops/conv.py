"""Masked convolution: ``F.conv2d`` between kept channels, which computes those and no others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taylor_cuda.errors import InputError
from taylor_cuda.ops import checks, library, reference
from taylor_cuda.ops.keep import check_keep
from taylor_cuda.ops.reference_conv import kept_mask

Geometry = tuple[list[int], list[int], list[int], int, bool]  # stride, padding, dilation, groups, packed


class _MaskedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        keep_out: Tensor | None,
        keep_in: Tensor | None,
        geometry: Geometry,
        scale: Tensor | None,
        relu: bool,
    ) -> Tensor:
        y: Tensor = library.masked_conv2d_forward(x, weight, bias, keep_out, keep_in, *geometry, scale, relu)
        ctx.save_for_backward(x, weight, keep_out, keep_in, scale, y if relu else None)
        ctx.geometry = geometry
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, keep_out, keep_in, scale, y = ctx.saved_tensors
        # Somebody will differentiate the gradient: PyTorch lets what the definition is made of be.
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        op: Callable[..., Any] = reference.masked_conv2d_backward if twice else library.masked_conv2d_backward
        (gradient,) = gradients
        if y is not None:
            gradient = torch.ops.aten.threshold_backward(gradient, y, 0)
        scaled, factors = weight, None
        if scale is not None:
            scaled, factors = _times(weight, scale, keep_out)
        needs = list(ctx.needs_input_grad[:3])
        gx, gw, gb = op(gradient, x, scaled, keep_out, keep_in, *ctx.geometry, needs)
        if needs[1] and factors is not None:
            gw = (gw * factors).to(weight.dtype)
        return (
            gx if needs[0] else None,
            gw if needs[1] else None,
            gb if needs[2] else None,
            *(None,) * 5,
        )


def _times(weight: Tensor, scale: Tensor, keep_out: Tensor | None) -> tuple[Tensor, Tensor]:
    """scale·weight, and scale as a factor of every row, 0 where it is dropped."""
    if keep_out is not None:
        scale = torch.where(kept_mask(keep_out, weight.shape[0]), scale, scale.new_zeros(()))
    factors = scale.view(-1, 1, 1, 1)
    return (weight * factors).to(weight.dtype), factors


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    keep_out: Tensor | None = None,
    keep_in: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    packed: bool = False,
    scale: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """``F.conv2d`` from the kept input channels to the kept output channels; the others are neither read nor computed.

    y = relu(scale·conv2d(x, weight) + bias) at kept outputs, 0 at dropped ones, as if x were 0 at dropped inputs;
    ``scale`` and ``relu`` are the epilogue of a frozen BatchNorm. The gradients of ``weight`` and ``bias`` are whole, 0
    where a row or a column is dropped: the parameters stay where an optimizer updates them, and a channel may come back
    at any step. A NaN in a dropped channel, of any argument or of the gradient, does not leave it.

    How many channels a mask on a GPU keeps has to be known on the host before a library can convolve them: with masks
    there, the whole convolution runs, and its result is masked, which waits for nothing and saves nothing.
    ``keep_lists`` makes lists of all masks of a network in one read. With lists nothing waits for the device, unless
    the convolution is grouped and not depthwise: there nothing waits for those of ``keep_lists``, except in a compiled
    graph. A list from elsewhere is looked at when it first comes. Of a grouped convolution, groups without a kept
    output are left out, and the others are computed with the counts of the largest of them.

    With ``packed``, x and y have the channels of the lists only, which saves memory traffic too: between layers dropped
    channels never exist. What x holds at an entry of -1 has to be finite, and counts for nothing; y is 0 there.

    Differentiable twice in x, weight and bias. Under autocast all but ``scale`` is cast as ``F.conv2d`` does. Works
    under ``torch.compile(fullgraph=True)``; another mask, or a list of the same length, needs no compilation.

    Args:
        x: ``[N, C_in, H, W]`` or ``[C_in, H, W]``, float32, float16, bfloat16 (float64 on the CPU), any strides;
            ``[N, K_in, H, W]`` with ``packed`` and ``keep_in``.
        weight: ``[C_out, C_in / groups, R, S]``, of x's dtype.
        bias: ``[C_out]``, of x's dtype, or float32.
        keep_out: bool mask ``[C_out]`` or keep list, int64 ``[K_out]``: ascending channels, then perhaps some -1. None
            keeps all.
        keep_in: the same of the input channels.
        stride: an int or one for each dimension, as the next two.
        padding: also ``"valid"``, or ``"same"`` with a stride of 1.
        dilation: of the filters.
        groups: as in ``F.conv2d``.
        packed: whether x and y are compact; masks have to be lists.
        scale: ``[C_out]``, of x's dtype, or float32. It has no gradient.
        relu: whether negative results become 0.

    Returns:
        ``[N, C_out, P, Q]``, or ``[C_out, P, Q]`` for x without N; ``K_out`` channels with ``packed`` and ``keep_out``.
        Of x's dtype, with its dimensions in memory in the order of x's. Without masks, scale and relu it is what
        ``F.conv2d`` returns.

    Raises:
        InputError: a wrong dtype, shape or device, a list that is unsorted, repeated, or out of range, a mask with
            ``packed``, a scale that requires grad, or an x smaller than the filters.
    """
    if keep_out is None and keep_in is None and scale is None and not relu:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    checks.check_tensor(x, "x")
    checks.check_tensor(weight, "weight")
    x, weight, bias = _autocast(x, weight, bias)
    _check_sizes(x, weight, groups)
    channels = weight.shape[1] * groups
    listed = packed and isinstance(keep_in, Tensor) and keep_in.dim() == 1
    wanted = keep_in.shape[0] if listed and keep_in is not None else channels
    if x.shape[-3] != wanted:
        raise InputError(f"x: wanted {wanted} channels, got shape {tuple(x.shape)}")
    for keep, name, size in ((keep_out, "keep_out", weight.shape[0]), (keep_in, "keep_in", channels)):
        if keep is not None:
            check_keep(keep, name, size, x.device, packed)
    _check_vectors(x, weight, bias, scale)
    images = x if x.dim() == 4 else x.unsqueeze(0)
    steps, rates = _pair(stride, "stride", 1), _pair(dilation, "dilation", 1)
    images, margins = _padded(images, weight, padding, steps, rates)
    _check_filter_fits(images, weight, margins, rates)
    if torch.compiler.is_compiling() and keep_in is not None and keep_in is keep_out:
        keep_in = keep_in.view_as(keep_in)  # the compiler takes no tensor twice
    geometry = (steps, margins, rates, groups, packed)
    y: Tensor = _MaskedConv2d.apply(images, weight, bias, keep_out, keep_in, geometry, scale, relu)
    return y if x.dim() == 4 else y.squeeze(0)


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    x, weight = (each if each.dtype == torch.float64 else each.to(dtype) for each in (x, weight))
    return x, weight, bias if bias is None or bias.dtype == torch.float64 else bias.to(dtype)


def _check_sizes(x: Tensor, weight: Tensor, groups: int) -> None:
    if x.dim() not in (3, 4):
        raise InputError(f"x: wanted [N, C_in, H, W] or [C_in, H, W], got shape {tuple(x.shape)}")
    if weight.dim() != 4 or 0 in weight.shape:
        raise InputError(f"weight: wanted [C_out, C_in / groups, R, S], got shape {tuple(weight.shape)}")
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1 or weight.shape[0] % groups:
        raise InputError(f"groups: wanted a divisor of {weight.shape[0]}, the outputs of weight, got {groups!r}")
    if weight.dtype != x.dtype:
        raise InputError(f"weight: wanted {x.dtype}, the dtype of x, got {weight.dtype}")
    if weight.device != x.device:
        raise InputError(f"weight: wanted it on {x.device}, where x is, got it on {weight.device}")


def _check_vectors(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> None:
    for name, vector in (("bias", bias), ("scale", scale)):
        if vector is None:
            continue
        checks.check_tensor(vector, name)
        if tuple(vector.shape) != (weight.shape[0],):
            raise InputError(f"{name}: wanted shape {(weight.shape[0],)}, got {tuple(vector.shape)}")
        if vector.dtype not in (x.dtype, reference.result_dtype(x.dtype)):
            raise InputError(f"{name}: wanted {x.dtype}, the dtype of x, or float32, got {vector.dtype}")
        if vector.device != x.device:
            raise InputError(f"{name}: wanted it on {x.device}, where x is, got it on {vector.device}")
    if scale is not None and scale.requires_grad and torch.is_grad_enabled():
        raise InputError("scale: wanted a tensor that does not require grad, for it has no gradient here")


def _pair(value: object, name: str, least: int) -> list[int]:
    numbers: list[Any] = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    whole = all(isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) and n >= least for n in numbers)
    if len(numbers) not in (1, 2) or not whole:
        raise InputError(f"{name}: wanted an int of at least {least} or two of them, got {value!r}")
    return [numbers[0], numbers[-1]]


def _padded(
    x: Tensor, weight: Tensor, padding: object, stride: list[int], dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """What padding is on both sides; where ``"same"`` needs one more on the far side, x has it already."""
    if padding == "valid":
        return x, [0, 0]
    if not isinstance(padding, str):
        return x, _pair(padding, "padding", 0)
    if padding != "same" or stride != [1, 1]:
        raise InputError(f"padding: wanted ints, 'valid', or 'same' with a stride of 1, got {padding!r} with {stride}")
    total = [dilation[d] * (weight.shape[2 + d] - 1) for d in (0, 1)]
    if total[0] % 2 or total[1] % 2:
        x = F.pad(x, (0, total[1] % 2, 0, total[0] % 2))
    return x, [total[0] // 2, total[1] // 2]


def _check_filter_fits(x: Tensor, weight: Tensor, padding: list[int], dilation: list[int]) -> None:
    for d in (0, 1):
        span = dilation[d] * (weight.shape[2 + d] - 1) + 1
        if x.shape[2 + d] + 2 * padding[d] < span:
            raise InputError(
                f"x: wanted at least the {span} rows or columns that the filters span, got shape {tuple(x.shape)} with "
                f"padding {padding}"
            )

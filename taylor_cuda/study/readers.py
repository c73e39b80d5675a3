"""What a reader gives without some of its input channels, from what it gives with them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taylor_cuda.study.recording import Span

__all__ = ["subtract_channels", "subtracts"]

_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_NAMES_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_TRANSPOSED = frozenset({torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d})
_WIDE = (torch.float32, torch.float64)


def _arguments(span: Span) -> dict[str, Any]:
    names = _NAMES_TRANSPOSED if span.func in _TRANSPOSED else _NAMES
    return {**dict(zip(names[1:], span.args, strict=False)), **span.kwargs}


def subtracts(span: Span, x: Tensor, width: int) -> bool:
    """Whether a reader's output without ``width`` of its channels is best had by subtracting what they add to it.

    Not in 16 bits, where the output was rounded already; not where the channels are most of the input.
    """
    batched = span.func is F.linear or span.dim == 1
    return batched and x.dtype in _WIDE and 2 * width <= x.shape[span.dim]


def subtract_channels(span: Span, x: Tensor, y: Tensor, channels: Tensor) -> Tensor:
    """A reader's output ``[K, …]`` without the channels of each row: what they add, Σ_c W_c x_c, is taken off.

    Args:
        span: the call of the reader.
        x: its whole input.
        y: its whole output.
        channels: int64 ``[K, width]`` on the device of x.
    """
    arguments = _arguments(span)
    weight = arguments.pop("weight")
    arguments.pop("bias", None)
    copies, width = channels.shape
    if width == 1 and _is_product(span, weight, arguments):
        return _subtract_products(span, x, y, channels.flatten(), weight, arguments)
    contracted = 0 if span.func in _TRANSPOSED else 1
    out = torch.empty_strided((copies, *y.shape), (y.numel(), *y.stride()), dtype=y.dtype, device=y.device)
    for row, copy in zip(channels, out, strict=True):
        part = span.func(x.index_select(span.dim, row), weight.index_select(contracted, row), **arguments)
        torch.sub(y, part, out=copy)
    return out


def _is_product(span: Span, weight: Tensor, arguments: dict[str, Any]) -> bool:
    """Whether a channel adds x_c times a number to each output: a linear layer, a 1×1 convolution."""
    if span.func is F.linear:
        return True
    padding = arguments.get("padding", 0)
    unpadded = padding in (0, "valid") or (isinstance(padding, (tuple, list)) and not any(padding))
    return span.func not in _TRANSPOSED and unpadded and weight.shape[2:].numel() == 1


def _subtract_products(
    span: Span, x: Tensor, y: Tensor, channels: Tensor, weight: Tensor, arguments: dict[str, Any]
) -> Tensor:
    factors = weight.index_select(1, channels).flatten(1).t()  # [K, O]
    if span.func is F.linear:
        part = x.index_select(-1, channels).movedim(-1, 0).unsqueeze(-1)
        return torch.addcmul(y, part, factors.view(len(channels), *(1,) * (y.dim() - 1), -1), value=-1)
    space = y.dim() - 2
    stride = arguments.get("stride", 1)
    steps = (stride,) * space if isinstance(stride, int) else tuple(stride) * (space if len(stride) == 1 else 1)
    slices: tuple[slice, ...] = (slice(None), slice(None), *(slice(None, None, step) for step in steps))
    taken = x.index_select(1, channels)[slices]
    return torch.addcmul(
        y, taken.movedim(1, 0).unsqueeze(2), factors.view(len(channels), 1, -1, *(1,) * space), value=-1
    )

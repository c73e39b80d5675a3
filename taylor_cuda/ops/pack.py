"""Between a tensor of all channels and a compact one of those that are kept; each is the gradient of the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from taylor_cuda.errors import InputError
from taylor_cuda.ops import checks, library
from taylor_cuda.ops.keep import check_keep_list


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.channels = x.shape[1]
        packed: Tensor = library.pack_channels(x, keep)
        return packed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return _Unpack.apply(gradients[0], keep, ctx.channels), None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, channels: int) -> Tensor:
        ctx.save_for_backward(keep)
        whole: Tensor = library.unpack_channels(x, keep, channels)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return _Pack.apply(gradients[0], keep), None, None


def pack_channels(x: Tensor, keep: Tensor) -> Tensor:
    """The kept channels of x, side by side: ``y[:, k] = x[:, keep[k]]``, and 0 where ``keep[k]`` is -1.

    Dropped channels are not read; their gradient is 0. Differentiable any number of times.

    Args:
        x: ``[N, C, *spatial]``, float32, float16, bfloat16 (float64 on the CPU), any strides.
        keep: int64 list ``[K]`` on x's device: kept channels, ascending, then perhaps some -1. ``keep_lists`` makes one
            of a mask. A list from elsewhere is looked at when it first comes, which waits for a GPU.

    Returns:
        ``[N, K, *spatial]``, of x's dtype, with its dimensions in memory in the order of x's.

    Raises:
        InputError: a wrong dtype or shape, or a list on another device, unsorted, repeated, or out of range.
    """
    _check_image(x)
    check_keep_list(keep, "keep", x.shape[1], x.device)
    packed: Tensor = _Pack.apply(x, keep)
    return packed


def unpack_channels(x: Tensor, keep: Tensor, channels: int) -> Tensor:
    """The compact tensor x among ``channels`` channels: ``y[:, keep[k]] = x[:, k]``, and 0 elsewhere.

    What x holds where ``keep[k]`` is -1 is left out. Differentiable any number of times.

    Args:
        x: ``[N, K, *spatial]``, float32, float16, bfloat16 (float64 on the CPU), any strides.
        keep: int64 list ``[K]``, as ``pack_channels`` takes it.
        channels: how many channels the result has.

    Returns:
        ``[N, channels, *spatial]``, of x's dtype, with its dimensions in memory in the order of x's.

    Raises:
        InputError: a wrong dtype or shape, a list of another length than x has channels, on another device, unsorted,
            repeated or out of range, or a negative number of channels.
    """
    _check_image(x)
    if not isinstance(channels, (int, torch.SymInt)) or isinstance(channels, bool) or channels < 0:
        raise InputError(f"channels: wanted an int of at least 0, got {channels!r}")
    check_keep_list(keep, "keep", channels, x.device)
    if keep.shape[0] != x.shape[1]:
        raise InputError(f"keep: wanted {x.shape[1]} entries, the channels of x, got {keep.shape[0]}")
    whole: Tensor = _Unpack.apply(x, keep, channels)
    return whole


def _check_image(x: object) -> None:
    checks.check_tensor(x, "x")
    assert isinstance(x, Tensor)
    if x.dim() < 2:
        raise InputError(f"x: wanted [N, C, *spatial], got shape {tuple(x.shape)}")

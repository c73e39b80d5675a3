"""The definitions of the ops on kept channels, in plain PyTorch: see ``reference``, of which they are a part.

A keep list is int64 ``[K]``, on its tensor's device: the positions that are kept, ascending and distinct, and anywhere
among them perhaps some -1, each of which stands for a channel of zeros. Lists of a length that hardware likes are made
so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack_channels(x: Tensor, keep: Tensor) -> Tensor:
    """y[:, k] = x[:, keep[k]], and 0 where keep[k] < 0: ``[N, C, *spatial]`` -> ``[N, K, *spatial]``, laid out as x."""
    return _select(x, 1, keep)


def unpack_channels(x: Tensor, keep: Tensor, channels: int) -> Tensor:
    """y[:, keep[k]] = x[:, k], and 0 elsewhere: ``[N, K, *spatial]`` -> ``[N, channels, *spatial]``, laid out as x."""
    shape = (x.shape[0], channels, *x.shape[2:])
    y = torch.zeros_like(empty_laid_as(x, shape))
    return y.index_copy_(1, keep[keep >= 0], x[:, keep >= 0])


def gather_kept(
    tensors: Sequence[Tensor], keep: Tensor, bounds: Sequence[int], cast: Sequence[bool], dtype: torch.dtype
) -> list[Tensor]:
    """The kept rows (dimension 0) and columns (dimension 1) of every tensor, 0 where an entry of a list is -1.

    ``keep`` holds all lists, one after another: rows of ``tensors[i]`` from ``bounds[2 * i]`` up to
    ``bounds[2 * i + 1]``, columns from there up to ``bounds[2 * i + 2]``. A list without entries keeps all. Results
    have their dimensions in memory in the order of those of ``tensors[i]``, and its dtype, or ``dtype`` where
    ``cast[i]``.
    """
    results = []
    for i, tensor in enumerate(tensors):
        result = tensor.detach()
        for dim, kept in enumerate(lists_of(keep, bounds, i)):
            result = result if kept is None else _select(result, dim, kept)
        strided = empty_laid_as(tensor, result.shape, dtype if cast[i] else tensor.dtype)
        results.append(strided.copy_(result))
    return results


def scatter_kept(
    values: Sequence[Tensor], targets: Sequence[Tensor], keep: Tensor, bounds: Sequence[int], clear: bool
) -> None:
    """Write ``values`` to where ``gather_kept`` with these lists would take them from; entries of -1 are left out.

    Everything else in ``targets`` becomes 0 with ``clear``, and stays as it is without.
    """
    for i, (value, target) in enumerate(zip(values, targets, strict=True)):
        places = []
        for dim, kept in enumerate(lists_of(keep, bounds, i)):
            if kept is not None:
                value = value.index_select(dim, (kept >= 0).nonzero().flatten())
            if dim < target.dim():
                places.append(torch.arange(target.shape[dim], device=keep.device) if kept is None else kept[kept >= 0])
        if clear:
            target.zero_()
        if target.dim() > 1:
            target[places[0][:, None], places[1]] = value.to(target.dtype)
        else:
            target[tuple(places)] = value.to(target.dtype)


def masked_conv2d_forward(
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
    """Compute relu(scale·conv2d(x, weight) + bias) from kept input to kept output channels, and 0 at the others.

    ``keep_out`` and ``keep_in`` are bool masks ``[C]`` or keep lists. With ``packed`` they are lists, and x and y have
    the channels of the lists instead of all of them. ``scale`` and ``bias`` are ``[C_out]``; without ``relu`` no ReLU.
    y is laid out as x.
    """
    if packed and keep_in is not None:
        x = unpack_channels(x, keep_in, weight.shape[1] * groups)
    weight = _masked_weight(weight, keep_out, keep_in, groups)
    y = torch.conv2d(_without_dropped(x, 1, keep_in), weight, None, stride, padding, dilation, groups)
    if scale is not None:
        y = y * scale.to(y.dtype).view(-1, 1, 1)
    if bias is not None:
        y = y + bias.to(y.dtype).view(-1, 1, 1)
    y = _without_dropped(y.relu() if relu else y, 1, keep_out)
    y = pack_channels(y, keep_out) if packed and keep_out is not None else y
    return empty_laid_as(x, y.shape).copy_(y)


def masked_conv2d_backward(
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
    """Gradients of conv2d(x, weight) + bias between kept channels in x, weight and bias; 0 outside of them.

    The gradient in y comes as y is: with ``packed``, so does that in x. Those of weight and bias are always whole.
    Those that ``needs`` denies are empty; the others are laid out as ``torch.empty_like`` of x and of weight.
    """
    inputs, whole = x, gradient
    if packed:
        inputs = x if keep_in is None else unpack_channels(x, keep_in, weight.shape[1] * groups)
        whole = gradient if keep_out is None else unpack_channels(gradient, keep_out, weight.shape[0])
    inputs, whole = _without_dropped(inputs, 1, keep_in), _without_dropped(whole, 1, keep_out)
    masked = _masked_weight(weight, keep_out, keep_in, groups)
    gx, gw, gb = torch.ops.aten.convolution_backward(
        whole, inputs, masked, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, list(needs)
    )
    none = x.new_empty(0)
    if needs[0]:
        gx = _without_dropped(gx, 1, keep_in)
        gx = torch.empty_like(x).copy_(pack_channels(gx, keep_in) if packed and keep_in is not None else gx)
    if needs[1]:
        gw = torch.empty_like(weight).copy_(_masked_weight(gw, keep_out, keep_in, groups))
    return gx if needs[0] else none, gw if needs[1] else none, gb if needs[2] else none


def lists_of(keep: Tensor, bounds: Sequence[int], i: int) -> tuple[Tensor | None, Tensor | None]:
    """The lists of rows and of columns of tensor i of ``gather_kept``; None where all are kept."""
    begin, middle, end = bounds[2 * i : 2 * i + 3]
    return (keep[begin:middle] if middle > begin else None), (keep[middle:end] if end > middle else None)


def empty_laid_as(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor of ``shape`` with its dimensions in memory in the order of those of ``tensor``, without gaps."""
    return tensor.new_empty_strided(tuple(shape), strides_laid_as(tensor, shape), dtype=dtype)


def strides_laid_as(tensor: Tensor, shape: Sequence[int]) -> list[int]:
    """The strides of ``empty_laid_as``.

    Strides alone can't tell the formats of a 1×1 or a depthwise weight apart: dimensions of length 1 count as the inner
    one of two with equal stride.
    """
    inner_first = sorted(range(tensor.dim()), key=lambda d: (tensor.stride(d), tensor.shape[d] > 1, -d))
    strides, step = [0] * tensor.dim(), 1
    for d in inner_first:
        strides[d] = step
        step *= max(shape[d], 1)
    return strides


def _select(x: Tensor, dim: int, keep: Tensor) -> Tensor:
    shape = [*x.shape[:dim], keep.shape[0], *x.shape[dim + 1 :]]
    there = (keep >= 0).view(-1, *[1] * (x.dim() - 1 - dim))
    if x.shape[dim] == 0:
        return torch.zeros_like(empty_laid_as(x, shape))
    chosen = x.index_select(dim, keep.clamp(min=0))
    return empty_laid_as(x, shape).copy_(torch.where(there, chosen, chosen.new_zeros(())))


def _without_dropped(x: Tensor, dim: int, keep: Tensor | None) -> Tensor:
    if keep is None:
        return x
    return torch.where(kept_mask(keep, x.shape[dim]).view(-1, *[1] * (x.dim() - 1 - dim)), x, x.new_zeros(()))


def kept_mask(keep: Tensor, channels: int) -> Tensor:
    """A mask ``[channels]`` of bool as it is, or that of a keep list."""
    if keep.dtype == torch.bool:
        return keep
    mask = torch.zeros(channels + 1, dtype=torch.bool, device=keep.device)  # what -1 marks is beyond the last channel
    mask[keep] = True
    return mask[:channels]


def _masked_weight(weight: Tensor, keep_out: Tensor | None, keep_in: Tensor | None, groups: int) -> Tensor:
    """``[C_out, C_in / groups, R, S]``: a group's filters meet only its own input channels."""
    weight = _without_dropped(weight, 0, keep_out)
    if keep_in is None:
        return weight
    by_group = kept_mask(keep_in, weight.shape[1] * groups).view(groups, 1, -1, 1, 1)
    parts = weight.reshape(groups, -1, *weight.shape[1:])
    return torch.where(by_group, parts, parts.new_zeros(())).view_as(weight)

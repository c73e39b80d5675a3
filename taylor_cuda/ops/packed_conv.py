"""Masked convolution by the library's own: gather what is kept, convolve compact tensors (oneDNN, cuDNN), scatter.

An engine of ops that ``backends`` selects; it has none of its own to compile. It waits for a GPU where it has to know
what only the device does: how many channels a bool mask keeps, and, for grouped convolutions that are not depthwise,
which groups the channels are in (of lists that ``keep`` has seen, it knows).

The order of the sums is the library's. oneDNN's depends on the number of threads; two runs with the same number are
bit-equal. cuDNN's are where ``torch.backends.cudnn.deterministic`` is set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from taylor_cuda.ops import backends, folded_conv, reference
from taylor_cuda.ops.keep import Channels, entries_of
from taylor_cuda.ops.reference_conv import kept_mask, strides_laid_as

Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]  # stride, padding, dilation, groups

CUDNN_CHANNELS = 16  # cuDNN copies tensors whose channels are no multiple of 8, and its tiles are 16 wide


class _Packing(NamedTuple):
    """Which channels the compact convolution has: None for all as they are, -1 for a channel of zeros."""

    inputs: Tensor | None  # [groups·ki]: where in x its inputs are
    columns: Tensor | None  # [ki], or [groups, ki] within the groups: where in dimension 1 of the weight they are
    rows: Tensor | None  # [ko], or [groups, ko]: where in dimension 0 of the weight its outputs are
    channels: Tensor | None  # [groups·ko]: where in scale and bias they are
    outputs: Tensor | None  # [groups·ko]: where in y they go
    groups: int
    counts: tuple[int, int]  # of outputs and of inputs


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
    """See ``reference_conv``: the definition."""
    packing = _packing(x, weight, keep_out, keep_in, groups, packed)
    shift = None if bias is None else _of_rows(bias, packing, x.dtype)
    if 0 in packing.counts:
        y = x.new_zeros(x.shape[0], packing.counts[0], *_spatial(x, weight, stride, padding, dilation))
        y = y if shift is None else y.add_(shift.view(-1, 1, 1))
    else:
        given = _pack(x, packing.inputs)
        compact = _scaled(weight, scale, packing).to(x.dtype).contiguous(memory_format=_format_of(given))
        y = _convolve(given, compact, shift, (stride, padding, dilation, packing.groups))
    y = _laid(y.relu_() if relu else y, strides_laid_as(x, y.shape))
    channels = keep_out.shape[0] if packed and keep_out is not None else weight.shape[0]
    y = _unpack(y, packing.outputs, channels)
    return _laid(y, strides_laid_as(x, y.shape))


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
    """See ``reference_conv``: the definition."""
    packing = _packing(x, weight, keep_out, keep_in, groups, packed)
    compact = _pack(gradient, packing.outputs)
    gx = gw = gb = x.new_empty(0)
    if 0 in packing.counts:
        gx = torch.zeros_like(x) if needs[0] else gx
        gw = torch.zeros_like(weight) if needs[1] else gw
        gb = _among_rows(compact.sum((0, 2, 3)), packing, weight.shape[0]) if needs[2] else gb
        return gx, gw, gb
    given = _pack(x, packing.inputs)
    kept = _scaled(weight, None, packing).contiguous(memory_format=_format_of(given))
    found = _convolve_backward(compact, given, kept, (stride, padding, dilation, packing.groups), list(needs))
    if needs[0]:
        gx = _unpack(_laid(found[0], strides_laid_as(x, found[0].shape)), packing.inputs, x.shape[1])
        gx = _laid(gx, torch.empty_like(x, device="meta").stride())
    if needs[1]:
        gw = _weight_gradient(found[1], weight, packing)
    return gx, gw, _among_rows(found[2], packing, weight.shape[0]) if needs[2] else gb


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    folding = folded_conv.folding_of(x, weight, *geometry)
    if folding is None:
        return torch.conv2d(x, weight, bias, *geometry)
    return folded_conv.choose(
        ("forward", x.device, x.dtype, x.shape, x.stride(), weight.shape[0], folding),
        lambda: folded_conv.convolve(x, weight, bias, folding),
        lambda: torch.conv2d(x, weight, bias, *geometry),
    )


def _convolve_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs: list[bool]
) -> Sequence[Tensor]:
    stride, padding, dilation, groups = geometry

    def plain() -> Sequence[Tensor]:
        found: Sequence[Tensor] = torch.ops.aten.convolution_backward(
            gradient, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, needs
        )
        return found

    folding = folded_conv.folding_of(x, weight, *geometry)
    if folding is None:
        return plain()
    return folded_conv.choose(
        ("backward", x.device, x.dtype, x.shape, x.stride(), weight.shape[0], folding, tuple(needs)),
        lambda: folded_conv.convolve_backward(gradient, x, weight, folding, needs),
        plain,
    )


def _packing(
    x: Tensor, weight: Tensor, keep_out: Tensor | None, keep_in: Tensor | None, groups: int, packed: bool
) -> _Packing:
    rounded = _is_rounded(x, packed)
    if groups > 1 and (keep_out is not None or keep_in is not None):
        if weight.shape[1] == 1 and weight.shape[0] == groups:
            return _packing_of_channels(x, groups, keep_out, keep_in, packed, rounded)
        return _packing_of_groups(x, weight, keep_out, keep_in, groups, packed)
    rows, columns = (_as_list(keep, rounded) for keep in (keep_out, keep_in))
    outputs = weight.shape[0] if rows is None else rows.shape[0]
    inputs = weight.shape[1] if columns is None else columns.shape[0]
    counts = (outputs, inputs)
    return _Packing(None if packed else columns, columns, rows, rows, None if packed else rows, groups, counts)


def _is_rounded(x: Tensor, packed: bool) -> bool:
    """Whether lists are filled up for the device; with ``packed`` their lengths are those of x and y."""
    return x.is_cuda and not packed


def _packing_of_channels(
    x: Tensor, channels: int, keep_out: Tensor | None, keep_in: Tensor | None, packed: bool, rounded: bool
) -> _Packing:
    """Depthwise: an output has one input, and the list of outputs is that of inputs but for those that are dropped."""
    kept = _as_list(keep_out, rounded)
    count = channels if kept is None else kept.shape[0]
    inputs, rows = kept, kept
    if keep_in is keep_out:
        inputs = None if packed else kept
    elif keep_in is not None:
        outputs = torch.arange(channels, device=x.device) if kept is None else kept
        inputs = _places(keep_in, channels, packed)[outputs]
        rows = outputs.masked_fill(inputs < 0, -1)  # where the input is dropped, so is the filter, but not the bias
    return _Packing(inputs, None, rows, kept, None if packed else kept, count, (count, count))


def _places(keep_in: Tensor, channels: int, packed: bool) -> Tensor:
    """[channels + 1]: where in x every channel is, -1 where it is not; the last entry is for the -1 of other lists."""
    places = torch.full((channels + 1,), -1, device=keep_in.device)
    if packed:
        places[keep_in] = torch.arange(keep_in.shape[0], device=keep_in.device)
        places[channels] = -1
    else:
        there = kept_mask(keep_in, channels)
        places[:channels] = torch.arange(channels, device=keep_in.device).masked_fill(~there, -1)
    return places


def _packing_of_groups(
    x: Tensor, weight: Tensor, keep_out: Tensor | None, keep_in: Tensor | None, groups: int, packed: bool
) -> _Packing:
    """Groups without outputs vanish; the others have as many outputs and inputs as the largest of them."""
    per_out, per_in = weight.shape[0] // groups, weight.shape[1]
    rows, outputs = _on_host(keep_out, weight.shape[0], packed)
    columns, inputs = _on_host(keep_in, per_in * groups, packed)
    remaining = np.unique(rows // per_out)
    host = [_by_group(rows // per_out, values, remaining) for values in (rows, outputs)]
    host += [_by_group(columns // per_in, values, remaining) for values in (columns % per_in, inputs)]
    counts = (host[0].size, host[2].shape[1] if len(remaining) else 0)
    channels_of_y = keep_out.shape[0] if packed and keep_out is not None else weight.shape[0]
    as_they_are = [np.array_equal(host[i].ravel(), np.arange(n)) for i, n in ((1, channels_of_y), (3, x.shape[1]))]
    tables = [torch.from_numpy(table).to(x.device) for table in host]
    return _Packing(
        None if as_they_are[1] else tables[3].flatten(),
        tables[2],
        tables[0],
        tables[0].flatten(),
        None if as_they_are[0] else tables[1].flatten(),
        len(remaining),
        counts,
    )


def _on_host(keep: Tensor | None, channels: int, packed: bool) -> tuple[Channels, Channels]:
    """The kept channels, and where they are in x or y."""
    if keep is None:
        kept = np.arange(channels)
    elif keep.dtype == torch.bool:
        kept = np.flatnonzero(keep.cpu().numpy())
    else:
        kept = entries_of(keep, "keep")
    return kept, np.arange(len(kept)) if packed and keep is not None else kept


def _by_group(group_of: Channels, values: Channels, remaining: Channels) -> Channels:
    """[remaining, most]: the values of every group that remains, filled up with -1. ``group_of`` ascends."""
    first, last = (np.searchsorted(group_of, remaining, side=side) for side in ("left", "right"))
    most = int((last - first).max(initial=0))
    positions = first[:, None] + np.arange(most)
    there = positions < last[:, None]
    return np.where(there, values[np.where(there, positions, 0)] if len(values) else -1, -1)


def _as_list(keep: Tensor | None, rounded: bool) -> Tensor | None:
    """A mask as a list, which waits for a GPU; None where it keeps everything."""
    if keep is None:
        return None
    if keep.dtype == torch.bool:
        channels, keep = keep.shape[0], keep.nonzero().flatten()
        if keep.shape[0] == channels:
            return None
    return F.pad(keep, (0, -keep.shape[0] % CUDNN_CHANNELS), value=-1) if rounded else keep


def _pack(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else cast(Tensor, backends.select("pack_channels", x.device.type)(x, keep))


def _unpack(x: Tensor, keep: Tensor | None, channels: int) -> Tensor:
    return x if keep is None else cast(Tensor, backends.select("unpack_channels", x.device.type)(x, keep, channels))


def _of_rows(vector: Tensor, packing: _Packing, dtype: torch.dtype) -> Tensor:
    """``[C_out]`` -> that of the compact outputs."""
    return _pack(vector.to(dtype).view(1, -1), packing.channels)[0]


def _among_rows(vector: Tensor, packing: _Packing, channels: int) -> Tensor:
    """The reverse, with 0 where nothing was kept."""
    return _unpack(vector.view(1, -1), packing.channels, channels)[0]


def _scaled(weight: Tensor, scale: Tensor | None, packing: _Packing) -> Tensor:
    """The weight of the compact convolution: what is kept, times scale, which is not rounded to 16 bits before."""
    wide = weight.dtype if scale is None else reference.result_dtype(weight.dtype)
    rows, columns = packing.rows, packing.columns
    if rows is not None and rows.dim() == 2:
        assert columns is not None
        at = (rows.clamp(min=0)[:, :, None], columns.clamp(min=0)[:, None])
        there = (rows >= 0)[:, :, None] & (columns >= 0)[:, None]
        kept = torch.where(there[..., None, None], weight[at], weight.new_zeros(())).flatten(0, 1).to(wide)
    elif rows is None and columns is None:
        kept = weight.to(wide)
    else:
        gather = backends.select("gather_kept", weight.device.type)
        (kept,) = gather([weight], *_lists(rows, columns), [wide != weight.dtype], wide)
    return kept if scale is None else kept * _of_rows(scale, packing, wide).view(-1, 1, 1, 1)


def _weight_gradient(found: Tensor, weight: Tensor, packing: _Packing) -> Tensor:
    """The gradient of the compact weight where it belongs in that of the weight, 0 elsewhere."""
    rows, columns = packing.rows, packing.columns
    if rows is not None and rows.dim() == 2:
        assert columns is not None
        # One row and one column more, where what -1 marks goes.
        whole = weight.new_zeros(weight.shape[0] + 1, weight.shape[1] + 1, *weight.shape[2:])
        whole[rows[:, :, None], columns[:, None]] = found.view(*rows.shape, columns.shape[1], *weight.shape[2:])
        return torch.empty_like(weight).copy_(whole[:-1, :-1])
    if rows is None and columns is None:
        return _laid(found, torch.empty_like(weight, device="meta").stride())
    whole = torch.empty_like(weight)
    backends.select("scatter_kept", weight.device.type)([found], [whole], *_lists(rows, columns), True)
    return whole


def _lists(rows: Tensor | None, columns: Tensor | None) -> tuple[Tensor, list[int]]:
    """The lists of one tensor, as gather_kept and scatter_kept take them."""
    lengths = [0 if keep is None else keep.shape[0] for keep in (rows, columns)]
    return torch.cat([keep for keep in (rows, columns) if keep is not None]), [0, lengths[0], sum(lengths)]


def _format_of(x: Tensor) -> torch.memory_format:
    is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format


def _laid(x: Tensor, strides: Sequence[int]) -> Tensor:
    """The same with these strides: a copy where it lies otherwise, which dimensions of length 1 don't say."""
    if all(size == 1 or has == wanted for size, has, wanted in zip(x.shape, x.stride(), strides, strict=True)):
        return x if x.stride() == tuple(strides) else x.as_strided(x.shape, strides)
    return x.new_empty_strided(x.shape, strides).copy_(x)


def _spatial(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Height and width of the result."""
    spans = [dilation[d] * (weight.shape[2 + d] - 1) + 1 for d in (0, 1)]
    return [(x.shape[2 + d] + 2 * padding[d] - spans[d]) // stride[d] + 1 for d in (0, 1)]

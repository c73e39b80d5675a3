"""Kept channels and weights as the convolution kernels walk them, made on the device: nothing waits for a count.

A keep list is int64, ascending, and ends in -1 where it has more entries than channels. A side of a convolution, its
inputs or its outputs, has ``width`` positions in each group, the kept channels first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from taylor_cuda.kernels._launch import device_of

LONGEST = 1024  # positions that a program takes at a time
ROUND = 8  # columns of packed weights: 16 bytes of a 16-bit type

# What a keep argument is to a kernel that looks channels up in it.
ALL, MASK, LIST, PACKED = 0, 1, 2, 3


@triton.jit
def rank_of(list_ptr, channel, entries):
    """How many entries of a keep list lie before each channel; -1 lies behind them all."""
    rank = channel * 0
    step = entries * 0 + 1
    while step * 2 <= entries:
        step *= 2
    while step > 0:
        far = rank + step
        entry = tl.load(list_ptr + far - 1, mask=far <= entries, other=-1)
        rank = tl.where((entry >= 0) & (entry < channel), far, rank)
        step //= 2
    return rank


@triton.jit
def place_of(keep_ptr, channel, inside, entries, KIND: tl.constexpr):
    """Where a channel lies in memory, -1 where it is dropped. KIND: 0 all are kept, 1 mask, 2 list, 3 packed list."""
    if KIND == 0:
        place = tl.where(inside, channel, -1)
    elif KIND == 1:
        place = tl.where(tl.load(keep_ptr + channel, mask=inside, other=0) != 0, channel, -1)
    else:
        rank = rank_of(keep_ptr, channel, entries)
        found = tl.load(keep_ptr + rank, mask=inside & (rank < entries), other=-1) == channel
        place = tl.where(found & inside, rank if KIND == 3 else channel, -1)
    return place


@triton.jit(do_not_specialize=("entries", "width"))
def sides_kernel(
    keep_ptr, channels_ptr, places_ptr, counts_ptr, entries, width, KIND: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The positions of one group: kept channels in order, then, where they lie in memory, dropped ones. Grid (groups,).

    channels[g, i] is -1 at dropped ones, places[g, i] where nothing lies in memory.
    """
    group = tl.program_id(0).to(tl.int64)
    first = group * width
    count = tl.zeros((BLOCK,), dtype=tl.int64)
    start = first * 0
    while start < width:
        local = start + tl.arange(0, BLOCK)
        inside = local < width
        count += (place_of(keep_ptr, first + local, inside, entries, KIND) >= 0).to(tl.int64)
        start += BLOCK
    kept = tl.sum(count, axis=0)
    tl.store(counts_ptr + group, kept)
    before, start = first * 0, first * 0
    while start < width:
        local = start + tl.arange(0, BLOCK)
        inside = local < width
        place = place_of(keep_ptr, first + local, inside, entries, KIND)
        there = (place >= 0).to(tl.int64)
        rank = before + tl.cumsum(there, axis=0) - there
        position = tl.where(place >= 0, rank, kept + local - rank)
        tl.store(channels_ptr + first + position, tl.where(place >= 0, first + local, -1), mask=inside)
        tl.store(places_ptr + first + position, place if KIND == 3 else first + local, mask=inside)
        before += tl.sum(there, axis=0)
        start += BLOCK


PACK_NUMBERS = (
    "row_width", "column_width", "b_width", "taps_h", "taps_w", "row_stride", "column_stride", "h_stride", "w_stride",
    "group_shift",
)  # fmt: skip


@triton.jit(do_not_specialize=PACK_NUMBERS)
def pack_weights_kernel(
    w_ptr, b_ptr, rows_ptr, row_counts_ptr, columns_ptr, column_counts_ptr, row_width, column_width, b_width,
    taps_h, taps_w, row_stride, column_stride, h_stride, w_stride, group_shift,
    ROUND: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """b[g, row, tap, column] = w at the channels of row and column, 0 where there is none. Grid (groups * tiles,).

    Rows past the count are left as they are, and so are columns past the next multiple of ROUND.
    """
    columns, rows = tl.cdiv(b_width, BLOCK_C), tl.cdiv(row_width, BLOCK_R)
    program = tl.program_id(0)
    group = (program // columns // rows).to(tl.int64)
    row = (program // columns % rows) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = (program % columns) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_count, column_count = row_width, column_width
    if row_counts_ptr is not None:
        row_count = tl.load(row_counts_ptr + group).to(tl.int32)
    if column_counts_ptr is not None:
        column_count = tl.load(column_counts_ptr + group).to(tl.int32)
    row_channel, column_channel = group * row_width + row, group * column_width + column
    if rows_ptr is not None:
        row_channel = tl.load(rows_ptr + row_channel, mask=row < row_count, other=-1)
    if columns_ptr is not None:
        column_channel = tl.load(columns_ptr + column_channel, mask=column < column_count, other=-1)
    known_row, known_column = (row < row_count) & (row_channel >= 0), (column < column_count) & (column_channel >= 0)
    known = known_row[:, None] & known_column[None, :]
    written = (row < row_count)[:, None] & (column < tl.cdiv(column_count, ROUND) * ROUND)[None, :]
    taps = taps_h * taps_w
    source = w_ptr + row_channel[:, None] * row_stride + column_channel[None, :] * column_stride - group * group_shift
    target = b_ptr + ((group * row_width + row) * taps)[:, None] * b_width + column[None, :]
    tap = taps * 0
    while tap < taps:
        r, s = tap // taps_w, tap % taps_w
        value = tl.load(source + r.to(tl.int64) * h_stride + s.to(tl.int64) * w_stride, mask=known, other=0.0)
        tl.store(target + tap.to(tl.int64) * b_width, value, mask=written)
        tap += 1


@dataclass(frozen=True)
class Side:
    """The channels of inputs or outputs as positions, ``width`` in each group; what is None is in order and complete.

    ``channels`` and ``places`` are [groups, width]: the channel at a position, -1 for none, and where it lies in
    memory, -1 for nowhere. ``counts`` is [groups]: positions before it have a channel, but for -1 that end a list.
    """

    width: int
    memory: int
    channels: Tensor | None = None
    places: Tensor | None = None
    counts: Tensor | None = None

    def unit(self, element_size: int) -> int:
        """Widths are multiples of it, and so many elements are at most 16 bytes."""
        if self.places is not None:
            return 1
        unit = 16 // element_size
        while self.width % unit:
            unit //= 2
        return unit


def kind_of(keep: Tensor | None, packed: bool) -> int:
    """What a keep argument is: ALL, MASK, LIST or PACKED."""
    if keep is None:
        return ALL
    return MASK if keep.dtype == torch.bool else PACKED if packed else LIST


def as_pointer(keep: Tensor | None) -> Tensor | None:
    """A keep argument as kernels read it."""
    if keep is None:
        return None
    keep = keep.contiguous()
    return keep.view(torch.uint8) if keep.dtype == torch.bool else keep


def make_side(keep: Tensor | None, channels: int, groups: int, packed: bool) -> Side:
    """The side of a convolution whose weights have so many channels there."""
    if keep is None:
        return Side(channels // groups, channels)
    if packed and groups == 1:
        return Side(keep.shape[0], keep.shape[0], keep.contiguous())
    width = channels // groups
    lists = keep.new_empty((2, groups, width), dtype=torch.int64)
    counts = keep.new_empty(groups, dtype=torch.int64)
    block = min(max(triton.next_power_of_2(width), 16), LONGEST)
    with device_of(keep):
        sides_kernel[(groups,)](
            as_pointer(keep), lists[0], lists[1], counts, keep.shape[0], width, KIND=kind_of(keep, packed), BLOCK=block,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return Side(width, keep.shape[0] if packed else channels, lists[0], lists[1], counts)


def pack_weights(weight: Tensor, rows: Side, columns: Side, groups: int, turned: bool) -> Tensor:
    """The weights between two sides, ``[groups, rows.width, taps, columns.width or more]``; turned: rows are inputs."""
    taps, width = weight.shape[2] * weight.shape[3], -(-columns.width // ROUND) * ROUND
    packed = weight.new_empty((groups, rows.width, taps, width))
    if packed.numel() == 0:
        return packed
    outer, inner, *window = weight.stride()
    strides = (inner, outer) if turned else (outer, inner)
    block_rows, block_columns = 8, 128
    tiles = triton.cdiv(rows.width, block_rows) * triton.cdiv(width, block_columns)
    with device_of(weight):
        pack_weights_kernel[(groups * tiles,)](
            weight, packed, rows.channels, rows.counts, columns.channels, columns.counts, rows.width, columns.width,
            width, *weight.shape[2:], *strides, *window, inner * weight.shape[1], ROUND=ROUND, BLOCK_R=block_rows,
            BLOCK_C=block_columns, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return packed

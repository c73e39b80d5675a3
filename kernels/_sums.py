"""The two passes behind every channel op: partial sums t[n, s, c] of samples n, splits s, channels c; then the finish.

Two kernels make partial sums: one for channels that lie side by side, one for summed elements that do. Sizes and
strides come in units of up to 16 bytes where they are multiples of it, so that one binary loads widely for all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from taylor_cuda.kernels._launch import Loop, Pair, Tiling, device_of

PRODUCT, SQUARE, ABS = 0, 1, 2  # what is summed of a*g, and what is done with a sample's sum

SIZES = ("channels", "samples", "length", "tiles", "splits", "inner")
STRIDES = ("a_sample", "a_channel", "a_outer", "a_inner", "g_sample", "g_channel", "g_outer", "g_inner")
PLACES = ("out_sample", "out_split")


@triton.jit
def _map(x, MAP: tl.constexpr):
    if MAP == 1:
        x = x * x
    elif MAP == 2:
        x = tl.abs(x)
    return x


@triton.jit
def _wide(number, UNIT: tl.constexpr):
    """A size or stride in elements; what fits into 32 bits in units may not in elements."""
    return number.to(tl.int64) * UNIT


@triton.jit
def _offsets(index, inner, outer_stride, inner_stride, NESTED: tl.constexpr, UNIT: tl.constexpr):
    """Where summed elements lie; ``index`` is int64, for a folded batch is one long run."""
    if NESTED:
        outer = index // inner
        return outer * _wide(outer_stride, UNIT) + (index - outer * inner) * _wide(inner_stride, UNIT)
    return index * _wide(inner_stride, UNIT)


@triton.jit(do_not_specialize=SIZES + STRIDES + PLACES)
def column_sums_kernel(
    a_ptr, g_ptr, out_ptr, channels, samples, length, tiles, splits, inner,
    a_sample, a_channel, a_outer, a_inner, g_sample, g_channel, g_outer, g_inner, out_sample, out_split,
    MAP: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr, UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr,
    NESTED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, TRIPS: tl.constexpr,
):  # fmt: skip
    """out[n, s, c] = the sum over split s. Grid (samples * splits * tiles,), a tile being BLOCK_C channels."""
    program = tl.program_id(0)
    tile = program % tiles
    split = (program // tiles) % splits
    sample = (program // tiles // splits).to(tl.int64)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < _wide(channels, UNIT)
    a_c = c if CONTIGUOUS else c * _wide(a_channel, 1)
    g_c = c if CONTIGUOUS else c * _wide(g_channel, 1)
    a_row = a_ptr + sample * _wide(a_sample, UNIT)
    g_row = g_ptr + sample * _wide(g_sample, UNIT)
    first = split.to(tl.int64) * (BLOCK_L * TRIPS)
    total = tl.zeros((BLOCK_L, BLOCK_C), dtype=ACC)
    for trip in range(TRIPS):
        index = first + trip * BLOCK_L + tl.arange(0, BLOCK_L)
        mask = (index < length)[:, None] & inside[None, :]
        a_l = _offsets(index, inner, a_outer, a_inner, NESTED, UNIT)
        g_l = _offsets(index, inner, g_outer, g_inner, NESTED, UNIT)
        a = tl.load(a_row + a_l[:, None] + a_c[None, :], mask=mask, other=0.0).to(ACC)
        g = tl.load(g_row + g_l[:, None] + g_c[None, :], mask=mask, other=0.0).to(ACC)
        total += _map(a * g, MAP)
    place = out_ptr + sample * out_sample + split.to(tl.int64) * out_split + c
    result = tl.sum(total, axis=0)
    if ADD:
        result += tl.load(place, mask=inside, other=0.0)
    tl.store(place, result, mask=inside)


@triton.jit(do_not_specialize=SIZES + STRIDES + PLACES)
def row_sums_kernel(
    a_ptr, g_ptr, out_ptr, channels, samples, length, tiles, splits, inner,
    a_sample, a_channel, a_outer, a_inner, g_sample, g_channel, g_outer, g_inner, out_sample, out_split,
    MAP: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr, UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr,
    NESTED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, TRIPS: tl.constexpr,
):  # fmt: skip
    """out[n, s, c] = the sum over split s. Grid (splits * tiles,), a tile being BLOCK_R rows (n, c)."""
    program = tl.program_id(0)
    tile = (program % tiles).to(tl.int64)
    split = (program // tiles).to(tl.int64)
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    sample = row // channels
    c = row - sample * channels
    inside = sample < samples
    a_row = sample * _wide(a_sample, UNIT) + c * _wide(a_channel, UNIT)
    g_row = sample * _wide(g_sample, UNIT) + c * _wide(g_channel, UNIT)
    total = tl.zeros((BLOCK_R, BLOCK_L), dtype=ACC)
    for trip in range(TRIPS):
        index = split * (BLOCK_L * TRIPS) + trip * BLOCK_L + tl.arange(0, BLOCK_L)
        mask = inside[:, None] & (index < _wide(length, UNIT))[None, :]
        a_l = index if CONTIGUOUS else _offsets(index, inner, a_outer, a_inner, NESTED, 1)
        g_l = index if CONTIGUOUS else _offsets(index, inner, g_outer, g_inner, NESTED, 1)
        a = tl.load(a_ptr + a_row[:, None] + a_l[None, :], mask=mask, other=0.0).to(ACC)
        g = tl.load(g_ptr + g_row[:, None] + g_l[None, :], mask=mask, other=0.0).to(ACC)
        total += _map(a * g, MAP)
    place = out_ptr + sample * out_sample + split * out_split + c
    result = tl.sum(total, axis=1)
    if ADD:
        result += tl.load(place, mask=inside, other=0.0)
    tl.store(place, result, mask=inside)


@triton.jit(do_not_specialize=("samples", "splits", "channels", "divisor"))
def finish_channels_kernel(
    t_ptr, out_ptr, samples, splits, channels, divisor,
    MAP: tl.constexpr, SQUARE_TOTAL: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[c] = total(sum_n map(sum_s t[n, s, c])) / divisor. Grid (cdiv(channels, BLOCK_C),)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
    first = tl.program_id(0).to(tl.int64) * 0  # loops count in int64, and their bounds are no Python numbers
    n = first
    while n < samples:
        sample = n + tl.arange(0, BLOCK_N)
        sums = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
        s = first
        while s < splits:
            split = s + tl.arange(0, BLOCK_S)
            place = (sample[:, None, None] * splits + split[None, :, None]) * channels + c[None, None, :]
            mask = (sample < samples)[:, None, None] & (split < splits)[None, :, None] & (c < channels)[None, None, :]
            sums += tl.sum(tl.load(t_ptr + place, mask=mask, other=0.0), axis=1)
            s += BLOCK_S
        total += _map(sums, MAP)
        n += BLOCK_N
    result = tl.sum(total, axis=0)
    if SQUARE_TOTAL:
        result = result * result
    result = result / divisor.to(ACC)
    if ADD:
        result += tl.load(out_ptr + c, mask=c < channels, other=0.0)
    tl.store(out_ptr + c, result, mask=c < channels)


@triton.jit(do_not_specialize=("rows", "splits", "channels"))
def finish_samples_kernel(
    t_ptr, out_ptr, rows, splits, channels, ADD: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[n, c] = sum_s t[n, s, c]. Grid (cdiv(rows, BLOCK),), a row being (n, c)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sample = row // channels
    base = sample * splits * channels + (row - sample * channels)
    sums = tl.zeros((BLOCK,), dtype=ACC)
    s = tl.program_id(0).to(tl.int64) * 0
    while s < splits:
        sums += tl.load(t_ptr + base + s * channels, mask=row < rows, other=0.0)
        s += 1
    if ADD:
        sums += tl.load(out_ptr + row, mask=row < rows, other=0.0)
    tl.store(out_ptr + row, sums, mask=row < rows)


def accumulator(out: Tensor) -> tl.dtype:
    """The type in which sums for ``out`` are formed."""
    return tl.float64 if out.element_size() == 8 else tl.float32


def launch_sums(
    pair: Pair, tiling: Tiling, out: Tensor, out_sample: int, out_split: int, term: int = PRODUCT, add: bool = False
) -> None:
    """Write, or add, t[n, s, c] to ``out`` at n * out_sample + s * out_split + c."""
    unit, block = tiling.unit, tiling.block_across
    channels, length, samples = pair.channel.size, pair.length, pair.sample.size
    sample, outer = _in_units(pair.sample, unit), _in_units(pair.outer, unit)
    if pair.columns:
        kernel, across, tiles = column_sums_kernel, {"BLOCK_C": block}, triton.cdiv(channels, block)
        channel, inner, channels = pair.channel, _in_units(pair.inner, unit), channels // unit
    else:
        kernel, across, tiles = row_sums_kernel, {"BLOCK_R": block}, triton.cdiv(samples * channels, block)
        channel, inner, length = _in_units(pair.channel, unit), pair.inner, length // unit
    with device_of(out):
        kernel[(tiling.programs,)](
            pair.activation, pair.gradient, out, channels, samples, length, tiles, tiling.splits, inner.size,
            sample.a, channel.a, outer.a, inner.a, sample.g, channel.g, outer.g, inner.g, out_sample, out_split,
            MAP=term, ADD=add, ACC=accumulator(out), UNIT=unit, CONTIGUOUS=tiling.contiguous,
            NESTED=pair.outer.size > 1, BLOCK_L=tiling.block_length, TRIPS=tiling.trips, **across,
            num_warps=tiling.warps, enable_fp_fusion=True,
        )  # fmt: skip


def launch_finish_channels(
    t: Tensor, out: Tensor, per_sample: int = PRODUCT, square_total: bool = False, divisor: int = 1, add: bool = False
) -> None:
    """Write, or add, total(sum_n map(sum_s t[n, s, c])) / divisor to ``out`` [C]."""
    samples, splits, channels = t.shape
    if per_sample == PRODUCT:  # then splits are added up as samples are
        samples, splits = samples * splits, 1
    block_s = min(triton.next_power_of_2(splits), 32)
    with device_of(out):
        finish_channels_kernel[(triton.cdiv(channels, 32),)](
            t, out, samples, splits, channels, divisor,
            MAP=per_sample, SQUARE_TOTAL=square_total, ADD=add, ACC=accumulator(out),
            BLOCK_N=128 // block_s, BLOCK_S=block_s, BLOCK_C=32, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip


def launch_finish_samples(t: Tensor, out: Tensor, add: bool = False) -> None:
    """Write, or add, sum_s t[n, s, c] to ``out`` [N, C]."""
    samples, splits, channels = t.shape
    rows = samples * channels
    with device_of(out):
        finish_samples_kernel[(triton.cdiv(rows, 256),)](
            t, out, rows, splits, channels, ADD=add, ACC=accumulator(out), BLOCK=256, num_warps=4, enable_fp_fusion=True
        )


def _in_units(loop: Loop, unit: int) -> Loop:
    return Loop(loop.size, loop.a // unit, loop.g // unit)

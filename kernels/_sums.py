"""The two passes behind every channel op: partial sums t[n, s, c] over samples n, splits s and channels c, then the finish.

Two kernels make partial sums: one for channels that lie side by side, one for summed elements that do. Sizes and strides come in
units of up to 16 bytes where they are multiples of it, so that one binary loads 16 bytes at a time for every such size.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from taylor_cuda.kernels._launch import Pair, Tiling, device_of

PRODUCT, SQUARE, ABS = 0, 1, 2  # what is summed of a*g, and what is done with a sample's sum

_SIZES = (
    *("channels", "samples", "length", "tiles", "splits", "inner", "a_sample", "a_channel", "a_outer", "a_inner"),
    *("g_sample", "g_channel", "g_outer", "g_inner", "out_sample", "out_split"),
)


@triton.jit
def _map(x, MAP: tl.constexpr):
    if MAP == 1:
        x = x * x
    elif MAP == 2:
        x = tl.abs(x)
    return x


@triton.jit
def _offsets(index, inner, outer_stride, inner_stride, NESTED: tl.constexpr, UNIT: tl.constexpr):
    """Where summed elements lie. Offsets can pass 2**31: a folded batch is one long run."""
    if NESTED:
        outer = index // inner
        return outer.to(tl.int64) * (outer_stride * UNIT) + (index - outer * inner).to(tl.int64) * (inner_stride * UNIT)
    return index.to(tl.int64) * (inner_stride * UNIT)


@triton.jit(do_not_specialize=_SIZES)
def column_sums_kernel(
    a_ptr, g_ptr, out_ptr, channels, samples, length, tiles, splits, inner,
    a_sample, a_channel, a_outer, a_inner, g_sample, g_channel, g_outer, g_inner, out_sample, out_split,
    MAP: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr, UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr,
    NESTED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, TRIPS: tl.constexpr,
):  # fmt: skip
    """out[n, s, c] = the sum over split s. Grid (samples * splits * tiles,): one program per split of one tile of channels."""
    program = tl.program_id(0)
    tile = program % tiles
    split = (program // tiles) % splits
    sample = (program // tiles // splits).to(tl.int64)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (c < channels * UNIT)[None, :]
    a_c = c if CONTIGUOUS else c.to(tl.int64) * a_channel
    g_c = c if CONTIGUOUS else c.to(tl.int64) * g_channel
    a_row = a_ptr + sample * (a_sample * UNIT)
    g_row = g_ptr + sample * (g_sample * UNIT)
    first = split.to(tl.int64) * (BLOCK_L * TRIPS)
    total = tl.zeros((BLOCK_L, BLOCK_C), dtype=ACC)
    for trip in range(TRIPS):
        index = first + trip * BLOCK_L + tl.arange(0, BLOCK_L)
        mask = (index < length)[:, None] & inside
        a_l = _offsets(index, inner, a_outer, a_inner, NESTED, UNIT)
        g_l = _offsets(index, inner, g_outer, g_inner, NESTED, UNIT)
        a = tl.load(a_row + a_l[:, None] + a_c[None, :], mask=mask, other=0.0).to(ACC)
        g = tl.load(g_row + g_l[:, None] + g_c[None, :], mask=mask, other=0.0).to(ACC)
        total += _map(a * g, MAP)
    place = out_ptr + sample * out_sample + split.to(tl.int64) * out_split + c
    result = tl.sum(total, axis=0)
    if ADD:
        result += tl.load(place, mask=c < channels * UNIT, other=0.0)
    tl.store(place, result, mask=c < channels * UNIT)


@triton.jit(do_not_specialize=_SIZES)
def row_sums_kernel(
    a_ptr, g_ptr, out_ptr, channels, samples, length, tiles, splits, inner,
    a_sample, a_channel, a_outer, a_inner, g_sample, g_channel, g_outer, g_inner, out_sample, out_split,
    MAP: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr, UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr,
    NESTED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, TRIPS: tl.constexpr,
):  # fmt: skip
    """out[n, s, c] = the sum over split s. Grid (splits * tiles,): one program per split of BLOCK_R rows n * channels + c."""
    program = tl.program_id(0)
    tile = (program % tiles).to(tl.int64)
    split = (program // tiles).to(tl.int64)
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    sample = row // channels
    c = row - sample * channels
    inside = (sample < samples)[:, None]
    a_row = sample * (a_sample * UNIT) + c * (a_channel * UNIT)
    g_row = sample * (g_sample * UNIT) + c * (g_channel * UNIT)
    total = tl.zeros((BLOCK_R, BLOCK_L), dtype=ACC)
    for trip in range(TRIPS):
        index = split * (BLOCK_L * TRIPS) + trip * BLOCK_L + tl.arange(0, BLOCK_L)
        mask = inside & (index < length * UNIT)[None, :]
        a_l = index if CONTIGUOUS and not NESTED else _offsets(index, inner, a_outer, a_inner, NESTED, 1)
        g_l = index if CONTIGUOUS and not NESTED else _offsets(index, inner, g_outer, g_inner, NESTED, 1)
        a = tl.load(a_ptr + a_row[:, None] + a_l[None, :], mask=mask, other=0.0).to(ACC)
        g = tl.load(g_ptr + g_row[:, None] + g_l[None, :], mask=mask, other=0.0).to(ACC)
        total += _map(a * g, MAP)
    place = out_ptr + sample * out_sample + split * out_split + c
    result = tl.sum(total, axis=1)
    if ADD:
        result += tl.load(place, mask=sample < samples, other=0.0)
    tl.store(place, result, mask=sample < samples)


@triton.jit(do_not_specialize=("samples", "splits", "channels"))
def finish_channels_kernel(
    t_ptr, out_ptr, samples, splits, channels, scale,
    MAP: tl.constexpr, SQUARE_TOTAL: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[c] = total(sum_n map(sum_s t[n, s, c])). Grid (cdiv(channels, BLOCK_C),): one program per tile of channels."""
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
    result = result * scale.to(ACC)
    if ADD:
        result += tl.load(out_ptr + c, mask=c < channels, other=0.0)
    tl.store(out_ptr + c, result, mask=c < channels)


@triton.jit(do_not_specialize=("rows", "splits", "channels"))
def finish_samples_kernel(
    t_ptr, out_ptr, rows, splits, channels, ADD: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[n, c] = sum_s t[n, s, c]. Grid (cdiv(rows, BLOCK),): one program per BLOCK rows n * channels + c."""
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


def launch_sums(pair: Pair, tiling: Tiling, out: Tensor, out_sample: int, out_split: int, term: int, add: bool = False) -> None:
    """Write, or add, t[n, s, c] to ``out`` at n * out_sample + s * out_split + c."""
    unit = tiling.unit
    kernel = column_sums_kernel if pair.columns else row_sums_kernel
    channels, length = pair.channel.size, pair.length
    if pair.columns:
        channels, tiles = channels // unit, -(-channels // tiling.block_across)
        across = {"BLOCK_C": tiling.block_across}
    else:
        length, tiles = length // unit, -(-pair.sample.size * channels // tiling.block_across)
        across = {"BLOCK_R": tiling.block_across}
    strides = [
        *(_in_units(pair.sample.a, unit), _in_units(pair.channel.a, 1 if pair.columns else unit)),
        *(_in_units(pair.outer.a, unit), _in_units(pair.inner.a, unit if pair.columns else 1)),
        *(_in_units(pair.sample.g, unit), _in_units(pair.channel.g, 1 if pair.columns else unit)),
        *(_in_units(pair.outer.g, unit), _in_units(pair.inner.g, unit if pair.columns else 1)),
    ]
    with device_of(out):
        kernel[(tiling.programs,)](
            *(pair.activation, pair.gradient, out, channels, pair.sample.size, length, tiles, tiling.splits),
            *(pair.inner.size, *strides, out_sample, out_split),
            MAP=term, ADD=add, ACC=accumulator(out), UNIT=unit, CONTIGUOUS=tiling.contiguous, NESTED=pair.outer.size > 1,
            BLOCK_L=tiling.block_length, TRIPS=tiling.trips, num_warps=4, **across,
        )  # fmt: skip


def launch_finish_channels(
    t: Tensor, out: Tensor, per_sample: int = PRODUCT, square_total: bool = False, scale: float = 1.0, add: bool = False
) -> None:
    """Write, or add, scale * total(sum_n map(sum_s t[n, s, c])) to ``out`` [C]."""
    samples, splits, channels = t.shape
    if per_sample == PRODUCT:  # then splits are added up as samples are
        samples, splits = samples * splits, 1
    block_s = min(triton.next_power_of_2(splits), 32)
    with device_of(out):
        finish_channels_kernel[(triton.cdiv(channels, 32),)](
            t, out, samples, splits, channels, scale,
            MAP=per_sample, SQUARE_TOTAL=square_total, ADD=add, ACC=accumulator(out),
            BLOCK_N=128 // block_s, BLOCK_S=block_s, BLOCK_C=32, num_warps=8,
        )  # fmt: skip


def launch_finish_samples(t: Tensor, out: Tensor, add: bool = False) -> None:
    """Write, or add, sum_s t[n, s, c] to ``out`` [N, C]."""
    samples, splits, channels = t.shape
    with device_of(out):
        finish_samples_kernel[(triton.cdiv(samples * channels, 256),)](
            t, out, samples * channels, splits, channels, ADD=add, ACC=accumulator(out), BLOCK=256, num_warps=4
        )


def _in_units(stride: int, unit: int) -> int:
    return stride // unit

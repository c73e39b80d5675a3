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
TWO, THREE = 3, 4  # the first two of them summed at once, or all three, each in a plane of its own

SIZES = ("channels", "samples", "length", "tiles", "splits", "trips", "inner")
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


@triton.jit
def _add(total, a, g, MAP: tl.constexpr):
    """The sum after a product. One fused operation for the plain sum, whatever else becomes of the product."""
    if MAP == 1 or MAP == 2:
        return total + _map(a * g, MAP)
    return tl.fma(a, g, total)


@triton.jit
def _store(place, total, inside, ADD: tl.constexpr):
    if ADD:
        total += tl.load(place, mask=inside, other=0.0)
    tl.store(place, total, mask=inside)


@triton.jit(do_not_specialize=SIZES + STRIDES + PLACES)
def column_sums_kernel(
    a_ptr, g_ptr, out_ptr, channels, samples, length, tiles, splits, trips, inner,
    a_sample, a_channel, a_outer, a_inner, g_sample, g_channel, g_outer, g_inner, out_sample, out_split,
    MAP: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr, UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr,
    NESTED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
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
    first = split.to(tl.int64) * trips
    total = tl.zeros((BLOCK_L, BLOCK_C), dtype=ACC)
    squares, sizes = total, total
    trip = program * 0  # a loop whose bounds are no Python numbers
    while trip < trips:
        index = (first + trip) * BLOCK_L + tl.arange(0, BLOCK_L)
        mask = (index < length)[:, None] & inside[None, :]
        a_l = _offsets(index, inner, a_outer, a_inner, NESTED, UNIT)
        g_l = _offsets(index, inner, g_outer, g_inner, NESTED, UNIT)
        a = tl.load(a_row + a_l[:, None] + a_c[None, :], mask=mask, other=0.0).to(ACC)
        g = tl.load(g_row + g_l[:, None] + g_c[None, :], mask=mask, other=0.0).to(ACC)
        total = _add(total, a, g, MAP)
        if MAP >= 3:
            squares += _map(a * g, 1)
        if MAP == 4:
            sizes += _map(a * g, 2)
        trip += 1
    place = out_ptr + sample * out_sample + split.to(tl.int64) * out_split + c
    plane = samples.to(tl.int64) * splits * _wide(channels, UNIT)
    _store(place, tl.sum(total, axis=0), inside, ADD)
    if MAP >= 3:
        _store(place + plane, tl.sum(squares, axis=0), inside, False)
    if MAP == 4:
        _store(place + 2 * plane, tl.sum(sizes, axis=0), inside, False)


@triton.jit(do_not_specialize=SIZES + STRIDES + PLACES)
def row_sums_kernel(
    a_ptr, g_ptr, out_ptr, channels, samples, length, tiles, splits, trips, inner,
    a_sample, a_channel, a_outer, a_inner, g_sample, g_channel, g_outer, g_inner, out_sample, out_split,
    MAP: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr, UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr,
    NESTED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
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
    squares = total
    trip = program * 0
    while trip < trips:
        index = (split * trips + trip) * BLOCK_L + tl.arange(0, BLOCK_L)
        mask = inside[:, None] & (index < _wide(length, UNIT))[None, :]
        a_l = index if CONTIGUOUS else _offsets(index, inner, a_outer, a_inner, NESTED, 1)
        g_l = index if CONTIGUOUS else _offsets(index, inner, g_outer, g_inner, NESTED, 1)
        a = tl.load(a_ptr + a_row[:, None] + a_l[None, :], mask=mask, other=0.0).to(ACC)
        g = tl.load(g_ptr + g_row[:, None] + g_l[None, :], mask=mask, other=0.0).to(ACC)
        total = _add(total, a, g, MAP)
        if MAP >= 3:
            squares += _map(a * g, 1)
        trip += 1
    place = out_ptr + sample * out_sample + split * out_split + c
    _store(place, tl.sum(total, axis=1), inside, ADD)
    if MAP >= 3:
        _store(place + samples.to(tl.int64) * splits * channels, tl.sum(squares, axis=1), inside, False)


@triton.jit
def _sum_splits(
    t_ptr, sample, c, samples, splits, channels,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sum_s t[n, s, c] of a tile of samples and channels."""
    sums = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
    s = tl.program_id(0).to(tl.int64) * 0  # loops count in int64, and their bounds are no Python numbers
    while s < splits:
        split = s + tl.arange(0, BLOCK_S)
        place = (sample[:, None, None] * splits + split[None, :, None]) * channels + c[None, None, :]
        mask = (sample < samples)[:, None, None] & (split < splits)[None, :, None] & (c < channels)[None, None, :]
        sums += tl.sum(tl.load(t_ptr + place, mask=mask, other=0.0), axis=1)
        s += BLOCK_S
    return sums


@triton.jit(do_not_specialize=("samples", "splits", "channels", "divisor"))
def finish_channels_kernel(
    t_ptr, out_ptr, samples, splits, channels, divisor,
    MAP: tl.constexpr, SQUARE_TOTAL: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[c] = total(sum_n map(sum_s t[n, s, c])) / divisor. Grid (cdiv(channels, BLOCK_C),)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
    n = tl.program_id(0).to(tl.int64) * 0
    while n < samples:
        sample = n + tl.arange(0, BLOCK_N)
        total += _map(_sum_splits(t_ptr, sample, c, samples, splits, channels, ACC, BLOCK_N, BLOCK_S, BLOCK_C), MAP)
        n += BLOCK_N
    result = tl.sum(total, axis=0)
    if SQUARE_TOTAL:
        result = result * result
    _store(out_ptr + c, result / divisor.to(ACC), c < channels, ADD)


@triton.jit(do_not_specialize=("samples", "splits", "channels", "divisor"))
def finish_all_kernel(
    t_ptr, out_ptr, samples, splits, channels, divisor,
    THREE: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[r, c] for the four reductions, from planes of t: a*g and (a*g)^2; with THREE also |a*g|, of one position."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
    squares, sizes, elements = total, total, total
    plane = samples.to(tl.int64) * splits * channels
    n = tl.program_id(0).to(tl.int64) * 0
    while n < samples:
        sample = n + tl.arange(0, BLOCK_N)
        sums = _sum_splits(t_ptr, sample, c, samples, splits, channels, ACC, BLOCK_N, BLOCK_S, BLOCK_C)
        total += sums
        sizes += tl.abs(sums)
        squares += sums * sums
        elements += _sum_splits(t_ptr + plane, sample, c, samples, splits, channels, ACC, BLOCK_N, BLOCK_S, BLOCK_C)
        n += BLOCK_N
    if THREE:
        squares = elements
        sizes = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
        n = tl.program_id(0).to(tl.int64) * 0
        while n < samples:
            sample = n + tl.arange(0, BLOCK_N)
            third = t_ptr + 2 * plane
            sizes += _sum_splits(third, sample, c, samples, splits, channels, ACC, BLOCK_N, BLOCK_S, BLOCK_C)
            n += BLOCK_N
    inside = c < channels
    place = out_ptr + c
    batch = tl.sum(total, axis=0)
    _store(place, batch * batch, inside, False)
    _store(place + channels, tl.sum(squares, axis=0), inside, False)
    _store(place + channels.to(tl.int64) * 2, tl.sum(sizes, axis=0) / divisor.to(ACC), inside, False)
    _store(place + channels.to(tl.int64) * 3, tl.sum(elements, axis=0), inside, False)


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
    _store(out_ptr + row, sums, row < rows, ADD)


def accumulator(out: Tensor) -> tl.dtype:
    """The type in which sums for ``out`` are formed."""
    return tl.float64 if out.element_size() == 8 else tl.float32


def constants_of(pair: Pair, tiling: Tiling, out: Tensor, term: int, add: bool) -> dict[str, object]:
    """What is compiled into a kernel of partial sums: with the types of the pointers, the key of its binary."""
    across = "BLOCK_C" if pair.columns else "BLOCK_R"
    return {
        **{"MAP": term, "ADD": add, "ACC": accumulator(out), "UNIT": tiling.unit, "CONTIGUOUS": tiling.contiguous},
        **{"NESTED": pair.outer.size > 1, "BLOCK_L": tiling.block_length, across: tiling.block_across},
    }


def launch_sums(
    pair: Pair, tiling: Tiling, out: Tensor, out_sample: int, out_split: int, term: int = PRODUCT, add: bool = False
) -> None:
    """Write, or add, t[n, s, c] to ``out`` at n * out_sample + s * out_split + c; further terms to further planes."""
    unit, block = tiling.unit, tiling.block_across
    channels, length, samples = pair.channel.size, pair.length, pair.sample.size
    sample, outer = _in_units(pair.sample, unit), _in_units(pair.outer, unit)
    if pair.columns:
        kernel, tiles = column_sums_kernel, triton.cdiv(channels, block)
        channel, inner, channels = pair.channel, _in_units(pair.inner, unit), channels // unit
    else:
        kernel, tiles = row_sums_kernel, triton.cdiv(samples * channels, block)
        channel, inner, length = _in_units(pair.channel, unit), pair.inner, length // unit
    with device_of(out):
        kernel[(tiling.programs,)](
            pair.activation, pair.gradient, out, channels, samples, length, tiles, tiling.splits, tiling.trips,
            inner.size, sample.a, channel.a, outer.a, inner.a, sample.g, channel.g, outer.g, inner.g, out_sample,
            out_split, **constants_of(pair, tiling, out, term, add), num_warps=tiling.warps, enable_fp_fusion=True,
        )  # fmt: skip


def launch_finish_channels(
    t: Tensor, out: Tensor, per_sample: int = PRODUCT, square_total: bool = False, divisor: int = 1, add: bool = False
) -> None:
    """Write, or add, total(sum_n map(sum_s t[n, s, c])) / divisor to ``out`` [C]."""
    samples, splits, channels = t.shape
    if per_sample == PRODUCT:  # then splits are added up as samples are
        samples, splits = samples * splits, 1
    block_s = _splits_at_once(splits)
    with device_of(out):
        finish_channels_kernel[(triton.cdiv(channels, 32),)](
            t, out, samples, splits, channels, divisor,
            MAP=per_sample, SQUARE_TOTAL=square_total, ADD=add, ACC=accumulator(out),
            BLOCK_N=128 // block_s, BLOCK_S=block_s, BLOCK_C=32, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip


def launch_finish_all(t: Tensor, out: Tensor, divisor: int) -> None:
    """Write the four reductions to ``out`` [4, C], from the planes of ``t`` [2 or 3, N, S, C]."""
    planes, samples, splits, channels = t.shape
    if planes == 3:  # then splits are added up as samples are
        samples, splits = samples * splits, 1
    block_s = _splits_at_once(splits)
    with device_of(out):
        finish_all_kernel[(triton.cdiv(channels, 32),)](
            t, out, samples, splits, channels, divisor, THREE=planes == 3, ACC=accumulator(out),
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


def _splits_at_once(splits: int) -> int:
    """Splits in one tile of a finish: each choice is a binary of its own."""
    return 1 if splits == 1 else 8 if splits <= 8 else 32


def _in_units(loop: Loop, unit: int) -> Loop:
    return Loop(loop.size, loop.a // unit, loop.g // unit)

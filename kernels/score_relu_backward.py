"""Triton backend of ops.score_relu_backward.

Computes     gx = 0 where output <= 0, else gradient; sums[n, c] += sum_l output * gradient, or sums[c] += the same
             over n too; skip_sums likewise of skip * gx                                            see ops/reference.py
Shapes       output, gradient, skip, gx [N, C, *spatial], L = product of spatial; sums, skip_sums [N, C] or [C]
Strides      gx: those of empty_like(output). 16-byte loads and stores for aligned channels_last and [N, L, C] with C,
             and NCHW with L, a multiple of 16 bytes; narrower ones by what C or L divides by, element by element where
             neighbours don't lie side by side. An output with gaps, a skip that lies otherwise, and a gradient with
             more than two summed dimensions that don't merge are copied first
Dtypes       output, gradient, skip, gx: fp32, fp16, bf16, fp64 (equal). Sums: fp32 (fp64 for fp64)
Bytes        3*N*C*L*itemsize (what threshold_backward moves), one more with skip; 8 for each of the sums, 8 more for
             each partial sum
Grid         as channel_sums; a second launch unless one program sums what belongs together, with skip a third
Determinism  yes: no atomics; each of the sums is changed by one program
Error        gx: none. Sums: at most 8 eps32 * (sum of the absolute terms + |sums|)                   (tests/gpu)
Source       arXiv:1906.10771
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taylor_cuda.kernels import _sums
from taylor_cuda.kernels._launch import Pair, Tiling, device_of, make_pair, make_tiling
from taylor_cuda.kernels._sums import PLACES, SIZES, STRIDES, _in_units, _offsets, _wide


@triton.jit
def _step(o_ptr, g_ptr, s_ptr, gx_ptr, o_at, g_at, mask, sums, skip_sums, SKIP: tl.constexpr, ACC: tl.constexpr):
    """One tile: writes gx and returns the sums with the tile's products. NaN is not <= 0."""
    o = tl.load(o_ptr + o_at, mask=mask, other=0.0).to(ACC)
    g = tl.load(g_ptr + g_at, mask=mask, other=0.0)
    gx = tl.where(o <= 0, tl.zeros_like(g), g)
    tl.store(gx_ptr + o_at, gx, mask=mask)
    sums += o * g.to(ACC)
    if SKIP:
        s = tl.load(s_ptr + o_at, mask=mask, other=0.0)
        skip_sums += s.to(ACC) * gx.to(ACC)
    return sums, skip_sums


@triton.jit
def _put(out_ptr, place, inside, result, ADD: tl.constexpr):
    if ADD:
        result += tl.load(out_ptr + place, mask=inside, other=0.0)
    tl.store(out_ptr + place, result, mask=inside)


@triton.jit(do_not_specialize=SIZES + STRIDES + PLACES)
def column_relu_kernel(
    o_ptr, g_ptr, s_ptr, gx_ptr, out_ptr, skip_out_ptr, channels, samples, length, tiles, splits, trips, inner,
    a_sample, a_channel, a_outer, a_inner, g_sample, g_channel, g_outer, g_inner, out_sample, out_split,
    SKIP: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr, UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr,
    NESTED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """gx, and out[n, s, c] = the sum over split s. Grid (samples * splits * tiles,), a tile being BLOCK_C channels."""
    program = tl.program_id(0)
    tile = program % tiles
    split = (program // tiles) % splits
    sample = (program // tiles // splits).to(tl.int64)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < _wide(channels, UNIT)
    a_c = c if CONTIGUOUS else c * _wide(a_channel, 1)
    g_c = c if CONTIGUOUS else c * _wide(g_channel, 1)
    a_row = sample * _wide(a_sample, UNIT)
    g_row = sample * _wide(g_sample, UNIT)
    first = split.to(tl.int64) * trips
    sums = tl.zeros((BLOCK_L, BLOCK_C), dtype=ACC)
    skip_sums = tl.zeros((BLOCK_L, BLOCK_C), dtype=ACC)
    trip = program * 0  # a loop whose bounds are no Python numbers
    while trip < trips:
        index = (first + trip) * BLOCK_L + tl.arange(0, BLOCK_L)
        mask = (index < length)[:, None] & inside[None, :]
        o_at = (a_row + _offsets(index, inner, a_outer, a_inner, NESTED, UNIT))[:, None] + a_c[None, :]
        g_at = (g_row + _offsets(index, inner, g_outer, g_inner, NESTED, UNIT))[:, None] + g_c[None, :]
        sums, skip_sums = _step(o_ptr, g_ptr, s_ptr, gx_ptr, o_at, g_at, mask, sums, skip_sums, SKIP, ACC)
        trip += 1
    place = sample * out_sample + split.to(tl.int64) * out_split + c
    _put(out_ptr, place, inside, tl.sum(sums, axis=0), ADD)
    if SKIP:
        _put(skip_out_ptr, place, inside, tl.sum(skip_sums, axis=0), ADD)


@triton.jit(do_not_specialize=SIZES + STRIDES + PLACES)
def row_relu_kernel(
    o_ptr, g_ptr, s_ptr, gx_ptr, out_ptr, skip_out_ptr, channels, samples, length, tiles, splits, trips, inner,
    a_sample, a_channel, a_outer, a_inner, g_sample, g_channel, g_outer, g_inner, out_sample, out_split,
    SKIP: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr, UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr,
    NESTED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """gx, and out[n, s, c] = the sum over split s. Grid (splits * tiles,), a tile being BLOCK_R rows (n, c)."""
    program = tl.program_id(0)
    tile = (program % tiles).to(tl.int64)
    split = (program // tiles).to(tl.int64)
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    sample = row // channels
    c = row - sample * channels
    inside = sample < samples
    a_row = sample * _wide(a_sample, UNIT) + c * _wide(a_channel, UNIT)
    g_row = sample * _wide(g_sample, UNIT) + c * _wide(g_channel, UNIT)
    sums = tl.zeros((BLOCK_R, BLOCK_L), dtype=ACC)
    skip_sums = tl.zeros((BLOCK_R, BLOCK_L), dtype=ACC)
    trip = program * 0
    while trip < trips:
        index = (split * trips + trip) * BLOCK_L + tl.arange(0, BLOCK_L)
        mask = inside[:, None] & (index < _wide(length, UNIT))[None, :]
        a_l = index if CONTIGUOUS else _offsets(index, inner, a_outer, a_inner, NESTED, 1)
        g_l = index if CONTIGUOUS else _offsets(index, inner, g_outer, g_inner, NESTED, 1)
        o_at = a_row[:, None] + a_l[None, :]
        g_at = g_row[:, None] + g_l[None, :]
        sums, skip_sums = _step(o_ptr, g_ptr, s_ptr, gx_ptr, o_at, g_at, mask, sums, skip_sums, SKIP, ACC)
        trip += 1
    place = sample * out_sample + split * out_split + c
    _put(out_ptr, place, inside, tl.sum(sums, axis=1), ADD)
    if SKIP:
        _put(skip_out_ptr, place, inside, tl.sum(skip_sums, axis=1), ADD)


def _laid_as(x: Tensor, other: Tensor) -> Tensor:
    """The tensor itself where it lies as the other does, else a copy that does."""
    alike = all(size == 1 or a == b for size, a, b in zip(x.shape, x.stride(), other.stride(), strict=True))
    return x if alike else torch.empty_like(other).copy_(x)


def warps_of(tiling: Tiling, skip: bool) -> int:
    """Of a program; with one more tensor to hold, four have too few registers."""
    return 8 if skip else tiling.warps


def _launch(
    pair: Pair, tiling: Tiling, gx: Tensor, skip: Tensor | None, out: Tensor, skip_out: Tensor | None,
    places: tuple[int, int], add: bool,
) -> None:  # fmt: skip
    """Write gx, and write or add both sums at n * places[0] + s * places[1] + c."""
    unit, block = tiling.unit, tiling.block_across
    channels, length, samples = pair.channel.size, pair.length, pair.sample.size
    sample, outer = _in_units(pair.sample, unit), _in_units(pair.outer, unit)
    if pair.columns:
        kernel, across, tiles = column_relu_kernel, {"BLOCK_C": block}, triton.cdiv(channels, block)
        channel, inner, channels = pair.channel, _in_units(pair.inner, unit), channels // unit
    else:
        kernel, across, tiles = row_relu_kernel, {"BLOCK_R": block}, triton.cdiv(samples * channels, block)
        channel, inner, length = _in_units(pair.channel, unit), pair.inner, length // unit
    beside = (gx, gx, out, out) if skip is None else (skip, gx, out, skip_out)
    with device_of(out):
        kernel[(tiling.programs,)](
            pair.activation, pair.gradient, *beside,
            channels, samples, length, tiles, tiling.splits, tiling.trips, inner.size,
            sample.a, channel.a, outer.a, inner.a, sample.g, channel.g, outer.g, inner.g, *places,
            SKIP=skip is not None, ADD=add, ACC=_sums.accumulator(out), UNIT=unit, CONTIGUOUS=tiling.contiguous,
            NESTED=pair.outer.size > 1, BLOCK_L=tiling.block_length, **across,
            num_warps=warps_of(tiling, skip is not None), enable_fp_fusion=True,
        )  # fmt: skip


def score_relu_backward(
    output: Tensor, gradient: Tensor, sums: Tensor, skip: Tensor | None = None, skip_sums: Tensor | None = None
) -> Tensor:
    """Return gx; add Σ_l output·gradient to sums [N, C] or, over n too, [C]; and Σ_l skip·gx to skip_sums."""
    gx = torch.empty_like(output)
    if output.numel() == 0:
        return gx
    output, skip = _laid_as(output, gx), None if skip is None else _laid_as(skip, gx)
    per_sample = sums.dim() == 2
    pair = make_pair(output, gradient, fold=not per_sample)
    if pair.activation is not output:  # a copy of both: with the gradient laid as gx, none is needed but for odd orders
        pair = make_pair(output, _laid_as(gradient, gx), fold=not per_sample)
    if pair.activation is not output:
        order = [None if x is None else x.contiguous() for x in (output, gradient, skip)]
        return gx.copy_(score_relu_backward(order[0], order[1], sums, order[2], skip_sums))
    tiling = make_tiling(pair)
    channels = pair.channel.size
    if tiling.splits == 1 and (per_sample or pair.sample.size == 1):
        _launch(pair, tiling, gx, skip, sums, skip_sums, (channels, 0), True)
        return gx
    outs = [sums] if skip_sums is None else [sums, skip_sums]
    partial = sums.new_empty((len(outs), pair.sample.size, tiling.splits, channels))
    places = (tiling.splits * channels, channels)
    _launch(pair, tiling, gx, skip, partial[0], None if skip is None else partial[-1], places, False)
    finish = _sums.launch_finish_samples if per_sample else _sums.launch_finish_channels
    for t, out in zip(partial, outs, strict=True):
        finish(t, out, add=True)
    return gx

"""The kernels of masked_conv2d: matrix products whose factors are gathered as they are loaded (implicit GEMM).

Activations are [N, H, W, C] without gaps. Widths of sides come in units of up to 16 bytes where they are multiples of
it, so that one binary loads widely for all of them, and every other number is an argument: a mask changes no binary.
"""

from __future__ import annotations

import triton
import triton.language as tl

CONV_NUMBERS = (
    "samples", "source_h", "source_w", "target_h", "target_w", "taps_h", "taps_w", "stride_h", "stride_w", "pad_h",
    "pad_w", "dilation_h", "dilation_w", "step_h", "step_w", "groups", "a_width", "a_memory", "y_width", "y_memory",
    "b_width",
)  # fmt: skip
GRADIENT_NUMBERS = (
    "samples", "source_h", "source_w", "target_h", "target_w", "taps_h", "taps_w", "stride_h", "stride_w", "pad_h",
    "pad_w", "dilation_h", "dilation_w", "groups", "g_width", "g_memory", "x_width", "x_memory", "trips",
)  # fmt: skip
FINISH_NUMBERS = (
    "groups", "row_width", "column_width", "taps_h", "taps_w", "splits", "row_stride", "column_stride", "h_stride",
    "w_stride", "group_shift",
)  # fmt: skip


@triton.jit
def _line(residue, taps, stride, pad, dilation, step, BACK: tl.constexpr):
    """Taps of one dimension as ``(first, number, base, delta)``.

    Target i, with BACK residue + i*stride, meets taps first + t*step for t < number, each at source i*stride + base +
    t*delta, with BACK i + base + t*delta.
    """
    first, number = taps * 0, taps
    base, delta = -pad, dilation
    if BACK:
        tap = taps * 0
        number = taps * 0
        while tap < taps:
            meets = (residue + pad - tap * dilation) % stride == 0
            first = tl.where(meets & (number == 0), tap, first)
            number += meets.to(tl.int32)
            tap += 1
        base = (residue + pad - first * dilation) // stride  # without a remainder where there are taps
        delta = -(step * dilation // stride)
    return first, number, base, delta


@triton.jit
def _count(counts_ptr, group, width):
    """Positions of a group that hold a channel."""
    count = width
    if counts_ptr is not None:
        count = tl.load(counts_ptr + group).to(tl.int32)
    return count


@triton.jit
def _places(places_ptr, group, width, position, count):
    """Where the channels of positions lie in memory."""
    place = group * width + position
    if places_ptr is not None:
        place = tl.load(places_ptr + place, mask=position < count, other=0).to(tl.int32)
    return place


@triton.jit
def _tap_of(k, width, FLAT: tl.constexpr, BLOCK: tl.constexpr):
    """Tap and channels of block k of a contraction, or columns, over (tap, channel); FLAT: blocks span taps."""
    if FLAT:
        element = k * BLOCK + tl.arange(0, BLOCK)
        tap = element // tl.maximum(width, 1)
        c = element - tap * width
    else:
        blocks = tl.maximum(tl.cdiv(width, BLOCK), 1)
        tap = k // blocks
        c = (k - tap * blocks) * BLOCK + tl.arange(0, BLOCK)
    return tap, c


@triton.jit
def _gathered(
    a_ptr, n, h, w, rows, place, known, up, across, source_h, source_w, memory, FLAT: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Tile [rows, channels] of an activation at (h + up, w + across), 0 outside of it; FLAT: up differs by channel."""
    if FLAT:
        hh, ww = h[:, None] + up[None, :], w[:, None] + across[None, :]
        inside = rows[:, None] & (hh >= 0) & (hh < source_h) & (ww >= 0) & (ww < source_w)
        pixel = hh * source_w + ww
    else:
        hh, ww = h + up, w + across
        inside = (rows & (hh >= 0) & (hh < source_h) & (ww >= 0) & (ww < source_w))[:, None]
        pixel = (hh * source_w + ww)[:, None]
    if WIDE:
        pixel = pixel.to(tl.int64)
    sample = a_ptr + (n.to(tl.int64) * source_h * source_w * memory)[:, None]
    return tl.load(sample + (pixel * memory + place[None, :]), mask=inside & known[None, :], other=0.0)


@triton.jit(do_not_specialize=CONV_NUMBERS)
def conv_kernel(
    a_ptr, b_ptr, y_ptr, a_places_ptr, a_counts_ptr, y_channels_ptr, y_places_ptr, y_counts_ptr, scale_ptr, bias_ptr,
    samples, source_h, source_w, target_h, target_w, taps_h, taps_w, stride_h, stride_w, pad_h, pad_w,
    dilation_h, dilation_w, step_h, step_w, groups, a_width, a_memory, y_width, y_memory, b_width,
    BACK: tl.constexpr, FLAT: tl.constexpr, RELU: tl.constexpr, A_UNIT: tl.constexpr, Y_UNIT: tl.constexpr,
    B_UNIT: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[m, o] = relu(scale*sum_{tap, c} a[m at tap, c]*b[o, tap, c] + bias), 0 where o is dropped.

    BACK: y is the gradient of an input and a that of its output, and m runs over the targets whose coordinates leave
    the same remainder, so that all of a tile meet the same taps. Grid (classes * tiles of m * groups * tiles of o,).
    """
    a_width, a_memory, b_width = a_width * A_UNIT, a_memory * A_UNIT, b_width * B_UNIT
    y_width, y_memory = y_width * Y_UNIT, y_memory * Y_UNIT
    if WIDE:
        samples = samples.to(tl.int64)
    tiles, program = tl.cdiv(y_width, BLOCK_N), tl.program_id(0)
    group = program // tiles % groups
    o = (program % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    jump_h, jump_w, move_h, move_w = stride_h * 0 + 1, stride_w * 0 + 1, stride_h, stride_w
    if BACK:
        jump_h, jump_w, move_h, move_w = stride_h, stride_w, jump_h, jump_w
    row_tiles = tl.cdiv(samples * tl.cdiv(target_h, jump_h) * tl.cdiv(target_w, jump_w), BLOCK_M)
    row_tile = program // tiles // groups
    residue_h, residue_w = row_tile // row_tiles // jump_w, row_tile // row_tiles % jump_w
    first_h, number_h, base_h, delta_h = _line(residue_h, taps_h, stride_h, pad_h, dilation_h, step_h, BACK)
    first_w, number_w, base_w, delta_w = _line(residue_w, taps_w, stride_w, pad_w, dilation_w, step_w, BACK)
    class_h, class_w = tl.cdiv(target_h - residue_h, jump_h), tl.cdiv(target_w - residue_w, jump_w)

    m = row_tile % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    some_h, some_w = tl.maximum(class_h, 1), tl.maximum(class_w, 1)
    i, j = m // some_w % some_h, m % some_w
    n = m // some_w // some_h
    rows = (n < samples) & (class_h * class_w > 0)
    h, w = i * move_h + base_h, j * move_w + base_w

    a_count, y_count = _count(a_counts_ptr, group, a_width), _count(y_counts_ptr, group, y_width)
    b_count = tl.cdiv(a_count, B_UNIT) * B_UNIT
    taps = number_h * number_w
    trips = tl.cdiv(taps * a_count, BLOCK_K) if FLAT else taps * tl.cdiv(a_count, BLOCK_K)
    trips = tl.where((program % tiles) * BLOCK_N < y_count, trips, 0)
    b_row = b_ptr + (group * y_width + o).to(tl.int64)[None, :] * (taps_h * taps_w * b_width)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, trips):
        tap, c = _tap_of(k, a_count, FLAT, BLOCK_K)
        t, u = tap // number_w, tap % number_w
        known = (c < a_count) & (tap < taps)
        place = _places(a_places_ptr, group, a_width, c, a_count)
        a = _gathered(
            a_ptr, n, h, w, rows, place, known, t * delta_h, u * delta_w, source_h, source_w, a_memory, FLAT, WIDE
        )
        b_place = ((first_h + t * step_h) * taps_w + first_w + u * step_w) * b_width + c
        there = ((c < b_count) & (tap < taps))[:, None] & (o < y_count)[None, :]
        b = tl.load(b_row + b_place[:, None], mask=there, other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        accumulator = tl.dot(a, b, accumulator, input_precision="ieee")

    channel = group * y_width + o
    if y_channels_ptr is not None:
        channel = tl.load(y_channels_ptr + channel, mask=o < y_count, other=-1).to(tl.int32)
    kept = (o < y_count) & (channel >= 0)
    if scale_ptr is not None:
        accumulator *= tl.load(scale_ptr + channel, mask=kept, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        accumulator += tl.load(bias_ptr + channel, mask=kept, other=0.0).to(tl.float32)[None, :]
    if RELU:
        accumulator = tl.where(accumulator <= 0, 0.0, accumulator)
    accumulator = tl.where(kept[None, :], accumulator, 0.0)
    place = _places(y_places_ptr, group, y_width, o, y_width)
    stored = (o < y_width) & (place >= 0)
    pixel = (n.to(tl.int64) * target_h + (residue_h + i * jump_h)) * target_w + (residue_w + j * jump_w)
    value = accumulator.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + pixel[:, None] * y_memory + place[None, :], value, mask=rows[:, None] & stored[None, :])


@triton.jit(do_not_specialize=GRADIENT_NUMBERS)
def weight_gradient_kernel(
    g_ptr, x_ptr, part_ptr, g_places_ptr, g_counts_ptr, x_places_ptr, x_counts_ptr,
    samples, source_h, source_w, target_h, target_w, taps_h, taps_w, stride_h, stride_w, pad_h, pad_w,
    dilation_h, dilation_w, groups, g_width, g_memory, x_width, x_memory, trips,
    FLAT: tl.constexpr, G_UNIT: tl.constexpr, X_UNIT: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """part[split, g, o, tap, c] = sum over the pixels m of a split of g[m, o]*x[m at tap, c].

    Positions without a channel are left as they are. Grid (splits * groups * tiles of o * tiles of (tap, c),).
    """
    g_width, g_memory, x_width, x_memory = g_width * G_UNIT, g_memory * G_UNIT, x_width * X_UNIT, x_memory * X_UNIT
    if WIDE:
        samples = samples.to(tl.int64)
    taps, program = taps_h * taps_w, tl.program_id(0)
    columns = tl.cdiv(taps * x_width, BLOCK_N) if FLAT else taps * tl.cdiv(x_width, BLOCK_N)
    tiles = tl.cdiv(g_width, BLOCK_M)
    tile, group = program // columns % tiles, program // columns // tiles % groups
    split = program // columns // tiles // groups
    o = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    g_count, x_count = _count(g_counts_ptr, group, g_width), _count(x_counts_ptr, group, x_width)
    tap, c = _tap_of(program % columns, x_width, FLAT, BLOCK_N)
    up, across = tap // taps_w * dilation_h - pad_h, tap % taps_w * dilation_w - pad_w
    known_o, known_c = o < g_count, (c < x_count) & (tap < taps)
    g_place = _places(g_places_ptr, group, g_width, o, g_count)
    x_place = _places(x_places_ptr, group, x_width, c, x_count)
    pixels = samples * target_h * target_w
    start = split * trips
    trips = tl.minimum(trips, tl.cdiv(pixels, BLOCK_K) - start)
    trips = tl.where((tile * BLOCK_M < g_count) & (tl.max(known_c.to(tl.int32), axis=0) > 0), trips, 0)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for trip in range(0, trips):
        m = (start + trip) * BLOCK_K + tl.arange(0, BLOCK_K)
        rows = m < pixels
        p, q = m // target_w % target_h, m % target_w
        n = m // target_w // target_h
        g_row = g_ptr + m.to(tl.int64)[:, None] * g_memory
        g = tl.load(g_row + g_place[None, :], mask=rows[:, None] & known_o[None, :], other=0.0)
        h, w = p * stride_h, q * stride_w
        x = _gathered(x_ptr, n, h, w, rows, x_place, known_c, up, across, source_h, source_w, x_memory, FLAT, WIDE)
        if UPCAST:
            g, x = g.to(tl.float32), x.to(tl.float32)
        accumulator = tl.dot(tl.trans(g), x, accumulator, input_precision="ieee")
    row = (split.to(tl.int64) * groups + group) * g_width + o
    place = row[:, None] * (taps * x_width) + (tap * x_width + c)[None, :]
    tl.store(part_ptr + place, accumulator, mask=known_o[:, None] & known_c[None, :])


@triton.jit(do_not_specialize=FINISH_NUMBERS)
def finish_weight_gradient_kernel(
    part_ptr, gw_ptr, rows_ptr, columns_ptr, groups, row_width, column_width, taps_h, taps_w, splits, row_stride,
    column_stride, h_stride, w_stride, group_shift,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Store gw[o, c, tap] at its channels = the sum of part over its splits, in order. Grid (tiles,)."""
    element = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    taps = taps_h * taps_w
    size = groups.to(tl.int64) * row_width * taps * column_width
    column, tap = element % column_width, element // column_width % taps
    row = element // column_width // taps % row_width
    group = element // column_width // taps // row_width
    known = element < size
    row_channel, column_channel = group * row_width + row, group * column_width + column
    if rows_ptr is not None:
        row_channel = tl.load(rows_ptr + row_channel, mask=known, other=-1)
    if columns_ptr is not None:
        column_channel = tl.load(columns_ptr + column_channel, mask=known, other=-1)
    known &= (row_channel >= 0) & (column_channel >= 0)
    total = tl.zeros((BLOCK_S, BLOCK_E), dtype=tl.float32)
    s = splits * 0
    while s < splits:
        split = s + tl.arange(0, BLOCK_S)
        there = (split < splits)[:, None] & known[None, :]
        total += tl.load(part_ptr + split.to(tl.int64)[:, None] * size + element[None, :], mask=there, other=0.0)
        s += BLOCK_S
    place = row_channel * row_stride + column_channel * column_stride - group * group_shift
    place += tap // taps_w * h_stride + tap % taps_w * w_stride
    tl.store(gw_ptr + place, tl.sum(total, axis=0).to(gw_ptr.dtype.element_ty), mask=known)

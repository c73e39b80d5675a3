"""The kernels of batch_norm_relu, over tensors without gaps whose channels, or whose summed elements, lie together.

A program takes TRIPS tiles of BLOCK_L summed elements x BLOCK_C channels, one after another, of one sample. C, or L in
rows, comes in units of up to 16 bytes where it is a multiple of it, so that one binary loads widely for all of them.
What a reduction read first its successor reads last: its programs count downwards, towards what is still in the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ("channels", "length", "tiles", "splits", "samples")


@triton.jit
def _start(program, channels, length, tiles, splits, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, SPAN: tl.constexpr):
    """Where the first tile of a program begins, in int64; a sample is [L, C] in columns and [C, L] in rows."""
    sample = (program // tiles // splits).to(tl.int64)
    first = ((program // tiles) % splits).to(tl.int64) * SPAN
    c = (program % tiles).to(tl.int64) * BLOCK_C
    within = first * channels + c if COLUMNS else c * length + first
    return sample * channels * length + within


@triton.jit
def _left(program, length, tiles, splits, SPAN: tl.constexpr):
    """How many summed elements a program has."""
    return tl.minimum(length - ((program // tiles) % splits).to(tl.int64) * SPAN, SPAN).to(tl.int32)


@triton.jit
def _places(channels, length, COLUMNS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    """Where the elements of a tile lie, seen from its first one; in 32 bits, where they suffice, for few registers."""
    place_type: tl.constexpr = tl.int64 if WIDE else tl.int32
    row = tl.arange(0, BLOCK_L).to(place_type)[:, None]
    column = tl.arange(0, BLOCK_C).to(place_type)[None, :]
    return row * channels.to(place_type) + column if COLUMNS else row + column * length.to(place_type)


@triton.jit
def _vector(pointer, c, inside, GIVEN: tl.constexpr, default: tl.constexpr):
    """One number a channel as a row of fp32, or the default where there is no such vector."""
    if GIVEN:
        row = tl.load(pointer + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    else:
        row = tl.full((1, 1), default, dtype=tl.float32)
    return row


@triton.jit
def _grouped(tile, GROUP: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr):
    """[GROUP, BLOCK_L / GROUP, BLOCK_C]: the rows that one thread holds are in the first dimension."""
    return tl.reshape(tile, (GROUP, BLOCK_L // GROUP, BLOCK_C))


@triton.jit
def _before_relu(g, z):
    """The gradient in the input of a ReLU whose output, or input, is z; a NaN there lets it pass."""
    return tl.where(z <= 0, 0.0, g)


@triton.jit(do_not_specialize=SIZES)
def moments_kernel(
    x_ptr, shift_ptr, step_ptr, m2_ptr, channels, length, tiles, splits,
    COLUMNS: tl.constexpr, UNIT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, TRIPS: tl.constexpr,
    WIDE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Store shift[n, s, c] + step[n, s, c], the mean of split s, and m2, its sum of squared differences from that.

    Grid (samples*splits*tiles,). Squares are those of differences from the first tile's mean. That tile is one of at
    most 16, so that the variance is at least a sixteenth of their mean, whatever the numbers are: no digits are lost
    where mean >> deviation. Nor are those that tell splits apart, for their means stay in two parts.
    """
    channels = channels.to(tl.int64) * (UNIT if COLUMNS else 1)
    length = length.to(tl.int64) * (1 if COLUMNS else UNIT)
    program = tl.program_id(0)
    c = (program % tiles).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    left = _left(program, length, tiles, splits, BLOCK_L * TRIPS)
    places = _places(channels, length, COLUMNS, BLOCK_L, BLOCK_C, WIDE)
    start = _start(program, channels, length, tiles, splits, COLUMNS, BLOCK_C, BLOCK_L * TRIPS)
    inside = (c < channels)[None, :]
    mask = (tl.arange(0, BLOCK_L) < left)[:, None] & inside
    x = tl.load(x_ptr + start + places, mask=mask, other=0.0).to(tl.float32)
    shift = tl.sum(x, axis=0) / tl.minimum(left, BLOCK_L).to(tl.float32)
    off = tl.where(mask, x - shift[None, :], 0.0)
    total = tl.sum(_grouped(off, GROUP, BLOCK_L, BLOCK_C), axis=0)
    squares = tl.sum(_grouped(off * off, GROUP, BLOCK_L, BLOCK_C), axis=0)
    for trip in range(1, TRIPS):
        mask = (trip * BLOCK_L + tl.arange(0, BLOCK_L) < left)[:, None] & inside
        here = x_ptr + start + trip * BLOCK_L * (channels if COLUMNS else 1)
        x = tl.load(here + places, mask=mask, other=0.0).to(tl.float32)
        off = tl.where(mask, x - shift[None, :], 0.0)
        total += tl.sum(_grouped(off, GROUP, BLOCK_L, BLOCK_C), axis=0)
        squares += tl.sum(_grouped(off * off, GROUP, BLOCK_L, BLOCK_C), axis=0)
    size = left.to(tl.float32)
    step = tl.sum(total, axis=0) / size
    m2 = tl.sum(squares, axis=0) - size * step * step
    place = (program // tiles).to(tl.int64) * channels + c
    tl.store(shift_ptr + place, shift, mask=c < channels)
    tl.store(step_ptr + place, step, mask=c < channels)
    tl.store(m2_ptr + place, m2, mask=c < channels)


@triton.jit
def _moved(pointer, value, c, inside, momentum):
    """Running statistics after one more batch."""
    before = tl.load(pointer + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(pointer + c, (before + momentum * (value - before)).to(pointer.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("parts", "channels", "length", "splits", "span", "momentum", "eps"))
def statistics_kernel(
    part_shift_ptr, part_step_ptr, part_m2_ptr, running_mean_ptr, running_var_ptr, mean_ptr, invstd_ptr,
    parts, channels, length, splits, span, momentum, eps,
    TRAINING: tl.constexpr, RUNNING: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store mean and 1/sqrt(variance + eps), those of parts of ``span`` elements or the running ones. Grid (tiles,)."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    if TRAINING:
        start = tl.program_id(0) * 0  # bounds of loops are no Python numbers
        size = (length.to(tl.int64) * (parts // splits)).to(tl.float32)
        full, last = span.to(tl.float32), (length - (splits - 1).to(tl.int64) * span).to(tl.float32)
        total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
        p = start
        while p < parts:
            part = p + tl.arange(0, BLOCK_P)
            place = part.to(tl.int64)[:, None] * channels + c[None, :]
            mask = (part < parts)[:, None] & inside[None, :]
            count = tl.where(part % splits == splits - 1, last, full)[:, None]
            total += count * tl.load(part_shift_ptr + place, mask=mask, other=0.0)
            p += BLOCK_P
        middle = tl.sum(total, axis=0) / size
        total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
        m2 = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
        p = start
        while p < parts:
            part = p + tl.arange(0, BLOCK_P)
            place = part.to(tl.int64)[:, None] * channels + c[None, :]
            mask = (part < parts)[:, None] & inside[None, :]
            count = tl.where(part % splits == splits - 1, last, full)[:, None]
            shift = tl.load(part_shift_ptr + place, mask=mask, other=0.0) - middle[None, :]
            off = tl.where(mask, shift + tl.load(part_step_ptr + place, mask=mask, other=0.0), 0.0)
            total += count * off
            m2 += tl.load(part_m2_ptr + place, mask=mask, other=0.0) + count * off * off
            p += BLOCK_P
        correction = tl.sum(total, axis=0) / size
        mean = middle + correction
        m2_all = tl.sum(m2, axis=0) - size * correction * correction
        m2_all = tl.where(m2_all < 0, 0.0, m2_all)
        variance = m2_all / size
        if RUNNING:
            _moved(running_mean_ptr, mean, c, inside, momentum)
            _moved(running_var_ptr, m2_all / (size - 1), c, inside, momentum)
    else:
        mean = tl.load(running_mean_ptr + c, mask=inside, other=0.0).to(tl.float32)
        variance = tl.load(running_var_ptr + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(mean_ptr + c, mean, mask=inside)
    tl.store(invstd_ptr + c, 1.0 / tl.sqrt(variance + eps), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def apply_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, invstd_ptr, y_ptr, channels, length, tiles, splits,
    RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, COLUMNS: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, TRIPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store y = relu((x - mean)*invstd*weight + bias + residual). Grid (samples * splits * tiles,)."""
    channels = channels.to(tl.int64) * (UNIT if COLUMNS else 1)
    length = length.to(tl.int64) * (1 if COLUMNS else UNIT)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    c = (program % tiles).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    mean = _vector(mean_ptr, c, inside, True, 0.0)
    scale = _vector(invstd_ptr, c, inside, True, 1.0) * _vector(weight_ptr, c, inside, WEIGHT, 1.0)
    beta = _vector(bias_ptr, c, inside, BIAS, 0.0)
    left = _left(program, length, tiles, splits, BLOCK_L * TRIPS)
    places = _places(channels, length, COLUMNS, BLOCK_L, BLOCK_C, WIDE)
    start = _start(program, channels, length, tiles, splits, COLUMNS, BLOCK_C, BLOCK_L * TRIPS)
    for trip in range(TRIPS):
        mask = (trip * BLOCK_L + tl.arange(0, BLOCK_L) < left)[:, None] & inside[None, :]
        here = start + trip * BLOCK_L * (channels if COLUMNS else 1)
        x = tl.load(x_ptr + here + places, mask=mask, other=0.0).to(tl.float32)
        y = (x - mean) * scale + beta
        if RESIDUAL:
            y += tl.load(residual_ptr + here + places, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            y = tl.where(y <= 0, 0.0, y)
        tl.store(y_ptr + here + places, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def gradient_sums_kernel(
    g_ptr, x_ptr, y_ptr, weight_ptr, bias_ptr, mean_ptr, invstd_ptr, masked_ptr, along_ptr, plain_ptr,
    channels, length, tiles, splits,
    OUTPUT: tl.constexpr, MASKED: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr,
    COLUMNS: tl.constexpr, UNIT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, TRIPS: tl.constexpr,
    WIDE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """along[n, s, c] = sum g'*xhat, plain[n, s, c] = sum g', masked = g' if wanted. Grid (samples*splits*tiles,)."""
    channels = channels.to(tl.int64) * (UNIT if COLUMNS else 1)
    length = length.to(tl.int64) * (1 if COLUMNS else UNIT)
    program = tl.program_id(0)
    c = (program % tiles).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    mean = _vector(mean_ptr, c, inside, True, 0.0)
    scale = _vector(invstd_ptr, c, inside, True, 1.0) * _vector(weight_ptr, c, inside, WEIGHT, 1.0)
    beta = _vector(bias_ptr, c, inside, BIAS, 0.0)
    left = _left(program, length, tiles, splits, BLOCK_L * TRIPS)
    places = _places(channels, length, COLUMNS, BLOCK_L, BLOCK_C, WIDE)
    start = _start(program, channels, length, tiles, splits, COLUMNS, BLOCK_C, BLOCK_L * TRIPS)
    along = tl.zeros((BLOCK_L // GROUP, BLOCK_C), dtype=tl.float32)
    plain = tl.zeros((BLOCK_L // GROUP, BLOCK_C), dtype=tl.float32)
    for trip in range(TRIPS):
        mask = (trip * BLOCK_L + tl.arange(0, BLOCK_L) < left)[:, None] & inside[None, :]
        here = start + trip * BLOCK_L * (channels if COLUMNS else 1)
        g = tl.load(g_ptr + here + places, mask=mask, other=0.0).to(tl.float32)
        centred = tl.load(x_ptr + here + places, mask=mask, other=0.0).to(tl.float32) - mean
        if RELU:
            if OUTPUT:
                z = tl.load(y_ptr + here + places, mask=mask, other=0.0).to(tl.float32)
            else:
                z = centred * scale + beta
            g = _before_relu(g, z)
        if MASKED:
            tl.store(masked_ptr + here + places, g.to(masked_ptr.dtype.element_ty), mask=mask)
        plain += tl.sum(_grouped(g, GROUP, BLOCK_L, BLOCK_C), axis=0)
        along += tl.sum(_grouped(g * centred, GROUP, BLOCK_L, BLOCK_C), axis=0)
    invstd = tl.load(invstd_ptr + c, mask=inside, other=0.0)
    place = (program // tiles).to(tl.int64) * channels + c
    tl.store(along_ptr + place, tl.sum(along, axis=0) * invstd, mask=inside)
    tl.store(plain_ptr + place, tl.sum(plain, axis=0), mask=inside)


@triton.jit(do_not_specialize=("samples", "splits", "channels"))
def gates_kernel(
    along_ptr, plain_ptr, weight_ptr, bias_ptr, totals_ptr, sums_ptr, samples, splits, channels,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, PER_SAMPLE: tl.constexpr, TOTAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """totals[0] = sum_n,s along, totals[1] = sum_n,s plain; sums += gamma*along + beta*plain. Grid (tiles,)."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    gamma = _vector(weight_ptr, c, inside, WEIGHT, 1.0)
    beta = _vector(bias_ptr, c, inside, BIAS, 0.0)
    all_along = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    all_plain = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    start = tl.program_id(0).to(tl.int64) * 0
    n = start
    while n < samples:
        sample = n + tl.arange(0, BLOCK_N)
        along = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
        plain = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
        s = start
        while s < splits:
            split = s + tl.arange(0, BLOCK_S)
            place = (sample[:, None, None] * splits + split[None, :, None]) * channels + c[None, None, :]
            mask = (sample < samples)[:, None, None] & (split < splits)[None, :, None] & inside[None, None, :]
            along += tl.sum(tl.load(along_ptr + place, mask=mask, other=0.0), axis=1)
            plain += tl.sum(tl.load(plain_ptr + place, mask=mask, other=0.0), axis=1)
            s += BLOCK_S
        if PER_SAMPLE:
            where = sums_ptr + sample[:, None] * channels + c[None, :]
            known = (sample < samples)[:, None] & inside[None, :]
            before = tl.load(where, mask=known, other=0.0)
            tl.store(where, before + gamma * along + beta * plain, mask=known)
        all_along += along
        all_plain += plain
        n += BLOCK_N
    along_total = tl.sum(all_along, axis=0)[None, :]
    plain_total = tl.sum(all_plain, axis=0)[None, :]
    row = c[None, :]
    tl.store(totals_ptr + row, along_total, mask=inside[None, :])
    tl.store(totals_ptr + channels + row, plain_total, mask=inside[None, :])
    if TOTAL:
        before = tl.load(sums_ptr + row, mask=inside[None, :], other=0.0)
        tl.store(sums_ptr + row, before + gamma * along_total + beta * plain_total, mask=inside[None, :])


@triton.jit(do_not_specialize=SIZES)
def input_gradient_kernel(
    g_ptr, x_ptr, y_ptr, weight_ptr, bias_ptr, mean_ptr, invstd_ptr, totals_ptr, masked_ptr, gx_ptr,
    channels, length, tiles, splits, samples,
    TRAINING: tl.constexpr, OUTPUT: tl.constexpr, MASKED: tl.constexpr, INNER: tl.constexpr, WEIGHT: tl.constexpr,
    BIAS: tl.constexpr, RELU: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr, TRIPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store gx = gamma*invstd*(g' - (plain + xhat*along)/M), without the bracket in evaluation mode. Grid as before."""
    channels = channels.to(tl.int64) * (UNIT if COLUMNS else 1)
    length = length.to(tl.int64) * (1 if COLUMNS else UNIT)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    c = (program % tiles).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    mean = _vector(mean_ptr, c, inside, True, 0.0)
    invstd = _vector(invstd_ptr, c, inside, True, 1.0)
    scale = invstd * _vector(weight_ptr, c, inside, WEIGHT, 1.0)
    beta = _vector(bias_ptr, c, inside, BIAS, 0.0)
    size = (length * samples).to(tl.float32)
    slope = _vector(totals_ptr, c, inside, TRAINING, 0.0) / size * invstd
    offset = _vector(totals_ptr + channels, c, inside, TRAINING, 0.0) / size
    left = _left(program, length, tiles, splits, BLOCK_L * TRIPS)
    places = _places(channels, length, COLUMNS, BLOCK_L, BLOCK_C, WIDE)
    start = _start(program, channels, length, tiles, splits, COLUMNS, BLOCK_C, BLOCK_L * TRIPS)
    for trip in range(TRIPS):
        mask = (trip * BLOCK_L + tl.arange(0, BLOCK_L) < left)[:, None] & inside[None, :]
        here = start + trip * BLOCK_L * (channels if COLUMNS else 1)
        g = tl.load(g_ptr + here + places, mask=mask, other=0.0).to(tl.float32)
        centred = tl.load(x_ptr + here + places, mask=mask, other=0.0).to(tl.float32) - mean
        if RELU:
            if OUTPUT:
                z = tl.load(y_ptr + here + places, mask=mask, other=0.0).to(tl.float32)
            else:
                z = centred * scale + beta
            g = _before_relu(g, z)
        if MASKED:
            tl.store(masked_ptr + here + places, g.to(masked_ptr.dtype.element_ty), mask=mask)
        if INNER:
            if TRAINING:
                g = g - offset - centred * slope
            tl.store(gx_ptr + here + places, (g * scale).to(gx_ptr.dtype.element_ty), mask=mask)

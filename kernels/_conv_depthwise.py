"""Masked convolution with one input and one output channel in each group: sums of products, nothing for tensor cores.

Activations are [N, H, W, C] without gaps. A program takes BLOCK_P pixels x BLOCK_C channels through all taps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taylor_cuda.kernels._conv_lists import ALL, PACKED, as_pointer, kind_of, place_of
from taylor_cuda.kernels._conv_shape import Shape, is_wide
from taylor_cuda.kernels._conv_tiles import power_between
from taylor_cuda.kernels._launch import TARGET_PROGRAMS, device_of

TILE = 1024  # elements of a tile
NUMBERS = (
    "samples", "source_h", "source_w", "target_h", "target_w", "taps_h", "taps_w", "stride_h", "stride_w", "pad_h",
    "pad_w", "dilation_h", "dilation_w", "a_memory", "y_memory", "a_entries", "y_entries",
)  # fmt: skip
SAME = 4  # KIND of inputs that lie where outputs do


@triton.jit
def _source(target, tap, stride, pad, dilation, size, BACK: tl.constexpr):
    """The coordinate that a tap meets, and whether there is one."""
    if BACK:
        reach = target + pad - tap * dilation
        at = reach // stride
        there = (reach >= 0) & (reach % stride == 0) & (at < size)
    else:
        at = target * stride - pad + tap * dilation
        there = (at >= 0) & (at < size)
    return at, there


@triton.jit
def _at(ptr, n, h, w, size_h, size_w, memory):
    """Pointers to pixels, as a column."""
    return (ptr + ((n.to(tl.int64) * size_h + h) * size_w + w) * memory)[:, None]


@triton.jit(do_not_specialize=(*NUMBERS, "w_channel", "w_h", "w_w"))
def depthwise_kernel(
    a_ptr, w_ptr, y_ptr, a_keep_ptr, y_keep_ptr, scale_ptr, bias_ptr,
    samples, source_h, source_w, target_h, target_w, taps_h, taps_w, stride_h, stride_w, pad_h, pad_w,
    dilation_h, dilation_w, a_memory, y_memory, a_entries, y_entries, w_channel, w_h, w_w,
    BACK: tl.constexpr, RELU: tl.constexpr, A_KIND: tl.constexpr, Y_KIND: tl.constexpr, UNIT: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[m, c] = relu(scale*sum_tap a[m at tap, c]*w[c, tap] + bias), 0 where c is dropped; BACK: y is gx and a is g.

    Grid (tiles of m * tiles of positions in y,).
    """
    a_memory, y_memory = a_memory * UNIT, y_memory * UNIT
    if WIDE:
        samples = samples.to(tl.int64)
    tiles, program = tl.cdiv(y_memory, BLOCK_C), tl.program_id(0)
    position = (program % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = position < y_memory
    channel, place = position, position
    if Y_KIND == 3:
        channel = tl.load(y_keep_ptr + position, mask=inside, other=-1).to(tl.int32)
        shown = channel >= 0
    else:
        shown = place_of(y_keep_ptr, channel, inside, y_entries, Y_KIND) >= 0
    kept = shown
    if A_KIND != 4 and (A_KIND != 0 or Y_KIND == 3):
        place = place_of(a_keep_ptr, channel, shown, a_entries, A_KIND)
        kept &= place >= 0
    m = program // tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    h, w = m // target_w % target_h, m % target_w
    n = m // target_w // target_h
    rows = n < samples
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    r = taps_h * 0
    while r < taps_h:
        hh, there_h = _source(h, r, stride_h, pad_h, dilation_h, source_h, BACK)
        s = taps_w * 0
        while s < taps_w:
            ww, there_w = _source(w, s, stride_w, pad_w, dilation_w, source_w, BACK)
            here = _at(a_ptr, n, hh, ww, source_h, source_w, a_memory)
            a = tl.load(here + place[None, :], mask=(rows & there_h & there_w)[:, None] & kept[None, :], other=0.0)
            weight = tl.load(w_ptr + channel * w_channel + r * w_h + s * w_w, mask=kept, other=0.0)
            total += a.to(tl.float32) * weight.to(tl.float32)[None, :]
            s += 1
        r += 1
    if scale_ptr is not None:
        total *= tl.load(scale_ptr + channel, mask=shown, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + channel, mask=shown, other=0.0).to(tl.float32)[None, :]
    if RELU:
        total = tl.where(total <= 0, 0.0, total)
    total = tl.where(shown[None, :], total, 0.0)
    target = _at(y_ptr, n, h, w, target_h, target_w, y_memory) + position[None, :]
    tl.store(target, total.to(y_ptr.dtype.element_ty), mask=rows[:, None] & inside[None, :])


@triton.jit(do_not_specialize=(*NUMBERS, "channels", "trips"))
def depthwise_weight_gradient_kernel(
    a_ptr, y_ptr, part_ptr, a_keep_ptr, y_keep_ptr,
    samples, source_h, source_w, target_h, target_w, taps_h, taps_w, stride_h, stride_w, pad_h, pad_w,
    dilation_h, dilation_w, a_memory, y_memory, a_entries, y_entries, channels, trips,
    A_KIND: tl.constexpr, Y_KIND: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """part[split, tap, c] = sum over the pixels m of a split of a[m at tap, c]*y[m, c], 0 where c is dropped.

    a is the input, y the gradient of the output. Grid (splits * tiles of channels * taps,).
    """
    a_memory, y_memory, channels = a_memory * UNIT, y_memory * UNIT, channels * UNIT
    if WIDE:
        samples = samples.to(tl.int64)
    taps, tiles, program = taps_h * taps_w, tl.cdiv(channels, BLOCK_C), tl.program_id(0)
    tap, tile, split = program % taps, program // taps % tiles, program // taps // tiles
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    a_place, y_place, kept = c, c, inside
    if A_KIND != 0:
        a_place = place_of(a_keep_ptr, c, inside, a_entries, A_KIND)
        kept &= a_place >= 0
    if Y_KIND != 0:
        y_place = place_of(y_keep_ptr, c, inside, y_entries, Y_KIND)
        kept &= y_place >= 0
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    trip = trips * 0
    while trip < trips:
        m = (split * trips + trip) * BLOCK_P + tl.arange(0, BLOCK_P)
        if WIDE:
            m = (split.to(tl.int64) * trips + trip) * BLOCK_P + tl.arange(0, BLOCK_P)
        h, w = m // target_w % target_h, m % target_w
        n = m // target_w // target_h
        rows = n < samples
        hh, there_h = _source(h, tap // taps_w, stride_h, pad_h, dilation_h, source_h, False)
        ww, there_w = _source(w, tap % taps_w, stride_w, pad_w, dilation_w, source_w, False)
        mask = (rows & there_h & there_w)[:, None] & kept[None, :]
        a = tl.load(_at(a_ptr, n, hh, ww, source_h, source_w, a_memory) + a_place[None, :], mask=mask, other=0.0)
        y = tl.load(_at(y_ptr, n, h, w, target_h, target_w, y_memory) + y_place[None, :], mask=mask, other=0.0)
        total += a.to(tl.float32) * y.to(tl.float32)
        trip += 1
    place = (split.to(tl.int64) * taps + tap) * channels + c
    tl.store(part_ptr + place, tl.sum(total, axis=0), mask=inside)


def _common(channels: int, a: Tensor, y: Tensor, keeps: tuple[Tensor | None, Tensor | None], packed: bool) -> dict:
    """Keep arguments, their kinds and the tile, for activations a and y, in whose memory their channels lie."""
    kinds = [kind_of(keep, packed) for keep in keeps]
    whole = kinds == [ALL, ALL] or _are_same(keeps, kinds)
    unit = 16 // a.element_size() if whole else 1
    while a.shape[1] % unit:
        unit //= 2
    across = power_between(16, channels, 64)
    entries = [0 if keep is None else keep.shape[0] for keep in keeps]
    return {
        "keeps": [as_pointer(keep) for keep in keeps],
        "sizes": (a.shape[1] // unit, y.shape[1] // unit, *entries),
        "unit": unit,
        "constants": {"A_KIND": kinds[0], "Y_KIND": kinds[1], "UNIT": unit, "WIDE": is_wide(a, y)},
        "blocks": {"BLOCK_P": TILE // across, "BLOCK_C": across, "num_warps": 4, "enable_fp_fusion": True},
    }


def _are_same(keeps: tuple[Tensor | None, Tensor | None], kinds: list[int]) -> bool:
    """Whether both sides have one packed list, so that inputs lie where outputs do."""
    a, y = keeps
    if a is None or y is None or kinds != [PACKED, PACKED]:
        return False
    return a is y or (a.data_ptr() == y.data_ptr() and a.shape == y.shape and a.stride() == y.stride())


def launch_depthwise(
    shape: Shape,
    a: Tensor,
    weight: Tensor,
    y: Tensor,
    keeps: tuple[Tensor | None, Tensor | None],
    packed: bool,
    epilogue: tuple[Tensor | None, Tensor | None, bool],
    back: bool,
) -> None:
    """Write y from a, [N, C, H, W] with channels side by side; ``keeps`` are those of a and of y."""
    given = _common(weight.shape[0], a, y, keeps, packed)
    same = _are_same(keeps, [given["constants"]["A_KIND"], given["constants"]["Y_KIND"]])
    constants = {**given["constants"], **({"A_KIND": SAME} if same else {})}
    pixels, block = y.shape[0] * y.shape[2] * y.shape[3], given["blocks"]["BLOCK_P"]
    grid = (triton.cdiv(pixels, block) * triton.cdiv(y.shape[1], given["blocks"]["BLOCK_C"]),)
    with device_of(a):
        depthwise_kernel[grid](
            a, weight, y, *given["keeps"], *epilogue[:2], a.shape[0], *a.shape[2:], *y.shape[2:], *shape.numbers,
            *given["sizes"], weight.stride(0), *weight.stride()[2:], BACK=back, RELU=epilogue[2], **constants,
            **given["blocks"],
        )  # fmt: skip


def depthwise_weight_gradient(
    shape: Shape, gradient: Tensor, x: Tensor, weight: Tensor, keeps: tuple[Tensor | None, Tensor | None], packed: bool
) -> Tensor:
    """The gradient of the weight, laid out as it; ``keeps`` are those of x and of the gradient."""
    given = _common(weight.shape[0], x, gradient, keeps, packed)
    unit = given["unit"] if given["constants"]["A_KIND"] == ALL else 1
    sizes = [size * given["unit"] // unit for size in given["sizes"][:2]]
    constants, blocks = {**given["constants"], "UNIT": unit}, given["blocks"]
    channels, taps = weight.shape[0], weight.shape[2] * weight.shape[3]
    blocks_of_pixels = triton.cdiv(gradient.shape[0] * gradient.shape[2] * gradient.shape[3], blocks["BLOCK_P"])
    tiles = taps * triton.cdiv(channels, blocks["BLOCK_C"])
    trips = triton.cdiv(blocks_of_pixels, max(1, min(blocks_of_pixels, TARGET_PROGRAMS * 2 // tiles)))
    splits = triton.cdiv(blocks_of_pixels, trips)
    part = weight.new_empty((splits, taps, channels), dtype=torch.float32)
    with device_of(x):
        depthwise_weight_gradient_kernel[(splits * tiles,)](
            x, gradient, part, *given["keeps"], x.shape[0], *x.shape[2:], *gradient.shape[2:], *shape.numbers, *sizes,
            *given["sizes"][2:], channels // unit, trips, **constants, **blocks,
        )  # fmt: skip
    return torch.empty_like(weight).copy_(part.sum(0).t().reshape(weight.shape))

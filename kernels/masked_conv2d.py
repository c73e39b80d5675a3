"""Triton backend of ops.masked_conv2d: its forward and its backward op.

Computes     y = relu(scale*conv2d(x, weight) + bias) at kept outputs from kept inputs, and the gradients of x, weight
             and bias between them, as products of gathered matrices (implicit GEMM)         see ops/reference_conv.py
Shapes       x [N, C_in, H, W], weight [C_out, C_in/groups, R, S], y and gradient [N, C_out, P, Q], packed with the
             channels of the lists; vectors [C_out]. Masks are bool [C]; lists int64 [K], ascending, any -1 last: packed
             channels of that name are zeros by definition, and what they hold must be finite
Strides      x and gradient channels_last without gaps, other ones are copied first; y and gx are laid out as x, gw as
             weight, by a copy where that isn't channels_last. Any stride, padding, dilation, groups
Dtypes       x, weight, gradient: one of fp32, fp16, bf16; vectors any. Sums are fp32; products are of fp16 and bf16 on
             tensor cores, of fp32 in fp32
Bytes        with X, Y, W those of x, y and weight, of kept channels where packed: forward X + Y + 3W, gradient of x the
             same, of weight X + Y + 2W + 8 a weight and split; a copy of a layout 2X or 2Y. With masks in dense
             layouts X and Y are whole, for kept and dropped channels share sectors. From L2 R*S*X*P*Q/(H*W) a tile
             of 64 or 128 outputs, and W for each of 128 or 256 pixels. Depthwise X + Y + W, the gradient of weight
             (X + Y)*R*S from L2
FLOPs        2*N*P*Q*K_out*K_in*R*S/groups for each of the three, K_out and K_in rounded up to tiles. The gradient of x
             meets only the taps that a stride lets through
Grid         one program per tile of pixels x outputs; those past the count, which the device alone knows, store zeros.
             Counts are arguments, in units of up to 16 bytes: a mask compiles nothing
Launches     forward: weights 1, product 1, and 1 for each mask, for each list of a dense layout or of groups. Backward:
             as much for gx, 2 for gw and its clearing, bias 1 to 9 of PyTorch's. Depthwise 1, and 3 for gw
Determinism  yes: no atomics; splits follow from shapes and the length of packed lists
Error        n*eps32*T + the rounding of the result, for n terms whose sizes add up to T       (tests/gpu/conv_cases.py)
Source       implicit GEMM: arXiv:1410.0759. Counts on the device, and taps sorted by what a stride lets through: ours
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from taylor_cuda.kernels import _conv, _conv_depthwise, _conv_tiles
from taylor_cuda.kernels._conv_lists import ROUND, Side, make_side, pack_weights
from taylor_cuda.kernels._conv_shape import (
    INTERPRETED,
    Shape,
    check_types,
    empty_as,
    empty_columns,
    in_columns,
    is_columns,
    is_wide,
    make_shape,
)
from taylor_cuda.kernels._launch import device_of


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
    """Y = relu(scale·conv2d(x, weight) + bias) at kept output channels, from kept input channels; 0 elsewhere."""
    check_types(x, weight)
    shape = make_shape(weight, stride, padding, dilation, groups)
    channels = keep_out.shape[0] if packed and keep_out is not None else weight.shape[0]
    y = empty_as(x, (x.shape[0], channels, *shape.target(*x.shape[2:])))
    if y.numel() == 0:
        return y
    values = in_columns(x)
    result = y if is_columns(y) else empty_columns(y, y.shape)
    epilogue = (_vector(scale), _vector(bias), relu)
    if _is_depthwise(weight, groups):
        keeps = (keep_in, keep_out)
        _conv_depthwise.launch_depthwise(shape, values, weight, result, keeps, packed, epilogue, back=False)
    else:
        outputs = make_side(keep_out, weight.shape[0], groups, packed)
        inputs = make_side(keep_in, weight.shape[1] * groups, groups, packed)
        _launch_conv(shape, values, weight, result, (inputs, outputs), epilogue, back=False)
    return y if result is y else y.copy_(result)


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
    """The gradients that ``needs`` asks for, in x, weight and bias, between kept channels; the others are empty."""
    check_types(x, weight)
    shape = make_shape(weight, stride, padding, dilation, groups)
    keeps = (keep_in, keep_out)
    values, flow = in_columns(x), in_columns(gradient)
    none = x.new_empty(0)
    sides = None
    if not _is_depthwise(weight, groups) and (needs[0] or needs[1]):
        outputs = make_side(keep_out, weight.shape[0], groups, packed)
        sides = make_side(keep_in, weight.shape[1] * groups, groups, packed), outputs
    gx = _input_gradient(shape, flow, x, weight, keeps, sides, packed) if needs[0] else none
    gw = none
    if needs[1]:
        if 0 in (flow.numel(), values.numel()):
            gw = torch.zeros_like(weight)
        elif sides is None:
            gw = _conv_depthwise.depthwise_weight_gradient(shape, flow, values, weight, keeps, packed)
        else:
            gw = _weight_gradient(shape, flow, values, weight, sides)
    return gx, gw, _bias_gradient(gradient, weight, keep_out, packed) if needs[2] else none


def _input_gradient(
    shape: Shape,
    flow: Tensor,
    x: Tensor,
    weight: Tensor,
    keeps: tuple[Tensor | None, Tensor | None],
    sides: tuple[Side, Side] | None,
    packed: bool,
) -> Tensor:
    """The gradient of x, laid out as it; ``keeps`` and ``sides`` are those of inputs and outputs."""
    gx = torch.empty_like(x)
    if gx.numel() == 0:
        return gx
    result, epilogue = gx if is_columns(gx) else empty_columns(x, x.shape), (None, None, False)
    if sides is None:
        _conv_depthwise.launch_depthwise(shape, flow, weight, result, keeps[::-1], packed, epilogue, back=True)
    else:
        _launch_conv(shape, flow, weight, result, sides[::-1], epilogue, back=True)
    return gx if result is gx else gx.copy_(result)


def _is_depthwise(weight: Tensor, groups: int) -> bool:
    return groups > 1 and weight.shape[1] == 1 and weight.shape[0] == groups


def _vector(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _launch_conv(
    shape: Shape,
    a: Tensor,
    weight: Tensor,
    y: Tensor,
    sides: tuple[Side, Side],
    epilogue: tuple[Tensor | None, Tensor | None, bool],
    back: bool,
) -> None:
    """Write y from a, with channels side by side; ``sides`` are those of a and of y."""
    inner, outer = sides
    item, groups = a.element_size(), shape.groups
    b = pack_weights(weight, outer, inner, groups, turned=back)
    whole = weight.shape[1], weight.shape[0] // groups
    width, outputs = whole[::-1] if back else whole
    jumps, steps = (shape.stride, shape.steps) if back else ((1, 1), (1, 1))
    classes = jumps[0] * jumps[1]
    pixels = y.shape[0] * triton.cdiv(y.shape[2], jumps[0]) * triton.cdiv(y.shape[3], jumps[1])
    units = inner.unit(item), outer.unit(item)
    fused = epilogue[0] is not None or epilogue[1] is not None
    tile = _conv_tiles.conv_tile(pixels * classes, outputs, width, shape.taps, item, min(units), fused)
    if outer.places is not None and outer.memory != outer.width * groups:
        y.zero_()  # entries of -1 in a packed list are of no group
    grid = (classes * triton.cdiv(pixels, tile.m) * groups * triton.cdiv(outer.width, tile.n),)
    with device_of(a):
        _conv.conv_kernel[grid](
            a, b, y, inner.places, inner.counts, outer.channels, outer.places, outer.counts, *epilogue[:2],
            a.shape[0], *a.shape[2:], *y.shape[2:], *shape.numbers, *steps, groups,
            inner.width // units[0], inner.memory // units[0], outer.width // units[1], outer.memory // units[1],
            b.shape[3] // ROUND,
            BACK=back, FLAT=_conv_tiles.is_flat(width, shape.taps), RELU=epilogue[2], A_UNIT=units[0], Y_UNIT=units[1],
            B_UNIT=ROUND, **_constants(tile, a, y),
        )  # fmt: skip


def _weight_gradient(shape: Shape, flow: Tensor, x: Tensor, weight: Tensor, sides: tuple[Side, Side]) -> Tensor:
    inputs, outputs = sides
    item, groups, widths = x.element_size(), shape.groups, (weight.shape[0] // shape.groups, weight.shape[1])
    gw = torch.empty_like(weight)
    if inputs.channels is not None or outputs.channels is not None:
        gw.zero_()
    units = outputs.unit(item), inputs.unit(item)
    tile = _conv_tiles.weight_tile(*widths, shape.taps, item, min(units))
    flat = _conv_tiles.is_flat(widths[1], shape.taps)
    columns = triton.cdiv(shape.taps * inputs.width, tile.n) if flat else shape.taps * triton.cdiv(inputs.width, tile.n)
    tiles = groups * triton.cdiv(outputs.width, tile.m) * columns
    splits, trips = _conv_tiles.splits_of(tiles, flow.shape[0] * flow.shape[2] * flow.shape[3], tile.k)
    part = x.new_empty((splits, groups, outputs.width, shape.taps, inputs.width), dtype=torch.float32)
    window = weight.shape[2:]
    with device_of(x):
        _conv.weight_gradient_kernel[(splits * tiles,)](
            flow, x, part, outputs.places, outputs.counts, inputs.places, inputs.counts, x.shape[0], *x.shape[2:],
            *flow.shape[2:], *shape.numbers, groups, outputs.width // units[0], outputs.memory // units[0],
            inputs.width // units[1], inputs.memory // units[1], trips,
            FLAT=flat, G_UNIT=units[0], X_UNIT=units[1], **_constants(tile, flow, x),
        )  # fmt: skip
        outer, inner, *rest = gw.stride()
        _conv.finish_weight_gradient_kernel[(triton.cdiv(part[0].numel(), 64),)](
            part, gw, outputs.channels, inputs.channels, groups, outputs.width, inputs.width, *window, splits,
            outer, inner, *rest, inner * weight.shape[1],
            BLOCK_S=32, BLOCK_E=64, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return gw


def _constants(tile: _conv_tiles.Tile, *activations: Tensor) -> dict[str, Any]:
    """What every kernel of products is compiled for."""
    return {"WIDE": is_wide(*activations), "UPCAST": INTERPRETED, "enable_fp_fusion": True, **tile.constants}


def _bias_gradient(gradient: Tensor, weight: Tensor, keep: Tensor | None, packed: bool) -> Tensor:
    """The sum of the gradient over pixels at kept outputs, 0 elsewhere."""
    sums = gradient.sum((0, 2, 3))
    channels = weight.shape[0]
    if keep is None:
        return sums
    if keep.dtype == torch.bool:
        return torch.where(keep, sums, sums.new_zeros(()))
    if keep.shape[0] == 0:
        return sums.new_zeros(channels)
    names = torch.arange(channels, device=keep.device)
    ascending = torch.where(keep >= 0, keep, channels)  # entries of -1 behind the last channel
    rank = torch.searchsorted(ascending, names).clamp(max=keep.shape[0] - 1)
    kept = sums.index_select(0, rank) if packed else sums
    return torch.where(ascending.index_select(0, rank) == names, kept, sums.new_zeros(()))

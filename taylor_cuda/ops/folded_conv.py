"""Strided convolutions of few channels, as ones of stride 1 over pixels folded into channels.

Tensor cores multiply eight or sixteen channels at a time, and an image has three: the first convolution of a network
(7 x 7, stride 2) takes cuDNN as long as all others of its stage, whatever is kept. With blocks of stride x stride
pixels side by side as channels it is 4 x 4 at stride 1 over 12 channels, filled up to 16 with zeros: 16·16 products
for each output instead of 3·49, and all of them on tensor cores.

Which way is faster only the device knows, so with ``torch.backends.cudnn.benchmark`` both are timed when a convolution
is first met, as cuDNN then times its own; without it, and while a graph is captured, cuDNN's way is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

MULTIPLE = 16  # channels after folding
MOST_CHANNELS = 4  # of those, folding makes more than zeros
ROUNDS = 5

_Result = TypeVar("_Result")
_faster: dict[object, bool] = {}


class Folding(NamedTuple):
    """A convolution's numbers, for height and width each."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    kernel: tuple[int, int]
    output: tuple[int, int]

    @property
    def taps(self) -> tuple[int, int]:
        """The filter in blocks."""
        return (-(-self.kernel[0] // self.stride[0]), -(-self.kernel[1] // self.stride[1]))

    @property
    def blocks(self) -> tuple[int, int]:
        """The image in blocks, from the first that a filter touches to the last."""
        return (self.output[0] + self.taps[0] - 1, self.output[1] + self.taps[1] - 1)

    def channels(self, given: int) -> int:
        """Of the folded tensors."""
        folded = given * self.stride[0] * self.stride[1]
        return folded + -folded % MULTIPLE


def has_tensor_cores(x: Tensor) -> bool:
    """Whether the hardware multiplies tensors like x in blocks of channels."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def folding_of(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Folding | None:
    """How x [N, C, H, W] folds under weight [K, C, R, S], or None where that has nothing to offer."""
    if not has_tensor_cores(x):
        return None
    kernel = (weight.shape[2], weight.shape[3])
    strided = min(stride) > 1 and all(kernel[d] >= stride[d] for d in (0, 1))
    if not strided or groups != 1 or max(dilation) > 1 or not 0 < x.shape[1] <= MOST_CHANNELS or 0 in x.shape:
        return None
    output = [(x.shape[2 + d] + 2 * padding[d] - kernel[d]) // stride[d] + 1 for d in (0, 1)]
    return Folding((stride[0], stride[1]), (padding[0], padding[1]), kernel, (output[0], output[1]))


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, folding: Folding) -> Tensor:
    """``torch.conv2d(x, weight, bias, stride, padding)``, channels_last."""
    return torch.conv2d(_folded_image(x, folding), _folded_filter(weight, folding), bias)


def convolve_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, folding: Folding, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias that ``needs`` asks for."""
    folded, kept = _folded_image(x, folding), _folded_filter(weight, folding)
    found = torch.ops.aten.convolution_backward(
        gradient, folded, kept, [kept.shape[0]], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, list(needs)
    )
    gx = _unfolded_image(found[0], x, folding) if needs[0] else found[0]
    return gx, _unfolded_filter(found[1], weight, folding) if needs[1] else found[1], found[2]


def choose(key: object, folded: Callable[[], _Result], plain: Callable[[], _Result]) -> _Result:
    """What the faster of two ways gives; ``key`` says what its speed depends on."""
    faster = _faster.get(key)
    if faster is None and torch.backends.cudnn.benchmark and not torch.cuda.is_current_stream_capturing():
        faster = _faster[key] = _seconds(folded) < _seconds(plain)
    return folded() if faster else plain()


def _seconds(run: Callable[[], object]) -> float:
    run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(ROUNDS):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _pieces(folding: Folding, length: Sequence[int], dim: int) -> list[tuple[int, slice, slice]]:
    """For each place within a block: which pixels of the image lie there, and in which blocks."""
    stride, padding, blocks = folding.stride[dim], folding.padding[dim], folding.blocks[dim]
    found = []
    for place in range(stride):
        first = (place - padding) % stride  # the first pixel of the image at this place
        block = (first + padding) // stride
        count = min(-(-(length[dim] - first) // stride), blocks - block)
        if count > 0:
            found.append((place, slice(first, first + stride * (count - 1) + 1, stride), slice(block, block + count)))
    return found


def _folded_image(x: Tensor, folding: Folding) -> Tensor:
    """[N, C, H, W] -> [N, channels, blocks], zeros where no pixel is: padding, and what fills the channels up."""
    n, channels = x.shape[:2]
    folded = x.new_zeros(n, *folding.blocks, folding.channels(channels))
    for place, pixels, blocks in _places(x, folding):
        folded[:, blocks[0], blocks[1], place : place + channels] = x[:, :, pixels[0], pixels[1]].movedim(1, -1)
    return folded.movedim(-1, 1)


def _unfolded_image(folded: Tensor, x: Tensor, folding: Folding) -> Tensor:
    """The reverse; zeros for pixels that no filter touches."""
    gx = torch.zeros_like(x)
    for place, pixels, blocks in _places(x, folding):
        gx[:, :, pixels[0], pixels[1]] = folded[:, place : place + x.shape[1], blocks[0], blocks[1]]
    return gx


def _places(x: Tensor, folding: Folding) -> list[tuple[int, tuple[slice, slice], tuple[slice, slice]]]:
    """Where the channels of each place within a block begin, its pixels and its blocks."""
    rows, columns = (_pieces(folding, x.shape[2:], dim) for dim in (0, 1))
    return [
        ((row * folding.stride[1] + column) * x.shape[1], (pixels, other_pixels), (blocks, other_blocks))
        for row, pixels, blocks in rows
        for column, other_pixels, other_blocks in columns
    ]


def _folded_filter(weight: Tensor, folding: Folding) -> Tensor:
    """[K, C, R, S] -> [K, channels, taps], zeros in what it was filled up with, channels_last."""
    outputs, inputs = weight.shape[:2]
    (rows, columns), (high, wide) = folding.taps, folding.stride
    filled = F.pad(weight, (0, columns * wide - weight.shape[3], 0, rows * high - weight.shape[2]))
    blocks = filled.view(outputs, inputs, rows, high, columns, wide).permute(0, 2, 4, 3, 5, 1).flatten(3)
    return F.pad(blocks, (0, folding.channels(inputs) - blocks.shape[-1])).movedim(-1, 1)


def _unfolded_filter(folded: Tensor, weight: Tensor, folding: Folding) -> Tensor:
    """The reverse."""
    outputs, inputs = weight.shape[:2]
    (rows, columns), (high, wide) = folding.taps, folding.stride
    blocks = folded[:, : inputs * high * wide].unflatten(1, (high, wide, inputs))
    filters = blocks.permute(0, 3, 4, 1, 5, 2).reshape(outputs, inputs, rows * high, columns * wide)
    result: Tensor = filters[:, :, : weight.shape[2], : weight.shape[3]].contiguous()
    return result

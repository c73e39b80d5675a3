"""What a convolution is beside its tensors, and how its tensors lie. No Triton here."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NARROW = 2**31  # what pixels, and offsets within a sample, must stay below to be 32 bits wide
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # its products of bf16 matrices are wrong


@dataclass(frozen=True)
class Shape:
    """Window, stride, padding and dilation, each (h, w), and groups."""

    window: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def taps(self) -> int:
        """Positions of the window."""
        return self.window[0] * self.window[1]

    @property
    def numbers(self) -> tuple[int, ...]:
        """As every kernel is told."""
        return (*self.window, *self.stride, *self.padding, *self.dilation)

    @property
    def steps(self) -> tuple[int, int]:
        """From one tap to the next that meets the same output coordinates, of the gradient of the input."""
        h, w = (stride // math.gcd(stride, d) for stride, d in zip(self.stride, self.dilation, strict=True))
        return h, w

    def target(self, h: int, w: int) -> tuple[int, int]:
        """Height and width of the output."""
        lines = zip((h, w), self.window, self.stride, self.padding, self.dilation, strict=True)
        out_h, out_w = ((n + 2 * pad - d * (taps - 1) - 1) // stride + 1 for n, taps, stride, pad, d in lines)
        return out_h, out_w


def make_shape(
    weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Shape:
    """The shape of a convolution; one number stands for both dimensions."""
    pairs = [(values[0], values[-1]) for values in (stride, padding, dilation)]
    return Shape((weight.shape[2], weight.shape[3]), *pairs, groups)


def is_wide(*activations: Tensor) -> bool:
    """Whether pixels, or offsets within a sample, need 64 bits."""
    return any(t[0].numel() >= NARROW or t.numel() // max(t.shape[1], 1) >= NARROW - 2**16 for t in activations)


def is_columns(x: Tensor) -> bool:
    """Whether channels lie side by side, without gaps."""
    return x.movedim(1, -1).is_contiguous()


def in_columns(x: Tensor) -> Tensor:
    """The values of x with channels side by side, without gaps."""
    return x if is_columns(x) else x.movedim(1, -1).contiguous().movedim(-1, 1)


def empty_columns(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An empty tensor with channels side by side."""
    n, c, h, w = shape
    return like.new_empty((n, h, w, c)).movedim(-1, 1)


def empty_as(x: Tensor, shape: Sequence[int]) -> Tensor:
    """An empty tensor without gaps whose dimensions follow one another in memory as those of x do.

    Of two dimensions with equal stride, one of which has length 1, that one is the inner one.
    """
    order = sorted(range(x.dim()), key=lambda d: (x.stride(d), x.shape[d] > 1, -d))
    strides = [0] * x.dim()
    for i, d in enumerate(order):
        strides[d] = math.prod(max(shape[inner], 1) for inner in order[:i])
    return x.new_empty_strided(tuple(shape), strides)


def check_types(x: Tensor, weight: Tensor) -> None:
    """The types that the kernels have.

    Raises:
        TypeError: float64, or two types.
    """
    if x.dtype != weight.dtype:
        raise TypeError(f"weight is {weight.dtype} and x is {x.dtype}: wanted one type")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"{x.dtype}: these kernels form everything in fp32")

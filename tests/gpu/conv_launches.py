"""Calls of the two ops of masked_conv2d on tensors without memory: what networks launch, to be compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conv:
    """A convolution in channels_last; ``keep`` is all, mask or packed, then half of the channels are kept."""

    inputs: int
    outputs: int
    side: int
    window: int = 3
    stride: int = 1
    groups: int = 1
    keep: str = "all"
    dtype: torch.dtype = torch.bfloat16
    samples: int = 256
    fused: bool = False
    kept: tuple[int, int] = (0, 0)  # other numbers than half, of outputs and inputs


# What the table of resources has: the shapes of ResNet-50 that differ in their tiles, a grouped and a depthwise one.
TABLE = (
    Conv(3, 64, 224, window=7, stride=2),
    Conv(64, 64, 56, keep="packed"),
    Conv(256, 256, 14),
    Conv(256, 256, 14, keep="packed"),
    Conv(256, 256, 14, keep="packed", fused=True),
    Conv(256, 256, 14, keep="mask", fused=True),
    Conv(512, 512, 7, keep="packed"),
    Conv(128, 128, 28, keep="packed", groups=32),
    Conv(128, 128, 28, dtype=torch.float32),
    Conv(96, 96, 28, groups=96, keep="packed", fused=True),
    Conv(96, 96, 28, groups=96, keep="mask"),
)


def _arguments(conv: Conv) -> tuple[Tensor, Tensor, Tensor | None, tuple[Any, ...]]:
    """The input, the weight, a vector for each output or None, and what both ops take besides."""
    numbers = [kept or channels // 2 for kept, channels in zip(conv.kept, (conv.outputs, conv.inputs), strict=True)]
    keeps: list[Tensor | None] = [None, None]
    if conv.keep == "packed":
        keeps = [torch.empty(number, dtype=torch.int64, device="meta") for number in numbers]
    elif conv.keep == "mask":
        keeps = [torch.empty(n, dtype=torch.bool, device="meta") for n in (conv.outputs, conv.inputs)]
    channels = numbers[1] if conv.keep == "packed" else conv.inputs
    shape = (conv.samples, conv.side, conv.side, channels)
    x = torch.empty(shape, dtype=conv.dtype, device="meta").movedim(-1, 1)
    weight = torch.empty(
        (conv.outputs, conv.inputs // conv.groups, conv.window, conv.window), dtype=conv.dtype, device="meta"
    )
    vector = torch.empty(conv.outputs, device="meta") if conv.fused else None
    padding = conv.window // 2
    window = ([conv.stride] * 2, [padding] * 2, [1, 1], conv.groups, conv.keep == "packed")
    return x, weight, vector, (*keeps, *window)


def forward(op: Callable[..., Any], convs: Sequence[Conv] = TABLE) -> None:
    """Call masked_conv2d_forward."""
    for conv in convs:
        x, weight, vector, common = _arguments(conv)
        op(x, weight, vector, *common, vector, conv.fused)


def backward(op: Callable[..., Any], convs: Sequence[Conv] = TABLE) -> None:
    """Call masked_conv2d_backward for the gradients of input and weight."""
    for conv in convs:
        x, weight, _, common = _arguments(conv)
        target = (conv.side - 1) // conv.stride + 1
        channels = common[0].shape[0] if conv.keep == "packed" else conv.outputs
        shape = (conv.samples, target, target, channels)
        gradient = torch.empty(shape, dtype=conv.dtype, device="meta").movedim(-1, 1)
        op(gradient, x, weight, *common, [True, True, False])


def pruned(conv: Conv) -> list[Conv]:
    """The packed convolution at widths in multiples of 8."""
    widths = ((8, 24), (16, 16), (72, 40), (40, 8), (88, 64), (conv.outputs, conv.inputs))
    return [
        replace(conv, keep="packed", kept=(outputs, outputs if conv.groups > 1 else inputs))
        for outputs, inputs in widths
    ]

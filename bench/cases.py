"""The shapes that are measured: those of named networks. Also what each job has to move and to compute at least."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from taylor_cuda.bench.resnet import DEPTHS

BLOCKS = {name: blocks for name, blocks in DEPTHS.items() if name not in ("tiny", "resnet18")}
"""Blocks in each stage of those built from bottlenecks."""

LAYOUTS = ("nchw", "channels_last", "tokens", "rows")


def resnet_gates(network: str) -> Counter[tuple[int, int]]:
    """``{(channels, height): number of gates}`` of a bottleneck ResNet at 224 x 224, inside and after each block."""
    gates: Counter[tuple[int, int]] = Counter()
    height = 56
    for stage, blocks in enumerate(BLOCKS[network]):
        width = 64 << stage
        for block in range(blocks):
            # The stride is in the second convolution of a stage's first block, so its first gate is still large.
            before, height = height, height // 2 if stage and not block else height
            gates[width, before] += 1
            gates[width, height] += 1
            gates[4 * width, height] += 1
    return gates


@dataclass(frozen=True)
class ActivationCase:
    """One activation and its gradient.

    Attributes:
        shape: ``[N, C, *spatial]`` as the op sees it, whatever the order in memory.
        dtype: of both.
        layout: order in memory: ``"nchw"`` as the shape says, ``"channels_last"`` channels innermost, ``"tokens"`` a
            ``[N, L, C]`` tensor seen as ``[N, C, L]``, ``"rows"`` ``[N, C]``.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str

    @property
    def name(self) -> str:
        """``64x256x28x28``."""
        return "x".join(map(str, self.shape))

    @property
    def dtype_name(self) -> str:
        """``float32``."""
        return str(self.dtype).removeprefix("torch.")

    def bytes(self, op: str) -> int:
        """Activation and gradient read once, the float32 result, ``[C]`` or ``[N, C]``, written once."""
        outputs = self.shape[1] * (self.shape[0] if op == "channel_sums" else 1)
        return 2 * prod(self.shape) * self.dtype.itemsize + 4 * outputs

    @property
    def flops(self) -> int:
        """One product and one addition per element."""
        return 2 * prod(self.shape)

    def inputs(self, device: str, seed: int) -> tuple[Tensor, Tensor]:
        """A fresh activation and gradient, standard normal."""
        generator = torch.Generator(device=device).manual_seed(seed)
        return self._tensor(device, generator), self._tensor(device, generator)

    def _tensor(self, device: str, generator: torch.Generator) -> Tensor:
        batch, channels, *spatial = self.shape
        memory = (batch, channels, *spatial) if self.layout in ("nchw", "rows") else (batch, *spatial, channels)
        values = torch.randn(memory, device=device, generator=generator).to(self.dtype)
        return values.movedim(-1, 1) if self.layout in ("channels_last", "tokens") else values


def input_sets(size: int, cache: int, least: int = 1) -> int:
    """How many input sets of ``size`` bytes to use in turn: together three times the cache, but no more than eight."""
    return min(max(least, -(-3 * cache // size)), 8)


def resnet_parameters(network: str) -> list[tuple[str, tuple[int, ...]]]:
    """``("conv" | "linear" | "norm" | "bias", shape)`` of every parameter of a bottleneck ResNet, block by block."""
    found: list[tuple[str, tuple[int, ...]]] = []

    def convolution(outputs: int, inputs: int, kernel: int) -> None:
        found.extend([("conv", (outputs, inputs, kernel, kernel)), ("norm", (outputs,)), ("norm", (outputs,))])

    convolution(64, 3, 7)
    inputs = 64
    for stage, blocks in enumerate(BLOCKS[network]):
        width = 64 << stage
        for block in range(blocks):
            convolution(width, inputs, 1)
            convolution(width, width, 3)
            convolution(4 * width, width, 1)
            if block == 0:
                convolution(4 * width, inputs, 1)
            inputs = 4 * width
    return [*found, ("linear", (1000, inputs)), ("bias", (1000,))]


def flat_in_memory(x: Tensor) -> Tensor:
    """The elements as one contiguous row, in the order in which they lie in memory; never a copy."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return x.permute(order).view(-1)


def parameter_bytes(pairs: list[tuple[Tensor, Tensor]], results: int) -> int:
    """Every weight and gradient read once and ``results`` float32 numbers written."""
    return sum(w.nbytes + g.nbytes for w, g in pairs) + 4 * results

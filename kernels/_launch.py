"""How a sum over two tensors [N, C, ...] is cut into programs: from shapes, strides and type alone. No Triton here."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TARGET_PROGRAMS = 1024  # a few waves of a large GPU; more would only make the finish longer
TILE = 4096  # elements of each operand that a program holds at a time
MOST_TRIPS = 16
LONGEST_ROW = 1024  # elements of a row in one tile


class Loop(NamedTuple):
    """One dimension of both tensors: its size, and its stride in the activation and in the gradient."""

    size: int
    a: int
    g: int


@dataclass(frozen=True)
class Pair:
    """Activation and gradient as samples x channels x summed elements, which are ``inner`` within ``outer``."""

    activation: Tensor
    gradient: Tensor
    sample: Loop
    channel: Loop
    outer: Loop
    inner: Loop

    @property
    def length(self) -> int:
        """Summed elements of one sample and channel."""
        return self.outer.size * self.inner.size

    @property
    def columns(self) -> bool:
        """Whether neighbouring channels are nearer to each other in memory than neighbouring summed elements are."""
        if self.length == 1:
            return True
        along = self.inner if self.inner.size > 1 else self.outer
        return self.channel.size > 1 and self.channel.a + self.channel.g <= along.a + along.g


@dataclass(frozen=True)
class Tiling:
    """The programs: ``splits`` of the summed elements, each of ``trips`` blocks of ``block_length``.

    Trips and splits are numbers that a program reads; everything else is compiled in. From 64 channels on it doesn't
    depend on how many there are, if they divide alike, so that a network has one binary for all its channels_last
    layers, and stays with it when it is pruned.
    """

    unit: int  # sizes and strides are multiples of it, and so many elements are at most 16 bytes
    contiguous: bool  # neighbours in a tile lie side by side
    block_length: int
    block_across: int  # channels, or rows of (sample, channel)
    trips: int
    splits: int
    programs: int
    warps: int


def merged(loops: list[Loop]) -> list[Loop]:
    """Outermost first, neighbours that form one loop merged, loops of size 1 dropped."""
    result: list[Loop] = []
    for loop in sorted((loop for loop in loops if loop.size != 1), key=lambda loop: -(loop.a + loop.g)):
        if result and result[-1].a == loop.a * loop.size and result[-1].g == loop.g * loop.size:
            result[-1] = Loop(result[-1].size * loop.size, loop.a, loop.g)
        else:
            result.append(loop)
    return result


def make_pair(activation: Tensor, gradient: Tensor, fold: bool) -> Pair:
    """The pair as the kernels walk it; with ``fold``, samples are summed too where that leaves one stride.

    Tensors with more than two summed dimensions that don't merge are copied first (2 reads and 2 writes more).
    """
    sizes, a, g = activation.shape, activation.stride(), gradient.stride()
    loops = [Loop(*loop) for loop in zip(sizes, a, g, strict=True)]
    sample, rest = loops[0], merged(loops[2:])
    everything = merged([sample, *loops[2:]])
    if fold and len(everything) <= 1:
        sample, rest = Loop(1, 0, 0), everything
    if len(rest) > 2:
        return make_pair(activation.contiguous(), gradient.contiguous(), fold)
    outer, inner = [Loop(1, 0, 0)] * (2 - len(rest)) + rest
    return Pair(activation, gradient, sample, loops[1], outer, inner)


def make_tiling(pair: Pair) -> Tiling:
    """Block sizes, trips and splits of a pair: many programs for small tensors, few partial sums for large ones."""
    neighbours = pair.channel if pair.columns else pair.inner
    others = [pair.sample, pair.outer, pair.inner if pair.columns else pair.channel]
    contiguous = neighbours.a == neighbours.g == 1 and (pair.columns or pair.outer.size == 1)
    unit = _unit(pair.activation.element_size(), neighbours.size, others) if contiguous else 1
    if pair.columns:
        block_length = min(_power_of_two(pair.length), TILE // min(_power_of_two(pair.channel.size), 64))
        block_across = min(_power_of_two(pair.channel.size), TILE // block_length, 1024)
        across = pair.sample.size * math.ceil(pair.channel.size / block_across)
    else:
        block_length = min(_power_of_two(pair.length), LONGEST_ROW)
        block_across = min(TILE // block_length, 32)
        across = math.ceil(pair.sample.size * pair.channel.size / block_across)
    blocks = math.ceil(pair.length / block_length)
    trips = max(1, min(MOST_TRIPS, blocks * across // TARGET_PROGRAMS))
    splits = math.ceil(blocks / trips)
    warps = 4 if unit * pair.activation.element_size() >= 8 else 8  # each narrow load needs registers for an address
    return Tiling(unit, contiguous, block_length, block_across, trips, splits, across * splits, warps)


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """The tensor's GPU as the current one, for Triton launches on the current device's stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length() if number > 1 else 1


def _unit(element_size: int, size: int, others: list[Loop]) -> int:
    unit = math.gcd(16 // element_size, size)
    for loop in others:
        if loop.size > 1:
            unit = math.gcd(unit, loop.a, loop.g)
    return unit

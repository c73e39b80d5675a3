"""Tiles of the masked convolution, by the shape and type of the whole one: a mask never changes them. No Triton here.

Each element of a factor is loaded once for every tile of the other one, mostly from the L2 cache, so that a tile of
m x n does 2*m*n / ((m + n)*itemsize) operations for a byte of it: tiles are as large as registers and the number of
programs allow. A tile wider than the kept channels multiplies zeros, so pixels, where they are rows, get the longer
side. What is gathered in single elements needs registers for as many addresses: its tiles are smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

FEW_PROGRAMS = 264  # two for each multiprocessor of the largest GPU
MOST_SPLITS = 512
FLAT_WIDTH = 16  # channels of a group below which a block of the contraction spans taps


@dataclass(frozen=True)
class Tile:
    """Block sizes and what the compiler is told beside them."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        """As arguments of a kernel."""
        blocks = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}
        return {**blocks, "num_warps": self.warps, "num_stages": self.stages}


def is_flat(width: int, taps: int) -> bool:
    """Whether a contraction over (tap, channel) is cut regardless of taps, because a group has so few channels."""
    return width < FLAT_WIDTH and taps > 1


def power_between(least: int, number: int, most: int) -> int:
    """The power of two from ``number`` on, within limits."""
    return max(least, min(most, 1 << max(number - 1, 0).bit_length()))


def conv_tile(pixels: int, outputs: int, inputs: int, taps: int, item_size: int, unit: int, fused: bool) -> Tile:
    """For the output and the gradient of the input: pixels x outputs of a group, contracted over inputs and taps.

    Elements come ``unit`` at a time. ``fused``: a scale or a bias for each column has to be held beside the sums.
    """
    if item_size > 2:  # no tensor cores: exact products and sums on fp32 pipelines
        return Tile(64, power_between(16, outputs, 64), 16 if inputs <= 16 else 32, 4, 3)
    n, k = power_between(16, outputs, 128), power_between(16, inputs, 64)
    if unit < 4 or is_flat(inputs, taps):
        return Tile(128, min(n, 64), 32, 8, 2)
    columns = -(-outputs // n)
    if pixels // 256 * columns >= FEW_PROGRAMS and unit == 8 and not (fused and n == 128):
        return Tile(256, n, k, 8, 3)
    if pixels // 128 * columns >= FEW_PROGRAMS // 2:
        return Tile(128, n, k, 8 if n == 128 else 4, 3)
    return Tile(64, n, k, 4, 4)


def weight_tile(outputs: int, inputs: int, taps: int, item_size: int, unit: int) -> Tile:
    """For the gradient of the weight: outputs x (taps, inputs) of a group, contracted from pixels, by ``unit``."""
    flat = is_flat(inputs, taps)
    width = taps * inputs if flat else inputs
    if item_size > 2:
        return Tile(power_between(16, outputs, 64), power_between(16, width, 64), 32, 4, 3)
    if flat or unit < 4:
        return Tile(64, power_between(16, width, 64), 32, 4, 2)
    m, n = power_between(64, outputs, 128), power_between(16, width, 128)
    return Tile(m, n, 64, 8 if m * n == 128 * 128 else 4, 3)


def splits_of(tiles: int, pixels: int, block: int) -> tuple[int, int]:
    """Splits of the pixels, and trips of each: enough programs, and few partial sums."""
    blocks = -(-pixels // block)
    wanted = max(1, min(MOST_SPLITS, -(-2 * FEW_PROGRAMS // tiles), blocks // 8))
    trips = -(-blocks // wanted)
    return -(-blocks // trips), trips

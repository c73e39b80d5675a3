"""Triton backend of ops.batch_norm_relu: its forward and its backward op.

Computes     y = relu(xhat*gamma + beta + residual), xhat = (x - mean)*invstd; gradients of x, residual, gamma, beta,
             and sums += sum_l (gamma*xhat + beta)*g' with g' the gradient where y > 0            see ops/reference.py
Shapes       x, y, residual, gradients [N, C, *spatial], L = product of spatial; vectors [C]; sums [N, C] or [C]
Strides      x channels_last or NCHW without gaps, other ones are copied first; what lies otherwise than x is copied to
             its layout. 16-byte loads where C (channels_last), or L (NCHW), is a multiple of 16 bytes
Dtypes       x: fp32, fp16, bf16. Vectors: fp32 or that of x. Everything is formed in fp32; sums are fp32
Bytes        with E = N*C*L*itemsize. Training: forward 3 E (x twice, y), with a residual 4; backward 5 E (x, g twice,
             gx), with a residual 7: its gradient g' is written first, and the second pass reads it instead of g and y.
             Evaluation: forward 2 E (3); backward 5 E (7), where nothing but gx and g' is wanted 3 (5). Beside that 28
             bytes for each channel, sample and split, backward 16. Kept for the backward pass: x (E), with a residual
             y (E), 8*C
Grid         one program per split of tiles of 4,096 elements; second passes in reverse, towards what the cache holds
             yet. Launches: 3 forward (2 in evaluation mode), 3 backward (1)
Determinism  yes: no atomics; splits follow from shape, strides and type
Error        with u = 16 eps32: y u*((|x| + |mean|)*invstd*|gamma| + |beta| + |residual|), dgamma u*sum|g'|*(|x| +
             |mean|)*invstd, dbeta u*sum|g'|; images are rounded to x's type once        (tests/ops/norm_cases.py)
Source       arXiv:1502.03167, arXiv:1906.10771; variances of parts added up as Chan, Golub and LeVeque did in 1979
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from taylor_cuda.kernels import _batch_norm
from taylor_cuda.kernels._launch import LONGEST_ROW, MOST_TRIPS, TARGET_PROGRAMS, TILE, device_of

NARROW = 2**31  # what offsets within a tile must stay below to be 32 bits wide


@dataclass(frozen=True)
class Grid:
    """How [samples, length, channels] is cut into programs: from shape, layout and type alone."""

    columns: bool  # channels lie side by side; otherwise summed elements do
    samples: int
    length: int
    channels: int
    unit: int
    block_length: int
    block_channels: int
    trips: int
    warps: int

    @property
    def span(self) -> int:
        """Summed elements of one program."""
        return self.block_length * self.trips

    @property
    def splits(self) -> int:
        """Programs over the summed elements of one sample."""
        return -(-self.length // self.span)

    @property
    def tiles(self) -> int:
        """Programs over the channels."""
        return -(-self.channels // self.block_channels)

    @property
    def parts(self) -> int:
        """Partial sums of one channel."""
        return self.samples * self.splits

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """What every kernel is told: channels, length, tiles, splits; the dimension that lies together in units."""
        channels, length = self.channels // (self.unit if self.columns else 1), self.length
        return channels, length if self.columns else length // self.unit, self.tiles, self.splits

    @property
    def group(self) -> int:
        """Rows of a tile that one thread holds."""
        threads = min(self.block_channels // self.unit, 32)
        return max(1, self.block_length * threads // (32 * self.warps)) if self.columns else 1

    @property
    def constants(self) -> dict[str, Any]:
        """What every kernel is compiled for."""
        blocks = {"BLOCK_L": self.block_length, "BLOCK_C": self.block_channels, "TRIPS": self.trips}
        reach = self.block_length * self.channels if self.columns else self.block_channels * self.length
        layout = {"COLUMNS": self.columns, "UNIT": self.unit, "WIDE": reach >= NARROW}
        return {**layout, **blocks, "num_warps": self.warps, "enable_fp_fusion": True}


def is_columns(x: Tensor) -> bool:
    """Whether channels lie side by side, without gaps."""
    return x.movedim(1, -1).is_contiguous()


def make_grid(x: Tensor, fold: bool) -> Grid:
    """The programs for x, which has one of the two layouts; with ``fold``, samples are one run in columns."""
    if x.dtype == torch.float64:
        raise TypeError("float64: these kernels form everything in fp32")
    columns, (samples, channels), length = is_columns(x), x.shape[:2], x.shape[2:].numel()
    if columns and fold:
        samples, length = 1, samples * length
    unit = math.gcd(16 // x.element_size(), channels if columns else length)
    across = min(triton.next_power_of_2(channels), 64)
    block_length = min(triton.next_power_of_2(length), TILE // across if columns else LONGEST_ROW)
    block_channels = min(triton.next_power_of_2(channels), TILE // block_length, 1024 if columns else 64)
    blocks = triton.cdiv(length, block_length)
    programs = blocks * samples * triton.cdiv(channels, block_channels)
    wanted = max(1, min(MOST_TRIPS, blocks, programs // TARGET_PROGRAMS))
    trips = 1 << (wanted.bit_length() - 1)
    warps = 4 if unit * x.element_size() >= 8 else 8
    return Grid(columns, samples, length, channels, unit, block_length, block_channels, trips, warps)


def batch_norm_relu_forward(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Y, and mean and invstd of every channel, [C] in fp32; with training the running statistics move."""
    y = torch.empty_like(x)
    mean, invstd = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return y, mean.zero_(), invstd.zero_()
    values = _without_gaps(x)
    added = None if residual is None else _like(values, residual)
    grid = make_grid(values, fold=True)
    with device_of(x):
        _launch_statistics(grid, values, (running_mean, running_var), (mean, invstd), training, momentum, eps)
        result = y if values is x else torch.empty_like(values)
        _batch_norm.apply_kernel[(grid.parts * grid.tiles,)](
            values, added, weight, bias, mean, invstd, result, *grid.sizes,
            RESIDUAL=added is not None, WEIGHT=weight is not None, BIAS=bias is not None, RELU=relu,
            **grid.constants,
        )  # fmt: skip
        if result is not y:
            y.copy_(result)
    return y, mean, invstd


def _launch_statistics(
    grid: Grid,
    x: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    results: tuple[Tensor, Tensor],
    training: bool,
    momentum: float,
    eps: float,
) -> None:
    parts: list[Tensor | None] = [None, None, None]
    if training:
        parts = [results[0].new_empty((grid.parts, grid.channels)) for _ in range(3)]
        _batch_norm.moments_kernel[(grid.parts * grid.tiles,)](
            x, *parts, *grid.sizes, GROUP=grid.group, **grid.constants
        )
    block_parts, block_channels = min(max(triton.next_power_of_2(grid.parts), 32), 1024), 4
    _batch_norm.statistics_kernel[(triton.cdiv(grid.channels, block_channels),)](
        *parts, *running, *results, grid.parts, grid.channels, grid.length, grid.splits, grid.span, momentum, eps,
        TRAINING=training, RUNNING=running[0] is not None, BLOCK_P=block_parts, BLOCK_C=block_channels, num_warps=8,
        enable_fp_fusion=True,
    )  # fmt: skip


def batch_norm_relu_backward(
    gradient: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor | None,
    training: bool,
    relu: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients that ``needs`` asks for, in x, residual, weight and bias, the others empty; adds to sums."""
    images = [torch.empty_like(x) if needed else None for needed in needs[:2]]
    totals = mean.new_empty((2, mean.shape[0]))
    values = _without_gaps(x)
    results = [image if image is None or values is x else torch.empty_like(values) for image in images]
    if x.numel() == 0:
        totals.zero_()
    else:
        tensors = (_like(values, gradient), values, None if y is None else _like(values, y))
        reduce = (training and needs[0]) or sums is not None or needs[2] or needs[3]
        with device_of(x):
            _launch_backward(tensors, (weight, bias, mean, invstd), totals, results, sums, training, relu, reduce)
    for image, result in zip(images, results, strict=True):
        if image is not None and result is not None and result is not image:
            image.copy_(result)
    return (
        x.new_empty(0) if images[0] is None else images[0],
        x.new_empty(0) if images[1] is None else images[1],
        _vector(totals[0], weight) if needs[2] else mean.new_empty(0),
        _vector(totals[1], bias) if needs[3] else mean.new_empty(0),
    )


def _launch_backward(
    tensors: tuple[Tensor, Tensor, Tensor | None],
    vectors: tuple[Tensor | None, ...],
    totals: Tensor,
    results: Sequence[Tensor | None],
    sums: Tensor | None,
    training: bool,
    relu: bool,
    reduce: bool,
) -> None:
    (gradient, x, y), (gx, masked) = tensors, results
    given = {"WEIGHT": vectors[0] is not None, "BIAS": vectors[1] is not None}
    per_sample = sums is not None and sums.dim() == 2
    if reduce:
        grid = make_grid(x, fold=not per_sample)
        partial = totals.new_empty((2, grid.samples, grid.splits, grid.channels))
        _batch_norm.gradient_sums_kernel[(grid.parts * grid.tiles,)](
            gradient, x, y, *vectors, masked, partial[0], partial[1], *grid.sizes,
            OUTPUT=y is not None, MASKED=masked is not None, RELU=relu, GROUP=grid.group, **given, **grid.constants,
        )  # fmt: skip
        _launch_gates(partial, vectors, totals, sums, per_sample)
        if masked is not None:
            gradient, masked, y, relu = masked, None, None, False
    if gx is None and masked is None:
        return
    grid = make_grid(x, fold=True)
    _batch_norm.input_gradient_kernel[(grid.parts * grid.tiles,)](
        gradient, x, y, *vectors, totals, masked, gx, *grid.sizes, grid.samples,
        TRAINING=training, OUTPUT=y is not None, MASKED=masked is not None, INNER=gx is not None, RELU=relu, **given,
        **grid.constants,
    )  # fmt: skip


def _launch_gates(
    partial: Tensor,
    vectors: tuple[Tensor | None, ...],
    totals: Tensor,
    sums: Tensor | None,
    per_sample: bool,
) -> None:
    _, samples, splits, channels = partial.shape
    if not per_sample:  # then splits are added up as samples are
        samples, splits = samples * splits, 1
    block_splits = min(triton.next_power_of_2(splits), 16)
    block_samples, block_channels = min(max(triton.next_power_of_2(samples), 2), 512 // block_splits), 4
    _batch_norm.gates_kernel[(triton.cdiv(channels, block_channels),)](
        partial[0], partial[1], vectors[0], vectors[1], totals, sums, samples, splits, channels,
        WEIGHT=vectors[0] is not None, BIAS=vectors[1] is not None, PER_SAMPLE=per_sample,
        TOTAL=sums is not None and not per_sample, BLOCK_N=block_samples, BLOCK_S=block_splits, BLOCK_C=block_channels,
        num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip


def _without_gaps(x: Tensor) -> Tensor:
    """The values of x in one of the two layouts."""
    return x if x.is_contiguous() or is_columns(x) else x.contiguous()


def _like(x: Tensor, other: Tensor) -> Tensor:
    """The values of other, laid out as x, which has no gaps."""
    return other if other.stride() == x.stride() else torch.empty_like(x).copy_(other)


def _vector(total: Tensor, like: Tensor | None) -> Tensor:
    """A row of totals as a tensor of its own, with the dtype of the parameter it is for."""
    return total.to(total.dtype if like is None else like.dtype, copy=True)

"""Triton backend of ops.accumulate_channel_sums.

Computes     sums[n, c] += sum_l a[n, c, l] * g[n, c, l], or sums[c] += the same summed over n      see ops/reference.py
Shapes       a, g [N, C, *spatial], L = product of spatial; sums [N, C] or [C], contiguous
Strides      a, g: any, as channel_sums
Dtypes       a, g: fp32, fp16, bf16, fp64 (equal). sums: fp32 (fp64 for fp64)
Bytes        2*N*C*L*itemsize read, 8 bytes for each of sums; 8 bytes more for each partial sum
Grid         as channel_sums; a second launch unless one program sums what belongs together
Determinism  yes: no atomics; each of sums is changed by one program
Error        at most 8 eps32 * (sum|a*g| + |sums|)                                                   (tests/gpu)
Source       arXiv:1906.10771
"""

from __future__ import annotations

from torch import Tensor

from taylor_cuda.kernels import _sums
from taylor_cuda.kernels._launch import make_pair, make_tiling


def accumulate_channel_sums(activation: Tensor, gradient: Tensor, sums: Tensor) -> None:
    """Add Σ_l a·g to sums [N, C], or Σ_{n,l} a·g to sums [C]."""
    if activation.numel() == 0:
        return
    per_sample = sums.dim() == 2
    pair = make_pair(activation, gradient, fold=not per_sample)
    tiling = make_tiling(pair)
    channels = pair.channel.size
    if tiling.splits == 1 and (per_sample or pair.sample.size == 1):
        _sums.launch_sums(pair, tiling, sums, channels, 0, _sums.PRODUCT, add=True)
        return
    partial = sums.new_empty((pair.sample.size, tiling.splits, channels))
    _sums.launch_sums(pair, tiling, partial, tiling.splits * channels, channels, _sums.PRODUCT)
    if per_sample:
        _sums.launch_finish_samples(partial, sums, add=True)
    else:
        _sums.launch_finish_channels(partial, sums, add=True)

"""Triton backend of ops.channel_sums.

Computes     out[n, c] = sum_l a[n, c, l] * g[n, c, l]                   see ops/reference.py
Shapes       a, g [N, C, *spatial], L = product of spatial; out [N, C]
Strides      any; 16-byte loads for aligned channels_last and [N, L, C] with C, and NCHW with L, a multiple of 16 bytes;
             narrower loads by what C or L divides by, element by element where neighbours don't lie side by side. More
             than two summed dimensions that don't merge are copied first (2 reads and 2 writes more)
Dtypes       a, g: fp32, fp16, bf16, fp64 (equal). Sums and out: fp32 (fp64 for fp64)
Bytes        2*N*C*L*itemsize read, 4*N*C written; with S > 1 splits 8*N*S*C more for the partial sums
Grid         one program per split of a tile of 4,096 elements; row indices in int64. A second launch with S > 1
Determinism  yes: no atomics; splits follow from shape, strides, type and alignment
Error        at most 8 eps32 * sum|a*g|                                  (tests/gpu)
Source       arXiv:1906.10771
"""

from __future__ import annotations

from torch import Tensor

from taylor_cuda.kernels import _sums
from taylor_cuda.kernels._launch import make_pair, make_tiling, result_dtype


def channel_sums(activation: Tensor, gradient: Tensor) -> Tensor:
    """Σ_l a·g of every sample and channel, [N, C]."""
    out = activation.new_empty(activation.shape[:2], dtype=result_dtype(activation.dtype))
    if activation.numel() == 0:
        return out.zero_()
    pair = make_pair(activation, gradient, fold=False)
    tiling = make_tiling(pair)
    samples, channels = out.shape
    if tiling.splits == 1:
        _sums.launch_sums(pair, tiling, out, channels, 0, _sums.PRODUCT)
        return out
    partial = out.new_empty((samples, tiling.splits, channels))
    _sums.launch_sums(pair, tiling, partial, tiling.splits * channels, channels, _sums.PRODUCT)
    _sums.launch_finish_samples(partial, out)
    return out

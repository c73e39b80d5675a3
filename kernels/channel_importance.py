"""Triton backend of ops.channel_importance.

Computes     with t[n, c] = sum_l a[n, c, l] * g[n, c, l]:  "batch" (sum_n t)^2   "sample" sum_n t^2
             "abs" mean_n |t / L|   "element" sum_{n,l} (a*g)^2   "all" these four          see ops/reference.py
Shapes       a, g [N, C, *spatial], L = product of spatial; out [C], or [4, C] for "all"
Strides      any; 16-byte loads for aligned channels_last and [N, L, C] with C, and NCHW with L, a multiple of 16 bytes;
             narrower loads by what C or L divides by, element by element where neighbours don't lie side by side. More
             than two summed dimensions that don't merge are copied first (2 reads and 2 writes more)
Dtypes       a, g: fp32, fp16, bf16, fp64 (equal). Sums and out: fp32 (fp64 for fp64)
Bytes        2*N*C*L*itemsize read, 8*P*C for P partial sums of a channel, 4*C written; for "all" P >= N (but for
             L = 1), 16*P*C and 16*C
Grid         one program per split of a tile of 4,096 elements, then one per 32 channels; row indices in int64
Determinism  yes: no atomics; splits follow from shape, strides, type and alignment
Error        of each sum at most 8 eps32 * (sum of the absolute terms)   (tests/gpu)
Source       arXiv:1906.10771, arXiv:1611.06440
"""

from __future__ import annotations

from torch import Tensor

from taylor_cuda.kernels import _sums
from taylor_cuda.kernels._launch import make_pair, make_tiling, result_dtype


def channel_importance(activation: Tensor, gradient: Tensor, reduction: str = "batch") -> Tensor:
    """Importance of every channel, [C]; [4, C] for "all"."""
    if reduction == "all":
        return _all(activation, gradient)
    channels = activation.shape[1]
    out = activation.new_empty(channels, dtype=result_dtype(activation.dtype))
    if activation.numel() == 0:
        return out.zero_()
    count = activation.numel() // channels
    single = count == activation.shape[0]  # one element per sample and channel: its sum needs no place of its own
    per_sample = {"sample": _sums.SQUARE, "abs": _sums.ABS}.get(reduction, _sums.PRODUCT)
    term = _sums.SQUARE if reduction == "element" else _sums.PRODUCT
    if single and per_sample != _sums.PRODUCT:
        term, per_sample = per_sample, _sums.PRODUCT
    pair = make_pair(activation, gradient, fold=per_sample == _sums.PRODUCT)
    tiling = make_tiling(pair)
    partial = out.new_empty((pair.sample.size, tiling.splits, channels))
    _sums.launch_sums(pair, tiling, partial, tiling.splits * channels, channels, term)
    divisor = count if reduction == "abs" else 1
    _sums.launch_finish_channels(partial, out, per_sample, square_total=reduction == "batch", divisor=divisor)
    return out


def _all(activation: Tensor, gradient: Tensor) -> Tensor:
    """The four of them from one pass, with samples apart.

    Where these have one position, that would write as much as it reads: there three sums over all samples do, except
    for the few layouts whose channels don't lie side by side.
    """
    channels = activation.shape[1]
    out = activation.new_empty((4, channels), dtype=result_dtype(activation.dtype))
    if activation.numel() == 0:
        return out.zero_()
    count = activation.numel() // channels
    pair = make_pair(activation, gradient, fold=True)
    term = _sums.THREE if count == activation.shape[0] and pair.columns else _sums.TWO
    if term == _sums.TWO:
        pair = make_pair(activation, gradient, fold=False)
    tiling = make_tiling(pair)
    planes = 3 if term == _sums.THREE else 2
    partial = out.new_empty((planes, pair.sample.size, tiling.splits, channels))
    _sums.launch_sums(pair, tiling, partial, tiling.splits * channels, channels, term)
    _sums.launch_finish_all(partial, out, count)
    return out

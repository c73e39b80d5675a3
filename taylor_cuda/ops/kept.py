"""Kept rows and columns of all weights of a network at once: out of the dense ones, and back into them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taylor_cuda.ops import checks, library


def gather_kept(
    tensors: Sequence[Tensor], keep: Tensor, bounds: Sequence[int], cast: Sequence[bool], dtype: torch.dtype
) -> list[Tensor]:
    """The kept rows (dimension 0) and columns (dimension 1) of every tensor, in one launch.

    A list of kept positions is ascending and distinct, and may have -1 anywhere, each of which stands for zeros.
    ``keep`` holds all lists, one after another: the rows of ``tensors[i]`` from ``bounds[2 * i]`` up to
    ``bounds[2 * i + 1]``, its columns from there up to ``bounds[2 * i + 2]``. A list without entries keeps all.

    Nothing waits for the device, and a CUDA graph may capture it. Two runs are bit-equal, and no result has a gradient.

    Args:
        tensors: of at least one dimension, two where there are columns to keep; float32, float16, bfloat16 (float64 on
            the CPU), any strides.
        keep: int64, on the tensors' device. An entry that is not among its dimension's is an error on the CPU; on CUDA,
            where asking would wait for the device, it is read from wherever it points to.
        bounds: ``2 * len(tensors) + 1`` numbers, from 0 to the length of ``keep``.
        cast: whether a result is of ``dtype``, rounded to nearest even; else it is of its tensor's.
        dtype: float32, float16, bfloat16 or float64.

    Returns:
        One tensor for each, with its dimensions in memory in the order of those of ``tensors[i]``, without gaps.

    Raises:
        InputError: a wrong dtype, device, number of lists or dimension.
    """
    checks.check_dtype(dtype, "dtype")
    if not isinstance(tensors, Sequence) or len(tensors) == 0:
        checks.check_gathered(tensors, keep, bounds, cast)
        return []
    try:
        result: list[Tensor] = library.gather_kept(list(tensors), keep, list(bounds), list(cast), dtype)
    except (RuntimeError, LookupError, TypeError, ValueError):
        # Every backend checks, and asking twice would show where tensors are small; this one names the argument.
        checks.check_gathered(tensors, keep, bounds, cast)
        raise
    return result


def scatter_kept(
    values: Sequence[Tensor], targets: Sequence[Tensor], keep: Tensor, bounds: Sequence[int], clear: bool
) -> None:
    """Write ``values`` to where ``gather_kept`` with these lists takes them from, in one launch.

    Entries of -1 are left out. Everything else in ``targets`` becomes 0 with ``clear``, in the same pass, and stays as
    it is without.

    Args:
        values: each of the shape of the kept part of its target; float32, float16, bfloat16 (float64 on the CPU), any
            strides. Cast to the target's dtype.
        targets: of at least one dimension, two where there are columns to keep; same dtypes, any strides under which
            no two elements share memory. Changed in place. No tensor may be there twice.
        keep: int64, on the targets' device. An entry that is not among its dimension's is an error on the CPU; on CUDA,
            where asking would wait for the device, it is left out with ``clear``, and written to wherever it points to
            without.
        bounds: as in ``gather_kept``.
        clear: whether what is not kept becomes 0.

    Raises:
        InputError: a wrong dtype, shape, device or number of lists.
    """
    if not isinstance(targets, Sequence) or len(targets) == 0:
        checks.check_scattered(values, targets, keep, bounds)
        return
    try:
        library.scatter_kept(list(values), list(targets), keep, list(bounds), clear)
    except (RuntimeError, LookupError, TypeError, ValueError):
        checks.check_scattered(values, targets, keep, bounds)
        raise

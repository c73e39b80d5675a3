"""The fast ops: drop-in functions for tensors of any layout, on the CPU and on CUDA.

Each has one definition (``reference``), one or two kernels, and one place that chooses between them (``backends``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taylor_cuda.errors import InputError
from taylor_cuda.ops import backends, checks, library
from taylor_cuda.ops.conv import masked_conv2d
from taylor_cuda.ops.gate import ScoreGate, score_gate
from taylor_cuda.ops.keep import keep_lists
from taylor_cuda.ops.kept import gather_kept, scatter_kept
from taylor_cuda.ops.norm import BatchNormReLU, batch_norm_relu
from taylor_cuda.ops.pack import pack_channels, unpack_channels
from taylor_cuda.ops.reference import CHANNEL_REDUCTIONS, UNIT_REDUCTIONS, WEIGHT_REDUCTIONS
from taylor_cuda.ops.relu import ScoreReLU, score_relu

__all__ = [
    "BatchNormReLU",
    "ScoreGate",
    "ScoreReLU",
    "accumulate_channel_sums",
    "accumulate_importance",
    "backends",
    "batch_norm_relu",
    "channel_importance",
    "channel_sums",
    "gather_kept",
    "keep_lists",
    "keep_mask",
    "masked_conv2d",
    "pack_channels",
    "scatter_kept",
    "score_gate",
    "score_relu",
    "score_relu_backward",
    "unpack_channels",
    "weight_importance",
]


def channel_importance(activation: Tensor, gradient: Tensor, reduction: str = "batch") -> Tensor:
    """Importance of every channel from an activation and the loss's gradient in it, in one pass over both.

    With t[n, c] = Σ_l a·g over the L positions of a feature map:

    - ``"batch"``: (Σ_n t)², Taylor-FO of a gate on the channel (arXiv:1906.10771). For a loss that is the
      batch's mean.
    - ``"sample"``: Σ_n t², every example on its own.
    - ``"abs"``: mean_n |t / L|, the Taylor criterion of arXiv:1611.06440.
    - ``"element"``: Σ_{n,l} (a·g)².
    - ``"all"``: these four, as rows in this order, still from one pass. A row may differ from the reduction of its name
      in the last bits, for it has to keep samples apart where that need not.

    The result has no gradient. Two runs are bit-equal, and a NaN stays in its channel. An empty batch gives zeros.

    Args:
        activation: ``[N, C, *spatial]`` (``[N, C]`` too), float32, float16, bfloat16 (float64 on the CPU), any strides.
        gradient: dE/da, of the same shape, dtype and device.
        reduction: one of the five above.

    Returns:
        ``[C]``, or ``[4, C]`` for ``"all"``, float32 (float64 for float64 inputs); higher means: keep.

    Raises:
        InputError: a wrong dtype, two dtypes, shapes or devices, or an unknown reduction.
    """
    checks.check_activation_pair(activation, gradient)
    checks.check_reduction(reduction, (*CHANNEL_REDUCTIONS, "all"))
    result: Tensor = library.channel_importance(activation, gradient, reduction)
    return result


def channel_sums(activation: Tensor, gradient: Tensor) -> Tensor:
    """Per-example gate gradients t[n, c] = Σ_l a·g, for criteria of one's own.

    Args:
        activation: ``[N, C, *spatial]``, float32, float16, bfloat16 (float64 on the CPU), any strides.
        gradient: dE/da, of the same shape, dtype and device.

    Returns:
        ``[N, C]``, float32 (float64 for float64 inputs), signed. No gradient; two runs are bit-equal.

    Raises:
        InputError: a wrong dtype, or two dtypes, shapes or devices.
    """
    checks.check_activation_pair(activation, gradient)
    result: Tensor = library.channel_sums(activation, gradient)
    return result


def accumulate_channel_sums(activation: Tensor, gradient: Tensor, sums: Tensor) -> None:
    """Add Σ_l a·g to ``sums`` in place: what ``score_gate`` does in its backward pass, for hooks of one's own.

    Args:
        activation: ``[N, C, *spatial]``, float32, float16, bfloat16 (float64 on the CPU), any strides.
        gradient: dE/da, of the same shape, dtype and device.
        sums: ``[N, C]``, or ``[C]`` to sum over the batch too; contiguous, float32 (float64 for float64 inputs).

    Raises:
        InputError: a wrong dtype, shape or device, or sums that require grad.
    """
    checks.check_activation_pair(activation, gradient)
    checks.check_sums(activation, sums, "activation")
    library.accumulate_channel_sums(activation, gradient, sums)


def weight_importance(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], dims: Sequence[int], reduction: str = "sum"
) -> list[Tensor]:
    """Importance of every channel of many layers from their weights and gradients, in one launch.

    ``dims[i]`` is the dimension of ``weights[i]`` that counts channels: 0 for the channels a convolution or linear
    layer writes, 1 for those it reads. The products are summed over all other dimensions:

    - ``"sum"``: Σ w·g, signed. Over a layer's inputs this is dE/dz of a gate in front of it, its share of the channel's
      first-order effect (arXiv:1906.10771); square it after adding the layers up.
    - ``"square"``: Σ (w·g)², Taylor-FO of every weight on its own.
    - ``"abs"``: Σ |w·g|.

    Args:
        weights: tensors of at least one dimension, float32, float16, bfloat16 (float64 on the CPU), any strides.
        gradients: dE/dw of each: same shape and device, and the same dtype or, for a float32 weight, a 16-bit one.
        dims: the channel dimension of each; negative ones count from the end.
        reduction: one of the three above.

    Returns:
        One ``[C_i]`` for each weight, float32 (float64 for float64 weights). No gradient; two runs are bit-equal.

    Raises:
        InputError: lists of different lengths, a wrong dtype, shape, device or dimension, or an unknown reduction.
    """
    checks.check_weight_lists(weights, gradients, dims)
    checks.check_reduction(reduction, WEIGHT_REDUCTIONS)
    if not weights:
        return []  # without a tensor the dispatcher has nothing to dispatch on
    try:
        result: list[Tensor] = library.weight_importance(list(weights), list(gradients), list(dims), reduction)
    except (RuntimeError, InputError):
        # Every backend checks the pairs itself, and asking twice would take a twentieth of the time of the sums; this
        # one names the entry.
        checks.check_weight_pairs(weights, gradients, dims)
        raise
    return result


def accumulate_importance(
    sums: Sequence[Tensor],
    entries: Tensor,
    offsets: Tensor,
    window: Tensor,
    counts: Tensor | None,
    reduction: str = "batch",
    scale: Tensor | None = None,
    added: Tensor | None = None,
    finite: Tensor | None = None,
    decay: float = 1.0,
    weight: float = 1.0,
) -> None:
    """Add the importance of every unit of a network to ``window`` in place, or skip the step if it overflowed.

    The last part of a scoring step: what ``weight_importance`` or gates left at the positions of many tensors becomes
    one value for each unit, which several tensors share. All of it is decided on the device, in two launches (one
    without ``counts``) that a CUDA graph can capture.

    Position p counts through all ``sums``, one after another. With s[n, p] side by side, t[n, u] the sum of
    s[n, entries[k]] / scale over offsets[u] <= k < offsets[u + 1], and T[u] = Σ_n t[n, u] + added[u]:

    - ``"batch"``: T², Taylor-FO of a gate on all of a unit's channels (arXiv:1906.10771).
    - ``"sample"``: Σ_n t², every example on its own.
    - ``"abs"``: Σ_n |t|.
    - ``"sum"``: T, for values that are squares or magnitudes already.

    If all of them are finite, and ``finite`` is true, window = decay·window + weight·value and counts[0] grows by 1;
    otherwise counts[1] does, and window stays as it is, bit for bit. Two runs are bit-equal.

    Args:
        sums: ``[C_i]`` or ``[N, C_i]`` with one N, contiguous, of the window's dtype. With none of them ``entries`` is
            not looked at, and all t are 0.
        entries: int64 ``[E]``, positions of all units. One that does not exist is an error on the CPU; on CUDA, where
            asking would wait for the device, its unit is NaN.
        offsets: int64 ``[U + 1]``, from 0 to E: where the entries of each unit begin.
        window: ``[U]``, float32 (float64 on the CPU), contiguous.
        counts: int64 ``[2]``: steps taken, steps skipped. With ``None`` nothing is skipped, and NaN stays in its unit.
        reduction: one of the four above.
        scale: scalar tensor of the window's dtype that the sums carry, such as the factor of a ``GradScaler``; for sums
            of squares its square.
        added: ``[U]``, of the window's dtype, for ``"batch"`` and ``"sum"``. Not divided by ``scale``.
        finite: scalar bool tensor; false skips the step.
        decay: factor of what ``window`` holds.
        weight: factor of the new values.

    Raises:
        InputError: a wrong dtype, shape or device, or an unknown reduction.
    """
    checks.check_reduction(reduction, UNIT_REDUCTIONS)
    if not isinstance(window, Tensor):
        raise InputError(f"window: wanted a tensor, got {type(window).__name__}")
    args = (list(sums), entries, offsets, window, counts, reduction, scale, added, finite, decay, weight)
    try:
        library.accumulate_importance(*args)
    except (RuntimeError, InputError):
        # As above: every backend checks, and this says which argument it was.
        checks.check_units(*args[:9])
        raise


def keep_mask(scores: Tensor, keep: int | Tensor) -> tuple[Tensor, Tensor]:
    """Mask of the ``keep`` largest scores, and the smallest score in it, without asking the host.

    For masks that change at every step, as soft pruning (SPP) and iterative masks have them: on a GPU it is one launch
    that waits for nothing and can stand in a CUDA graph, and with ``keep`` in device memory so can the schedule.
    Budgets in MACs, minimum widths and coupled layers remain with ``tc.plan``.

    The mask has exactly ``min(max(keep, 0), n)`` True entries. Of equal scores, those with the lower index stay; -0.0
    equals 0.0. NaN counts as larger than every number, for nothing speaks for removing what was not measured. Two runs
    are bit-equal, and neither result has a gradient.

    Args:
        scores: ``[n]``, float32 (float64 on the CPU), any stride; higher means: keep. On a GPU less than 2**31 of them.
        keep: how many stay: an int, or a 0-d int64 tensor on the scores' device.

    Returns:
        The mask, ``[n]`` of bool, and the threshold, a 0-d tensor of the scores' dtype: the smallest score that stays,
        +inf where none does, NaN where any score is NaN.

    Raises:
        InputError: scores of a wrong dtype or shape, or keep of a wrong type, shape or device.
    """
    checks.check_scores(scores)
    checks.check_keep(keep, scores)
    if not isinstance(keep, Tensor):
        keep = scores.new_full((), min(max(keep, 0), scores.shape[0]), dtype=torch.int64)  # no copy from the host
    mask, threshold = library.keep_mask(scores, keep)
    return mask, threshold


def score_relu_backward(
    output: Tensor, gradient: Tensor, sums: Tensor, skip: Tensor | None = None, skip_sums: Tensor | None = None
) -> Tensor:
    """The backward pass of a ReLU, which adds Σ_l output·gradient to ``sums`` as it goes: what ``score_relu`` runs.

    Args:
        output: of the ReLU, ``[N, C, *spatial]``, float32, float16, bfloat16 (float64 on the CPU), any strides.
        gradient: of the loss in it, of the same shape, dtype and device.
        sums: ``[N, C]``, or ``[C]`` to sum over the batch too; contiguous, float32 (float64 for float64 outputs).
        skip: what was added before the ReLU; of output's shape, dtype and device.
        skip_sums: what Σ_l skip·gx is added to; a tensor like ``sums``. Given with ``skip``, and only then.

    Returns:
        gx: 0 where output <= 0, else the gradient; bit-equal to PyTorch's, strided as ``torch.empty_like(output)``. No
        gradient. Two runs are bit-equal, and a NaN stays in its channel.

    Raises:
        InputError: a wrong dtype, shape or device, sums that require grad, or one of skip and skip_sums alone.
    """
    checks.check_activation_pair(output, gradient, "output")
    checks.check_sums(output, sums, "output")
    checks.check_skip(output, sums, skip, skip_sums, "output")
    if skip is not None and (skip_sums is None or skip.dtype != output.dtype):
        raise InputError(
            f"skip: wanted it of {output.dtype}, output's dtype, and with skip_sums, "
            f"got {skip.dtype}{'' if skip_sums is not None else ' and no sums'}"
        )
    result: Tensor = library.score_relu_backward(output, gradient, sums, skip, skip_sums)
    return result

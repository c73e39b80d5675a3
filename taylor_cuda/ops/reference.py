"""The definition of every op in plain PyTorch.

Its annotations are the op's schema, and every other backend is tested against it.

Notation: activation a and gradient g = dE/da are ``[N, C, *spatial]``, L is the product of the spatial sizes, and
every product a·g is taken in float32 (float64 for float64 inputs). An empty sum is 0, and so is the mean of an empty
batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taylor_cuda.ops.reference_conv import (
    gather_kept,
    masked_conv2d_backward,
    masked_conv2d_forward,
    pack_channels,
    scatter_kept,
    unpack_channels,
)

__all__ = [
    "CHANNEL_REDUCTIONS",
    "UNIT_REDUCTIONS",
    "WEIGHT_REDUCTIONS",
    "accumulate_channel_sums",
    "accumulate_importance",
    "batch_norm_relu_backward",
    "batch_norm_relu_forward",
    "channel_importance",
    "channel_sums",
    "gather_kept",
    "keep_mask",
    "masked_conv2d_backward",
    "masked_conv2d_forward",
    "pack_channels",
    "result_dtype",
    "scatter_kept",
    "score_relu_backward",
    "unpack_channels",
    "weight_importance",
]

CHANNEL_REDUCTIONS = ("batch", "sample", "abs", "element")  # in the order of the rows of "all"
WEIGHT_REDUCTIONS = ("sum", "square", "abs")
UNIT_REDUCTIONS = ("batch", "sample", "abs", "sum")


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.promote_types(dtype, torch.float32)


def _products(left: Tensor, right: Tensor) -> Tensor:
    dtype = result_dtype(left.dtype)
    return left.to(dtype) * right.to(dtype)


def _channel_products(activation: Tensor, gradient: Tensor) -> Tensor:
    products = _products(activation, gradient)
    return products.flatten(2) if products.dim() > 2 else products.unsqueeze(2)


def channel_sums(activation: Tensor, gradient: Tensor) -> Tensor:
    """t[n, c] = Σ_l a·g: minus the first-order change of example n's loss when channel c goes (arXiv:1906.10771)."""
    return _channel_products(activation, gradient).sum(dim=2)


def channel_importance(activation: Tensor, gradient: Tensor, reduction: str = "batch") -> Tensor:
    """Importance of every channel, ``[C]`` (``[4, C]`` for ``"all"``), with t[n, c] = Σ_l a·g.

    ``"batch"``    (Σ_n t)²: Taylor-FO of a gate, the square of dE/dz (arXiv:1906.10771)
    ``"sample"``   Σ_n t²: the same for every example on its own
    ``"abs"``      mean_n |t / L|: the Taylor criterion of arXiv:1611.06440
    ``"element"``  Σ_{n,l} (a·g)²
    ``"all"``      the four of them, ``[4, C]``
    """
    if reduction == "all":
        return torch.stack([channel_importance(activation, gradient, each) for each in CHANNEL_REDUCTIONS])
    products = _channel_products(activation, gradient)
    if reduction == "element":
        return products.square().sum(dim=(0, 2))
    sums = products.sum(dim=2)
    if reduction == "batch":
        return sums.sum(dim=0).square()
    if reduction == "sample":
        return sums.square().sum(dim=0)
    return sums.abs().sum(dim=0) / max(products.shape[0] * products.shape[2], 1)


def accumulate_channel_sums(activation: Tensor, gradient: Tensor, sums: Tensor) -> None:
    """Add Σ_l a·g to ``sums`` ``[N, C]``, or Σ_{n,l} a·g to ``sums`` ``[C]``: the gradient of a gate of 1."""
    added = channel_sums(activation, gradient)
    sums.add_(added if sums.dim() == 2 else added.sum(dim=0))


def weight_importance(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], dims: Sequence[int], reduction: str = "sum"
) -> list[Tensor]:
    """Importance of every index of dimension ``dims[i]`` of ``weights[i]``, ``[C_i]`` each.

    Summed over the other dimensions:

    ``"sum"``     Σ w·g, signed: dE/dz of a gate on those weights (arXiv:1906.10771)
    ``"square"``  Σ (w·g)²: Taylor-FO of every weight on its own, added up
    ``"abs"``     Σ |w·g|
    """
    scores = []
    for weight, gradient, dim in zip(weights, gradients, dims, strict=True):
        products = (
            _products(weight, gradient).movedim(dim, 0).flatten(1)
            if weight.dim() > 1
            else _products(weight, gradient)[:, None]
        )
        if reduction == "square":
            products = products.square()
        elif reduction == "abs":
            products = products.abs()
        scores.append(products.sum(dim=1))
    return scores


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
    """Add the importance v of every unit, ``[U]``, to ``window``, unless one of them is not finite.

    ``sums`` are ``[C_i]`` or ``[N, C_i]``, side by side ``s[N, P]``. With t[n, u] = Σ_k s[n, entries[k]] / scale over
    the k from offsets[u] up to offsets[u + 1], and T[u] = Σ_n t + added[u]:

    ``"batch"``    T²: Taylor-FO of a gate on all of a unit's channels (arXiv:1906.10771)
    ``"sample"``   Σ_n t²: the same for every example on its own
    ``"abs"``      Σ_n |t|
    ``"sum"``      T

    Where all v are finite, and ``finite`` is true, window = decay·window + weight·v and counts[0] grows by 1; otherwise
    counts[1] does. Without ``counts`` nothing is left out.
    """
    values = _unit_values(sums, entries, offsets, window, reduction, scale)
    if added is not None:
        values = values + added
    if reduction == "batch":
        values = values.square()
    blended = decay * window + weight * values
    if counts is None:
        window.copy_(blended)
        return
    good = values.isfinite().all()
    if finite is not None:
        good = good & finite
    window.copy_(torch.where(good, blended, window))
    counts.add_(torch.stack((good, ~good)))


def _unit_values(
    sums: Sequence[Tensor], entries: Tensor, offsets: Tensor, window: Tensor, reduction: str, scale: Tensor | None
) -> Tensor:
    if not sums:
        return torch.zeros_like(window)
    side_by_side = torch.cat([each if each.dim() == 2 else each[None] for each in sums], dim=1)
    # The last offset is known to be the number of entries: asking whether all of them fit would wait for a GPU.
    joint = torch.segment_reduce(side_by_side.t()[entries], "sum", offsets=offsets, unsafe=True, initial=0)
    if scale is not None:
        joint = joint / scale
    if reduction == "sample":
        joint = joint.square()
    elif reduction == "abs":
        joint = joint.abs()
    return joint.sum(dim=1)


def keep_mask(scores: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Mask ``[n]`` of the ``keep`` largest scores, and the smallest score in it.

    ``keep``, a 0-d int64 tensor, is taken as the nearest number from 0 to n. NaN is larger than every number, -0.0
    equals 0.0, and of equal scores those with the lower index stay. The threshold is +inf where nothing stays, and NaN
    where any score is NaN.
    """
    count = keep.clamp(0, scores.shape[0])
    bits = scores.view(torch.int64 if scores.dtype == torch.float64 else torch.int32)
    lowest, highest = torch.iinfo(bits.dtype).min, torch.iinfo(bits.dtype).max
    # Whole numbers in the order of the scores: the bits of a negative float count downwards. -0.0 is the lowest number.
    keys = torch.where(bits < 0, bits ^ highest, bits).masked_fill(bits == lowest, 0)
    keys = keys.masked_fill(scores.isnan(), highest)
    ordered, order = keys.sort(descending=True, stable=True)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask = mask.scatter(0, order, torch.arange(scores.shape[0], device=scores.device) < count)
    if scores.shape[0] == 0:
        return mask, scores.new_full((), float("inf"))
    last = ordered.gather(0, (count - 1).clamp(min=0).reshape(1))
    threshold = torch.where(last < 0, last ^ highest, last).view(scores.dtype).reshape(())
    threshold = threshold.masked_fill(count == 0, float("inf"))
    return mask, threshold.masked_fill(scores.isnan().any(), float("nan"))


def score_relu_backward(
    output: Tensor, gradient: Tensor, sums: Tensor, skip: Tensor | None = None, skip_sums: Tensor | None = None
) -> Tensor:
    """The backward pass of a ReLU: gx = 0 where output <= 0, else gradient. It leaves what a gate behind it would get.

    ``sums`` ``[C]`` or ``[N, C]`` grows by Σ output·gradient. For output = relu(x + skip), ``skip_sums`` grows by
    Σ skip·gx: the part of the same sum that flows on along the skip connection; x has the rest. gx is strided as
    ``torch.empty_like(output)`` is, the layout that threshold_backward chooses too.
    """
    gx = torch.empty_like(output)
    torch.ops.aten.threshold_backward.grad_input(gradient, output, 0, grad_input=gx)
    accumulate_channel_sums(output, gradient, sums)
    if skip is not None and skip_sums is not None:
        accumulate_channel_sums(skip, gx, skip_sums)
    return gx


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
    """Return y = relu(x̂·γ + β + residual) with x̂ = (x - mean)·invstd, and mean and invstd of every channel, ``[C]``.

    With ``training`` the statistics are the batch's, and the running ones move towards them, the variance being the
    unbiased one there; otherwise they are the running ones. y is laid out as ``torch.empty_like(x)``.
    """
    wide = result_dtype(x.dtype)
    if x.numel() == 0:  # no statistics, and nothing moves
        return torch.empty_like(x), x.new_zeros(x.shape[1], dtype=wide), x.new_zeros(x.shape[1], dtype=wide)
    gamma, beta, old_mean, old_var = (
        None if vector is None else vector.to(wide) for vector in (weight, bias, running_mean, running_var)
    )
    y, mean, invstd = torch.native_batch_norm(x.to(wide), gamma, beta, old_mean, old_var, training, momentum, eps)
    if not training and old_mean is not None and old_var is not None:
        mean, invstd = old_mean.clone(), (old_var + eps).rsqrt()
    for running, moved in ((running_mean, old_mean), (running_var, old_var)):
        if training and running is not None and moved is not None and moved is not running:
            running.copy_(moved)
    if residual is not None:
        y = y.add_(residual)
    return _laid_as(x, y.relu_() if relu else y), mean, invstd


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
    """Gradients of ``batch_norm_relu_forward`` in x, residual, weight and bias; those that ``needs`` denies are empty.

    With g' the gradient where y > 0 (all of it without ``relu``), dγ = Σ g'·x̂, dβ = Σ g', and M summed elements:

        gx = γ·invstd·(g' - dβ/M - x̂·dγ/M)    with ``training``, else γ·invstd·g'
        sums += Σ_l b·g' = γ·Σ_l g'·x̂ + β·Σ_l g'    where b = γ·x̂ + β; Σ_{n,l} for ``sums`` ``[C]``

    y is needed where there was a residual; without one, y > 0 is x̂·γ + β > 0.
    """
    wide = mean.dtype
    shape = (1, -1, *[1] * (x.dim() - 2))
    gamma = torch.ones_like(mean) if weight is None else weight.to(wide)
    beta = torch.zeros_like(mean) if bias is None else bias.to(wide)
    normalized = (x.to(wide) - mean.view(shape)) * invstd.view(shape)
    masked = gradient.to(wide)
    if relu:
        output = normalized * gamma.view(shape) + beta.view(shape) if y is None else y
        masked = masked.masked_fill(output <= 0, 0)
    along, plain = channel_sums(masked, normalized), channel_sums(masked, torch.ones_like(masked))
    weight_gradient, bias_gradient = along.sum(dim=0), plain.sum(dim=0)
    if sums is not None:
        gates = gamma * along + beta * plain
        sums.add_(gates if sums.dim() == 2 else gates.sum(dim=0))
    inner = masked
    if training:
        count = max(x.numel() // max(mean.numel(), 1), 1)
        slope, offset = (total.view(shape) / count for total in (weight_gradient, bias_gradient))
        inner = masked - offset - normalized * slope
    return (
        _laid_as(x, inner * (gamma * invstd).view(shape)) if needs[0] else x.new_empty(0),
        _laid_as(x, masked) if needs[1] else x.new_empty(0),
        weight_gradient.to(gamma.dtype if weight is None else weight.dtype) if needs[2] else mean.new_empty(0),
        bias_gradient.to(beta.dtype if bias is None else bias.dtype) if needs[3] else mean.new_empty(0),
    )


def _laid_as(x: Tensor, values: Tensor) -> Tensor:
    """The values with the dtype of x, and where it has no gaps its strides."""
    result = torch.empty_like(x)
    return result.copy_(values)

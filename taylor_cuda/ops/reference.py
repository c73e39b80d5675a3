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

CHANNEL_REDUCTIONS = ("batch", "sample", "abs", "element")  # in the order of the rows of "all"
WEIGHT_REDUCTIONS = ("sum", "square", "abs")


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

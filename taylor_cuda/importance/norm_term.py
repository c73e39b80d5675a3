"""The norm term: what removing a unit changes through the statistics of a LayerNorm or RMSNorm inside its group.

The sums at the readers, Σ_{n,l} a·g, are the effect of zeroing a unit where it ends. A cut does more: mean and variance
are taken over the channels that are left. Give channel k a weight w_k, 1 for the whole network and 0 once it is cut:

    m = Σ_k w_k x_k / Σ_k w_k,   v = Σ_k w_k (x_k − m)² / Σ_k w_k,   x̂ = (x − m) / √(v + eps),   y = γ x̂ + β.

At w = 1 over C channels ∂m/∂w_c = (x_c − m)/C and ∂v/∂w_c = ((x_c − m)² − v)/C, so ∂x̂_k/∂w_c is
−x̂_c/C − x̂_k (x̂_c² − v/(v+eps))/(2C), and with g = dE/dy what the gate's gradient dE/dz_c lacks is exactly

    −Σ_{n,l} [ x̂_c/C · Σ_k γ_k g_k + (x̂_c² − v/(v+eps))/(2C) · Σ_k γ_k g_k x̂_k ].

An RMSNorm has no mean: there v is the mean square, x̂ = x / √(v + eps), and only the second summand stays. Batch
normalisations take statistics channel by channel, and a group normalisation's unit is a whole group of it: neither
has such a term. The term of a unit of several channels is the sum of theirs, and several normalisations add up.

It is exact to first order, in steps of 1/C. Where curvature decides, in narrow layers near a minimum, an exact first
order need not rank whole cuts better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_cuda.graph.groups import named_tensors
from taylor_cuda.graph.sites import RMS_NORMS, ReaderInputs, Transform
from taylor_cuda.ops.reference import result_dtype

SumsOf = Callable[[str, Tensor], Tensor | None]
"""``(name of the normalisation's weight, its output [..., C]) -> [C]`` to add the term to, or none to leave it out."""


def statistics_term(
    x: Tensor, weight: Tensor, gradient: Tensor, eps: float | None = None, *, centred: bool = True
) -> Tensor:
    """The effect of each channel's weight in the statistics: the formula of this module, before any squaring.

    Args:
        x: ``[..., C]``, the input of the normalisation.
        weight: ``[C]``, γ.
        gradient: ``[..., C]``, dE/dy of its output.
        eps: as in the normalisation; ``None`` is the machine epsilon of the computation.
        centred: a LayerNorm; otherwise an RMSNorm.

    Returns:
        ``[C]``, float64 for float64 x, otherwise float32.
    """
    dtype = result_dtype(x.dtype)
    channels = x.shape[-1]
    normed = x.detach().to(dtype).reshape(-1, channels)
    if centred:
        normed = normed - normed.mean(-1, keepdim=True)
    variance = normed.square().mean(-1, keepdim=True)
    shifted = variance + (torch.finfo(dtype).eps if eps is None else eps)
    normed = normed * shifted.rsqrt()
    scaled = gradient.detach().to(dtype).reshape(-1, channels) * weight.detach().to(dtype)
    along = (scaled * normed).sum(-1, keepdim=True)
    term = (normed.square() - variance / shifted).mul_(along / 2)
    if centred:
        term += normed * scaled.sum(-1, keepdim=True)
    return term.sum(0) / -channels


class _TermGate(torch.autograd.Function):
    """Identity on y, in place: y becomes no view, so what follows may change it in place."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, weight: Tensor, eps: float | None, centred: bool, sums: Tensor
    ) -> Tensor:
        # As a saved tensor, so that it goes when the graph does and activation checkpointing can drop it.
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.centred, ctx.sums = eps, centred, sums
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        ctx.sums.add_(statistics_term(x, weight, gradient, ctx.eps, centred=ctx.centred))
        return gradient, None, None, None, None, None


class ReaderAndNormInputs(ReaderInputs):
    """``ReaderInputs`` that also adds the norm term of every call with one of ``norms`` to sums, in the backward pass.

    Outputs and gradients stay as they are, bit for bit.

    Args:
        model: the traced module.
        weights: names of the readers' weights.
        transform: see ``ReaderInputs``.
        norms: names among which the weights of layer and RMS normalisations are; others are never met.
        sums_of: where the term of one call goes.
    """

    def __init__(
        self, model: nn.Module, weights: Iterable[str], transform: Transform, norms: Iterable[str], sums_of: SumsOf
    ) -> None:
        super().__init__(model, weights, transform)
        tensors = named_tensors(model)
        self._norm_of = {id(tensors[name]): name for name in norms}
        self._sums_of = sums_of

    def weights(self) -> set[int]:
        """The readers, and the normalisations."""
        return super().weights() | self._norm_of.keys()

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Layer and RMS normalisations with a gate behind them, everything else as it is."""
        y = func(*args, **kwargs)
        if func is F.layer_norm:
            return self._gated(y, centred=True, **_layer_norm(*args, **kwargs))
        if func in RMS_NORMS:
            return self._gated(y, centred=False, **_rms_norm(*args, **kwargs))
        return y

    def _gated(self, y: Tensor, x: Tensor, weight: Tensor | None, eps: float | None, *, centred: bool) -> Tensor:
        name = self._norm_of.get(id(weight))
        sums = None if name is None else self._sums_of(name, y)
        if sums is None or weight is None:
            return y
        # Autograd keeps an input that requires grad, but not a frozen one, which may change in place: keep a copy.
        x = x.detach() if x.requires_grad else x.detach().clone()
        # Where everything up to y is frozen the graph has to begin here, or no gradient of y ever arrives.
        x.requires_grad_(not y.requires_grad)
        gated: Tensor = _TermGate.apply(y, x, weight.detach(), eps, centred, sums)
        return gated


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> dict[str, Any]:
    """What the term needs of the arguments of ``F.layer_norm``."""
    del normalized_shape, bias
    return {"x": input, "weight": weight, "eps": eps}


def _rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> dict[str, Any]:
    """What the term needs of the arguments of ``F.rms_norm``."""
    del normalized_shape
    return {"x": input, "weight": weight, "eps": eps}

"""The curvature of a loss in a model's outputs, as probes to send backward from there.

A probe is a vector u with E[u·uᵀ] = H, the Hessian of the loss in the outputs: u = S·v with S·Sᵀ = H and v of random
signs. H is asked of the loss itself, by the second derivative of what stands between the outputs and it, which is
little. So everything that decides its scale is in it: mean or sum, weights of classes, smoothed or soft targets,
ignored positions, the factor of gradient accumulation or of a ``GradScaler``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from taylor_cuda.errors import InputError

__all__ = ["LOSSES", "OutputCurvature", "Probe", "loss_name"]

LOSSES = ("cross_entropy", "bce", "mse", "any")
"""Those whose Hessian in the outputs has a root in closed form, and all others."""

_NAMES: dict[Any, str] = {
    F.cross_entropy: "cross_entropy",
    F.binary_cross_entropy_with_logits: "bce",
    F.binary_cross_entropy: "bce",
    F.mse_loss: "mse",
    nn.CrossEntropyLoss: "cross_entropy",
    nn.BCEWithLogitsLoss: "bce",
    nn.BCELoss: "bce",
    nn.MSELoss: "mse",
}

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""How far a Hessian may be from its form, relative to its size; a twentieth in 16 bits."""


def loss_name(loss: str | Callable[..., Any]) -> str:
    """One of ``LOSSES`` for a name, a function of ``torch.nn.functional`` or a module; ``"any"`` for other callables.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise InputError(f"loss: wanted one of {', '.join(LOSSES)}, or a loss function, got {loss!r}")
        return loss
    if not callable(loss):
        raise InputError(f"loss: wanted one of {', '.join(LOSSES)}, or a loss function, got {loss!r}")
    return _NAMES.get(type(loss) if isinstance(loss, nn.Module) else loss, "any")


@dataclass(frozen=True)
class Probe:
    """Gradients to send backward from ``outputs``: E[(a·Jᵀ·sent)(a·Jᵀ·other)] is the Gauss-Newton form of a.

    Attributes:
        outputs: the tensors.
        sent: one for each of them.
        other: likewise; ``None`` where it is ``sent``.
    """

    outputs: list[Tensor]
    sent: list[Tensor]
    other: list[Tensor] | None = None


class _Root(Protocol):
    def __call__(self, signs: Tensor) -> Tensor:
        """S·signs."""


class OutputCurvature:
    """Probes of one kind of loss.

    Args:
        loss: see ``loss_name``.
    """

    def __init__(self, loss: str | Callable[..., Any]) -> None:
        self.loss = loss_name(loss)
        self._class_dims: dict[int, int] = {}
        self._checked: set[int] = set()

    def at(self, loss: Tensor, outputs: Any, generator: torch.Generator) -> Callable[[], Probe]:
        """What draws probes of one batch.

        Args:
            loss: the scalar.
            outputs: what the model returned, and the loss was computed from: a tensor, or a structure of them. Each
                has its examples along dimension 0.
            generator: on the outputs' device. Signs are shared by all examples, so that ranks draw the same.

        Raises:
            InputError: the loss doesn't depend on the outputs, or isn't of the kind that was named.
        """
        leaves = _leaves(loss, outputs)
        # Whatever dtype autocast has chosen, here it would only round.
        with torch.enable_grad(), torch.autocast(loss.device.type, enabled=False):
            slopes = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        used = [(i, x, slope) for i, (x, slope) in enumerate(zip(leaves, slopes, strict=True)) if slope is not None]
        if not used:
            raise InputError("outputs: wanted what the loss was computed from, got tensors that it doesn't depend on")
        tensors, grads = [x for _, x, _ in used], [slope for _, _, slope in used]
        if self.loss == "any":
            return lambda: self._product(tensors, grads, generator)
        roots = [self._root(i, x, slope, generator) for i, x, slope in used]
        return lambda: Probe(
            tensors,
            [root(_signs(x, generator)).to(x.dtype) for root, x in zip(roots, tensors, strict=True)],
        )

    def _product(self, tensors: list[Tensor], grads: list[Tensor], generator: torch.Generator) -> Probe:
        sent = [_signs(x, generator).to(x.dtype).expand_as(x) for x in tensors]
        curved = _derivative(grads, tensors, sent)
        # The product is what counts. Of like size, its factors lose no digits, nor what 16 bits can't hold.
        both = zip(sent, curved, strict=True)
        factors = [(_size(there) / _size(here).clamp_min(_tiny(there))).sqrt() for here, there in both]
        factor = torch.stack(factors).amax().clamp_min(1e-12)
        return Probe(
            tensors,
            [(x.float() * factor).to(x.dtype) for x in sent],
            [(x.float() / factor).to(x.dtype) for x in curved],
        )

    def _root(self, i: int, x: Tensor, slope: Tensor, generator: torch.Generator) -> _Root:
        ask = torch.randn((1, *x.shape[1:]), generator=generator, device=x.device, dtype=_wide(x)).expand_as(x)
        (curved,) = _derivative([slope], [x], [ask.to(x.dtype)])
        ask = ask.to(x.dtype).to(_wide(x))
        if self.loss == "cross_entropy":
            return self._of_cross_entropy(i, x, ask, curved)
        (diagonal,) = _derivative([slope], [x], [torch.ones_like(x)])
        self._check(i, x, curved - diagonal * ask, curved)
        root = diagonal.clamp_min(0).sqrt()
        return lambda signs: root * signs

    def _of_cross_entropy(self, i: int, x: Tensor, ask: Tensor, curved: Tensor) -> _Root:
        """H = w·(diag(p) - p·pᵀ) at every position: w is found from what H makes of ``ask``."""
        if i not in self._class_dims:
            self._class_dims[i] = self._class_dim(i, x, ask, curved)
        dim = self._class_dims[i]
        p = x.detach().to(_wide(x)).softmax(dim)
        weight = _weight(p, ask, curved, dim)[0].clamp_min(0).sqrt()
        root = p.sqrt()

        def times(signs: Tensor) -> Tensor:
            return weight * (root * signs - p * (root * signs).sum(dim, keepdim=True))

        return times

    def _class_dim(self, i: int, x: Tensor, ask: Tensor, curved: Tensor) -> int:
        """1, as PyTorch has it, or the last one, of a loss that was given flattened outputs."""
        if x.dim() < 2:
            raise InputError(f"outputs: wanted [N, classes, …] for loss='cross_entropy', got shape {tuple(x.shape)}")
        left = {}
        for dim in dict.fromkeys((1, x.dim() - 1)):
            p = x.detach().to(_wide(x)).softmax(dim)
            weight, form = _weight(p, ask, curved, dim)
            left[dim] = curved - weight * form
        best = min(left, key=lambda dim: float(_size(left[dim])))
        self._check(i, x, left[best], curved)
        return best

    def _check(self, i: int, x: Tensor, rest: Tensor, curved: Tensor) -> None:
        """Once for every output, for it asks the device."""
        if i in self._checked:
            return
        allowed = _TOLERANCE.get(x.dtype, 5e-2)
        if not bool(_size(rest) <= allowed * _size(curved)):
            raise InputError(
                f"loss: the curvature of this loss in the outputs (tensor {i}, shape {tuple(x.shape)}) is not that of "
                f"{self.loss!r}; give loss='any', or outputs that the loss was computed from (logits)"
            )
        self._checked.add(i)


def _leaves(loss: Tensor, outputs: Any) -> list[Tensor]:
    found = [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()]
    found = [x for x in found if x is not loss and x.dim() > 0 and x.requires_grad]
    if not found:
        raise InputError(
            "outputs: wanted what the model returned, a tensor or a structure of tensors with their graph, got "
            f"{type(outputs).__name__}; call backward(loss, outputs)"
        )
    return list({id(x): x for x in found}.values())


def _derivative(grads: Sequence[Tensor], tensors: Sequence[Tensor], along: Sequence[Tensor]) -> list[Tensor]:
    """The Hessian times a vector, wide; zeros where the gradient doesn't depend on a tensor."""
    chosen = [(grad, one) for grad, one in zip(grads, along, strict=True) if grad.requires_grad]
    if not chosen:
        return [torch.zeros(x.shape, dtype=_wide(x), device=x.device) for x in tensors]
    found = torch.autograd.grad(
        [grad for grad, _ in chosen], tensors, [one for _, one in chosen], retain_graph=True, allow_unused=True
    )
    return [
        torch.zeros(x.shape, dtype=_wide(x), device=x.device) if one is None else one.detach().to(_wide(x))
        for x, one in zip(tensors, found, strict=True)
    ]


def _weight(p: Tensor, ask: Tensor, curved: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The w at every position, and (diag(p) - p·pᵀ)·ask."""
    form = p * (ask - (p * ask).sum(dim, keepdim=True))
    along = (curved * form).sum(dim, keepdim=True)
    return along / form.square().sum(dim, keepdim=True).clamp_min(_tiny(form)), form


def _signs(x: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(0, 2, (1, *x.shape[1:]), generator=generator, device=x.device)
    return drawn.to(_wide(x)) * 2 - 1


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _size(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dtype=_wide(x))
    return norm


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny

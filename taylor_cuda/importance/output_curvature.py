"""The curvature of a loss in a model's outputs, as probes to send backward from there.

A probe is a vector u with E[u·uᵀ] = H, the Hessian of the loss in the outputs: u = S·v with S·Sᵀ = H and v of random
signs. H is asked of the loss itself, by the second derivative of what stands between the outputs and it, which is
little. So everything that decides its scale is in it: mean or sum, weights of classes, smoothed or soft targets,
ignored positions, the factor of gradient accumulation or of a ``GradScaler``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_cuda.errors import InputError
from taylor_cuda.graph.recorder import leaves
from taylor_cuda.ops.reference import result_dtype

__all__ = ["LOSSES", "OutputCurvature", "Probe", "loss_name", "read_by"]

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

_LINEAR = (
    "outputs: the loss is linear in them, so it has no curvature there; have the model return what goes into the "
    "softmax or the square (logits), and compute the loss from that"
)
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
    if isinstance(loss, partial):
        return loss_name(loss.func)
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

    def at(
        self, loss: Tensor, tensors: list[Tensor], generator: torch.Generator, rows: Sequence[int] | None = None
    ) -> Callable[[], Probe]:
        """What draws probes of one batch.

        Args:
            loss: the scalar.
            tensors: of the outputs, those that it was computed from; see ``read_by``. Each has its examples along
                dimension 0.
            generator: on their device. Signs are shared by all examples, so that ranks draw the same.
            rows: how many rows side by side an example has in each of them, 1 unless given.

        Raises:
            InputError: the loss has no curvature in the outputs, or isn't of the kind that was named.
        """
        rows = [1] * len(tensors) if rows is None else rows
        # Whatever dtype autocast has chosen, here it would only round.
        with torch.enable_grad(), torch.autocast(loss.device.type, enabled=False):
            slopes = torch.autograd.grad(loss, tensors, create_graph=True)
        if not any(slope.requires_grad for slope in slopes):
            raise InputError(_LINEAR)

        def signs() -> list[Tensor]:
            return [_signs(x, generator, count) for x, count in zip(tensors, rows, strict=True)]

        if self.loss == "any":
            return lambda: self._product(tensors, slopes, signs())
        roots = [self._root(i, x, slope, generator) for i, (x, slope) in enumerate(zip(tensors, slopes, strict=True))]
        return lambda: Probe(tensors, [root(v).to(x.dtype) for root, v, x in zip(roots, signs(), tensors, strict=True)])

    def _product(self, tensors: list[Tensor], grads: Sequence[Tensor], signs: list[Tensor]) -> Probe:
        sent = [v.to(x.dtype).expand_as(x) for v, x in zip(signs, tensors, strict=True)]
        curved = _derivative(grads, tensors, sent)
        # The product is what counts. Of like size, its factors lose no digits, nor what 16 bits can't hold.
        both = zip(sent, curved, strict=True)
        factors = [(_size(there) / _size(here).clamp_min(_tiny(there))).sqrt() for here, there in both]
        factor = torch.stack(factors).amax().clamp_min(1e-12)
        return Probe(
            tensors,
            [(x.to(result_dtype(x.dtype)) * factor).to(x.dtype) for x in sent],
            [(c / factor).to(x.dtype) for c, x in zip(curved, tensors, strict=True)],
        )

    def _root(self, i: int, x: Tensor, slope: Tensor, generator: torch.Generator) -> _Root:
        ask = torch.randn(
            (1, *x.shape[1:]), generator=generator, device=x.device, dtype=result_dtype(x.dtype)
        ).expand_as(x)
        (curved,) = _derivative([slope], [x], [ask.to(x.dtype)])
        ask = ask.to(x.dtype).to(result_dtype(x.dtype))
        if self.loss == "cross_entropy":
            return self._of_cross_entropy(i, x, slope, ask, curved)
        (diagonal,) = _derivative([slope], [x], [torch.ones_like(x)])
        self._believe(i, x, curved - diagonal * ask, curved, diagonal)
        root = diagonal.clamp_min(0).sqrt()
        return lambda signs: root * signs

    def _of_cross_entropy(self, i: int, x: Tensor, slope: Tensor, ask: Tensor, curved: Tensor) -> _Root:
        """H = w·(diag(p) - p·pᵀ) at every position: w is found from what H makes of ``ask``."""
        dim = self._class_dims.get(i) or self._class_dim(i, x, slope, ask, curved)
        p = x.detach().to(result_dtype(x.dtype)).softmax(dim)
        weight = _weight(p, ask, curved, dim)[0].clamp_min(0).sqrt()
        root = p.sqrt()

        def times(signs: Tensor) -> Tensor:
            return weight * (root * signs - p * (root * signs).sum(dim, keepdim=True))

        return times

    def _class_dim(self, i: int, x: Tensor, slope: Tensor, ask: Tensor, curved: Tensor) -> int:
        """1, as PyTorch has it, or the last one, of a loss that was given flattened outputs."""
        if x.dim() < 2:
            raise InputError(f"outputs: wanted [N, classes, …] for loss='cross_entropy', got shape {tuple(x.shape)}")
        left, weights = {}, {}
        for dim in dict.fromkeys((1, x.dim() - 1)):
            p = x.detach().to(result_dtype(x.dtype)).softmax(dim)
            weights[dim], form = _weight(p, ask, curved, dim)
            left[dim] = curved - weights[dim] * form
            if i not in self._checked and bool(form.any() & slope.any() & ~curved.any()):
                raise InputError(_LINEAR)
        best = min(left, key=lambda dim: float(_size(left[dim])))
        if self._believe(i, x, left[best], curved, weights[best]):
            self._class_dims[i] = best
        return best

    def _believe(self, i: int, x: Tensor, rest: Tensor, curved: Tensor, weight: Tensor) -> bool:
        """Whether the loss is of its kind. Asked until the first answer for every output, for it asks the device.

        Args:
            i: the output's number.
            x: the output.
            rest: what the kind doesn't explain of the Hessian's product.
            curved: the product.
            weight: what the kind's form is multiplied with. Of its rounding errors much is left where a network is
                sure of all its examples, for there the form is a difference of equal numbers.
        """
        if i in self._checked:
            return True
        size = float(_size(rest))
        if not isfinite(size):  # the step is left out for that
            return False
        if size > _TOLERANCE.get(x.dtype, 5e-2) * _size(curved) + 16 * torch.finfo(x.dtype).eps * _size(weight):
            raise InputError(
                f"loss: the curvature of this loss in the outputs (tensor {i}, shape {tuple(x.shape)}) is not that of "
                f"{self.loss!r}; give loss='any', or outputs that the loss was computed from (logits)"
            )
        self._checked.add(i)
        return True


def read_by(loss: Tensor, outputs: Any) -> list[Tensor]:
    """The tensors that the loss was computed from, without what it depends on only through another one of them.

    Models return more than logits: hidden states, their own loss. Their order is that of ``outputs``.

    Raises:
        InputError: there is none.
    """
    given = [x for x in leaves(outputs) if x is not loss and x.is_floating_point() and x.requires_grad and x.dim() > 0]
    at = {torch.autograd.graph.get_gradient_edge(x): x for x in given}
    places = {(edge.node, edge.output_nr): x for edge, x in at.items()}
    found, seen = set[Any](), set[Any]()
    waiting = [(loss.grad_fn, 0)]
    while waiting:
        place = waiting.pop()
        if place in places:
            found.add(place)
        elif place[0] is not None and place[0] not in seen:
            seen.add(place[0])
            waiting += place[0].next_functions
    if not found:
        raise InputError(
            "outputs: wanted what the model returned and the loss was computed from, with its graph: a tensor, or a "
            f"structure of tensors; got {type(outputs).__name__} in which the loss depends on none"
        )
    return [x for place, x in places.items() if place in found]


def _derivative(grads: Sequence[Tensor], tensors: Sequence[Tensor], along: Sequence[Tensor]) -> list[Tensor]:
    """The Hessian times a vector, wide; zeros where the gradient doesn't depend on a tensor."""
    chosen = [(grad, one) for grad, one in zip(grads, along, strict=True) if grad.requires_grad]
    if not chosen:
        return [torch.zeros(x.shape, dtype=result_dtype(x.dtype), device=x.device) for x in tensors]
    found = torch.autograd.grad(
        [grad for grad, _ in chosen], tensors, [one for _, one in chosen], retain_graph=True, allow_unused=True
    )
    return [
        torch.zeros(x.shape, dtype=result_dtype(x.dtype), device=x.device)
        if one is None
        else one.detach().to(result_dtype(x.dtype))
        for x, one in zip(tensors, found, strict=True)
    ]


def _weight(p: Tensor, ask: Tensor, curved: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The w at every position, and (diag(p) - p·pᵀ)·ask."""
    form = p * (ask - (p * ask).sum(dim, keepdim=True))
    along = (curved * form).sum(dim, keepdim=True)
    return along / form.square().sum(dim, keepdim=True).clamp_min(_tiny(form)), form


def _signs(x: Tensor, generator: torch.Generator, rows: int) -> Tensor:
    """Signs for the rows of one example, and the same for all others."""
    drawn = torch.randint(0, 2, (rows, *x.shape[1:]), generator=generator, device=x.device)
    signs = drawn.to(result_dtype(x.dtype)) * 2 - 1
    return signs if rows == 1 else signs.repeat(len(x) // rows, *(1,) * (x.dim() - 1))


def _size(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dtype=result_dtype(x.dtype))
    return norm


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny

"""Slope and curvature of small networks by brute force: explicit gates, Jacobians and Hessians. No package code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import taylor_cuda as tc
from taylor_cuda.importance import output_curvature
from tests.importance.gated_nets import GatedNet, make

LossOf = Callable[[Any, Tensor], Tensor]
"""(outputs, targets) -> loss."""


def cross_entropy(y: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(y, target)


def still(net: type[GatedNet], dtype: torch.dtype = torch.float64) -> tuple[GatedNet, Tensor, Tensor]:
    """In eval mode, where the outputs of an example depend on nothing but this example."""
    model, x, target = make(net, dtype)
    with torch.no_grad():
        model(x)
    return model.eval(), x, target


def along_gates(model: GatedNet, run: Callable[[], Tensor]) -> Callable[[Tensor], Tensor]:
    """``run`` as a function of the gates of all units, flat in the order of ``group_sizes``."""

    def of_gates(flat: Tensor) -> Tensor:
        model.gates = dict(zip(model.group_sizes, flat.split(list(model.group_sizes.values())), strict=True))
        try:
            return run()
        finally:
            model.gates = {}

    return of_gates


def ones(model: GatedNet, like: Tensor) -> Tensor:
    return torch.ones(sum(model.group_sizes.values()), dtype=like.dtype)


def slope_of(model: GatedNet, x: Tensor, target: Tensor, loss_of: LossOf = cross_entropy) -> Tensor:
    of_gates = along_gates(model, lambda: loss_of(model(x), target))
    return torch.autograd.functional.jacobian(of_gates, ones(model, x))


def hessian_of(model: GatedNet, x: Tensor, target: Tensor, loss_of: LossOf = cross_entropy) -> Tensor:
    """The diagonal of d²E/dz²."""
    of_gates = along_gates(model, lambda: loss_of(model(x), target))
    if not model.training:
        return torch.func.hessian(of_gates)(ones(model, x)).diagonal()
    # batch statistics are written into buffers, which the function transforms don't allow
    return torch.autograd.functional.hessian(of_gates, ones(model, x)).diagonal()


def gauss_newton_of(model: GatedNet, x: Tensor, target: Tensor, loss_of: LossOf = cross_entropy) -> Tensor:
    """The diagonal of Jᵀ H J, of one output."""
    with torch.no_grad():
        y = model(x)
    jacobian = torch.autograd.functional.jacobian(along_gates(model, lambda: model(x)), ones(model, x)).flatten(0, -2)
    hessian = torch.autograd.functional.hessian(lambda y: loss_of(y, target), y).reshape(y.numel(), y.numel())
    return torch.einsum("pu,pq,qu->u", jacobian, hessian, jacobian)


def empirical_fisher_of(model: GatedNet, x: Tensor, target: Tensor) -> Tensor:
    """mean_n d², each d of one example's own loss."""
    return torch.stack([slope_of(model, x[[n]], target[[n]]).square() for n in range(len(x))]).mean(0)


def flat(model: GatedNet, scores: dict[str, Tensor]) -> Tensor:
    return torch.cat([scores[name] for name in model.group_sizes]).double()


def second(slope: Tensor, curve: Tensor) -> Tensor:
    """The square of the predicted change of the loss when a gate goes from 1 to 0."""
    return (-slope + 0.5 * curve).square()


class EverySign:
    """Takes the place of the random signs: lets a test go through all that there are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now: tuple[float, ...] = ()
        self._at = 0
        monkeypatch.setattr(output_curvature, "_signs", self)

    def __call__(self, x: Tensor, generator: Any, rows: int) -> Tensor:
        size = rows * (x[0].numel() if x.dim() > 1 else 1)
        chosen = torch.tensor(self.now[self._at : self._at + size], dtype=x.dtype)
        self._at = (self._at + size) % len(self.now)
        return chosen.view(rows, *x.shape[1:]).repeat(len(x) // rows, *(1,) * (x.dim() - 1))

    def all_of(self, size: int) -> Iterator[None]:
        for signs in product((-1.0, 1.0), repeat=size - 1):
            self.now, self._at = (1.0, *signs), 0  # v and -v say the same
            yield


def scored(
    model: GatedNet, x: Tensor, target: Tensor, criterion: str, loss_of: LossOf = cross_entropy, **options: Any
) -> tc.Importance:
    """One step."""
    model.zero_grad()
    est = tc.Importance(model, tc.trace(model, x), criterion, **options)
    outputs = model(x)
    est.backward(loss_of(outputs, target), outputs)
    est.close()
    return est

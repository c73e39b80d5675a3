"""Ways to prune the network while it trains: this package's criteria, and Torch-Pruning's."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from taylor_cuda.bench.frontier.forms import Form
from taylor_cuda.bench.frontier.network import macs
from taylor_cuda.bench.suites.peers import installed
from taylor_cuda.errors import InputError, TaylorError
from taylor_cuda.graph import trace
from taylor_cuda.planning import budgets_at, plan
from taylor_cuda.pruner import Pruner
from taylor_cuda.surgery import cut

WITHIN = 0.01
"""Of what was asked: how far a network's cost may be from it."""
DRAWS = 100
"""Of random channels, until a network costs enough."""
ONE = 1e-6
"""A share of the channels that Torch-Pruning rounds up to a single one."""


@dataclass(frozen=True)
class Start:
    """Where every method begins.

    Attributes:
        form: the settings.
        model: a copy of the base network, for this method to keep.
        budget: share of its MACs.
        seed: of the run.
    """

    form: Form
    model: nn.Module
    budget: float
    seed: int


class Removal(Protocol):
    """Removes channels in the course of a training loop. ``model`` and ``optimizer`` may be others after a removal."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def backward(self, loss: Tensor, logits: Tensor) -> None:
        """The backward pass of one step."""

    def step(self) -> None:
        """After each optimizer step, the gradients gone; at every ``every``-th one channels are removed."""


class Ours:
    """``tc.Pruner`` with one of its criteria, on the scores since the last removal alone, as the peer has them."""

    def __init__(self, criterion: str, start: Start) -> None:
        form = start.form
        self.model = start.model
        self.optimizer: torch.optim.Optimizer = form.sgd(self.model, form.prune_rate)
        self._pruner = Pruner(
            self.model,
            _example(self.model, form.size),
            self.optimizer,
            budget={"macs": start.budget},
            criterion=criterion,
            every=form.every,
            steps=form.prune_steps,
            schedule=form.schedule,
            round_to=1,
            momentum=0.0,
            seed=start.seed,
        )

    def backward(self, loss: Tensor, logits: Tensor) -> None:
        """With scores."""
        self._pruner.backward(loss, logits)

    def step(self) -> None:
        """See ``Removal``."""
        if self._pruner.step() is not None:
            self.optimizer.state.clear()


class Random:
    """Channels at random, each as likely as the other whatever it costs, drawn until the network costs what is asked.

    ``tc.Pruner`` would take random values by their cost, so that what costs most always went: no floor, but a trap.
    """

    def __init__(self, start: Start) -> None:
        form = start.form
        self.model = start.model
        self.optimizer: torch.optim.Optimizer = form.sgd(self.model, form.prune_rate)
        self._form, self._budget, self._batches = form, {"macs": start.budget}, 0
        self._groups = trace(self.model, _example(self.model, form.size))
        self._generator = torch.Generator().manual_seed(start.seed)

    def backward(self, loss: Tensor, logits: Tensor) -> None:
        """Nothing but that."""
        loss.backward()

    def step(self) -> None:
        """See ``Removal``."""
        self._batches += 1
        if self._batches % self._form.every:
            return
        removal, of = self._batches // self._form.every, self._form.prune_steps
        budget = budgets_at(self._form.schedule, self._budget, removal, of)
        for _ in range(DRAWS):
            scores = {group.name: torch.rand(group.size, generator=self._generator) for group in self._groups}
            decided = plan(self.model, self._groups, scores, budget, round_to=1, rank="value")
            if decided.cost.macs >= (1 - WITHIN) * budget["macs"] * decided.cost_original.macs:
                break
        cut(self.model, self._groups, decided, self.optimizer)
        self.optimizer.state.clear()


class Peer:
    """Torch-Pruning's ``MetaPruner`` with one of its importances, called until the network costs what is asked.

    Args:
        importance: the name of a class in ``torch_pruning.importance``.
        gradients: it reads the parameters' gradients.
        start: where it begins.
    """

    def __init__(self, importance: str, gradients: bool, start: Start) -> None:
        self._peer: Any = installed("torch_pruning")
        if self._peer is None:
            raise InputError("torch-pruning: isn't installed; pip install torch-pruning")
        self._importance, self._gradients = getattr(self._peer.importance, importance)(), gradients
        self._form, self._budget = start.form, {"macs": start.budget}
        self.model = start.model
        self._whole = macs(self.model, self._form.size)
        self._batches = 0
        self._restart()

    def _restart(self) -> None:
        self.model.train()
        self.optimizer: torch.optim.Optimizer = self._form.sgd(self.model, self._form.prune_rate)
        self._parameters = list(self.model.parameters())
        self._sums = [torch.zeros_like(parameter) for parameter in self._parameters] if self._gradients else []

    def backward(self, loss: Tensor, logits: Tensor) -> None:
        """With the sums of the gradients since the last removal."""
        loss.backward()
        if self._gradients:
            torch._foreach_add_(self._sums, [p.grad for p in self._parameters if p.grad is not None])

    def step(self) -> None:
        """See ``Removal``."""
        self._batches += 1
        if self._batches % self._form.every:
            return
        if self._gradients:
            for parameter, total in zip(self._parameters, self._sums, strict=True):
                parameter.grad = total
        removal, of = self._batches // self._form.every, self._form.prune_steps
        self._shrink(budgets_at(self._form.schedule, self._budget, removal, of)["macs"] * self._whole)
        self.model.zero_grad()
        self._restart()

    def _shrink(self, target: float) -> None:
        """Remove channels until the network costs at most ``target`` MACs, and hardly less."""
        passed_over: set[str] = set()
        one_by_one = False
        while (now := macs(self.model, self._form.size)) > target:
            before, widths = _twin(self.model), _widths(self.model)
            # MACs go with the square of the width, and half of the way leaves room for channels that cost more
            self._remove(ONE if one_by_one else max(ONE, 0.5 * (1 - math.sqrt(target / now))), passed_over)
            after = _widths(self.model)
            shrunk = {name for name, width in after.items() if width < widths[name]}
            if shrunk and macs(self.model, self._form.size) >= (1 - WITHIN) * target:
                continue
            if one_by_one and shrunk <= passed_over:
                raise TaylorError(
                    f"torch-pruning: no channel left that fits, at {now / self._whole:.2%} of the MACs "
                    f"where {target / self._whole:.2%} are wanted"
                )
            self.model = before
            passed_over |= shrunk if one_by_one else set()
            one_by_one = True

    def _remove(self, share: float, passed_over: set[str]) -> None:
        ignored = [self.model.get_submodule(name) for name in ("fc", *sorted(passed_over))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._peer.pruner.MetaPruner(
                self.model,
                _example(self.model, self._form.size),
                self._importance,
                global_pruning=True,
                pruning_ratio=share,
                ignored_layers=ignored,
            ).step()


Method = Callable[[Start], Removal]


def methods() -> dict[str, Method]:
    """Every method by the name of its provider in the rows, ours first."""
    ours = {f"ours:{name}": _ours(name) for name in ("taylor_fo", "taylor_so", "fisher", "magnitude")}
    return ours | {
        "ours:random": Random,
        "torch-pruning:taylor": lambda start: Peer("GroupTaylorImportance", True, start),
        "torch-pruning:magnitude": lambda start: Peer("GroupMagnitudeImportance", False, start),
    }


def _ours(criterion: str) -> Method:
    return lambda start: Ours(criterion, start)


def _example(model: nn.Module, size: int) -> Tensor:
    return torch.zeros(1, 1, size, size, device=next(model.parameters()).device)


def _widths(model: nn.Module) -> dict[str, int]:
    return {name: module.out_channels for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def _twin(model: nn.Module) -> nn.Module:
    """A copy with its gradients, which ``deepcopy`` leaves out."""
    copied = copy.deepcopy(model)
    for parameter, twin in zip(model.parameters(), copied.parameters(), strict=True):
        twin.grad = None if parameter.grad is None else parameter.grad.clone()
    return copied

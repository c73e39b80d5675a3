"""The pruning loop as a companion of somebody's training loop: ``tc.Pruner`` prunes, ``tc.watch`` only looks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from taylor_cuda.errors import InputError
from taylor_cuda.graph import trace
from taylor_cuda.graph.groups import Groups
from taylor_cuda.importance import Importance
from taylor_cuda.importance.criteria import Source
from taylor_cuda.planning import Plan, budgets_at, parse_budget, plan
from taylor_cuda.surgery import cut
from taylor_cuda.text import table


class Pruner:
    """Prunes a model step by step to a budget while it trains.

    ::

        pruner = tc.Pruner(model, example_inputs, optimizer=optimizer, budget={"macs": 0.5})
        for inputs, targets in loader:
            outputs = model(inputs)
            pruner.backward(loss_fn(outputs, targets), outputs)
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()

    Every ``every`` optimizer steps one prune step: the window's scores enter the moving average, the schedule's next
    budget is planned, and the channels are removed from the model, its gradients, the optimizer's state and the EMA
    copy. After ``steps`` prune steps the budget is met and ``done`` is true; the loop goes on as fine-tuning.

    Args:
        model: the module itself, not a compiled or wrapped one.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments for one forward pass.
        optimizer: the optimizer that owns the model's parameters; its state follows every cut.
        budget: fractions of the original model, ``{"macs": 0.5}``, ``{"params": …}``, ``{"channels": …}``, or several.
        criterion: see ``tc.Importance``.
        every: optimizer steps between prune steps (30 in the paper).
        steps: prune steps until the budget.
        schedule: ``"linear"`` or ``"cubic"`` path of the budget.
        ignore: globs of module names whose outputs stay.
        source: see ``tc.Importance``.
        round_to: see ``tc.plan``.
        min_keep: see ``tc.plan``.
        max_ratio: see ``tc.plan``.
        rank: see ``tc.plan``.
        momentum: see ``tc.Importance``.
        seed: see ``tc.Importance``.
        norm_term: see ``tc.Importance``.
        ema: a module or a dict of tensors that follows every cut.
        verify: compare every cut with the masked model, and undo it if they differ.

    Raises:
        BudgetError: no plan can meet the budget; raised here, before any training.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        optimizer: torch.optim.Optimizer | None = None,
        budget: Mapping[str, float] | str = "macs=0.5",
        criterion: str = "taylor_fo",
        every: int = 30,
        steps: int = 10,
        schedule: str = "cubic",
        ignore: Sequence[str] = (),
        source: Source = "auto",
        round_to: int | str = "auto",
        min_keep: int = 1,
        max_ratio: float = 1.0,
        rank: str = "value_per_cost",
        momentum: float = 0.9,
        seed: int = 0,
        ema: Any = None,
        verify: bool = True,
        norm_term: bool = False,
    ) -> None:
        for name, value in (("every", every), ("steps", steps)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name}: wanted a whole number of at least 1, got {value!r}")
        self.model, self.optimizer, self.ema = model, optimizer, ema
        self.budget = parse_budget(budget)
        self.every, self.steps, self.schedule = every, steps, schedule
        budgets_at(schedule, self.budget, steps, steps)
        self._limits: dict[str, Any] = {
            "round_to": round_to,
            "min_keep": min_keep,
            "max_ratio": max_ratio,
            "rank": rank,
        }
        self._verify = verify
        self.groups: Groups = trace(model, example_inputs, ignore=ignore)
        anything = {group.name: torch.ones(group.size) for group in self.groups}
        plan(model, self.groups, anything, self.budget, **self._limits)  # raises now if it can't be met later
        self.importance = Importance(
            model, self.groups, criterion, source=source, momentum=momentum, seed=seed, norm_term=norm_term
        )
        self.batches = 0
        self.prunes = 0
        self.history: list[dict[str, Any]] = []

    @property
    def done(self) -> bool:
        """All prune steps were taken: the budget is met."""
        return self.prunes >= self.steps

    def backward(self, loss: Tensor, outputs: Any = None, scaler: Any = None) -> None:
        """``loss.backward()``, with the scores of this step while there is pruning left to do.

        See ``tc.Importance.backward``.
        """
        if self.done:
            (loss if scaler is None else scaler.scale(loss)).backward()
            return
        self.importance.backward(loss, outputs, scaler=scaler)

    def update(self, grad_scale: float = 1.0) -> None:
        """Instead of ``backward``: take the scores between one's own ``loss.backward()`` and ``optimizer.step()``."""
        if not self.done:
            self.importance.update(grad_scale)

    def step(self) -> Plan | None:
        """Count one optimizer step; at every ``every``-th one, prune. Call it after ``optimizer.step()``.

        Returns:
            The plan that was carried out, or ``None`` where this was no prune step.
        """
        if self.done:
            return None
        self.batches += 1
        if self.batches < self.every * (self.prunes + 1):
            return None
        if self.importance.criterion.gradient and self.importance.steps == 0:
            if self.importance.skipped:
                return None  # every step of the window overflowed: prune as soon as there is one that didn't
            raise InputError(
                f"no scores in the last {self.every} steps: call pruner.backward(loss) in place of loss.backward(), or "
                "pruner.update() after it"
            )
        return self._prune()

    def _prune(self) -> Plan:
        budget = budgets_at(self.schedule, self.budget, self.prunes + 1, self.steps)
        self.importance.fold()
        decided = plan(self.model, self.groups, self.importance.scores(), budget, **self._limits)
        sizes = self.groups.sizes()
        if any(kept.numel() < sizes[name] for name, kept in decided.keep.items()):
            cut(self.model, self.groups, decided, self.optimizer, self.ema, verify=self._verify)
            self.importance.keep(decided.keep)
        self.prunes += 1
        removed = {name: sizes[name] - kept.numel() for name, kept in decided.keep.items()}
        self.history.append(
            {
                "batch": self.batches,
                "prune": self.prunes,
                "budget": budget,
                "macs": decided.cost.macs,
                "params": decided.cost.params,
                "channels": decided.cost.channels,
                "removed": {name: count for name, count in removed.items() if count},
            }
        )
        if self.done:
            self.importance.close()
        return decided

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands and what was collected; save it beside the model's and the optimizer's state."""
        return {
            "kept": {group.name: group.kept.clone() for group in self.groups},
            "original": {group.name: group.original_size for group in self.groups},
            "batches": self.batches,
            "prunes": self.prunes,
            "history": [dict(entry) for entry in self.history],
            "importance": self.importance.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Cut the model as it was cut then, and go on from there.

        Make the model and the pruner as in the first run, at the original widths; call this; then load the state of the
        model and of the optimizer, which now have the right shapes.
        """
        original = {group.name: group.original_size for group in self.groups}
        if state["original"] != original or self.prunes:
            raise InputError(
                "state_dict: it belongs to another model, or this model was already pruned; build the model and "
                "the pruner as in the first run before loading"
            )
        keep = dict(state["kept"])
        if any(kept.numel() < original[name] for name, kept in keep.items()):
            cut(self.model, self.groups, keep, self.optimizer, self.ema, verify=False)
            self.importance.keep(keep)
        self.batches, self.prunes = state["batches"], state["prunes"]
        self.history = [dict(entry) for entry in state["history"]]
        self.importance.load_state_dict(state["importance"])
        if self.done:
            self.importance.close()


class Watched:
    """The scores that ``tc.watch`` collects."""

    def __init__(self, importance: Importance, groups: Groups) -> None:
        self._importance, self.groups = importance, groups

    @property
    def steps(self) -> int:
        """Optimizer steps seen."""
        return self._importance.steps

    def scores(self) -> dict[str, Tensor]:
        """``{group: fp32 [size]}``; higher = keep."""
        return self._importance.scores()

    def table(self) -> str:
        """One line a group: its channels, how much loss they are predicted to be worth, and how unevenly."""
        rows = []
        for name, score in self.scores().items():
            worth = score.sqrt().cpu()
            weak = int((worth < 0.1 * worth.mean()).sum())
            rows.append(
                (
                    name,
                    score.numel(),
                    f"{worth.sum():.3g}",
                    f"{worth.min():.2g}",
                    f"{worth.median():.2g}",
                    f"{worth.max():.2g}",
                    weak,
                )
            )
        header = ("group", "channels", "|loss change|", "lowest", "median", "highest", "below a tenth of the mean")
        return table(header, rows)


@contextmanager
def watch(
    model: nn.Module,
    example_inputs: Any,
    criterion: str = "taylor_fo",
    ignore: Sequence[str] = (),
    source: Source = "auto",
) -> Iterator[Watched]:
    """Score every channel while somebody else's training loop runs; nothing else changes.

    ::

        with tc.watch(model, example_inputs) as scores:
            train_one_epoch()
        print(scores.table())

    Scores are taken right before each ``step()`` of the first optimizer seen that owns a parameter of the model, from
    the gradients it is about to use: a loop that clips gradients is scored on clipped ones.

    Args:
        model: the module itself, not a compiled or wrapped one.
        example_inputs: see ``tc.trace``.
        criterion: see ``tc.Importance``.
        ignore: see ``tc.trace``.
        source: see ``tc.Importance``.
    """
    groups = trace(model, example_inputs, ignore=ignore)
    importance = Importance(model, groups, criterion, source=source)
    mine = {id(parameter) for parameter in model.parameters()}
    owner: list[int] = []

    def before_step(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        if not owner and any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
            owner.append(id(optimizer))
        if owner and owner[0] == id(optimizer):
            importance.update()

    handle = register_optimizer_step_pre_hook(before_step)
    try:
        yield Watched(importance, groups)
    finally:
        handle.remove()
        importance.close()

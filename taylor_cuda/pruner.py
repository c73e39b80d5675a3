"""The pruning loop as a companion of somebody's training loop: ``tc.Pruner`` prunes, ``tc.watch`` only looks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from taylor_cuda.distributed import Replicas
from taylor_cuda.errors import InputError
from taylor_cuda.graph import trace
from taylor_cuda.graph.groups import Groups
from taylor_cuda.importance import Importance
from taylor_cuda.importance.criteria import Source
from taylor_cuda.planning import Plan, budgets_at, parse_budget, plan
from taylor_cuda.surgery import cut
from taylor_cuda.surgery.shrink import Shrinking
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

    What else a loop may have:

    - Gradient accumulation: ``pruner.backward(loss / n, accumulate=True)`` for all micro-batches but the last one.
    - ``torch.amp.GradScaler``: ``pruner.backward(loss, scaler=scaler)``. Steps that the scaler skips are left out.
    - Clipping: after ``backward``, as always; the scores are those of the gradients before.
    - ``torch.compile``: give the original module, and call the compiled one. It recompiles after every cut, and at most
      ``torch._dynamo.config.recompile_limit`` (8) times in all, after which torch goes on uncompiled: raise it above
      ``steps`` and the modes (train, eval) used. Scores from activations break the graph at every gate: not with
      ``fullgraph=True``.
    - ``DistributedDataParallel``: give the wrapper, with the same arguments on every rank. Every cut makes it anew, in
      place, so the loop goes on with it; ``pruner.model`` is the module inside. Ranks that would cut differently raise.

    Args:
        model: the module itself, not a compiled one; or a ``DistributedDataParallel`` around it.
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
        InputError: an argument doesn't fit the model (an optimizer or an EMA copy of another one); likewise.
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
        self._replicas = Replicas(model)
        self.model, self.optimizer, self.ema = self._replicas.module, optimizer, ema
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
        self.groups: Groups = trace(self.model, example_inputs, ignore=ignore)
        # what a plan and a cut refuse, they refuse now and not after an hour of training
        anything = {group.name: torch.ones(group.size) for group in self.groups}
        plan(self.model, self.groups, anything, self.budget, **self._limits)
        Shrinking(self.model, {member.tensor: {} for group in self.groups for member in group.members}, optimizer, ema)
        self.importance = Importance(
            self.model,
            self.groups,
            criterion,
            source,
            momentum,
            seed,
            norm_term=norm_term,
            process_group=self._replicas.group,
        )
        self._wrapper_check = self._replicas.watch_wrapper()
        self.batches = 0
        self.prunes = 0
        self._skipped = 0
        self.history: list[dict[str, Any]] = []

    @property
    def done(self) -> bool:
        """All prune steps were taken: the budget is met."""
        return self.prunes >= self.steps

    @property
    def skipped(self) -> int:
        """Optimizer steps, since the start, without scores because a value or a gradient was not finite."""
        return self._skipped + self.importance.skipped

    def backward(self, loss: Tensor, outputs: Any = None, scaler: Any = None, accumulate: bool = False) -> None:
        """``loss.backward()``, with the scores of this step while there is pruning left to do.

        See ``tc.Importance.backward``. Under ``DistributedDataParallel`` the last backward pass of an optimizer step
        may not be in ``no_sync()``; those with ``accumulate=True`` may.
        """
        if self.done:
            (loss if scaler is None else scaler.scale(loss)).backward()
            return
        self.importance.backward(loss, outputs, scaler=scaler, accumulate=accumulate)

    def update(self, grad_scale: float | Tensor = 1.0, unscaled: bool = False) -> None:
        """Instead of ``backward``: take the scores between one's own ``loss.backward()`` and ``optimizer.step()``.

        With a ``GradScaler``: ``update(scaler.get_scale())`` before ``scaler.unscale_(optimizer)``,
        ``update(scaler.get_scale(), unscaled=True)`` after it. Before clipping in either case. See
        ``tc.Importance.update``.
        """
        if not self.done:
            self.importance.update(grad_scale, unscaled)

    def step(self) -> Plan | None:
        """Count one optimizer step; at every ``every``-th one, prune. Call it after ``optimizer.step()``.

        A step that a ``GradScaler`` skipped counts too, so that schedules by batches stay in step.

        Returns:
            The plan that was carried out, or ``None`` where this was no prune step.

        Raises:
            InputError: no scores were taken, or the last backward pass had ``accumulate=True``.
            TaylorError: ranks would cut differently, or a cut failed on another rank.
        """
        if self.done:
            return None
        if self.importance.accumulating:
            raise InputError(
                "accumulate: the last pruner.backward() before this step had accumulate=True, so no scores were taken; "
                "give accumulate=False with the last micro-batch before optimizer.step()"
            )
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
        sizes = self.groups.sizes()
        with self._replicas.together("the plan"):
            skipped = self.importance.skipped
            self.importance.fold()
            self._skipped += skipped
            decided = plan(self.model, self.groups, self.importance.scores(), budget, **self._limits)
        self._replicas.agree("the plan", decided.digest)
        self._cut(decided.keep, self._verify)
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
        self._close_if_done()
        return decided

    def _cut(self, keep: Mapping[str, Tensor], verify: bool) -> None:
        sizes = self.groups.sizes()
        if all(kept.numel() == sizes[name] for name, kept in keep.items()):
            return
        with self._replicas.together("the cut"):
            cut(self.model, self.groups, keep, self.optimizer, self.ema, verify=verify)
        self.importance.keep(dict(keep))
        self._replicas.rewrap()

    def _close_if_done(self) -> None:
        if self.done:
            self.importance.close()
            if self._wrapper_check is not None:
                self._wrapper_check.remove()

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands and what was collected; save it beside the model's and the optimizer's state."""
        return {
            "kept": {group.name: group.kept.clone() for group in self.groups},
            "original": {group.name: group.original_size for group in self.groups},
            "batches": self.batches,
            "prunes": self.prunes,
            "skipped": self._skipped,
            "history": [dict(entry) for entry in self.history],
            "importance": self.importance.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Cut the model as it was cut then, and go on from there.

        Make the model and the pruner as in the first run, at the original widths; call this; then load the state of the
        model, of the optimizer and of the EMA copy, which now have the right shapes.
        """
        original = {group.name: group.original_size for group in self.groups}
        if state["original"] != original or self.prunes:
            raise InputError(
                "state_dict: it belongs to another model, or this model was already pruned; build the model and "
                "the pruner as in the first run before loading"
            )
        self._cut(state["kept"], verify=False)
        self.batches, self.prunes, self._skipped = state["batches"], state["prunes"], state.get("skipped", 0)
        self.history = [dict(entry) for entry in state["history"]]
        self.importance.load_state_dict(state["importance"])
        self._close_if_done()


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
    scaler: Any = None,
) -> Iterator[Watched]:
    """Score every channel while somebody else's training loop runs; nothing else changes.

    ::

        with tc.watch(model, example_inputs) as scores:
            train_one_epoch()
        print(scores.table())

    Scores are taken right before each ``step()`` of the first optimizer seen that owns a parameter of the model, from
    the gradients it is about to use: a loop that clips gradients is scored on clipped ones, one that accumulates them
    on their sum, one with a ``GradScaler`` on unscaled ones.

    Args:
        model: the module itself, not a compiled one; or a ``DistributedDataParallel`` around it.
        example_inputs: see ``tc.trace``.
        criterion: see ``tc.Importance``.
        ignore: see ``tc.trace``.
        source: see ``tc.Importance``.
        scaler: the loop's ``GradScaler``. Only needed where scores come from activations, whose gradients it doesn't
            unscale.
    """
    replicas = Replicas(model)
    groups = trace(replicas.module, example_inputs, ignore=ignore)
    importance = Importance(replicas.module, groups, criterion, source=source, process_group=replicas.group)
    mine = {id(parameter) for parameter in model.parameters()}
    one = torch.ones((), device=next(model.parameters()).device)
    owner: list[int] = []

    def before_step(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        if not owner and any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
            owner.append(id(optimizer))
        if owner and owner[0] == id(optimizer):
            # a fused optimizer unscales in its own kernel: its GradScaler tells it the factor, and always calls step()
            carried = getattr(optimizer, "grad_scale", None)
            factor = carried if scaler is None else scaler.scale(one)
            scaled = scaler is not None or hasattr(optimizer, "found_inf")
            importance.update(1.0 if factor is None else factor, unscaled=scaled and carried is None)

    handle = register_optimizer_step_pre_hook(before_step)
    try:
        yield Watched(importance, groups)
    finally:
        handle.remove()
        importance.close()

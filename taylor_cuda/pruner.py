"""The pruning loop as a companion of somebody's training loop: ``tc.Pruner``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taylor_cuda.distributed import Replicas
from taylor_cuda.errors import InputError
from taylor_cuda.graph import trace
from taylor_cuda.graph.groups import Groups
from taylor_cuda.importance import Importance
from taylor_cuda.importance.criteria import Source, find_criterion
from taylor_cuda.planning import Plan, budgets_at, parse_budget, plan
from taylor_cuda.planning.cost import Cost, model_cost
from taylor_cuda.planning.rungs import resolve_round_to
from taylor_cuda.surgery.modes import execution_of
from taylor_cuda.surgery.shrink import Shrinking


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
      With ``torch.compile``: ``module.compile()``, then wrap. With ``static_graph=True`` the first micro-batch after
      each cut is averaged in ``no_sync()`` too. ``SyncBatchNorm`` stays in step; what looks at copies meets no rank.

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
        loss: see ``tc.Importance``.
        probes: see ``tc.Importance``.
        shared_norm: see ``tc.Importance``.
        ema: a module or a dict of tensors that follows every cut.
        verify: compare every cut with the masked model, and undo it if they differ; likewise a compact model.
        mode: how channels go. ``"cut"``: for real, at every prune step. ``"compact"``: the model stays dense and runs
            compact (``tc.compact``), as fast as a cut one; ``"mask"``: it runs with the channels off, at full cost.
            All three decide alike and, but for rounding, train alike; in the last two ``finish()`` cuts at the end, and
            until then every weight is there.

    Attributes:
        groups: of ``model`` as it is: in the modes ``"compact"`` and ``"mask"`` those of the dense one.
        keep: ``{group name: int64 indices of its units that are left}``; with ``groups``, a plan of what runs.

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
        mode: str = "cut",
        loss: str | Callable[..., Any] = "cross_entropy",
        probes: int = 1,
        shared_norm: str = "none",
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
            "round_to": resolve_round_to(self.model, round_to),
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
        self.mode = mode
        if norm_term and mode != "cut":
            raise InputError(f"norm_term: wanted mode='cut' with it, got mode={mode!r}")
        found = find_criterion(criterion)
        if found.gates_inserted and mode != "cut":
            raise InputError(
                f"criterion: {criterion!r} multiplies gates in, wanted mode='cut' with it, got mode={mode!r}"
            )
        self._execution = execution_of(mode, self.model, self.groups, optimizer, ema, weights=not found.gradient)
        scored = self._execution.scored
        self.importance = Importance(
            *scored,
            criterion,
            source,
            momentum,
            seed,
            norm_term=norm_term,
            process_group=self._replicas.group,
            fuse=mode == "cut",  # a ReLU gives no ride where something else reaches into the forward pass
            loss=loss,
            probes=probes,
            shared_norm=shared_norm,
        )
        self._wrapper_check = self._replicas.watch_wrapper()
        self._replicas.average_first_pass()
        self.batches = 0
        self.prunes = 0
        self.finished = False
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
        self._execution.check_reached()
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
        execution = self._execution
        sizes = execution.planned_groups.sizes()
        with self._replicas.together("the plan"):
            skipped = self.importance.skipped
            execution.refresh()
            self.importance.fold()
            self._skipped += skipped
            scores = execution.for_plan(self.importance.scores())
            decided = plan(execution.planned, execution.planned_groups, scores, budget, **self._limits)
        self._replicas.agree("the plan", decided.digest)
        self._carry_out(decided.keep, self._verify)
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

    def _carry_out(self, keep: Mapping[str, Tensor], verify: bool) -> None:
        sizes = self._execution.planned_groups.sizes()
        if all(kept.numel() == sizes[name] for name, kept in keep.items()):
            return
        with self._replicas.together("the cut"):
            self._execution.carry_out(keep, verify)
        if self._execution.scores_shrink:
            self.importance.keep(dict(keep))
        if self.mode == "cut":
            self._replicas.rewrap()

    @property
    def keep(self) -> dict[str, Tensor]:
        """The units of ``groups`` that are left."""
        return dict(self._execution.left)

    @property
    def cost(self) -> Cost:
        """What the model costs with the channels that are left."""
        return model_cost(self._execution.planned, self._execution.planned_groups)

    def finish(self) -> None:
        """Cut for good what the modes ``"compact"`` and ``"mask"`` have left out. Call it when ``done``.

        Everything goes as with a cut of ``mode="cut"``: optimizer, EMA copy, wrapper. There is nothing to do in that
        mode, nor the second time.

        Raises:
            InputError: there are prune steps left to do.
        """
        if not self.done:
            raise InputError(f"finish: wanted it after the last prune step, got it after {self.prunes} of {self.steps}")
        if self.finished:
            return
        if self.mode != "cut":
            left = self.keep
            with self._replicas.together("the cut"):
                self._execution.finish(self._verify)
            if not self._execution.scores_shrink:
                self.importance.keep(left)
                self.importance.close()
            self._replicas.rewrap()
        self.finished = True

    def _close_if_done(self) -> None:
        if self.done:
            self.importance.close()
            if self._wrapper_check is not None:
                self._wrapper_check.remove()

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands and what was collected; save it beside the model's and the optimizer's state."""
        return {
            "mode": self.mode,
            "finished": self.finished,
            "kept": {group.name: group.kept.clone() for group in self._execution.planned_groups},
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
        if state.get("mode", "cut") != self.mode:
            raise InputError(f"state_dict: mode is {state['mode']!r} there and {self.mode!r} here")
        self._carry_out(state["kept"], verify=False)
        self.batches, self.prunes, self._skipped = state["batches"], state["prunes"], state.get("skipped", 0)
        self.history = [dict(entry) for entry in state["history"]]
        if state.get("finished", False):
            self.finish()
        self.importance.load_state_dict(state["importance"])
        self._close_if_done()

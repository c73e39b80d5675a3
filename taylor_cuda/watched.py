"""``tc.watch``: scores while somebody else's training loop runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from taylor_cuda.importance.criteria import Source, find_criterion
from taylor_cuda.text import table


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
        criterion: see ``tc.Importance``; none of those that need the model's outputs, which nobody gives here.
        ignore: see ``tc.trace``.
        source: see ``tc.Importance``.
        scaler: the loop's ``GradScaler``. Only needed where scores come from activations, whose gradients it doesn't
            unscale.
    """
    if find_criterion(criterion).outputs:
        raise InputError(
            f"criterion: wanted one that gradients suffice for, got {criterion!r}; use tc.Importance and its "
            "backward(loss, outputs), or 'taylor_fo'"
        )
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

"""Losses of a mini-batch without these or those units of a group, the fast way where a model allows it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from taylor_cuda.graph.groups import Groups
from taylor_cuda.study.batches import Batch, LossFn
from taylor_cuda.study.naive import Drops, loss_without

__all__ = ["Evaluator"]


class Evaluator:
    """Measures one model on one mini-batch after another.

    Args:
        model: in eval mode; call everything inside ``evaluating(model)``.
        groups: of this model.
        loss_fn: ``(outputs, targets)`` to the mean loss.

    Attributes:
        base: float64 scalar, the loss of the batch with nothing removed but ``removed``.
    """

    def __init__(self, model: nn.Module, groups: Groups, loss_fn: LossFn) -> None:
        self._model, self._groups, self._loss_fn = model, groups, loss_fn
        self._removed: dict[str, Tensor] = {}
        self.base = torch.zeros(())

    def start(self, batch: Batch, removed: Drops | None = None) -> None:
        """Take a mini-batch; ``removed`` units are off in all that follows."""
        self._batch = batch
        self._removed = dict(removed or {})
        self.base = self._naive({})

    def _naive(self, drops: Mapping[str, Tensor]) -> Tensor:
        together = dict(self._removed)
        for name, drop in drops.items():
            together[name] = drop | together[name] if name in together else drop
        return loss_without(self._model, self._groups, self._loss_fn, self._batch, together).double()

    def losses(self, name: str, drops: Tensor) -> Tensor:
        """The loss without the units of each row.

        Args:
            name: of the group.
            drops: bool ``[K, size]`` on the CPU, True = removed; equally many in every row.

        Returns:
            float64 ``[K]`` on the model's device; nothing waits for it.
        """
        return torch.stack([self._naive({name: drop}) for drop in drops])

"""How ``tc.Pruner`` carries out what it decides: channels are cut, or run compact, or are masked.

In the last two the model stays as wide as it was, and what is planned for is a twin of it with the widths that it would
have had by now, so that all three decide alike.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from taylor_cuda.errors import InputError
from taylor_cuda.graph.around import Around
from taylor_cuda.graph.checks import check_not_compacted
from taylor_cuda.graph.groups import Groups, named_tensors
from taylor_cuda.graph.mask import MaskedForward
from taylor_cuda.graph.recorder import copy_model
from taylor_cuda.graph.sites import active_in_forward, is_active
from taylor_cuda.graph.slicing import shrink_groups, slice_model, slice_tensor, tensor_keeps
from taylor_cuda.surgery.compact import Compacted, compact
from taylor_cuda.surgery.cut import cut

__all__ = ["MODES", "Execution", "execution_of"]

MODES = ("cut", "compact", "mask")


class Execution:
    """A model without the units that are gone; here they are cut, at once.

    Args:
        model: the user's module.
        groups: its groups.
        optimizer: follows every cut.
        ema: likewise.

    Attributes:
        model: the user's module.
        groups: its groups.
        planned: the module that plans are made for.
        planned_groups: its groups, with the units that are left.
        scored: the module, and its groups, that importance is taken of.
        scores_shrink: whether these groups lose the units that go.
    """

    def __init__(self, model: nn.Module, groups: Groups, optimizer: Any, ema: Any) -> None:
        self.model, self.groups = model, groups
        self._optimizer, self._ema = optimizer, ema
        self.planned, self.planned_groups = model, groups
        self.scored = model, groups
        self.scores_shrink = True

    @property
    def left(self) -> dict[str, Tensor]:
        """``{group name: int64 indices of its units that are left}``, in ``groups``."""
        return {group.name: torch.arange(group.size) for group in self.groups}

    def carry_out(self, keep: Mapping[str, Tensor], verify: bool) -> None:
        """Let go of all units of ``planned_groups`` that aren't kept; all of it or none."""
        self._cut(keep, verify)

    def _cut(self, keep: Mapping[str, Tensor], verify: bool) -> None:
        cut(self.model, self.groups, keep, self._optimizer, self._ema, verify=verify)

    def finish(self, verify: bool) -> None:
        """Cut for good what isn't yet."""

    def refresh(self) -> None:
        """Give ``planned`` the weights of now, if it has any."""

    def for_plan(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scores of the units that are left, out of those of ``scored``."""
        return dict(scores)

    def check_reached(self) -> None:
        """Raise unless the model ran without the units that are gone since the last of them went."""


class Holding(Execution, ABC):
    """The model stays as it is; units that are gone are left out when it runs.

    Args:
        model: the user's module.
        groups: its groups.
        optimizer: for the cut at the end.
        ema: likewise.
        weights: whether ``planned`` has to have weights; otherwise it takes no memory.
    """

    def __init__(self, model: nn.Module, groups: Groups, optimizer: Any, ema: Any, weights: bool) -> None:
        super().__init__(model, groups, optimizer, ema)
        self._weights = weights
        self.planned = copy_model(model) if weights else copy_model(model).to("meta")
        self.planned_groups = copy.copy(groups)
        self.scores_shrink = weights
        if weights:
            self.scored = self.planned, self.planned_groups
        self._left: dict[str, Tensor] | None = super().left
        self._running: Compacted | _Masked | None = None

    @property
    def left(self) -> dict[str, Tensor]:
        """See ``Execution``."""
        return super().left if self._left is None else self._left

    @abstractmethod
    def _run(self, left: Mapping[str, Tensor], verify: bool) -> None:
        """Let the model run with these units of ``groups``."""

    def carry_out(self, keep: Mapping[str, Tensor], verify: bool) -> None:
        """See ``Execution``."""
        left = {name: units[keep[name].cpu()] if name in keep else units for name, units in self.left.items()}
        self._run(left, verify)
        keeps = tensor_keeps(self.planned, self.planned_groups, keep)
        shrunk = shrink_groups(self.planned_groups, dict(keep), keeps)
        slice_model(self.planned, self.planned_groups, keep, keeps)
        self.planned_groups.groups, self._left = shrunk, left

    def finish(self, verify: bool) -> None:
        """See ``Execution``."""
        left = self.left
        self._end()
        try:
            self._cut(left, verify)
        except BaseException:
            self._run(left, False)
            raise
        self._left = None

    def _end(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None

    @torch.no_grad()
    def refresh(self) -> None:
        """See ``Execution``."""
        if not self._weights:
            return
        dense, keeps = named_tensors(self.model), tensor_keeps(self.model, self.groups, self.left)
        for name, tensor in named_tensors(self.planned).items():
            tensor.copy_(slice_tensor(dense[name], keeps[name]) if name in keeps else dense[name])

    def for_plan(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See ``Execution``."""
        if self.scores_shrink:
            return dict(scores)
        return {name: score[self.left[name].to(score.device)] for name, score in scores.items()}

    def check_reached(self) -> None:
        """See ``Execution``."""
        if self._running is not None and not self._running.forwards:
            raise InputError(
                "model: no forward pass went through it since channels were left out, so they are still there; call "
                "the module that the pruner was given, or what torch.compile or DistributedDataParallel made of it"
            )


class Compacting(Holding):
    """The model runs compact: ``tc.compact``."""

    def _run(self, left: Mapping[str, Tensor], verify: bool) -> None:
        if isinstance(self._running, Compacted):
            self._running.update(left, verify=verify)
        else:
            self._running = compact(self.model, self.groups, left, verify=verify)


class _Masked(Around):
    """A model whose channels are off, as in ``tc.masked``, until it is closed."""

    def __init__(self, model: nn.Module, groups: Groups, left: Mapping[str, Tensor]) -> None:
        super().__init__(model)
        self._groups, self._left = groups, left
        self._masks: TorchFunctionMode | None = None
        self._handles: list[RemovableHandle] = []
        self._start()
        self._make_masks()

    def _make_masks(self) -> TorchFunctionMode:
        masks = MaskedForward(self.model, self._groups, self._left)
        # activation checkpointing runs layers once more without the model
        self._handles = active_in_forward(self.model, masks, whole=False)
        self._masks = masks
        return masks

    def _enter(self) -> None:
        masks = self._masks or self._make_masks()
        self._entered = None if is_active(masks) else masks
        if self._entered is not None:
            self._entered.__enter__()

    def _leave(self) -> None:
        if self._entered is not None:
            self._entered.__exit__(None, None, None)

    def close(self) -> None:
        """Take the masks out of the model."""
        for handle in self._handles:
            handle.remove()
        self._stop()

    def __getstate__(self) -> dict[str, Any]:
        """Masks know tensors by identity: a copy makes its own."""
        return {**super().__getstate__(), "_masks": None, "_handles": [], "_entered": None}


class Masking(Holding):
    """Channels are off, shapes as they were."""

    def _run(self, left: Mapping[str, Tensor], verify: bool) -> None:
        check_not_compacted(self.model, "Pruner")
        self._end()
        self._running = _Masked(self.model, self.groups, left)


def execution_of(
    mode: str, model: nn.Module, groups: Groups, optimizer: Any = None, ema: Any = None, weights: bool = False
) -> Execution:
    """The execution of a mode, one of ``MODES``.

    Args:
        mode: ``"cut"``, ``"compact"`` or ``"mask"``.
        model: the traced module.
        groups: its groups.
        optimizer: what follows a cut.
        ema: likewise.
        weights: whether importance is taken from weights alone.

    Raises:
        InputError: no such mode.
    """
    if mode == "cut":
        return Execution(model, groups, optimizer, ema)
    held = {"compact": Compacting, "mask": Masking}.get(mode)
    if held is None:
        raise InputError(f"mode: wanted one of {', '.join(map(repr, MODES))}, got {mode!r}")
    return held(model, groups, optimizer, ema, weights)

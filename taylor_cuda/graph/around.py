"""Something around every forward pass of a model, whatever compiled it and whatever ends the pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["Around"]


class Around(ABC):
    """Takes the place of ``model.forward`` between ``start`` and ``stop``, and enters and leaves around it.

    Hooks would not do: those after a pass aren't run when Ctrl-C ends it, and code that ``torch.compile`` made before
    them never meets any. Subclasses define what ``_enter`` and ``_leave`` do. They and this are not compiled, the
    model's own forward pass is. A copy of the model has a copy of this.

    Attributes:
        model: the module.
        forwards: forward passes since this was last set to 0.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.forwards = 0
        self._depth = 0
        self._plain: tuple[Callable[[], None], Callable[[], None]] | None = None

    @abstractmethod
    def _enter(self) -> None:
        """Called before every forward pass of the model."""

    @abstractmethod
    def _leave(self) -> None:
        """Called after it, and after whatever ended it."""

    def _start(self) -> None:
        self._own = vars(self.model).get("forward")
        self._forward = self.model.forward
        torch.compiler.disable(Around._run, recursive=False)
        vars(self.model)["forward"] = self._run

    def _stop(self) -> None:
        vars(self.model).pop("forward", None)
        if self._own is not None:  # a forward of the instance, that was there before
            vars(self.model)["forward"] = self._own

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self._depth:
            return self._forward(*args, **kwargs)
        if self._plain is None:
            self._plain = torch.compiler.disable(self._enter), torch.compiler.disable(self._leave)
        enter, leave = self._plain
        self.forwards += 1
        try:
            self._depth += 1
            enter()
            return self._forward(*args, **kwargs)
        finally:
            self._depth -= 1
            leave()

    def __getstate__(self) -> dict[str, Any]:
        """What is compiled, or kept from it, belongs to one object; a copy makes its own."""
        return {**vars(self), "_plain": None}

"""All of a cut or none of it: what a cut may change, remembered by reference, and put back whatever happened to it."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from taylor_cuda.graph.groups import Groups

__all__ = ["Transaction", "set_data"]


def set_data(tensor: Tensor, data: Tensor) -> None:
    """``tensor.data = data`` for data of another shape, so that the next backward pass works.

    As long as an output computed from ``tensor`` is alive, so is the node that accumulates its gradient, and it
    insists on the old shape. Autograd makes a new node when the dtype has changed, so the dtype changes and comes
    back.
    """
    other = torch.float16 if tensor.dtype != torch.float16 else torch.float32
    tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data


class _Modes:
    """Autograd's and autocast's modes, which an exception within PyTorch's own context managers leaves as they are.

    What stays behind of autocast is a depth that never gets to 0 again, where casts of weights are forgotten: after the
    next cut a layer would compute with the weights of before.
    """

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._autocast = {kind: torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")}
        self._depth = self._current_depth()

    @staticmethod
    def _current_depth() -> int:
        # PyTorch tells the depth to whoever changes it; on one line, so that Ctrl-C hardly comes between.
        depth: int = (torch.autocast_increment_nesting(), torch.autocast_decrement_nesting())[1]
        return depth

    def restore(self) -> None:
        """Set what differs."""
        torch.set_grad_enabled(self._grad)
        for kind, enabled in self._autocast.items():
            torch.set_autocast_enabled(kind, enabled)
        while self._current_depth() > self._depth:
            torch.autocast_decrement_nesting()
        if self._depth == 0:
            torch.clear_autocast_cache()


class Transaction:
    """Puts everything back if its body raises, ``KeyboardInterrupt`` included, from references and not from copies.

    Args:
        modules: modules whose attributes, submodules, parameters and buffers (as objects) may change.
        tensors: tensors whose data may be replaced by data of another shape, and whose gradient may be replaced. What
            is written into a tensor is put back only after ``remember_values``.
        optimizers: optimizers whose state may change.
        groups: changed along, if given.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        tensors: Iterable[Tensor],
        optimizers: Iterable[torch.optim.Optimizer] = (),
        groups: Groups | None = None,
    ) -> None:
        self._tensors = [(tensor, tensor.data, tensor.grad) for tensor in tensors]
        dicts: list[dict[Any, Any]] = []
        for module in modules:
            dicts += [vars(module), module._parameters, module._buffers, module._modules]
        for optimizer in optimizers:
            dicts += [
                optimizer.state[p] for group in optimizer.param_groups for p in group["params"] if p in optimizer.state
            ]
        if groups is not None:
            dicts.append(vars(groups))
        self._dicts = [(entries, dict(entries)) for entries in dicts]
        self._modes = _Modes()
        self._values: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.restore()

    def remember_values(self, tensor: Tensor) -> None:
        """Copy the values of ``tensor``, because something is about to be written into it."""
        self._values.append((tensor, tensor.detach().clone()))

    def restore(self) -> None:
        """Put everything back. A ``KeyboardInterrupt`` meanwhile is raised when that is done."""
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                self._restore()
                break
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _restore(self) -> None:
        self._modes.restore()
        for entries, before in self._dicts:
            if list(entries) != list(before) or any(entries[key] is not value for key, value in before.items()):
                entries.clear()
                entries.update(before)
        for tensor, data, grad in self._tensors:
            if tensor.shape != data.shape or tensor.dtype != data.dtype:
                tensor.grad = None
                set_data(tensor, data)
            if tensor.grad is not grad:
                tensor.grad = grad
        with torch.no_grad():
            for tensor, values in self._values:
                tensor.copy_(values)

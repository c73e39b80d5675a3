"""Reaching the inputs of readers, wherever in Python code they are called.

A reader is known by its weight, not by its module: ``F.conv2d(x, self.conv.weight)`` in a hand-written forward is met
as well as ``self.conv(x)``. Inputs are met above autograd, so what is put there takes part in the backward pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.hooks import RemovableHandle

from taylor_cuda.graph.groups import named_tensors

Transform = Callable[[str, Tensor, int], Tensor]
"""``(name of the weight, input, channel dimension) -> what the reader gets instead``; the dimension is >= 0."""

_SPATIAL = {
    torch.conv1d: 1,
    torch.conv2d: 2,
    torch.conv3d: 3,
    torch.conv_transpose1d: 1,
    torch.conv_transpose2d: 2,
    torch.conv_transpose3d: 3,
    F.linear: 0,
}
_CONTRACTED = {torch.conv_transpose1d: 0, torch.conv_transpose2d: 0, torch.conv_transpose3d: 0}
"""The dimension of a weight that meets the channels of the input; 1 of all others."""
READER_FUNCTIONS = frozenset(_SPATIAL)
RMS_NORMS = frozenset({F.rms_norm, torch.rms_norm})
"""What an RMSNorm calls; devices and releases differ in the ops it comes to."""


_STANDS_FOR = "taylor_cuda_stands_for"


def stand_in(part: Tensor, dense: Tensor, kept: Mapping[int, Tensor]) -> None:
    """Say that ``part`` is used in the place of ``dense``, of which it has the ``kept`` positions (-1: zeros)."""
    setattr(part, _STANDS_FOR, (dense, kept))


def _stood_for(tensor: Any) -> tuple[Any, Mapping[int, Tensor]]:
    found: tuple[Any, Mapping[int, Tensor]] = getattr(tensor, _STANDS_FOR, (tensor, {}))
    return found


class ReaderInputs(TorchFunctionMode):
    """While active, passes the input of every call that uses one of ``weights`` through ``transform``."""

    def __init__(self, model: nn.Module, weights: Iterable[str], transform: Transform) -> None:
        super().__init__()
        tensors = named_tensors(model)
        self._name_of = {id(tensors[name]): name for name in weights}
        self._transform = transform
        self.kept: dict[str, tuple[Tensor, int]] = {}
        """Of readers met in a model that runs compact: the dense position of each channel they read (-1: zeros), and
        how many there are."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SPATIAL:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            dense, kept = _stood_for(weight)
            name = self._name_of.get(id(dense))
            if name is not None:
                self._note_kept(name, dense, kept, _CONTRACTED.get(func, 1))
                x = args[0] if args else kwargs.pop("input")
                dim = x.dim() - 1 - _SPATIAL[func]
                args = (self._transform(name, x, dim), *args[1:])
        return self.call(func, args, kwargs)

    def _note_kept(self, name: str, dense: Tensor, kept: Mapping[int, Tensor], dim: int) -> None:
        self.kept.pop(name, None)
        if dim in kept:
            self.kept[name] = kept[dim], dense.shape[dim]

    def weights(self) -> set[int]:
        """The ids of the tensors at whose uses the mode does something."""
        return set(self._name_of)

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one function; a place for subclasses to change what it does."""
        return func(*args, **kwargs)


def is_active(mode: TorchFunctionMode) -> bool:
    """Whether this very mode is on the stack of this thread."""
    return any(active is mode for active in _get_current_function_mode_stack())


def active_in_forward(model: nn.Module, mode: ReaderInputs, whole: bool = True) -> list[RemovableHandle]:
    """Make ``mode`` active during every forward pass of ``model`` and nowhere else. Remove the handles to end that.

    Activation checkpointing runs parts of the model once more in the backward pass, where no mode of the forward pass
    is active and perhaps in another thread: there the layers whose weights the mode looks for enter it themselves.
    Without ``whole`` only they do, for a model that ``Around`` takes care of.
    """
    entered = threading.local()
    function_mode: TorchFunctionMode = mode

    def enter(_module: nn.Module, _args: Any) -> None:
        fresh = not is_active(mode)
        entered.fresh = [*getattr(entered, "fresh", []), fresh]
        if fresh:
            function_mode.__enter__()

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        *entered.fresh, fresh = entered.fresh
        if fresh:
            function_mode.__exit__(None, None, None)

    wanted = mode.weights()
    owners = [module for module in model.modules() if any(id(p) in wanted for p in module._parameters.values())]
    handles = []
    for module in {id(module): module for module in (model, *owners)}.values():
        if module is model and not whole:
            continue
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    return handles

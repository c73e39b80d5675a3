"""Everything that shrinks with a model: its tensors and gradients, the optimizer's state, EMA copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils import _pytree as pytree

from taylor_cuda.errors import InputError
from taylor_cuda.graph.groups import Groups, named_tensors
from taylor_cuda.graph.slicing import Keeps, set_numbers, slice_tensor, update_attributes
from taylor_cuda.surgery.transaction import Transaction, set_data

__all__ = ["RECIPE", "Shrinking"]

RECIPE = "taylor_cuda_recipe"
"""The attribute of a model under which the recipe of its cuts is kept."""


@dataclass(frozen=True)
class _Copy:
    """An EMA copy: its tensors by the model's names, and the module they belong to, if any."""

    module: nn.Module | None
    tensors: dict[str, list[Tensor]]


class Shrinking:
    """One cut of a model and of everything that goes with it: checked when made, carried out by ``apply``.

    Args:
        model: the module itself.
        keeps: ``{tensor name: {dimension: positions that stay}}``.
        optimizer: an optimizer, or several, that own the model's trainable parameters.
        ema: a module, an object with a ``module``, a dict of tensors by name, or several of these.

    Raises:
        InputError: something doesn't fit; nothing was touched.
    """

    def __init__(self, model: nn.Module, keeps: Keeps, optimizer: Any = None, ema: Any = None) -> None:
        self._model, self._keeps = model, keeps
        tensors = named_tensors(model)
        self._tensors = {name: tensors[name] for name in keeps}
        self._optimizers = list(_optimizers(optimizer))
        self._copies = [_find_copy(model, copy, self._tensors) for copy in _several(ema)]
        _check_memory(tensors, keeps)
        if self._optimizers:
            self._check_owned()
            self._check_states()

    def transaction(self, groups: Groups | None = None) -> Transaction:
        """Remembers everything that ``apply`` and a change of ``groups`` will replace."""
        copies = [tensor for copy in self._copies for tensors in copy.tensors.values() for tensor in tensors]
        modules = {id(module): module for root in self._modules() for module in root.modules()}
        return Transaction(modules.values(), [*self._tensors.values(), *copies], self._optimizers, groups)

    def apply(self, recipe: dict[str, Any]) -> None:
        """Slice everything, set sizes of layers and the recipe. To be called inside ``transaction()``."""
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                shape = tensor.shape
                _slice_in_place(tensor, self._keeps[name])
                for optimizer in self._optimizers:
                    if tensor in optimizer.state:
                        _slice_state(optimizer.state[tensor], shape, self._keeps[name])
            for copy in self._copies:
                for name, tensors in copy.tensors.items():
                    for tensor in tensors:
                        _slice_in_place(tensor, self._keeps[name])
        for module in self._modules():
            update_attributes(module)
            set_numbers(module, recipe.get("numbers", {}))
            setattr(module, RECIPE, recipe)

    def _modules(self) -> list[nn.Module]:
        return [self._model, *(copy.module for copy in self._copies if copy.module is not None)]

    def _check_owned(self) -> None:
        owned = {id(p) for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in self._tensors.items() if p.requires_grad and id(p) not in owned]
        if missing:
            raise InputError(
                f"optimizer: it doesn't own {_first(missing)}, which this cut would slice; give the optimizer (or a "
                "list of optimizers) that trains this very model, or none"
            )

    def _check_states(self) -> None:
        for optimizer in self._optimizers:
            if isinstance(optimizer, LBFGS) and optimizer.state:
                raise InputError("optimizer: LBFGS keeps one flat history over all parameters, which can't be sliced")
            for name, tensor in self._tensors.items():
                for key, leaf in _state_tensors(optimizer.state.get(tensor, {})):
                    if not _fits(leaf, tensor.shape):
                        raise InputError(
                            f"optimizer: state {key!r} of {name} has shape {tuple(leaf.shape)}, which doesn't follow "
                            f"the parameter's {tuple(tensor.shape)} and can't be sliced; cut without the optimizer and "
                            "build a new one"
                        )


def _slice_in_place(tensor: Tensor, kept: Mapping[int, Tensor]) -> None:
    data = slice_tensor(tensor.data, kept)
    grad = None if tensor.grad is None else slice_tensor(tensor.grad, kept)
    tensor.grad = None
    set_data(tensor, data)
    tensor.grad = grad


def _slice_state(state: dict[Any, Any], shape: torch.Size, kept: Mapping[int, Tensor]) -> None:
    def sliced(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.numel() <= 1:
            return leaf
        # a factored state has length 1 in the dimensions it was reduced over
        present = {dim: positions for dim, positions in kept.items() if leaf.shape[dim] == shape[dim]}
        return slice_tensor(leaf, present) if present else leaf

    for key, value in list(state.items()):
        state[key] = pytree.tree_map(sliced, value)


def _state_tensors(state: Mapping[Any, Any]) -> Iterator[tuple[Any, Tensor]]:
    for key, value in state.items():
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor):
                yield key, leaf


def _fits(leaf: Tensor, shape: torch.Size) -> bool:
    if leaf.numel() <= 1:
        return True
    return leaf.dim() == len(shape) and all(size in (1, full) for size, full in zip(leaf.shape, shape, strict=True))


def _several(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) else [value]


def _optimizers(optimizer: Any) -> Iterator[Optimizer]:
    """The optimizers given and those inside them (Lookahead and its like), each state once."""
    seen: set[int] = set()
    waiting = _several(optimizer)
    while waiting:
        one = waiting.pop(0)
        if not isinstance(one, Optimizer):
            raise InputError(f"optimizer: wanted a torch optimizer or a list of them, got {type(one).__name__}")
        if id(one.state) not in seen:
            seen.add(id(one.state))
            yield one
        waiting += [inner for inner in vars(one).values() if isinstance(inner, Optimizer) and inner is not one]


def _find_copy(model: nn.Module, ema: Any, tensors: Mapping[str, Tensor]) -> _Copy:
    if isinstance(ema, Mapping):
        return _find_in_dict(model, ema, tensors)
    inner, wrapped = ema, []
    while not isinstance(inner, nn.Module) or not tensors.keys() <= named_tensors(inner).keys():
        wrapped.append(type(inner).__name__)
        inner = next((getattr(inner, name) for name in ("module", "ema") if hasattr(inner, name)), None)
        if inner is None:
            raise InputError(
                f"ema: found no copy of the model in {' > '.join(wrapped)}; wanted a module, an object with one in "
                ".module, or a dict of tensors by name"
            )
    there = named_tensors(inner)
    if inner is model or any(there[name] is tensor for name, tensor in tensors.items()):
        raise InputError("ema: it is the model itself, not a copy")
    copy = _Copy(inner, {name: [there[name]] for name in tensors})
    _check_shapes(copy, tensors)
    return copy


def _find_in_dict(model: nn.Module, ema: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> _Copy:
    names: dict[int, list[str]] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names.setdefault(id(tensor), []).append(name)
    found: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        values = {id(ema[other]): ema[other] for other in names[id(tensor)] if isinstance(ema.get(other), Tensor)}
        if id(tensor) in values:
            raise InputError(f"ema: {name} in it is the model's own tensor, not a copy")
        if values:
            found[name] = list(values.values())
        elif isinstance(tensor, nn.Parameter):
            raise InputError(f"ema: no tensor named {name} in it; it has {_first(list(ema))}")
    copy = _Copy(None, found)
    _check_shapes(copy, tensors)
    return copy


def _check_shapes(copy: _Copy, tensors: Mapping[str, Tensor]) -> None:
    for name, found in copy.tensors.items():
        for tensor in found:
            if tensor.shape != tensors[name].shape:
                raise InputError(
                    f"ema: {name} has shape {tuple(tensor.shape)} in it and {tuple(tensors[name].shape)} in the model; "
                    "was it left out of an earlier cut?"
                )


def _check_memory(tensors: Mapping[str, Tensor], keeps: Keeps) -> None:
    """A tie by memory alone would silently come loose when one side gets new memory."""
    owner: dict[tuple[torch.device, int], str] = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0 or tensor.layout != torch.strided or tensor.device.type == "meta":
            continue
        other = owner.setdefault((tensor.device, tensor.data_ptr()), name)
        if other != name and (name in keeps or other in keeps):
            raise InputError(
                f"model: {other} and {name} share memory but are different tensors, so a cut would separate them; "
                "share the Parameter itself"
            )


def _first(names: Iterable[str], count: int = 3) -> str:
    listed = list(names)
    more = f" and {len(listed) - count} more" if len(listed) > count else ""
    return ", ".join(listed[:count]) + more

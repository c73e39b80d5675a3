"""Compact tensors and sizes in the places of a model's dense ones, for the time of a forward pass."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from taylor_cuda.errors import InputError
from taylor_cuda.graph.groups import Groups, named_tensors
from taylor_cuda.graph.sites import stand_in
from taylor_cuda.graph.slicing import numbers_after, set_numbers, stays, update_attributes
from taylor_cuda.surgery.gathered import Kept, Selection

__all__ = ["Swap"]


@dataclass(frozen=True)
class _Slot:
    """Where a module keeps a tensor: ``holder[name]``, among its parameters or its buffers."""

    owner: nn.Module
    holder: dict[str, Any]
    name: str


@dataclass(frozen=True)
class _Size:
    """An attribute of a module that follows the width."""

    owner: nn.Module
    name: str
    dense: Any
    compact: Any

    def set(self, value: Any) -> None:
        own = vars(self.owner)
        if self.name in own:  # a module's own way of setting asks a dozen questions, at every layer of every step
            own[self.name] = value
        else:
            setattr(self.owner, self.name, value)


class Swap:
    """Everything of a model that one plan makes smaller.

    Args:
        model: the dense module; it is left as it is.
        groups: its groups.
        keep: ``{group name: units that are kept}``.
        held: likewise, with the units that run beside them, with zeros.
        cast: names of weights that are gathered in autocast's dtype where autocast is on.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        keep: Mapping[str, Tensor],
        held: Mapping[str, Tensor],
        cast: Collection[str],
    ) -> None:
        tensors, parameters = named_tensors(model), dict(model.named_parameters())
        kept = _kept_positions(model, groups, keep, held)
        self._names = list(kept)
        self._kept = list(kept.values())
        self._is_buffer = [name not in parameters for name in self._names]
        self._shapes = [tensors[name].shape for name in self._names]
        self._cast = [name in cast for name in self._names]
        self._slots = _slots(model, [tensors[name] for name in self._names])
        self._selections: dict[tuple[int, ...], Selection] = {}
        self._put: list[tuple[_Slot, Any]] = []
        self._buffers: dict[int, tuple[int, int]] = {}
        self._resized: list[_Size] = []
        self._sizes: list[_Size] = []
        self._sizes = self._measured(model, numbers_after(groups, held))

    def owners(self) -> list[nn.Module]:
        """The modules that keep a tensor which changes."""
        return list({id(slot.owner): slot.owner for slots in self._slots for slot in slots}.values())

    def _measured(self, model: nn.Module, numbers: Mapping[str, Mapping[str, int]]) -> list[_Size]:
        changed: list[tuple[nn.Module, str, Any]] = []
        with torch.no_grad():
            self.enter(None)
        try:
            changed = update_attributes(model) + set_numbers(model, numbers)
            return [_Size(module, name, old, getattr(module, name)) for module, name, old in changed]
        finally:
            for module, name, old in reversed(changed):
                setattr(module, name, old)
            self.leave()

    def enter(self, owner: nn.Module | None) -> None:
        """Put compact tensors and sizes where the dense ones are: in one module, or in all of them.

        Raises:
            InputError: the model's shapes aren't those that the plan was made for.
        """
        places = [[slot for slot in slots if owner is None or slot.owner is owner] for slots in self._slots]
        chosen = tuple(i for i, slots in enumerate(places) if slots)
        parts = dict(zip(chosen, self._gathered(chosen), strict=True))
        self._buffers = {id(part): (i, part._version) for i, part in parts.items() if self._is_buffer[i]}
        for i, part in parts.items():
            for slot in places[i]:
                self._put.append((slot, slot.holder[slot.name]))
                slot.holder[slot.name] = part
        for size in self._sizes:
            if owner is None or size.owner is owner:
                self._resized.append(size)
                size.set(size.compact)

    def leave(self) -> None:
        """Put the dense ones back, and into the buffers among them what the forward pass wrote."""
        values: dict[int, Tensor] = {}
        while self._put:
            slot, dense = self._put[-1]
            now = slot.holder[slot.name]
            i, version = self._buffers.get(id(now), (-1, 0))
            # batch normalisation writes its running statistics without a new version
            if i >= 0 and (slot.owner.training or now._version != version):
                values[i] = now
            slot.holder[slot.name] = dense
            self._put.pop()
        while self._resized:
            size = self._resized[-1]
            size.set(size.dense)
            self._resized.pop()
        if values:
            chosen = tuple(values)
            self._selection(chosen).write_back(list(values.values()), [self._dense(i) for i in chosen])
        self._buffers = {}

    def _dense(self, i: int) -> Tensor:
        slot = self._slots[i][0]
        tensor: Tensor = slot.holder[slot.name]
        return tensor

    def _gathered(self, chosen: tuple[int, ...]) -> list[Tensor]:
        dense = [self._dense(i) for i in chosen]
        for i, tensor in zip(chosen, dense, strict=True):
            if tensor.shape != self._shapes[i]:
                raise InputError(
                    f"model: {self._names[i]} has shape {tuple(tensor.shape)}, and had {tuple(self._shapes[i])} when "
                    "the model was compacted; compact it anew"
                )
        kind = dense[0].device.type if dense else "cpu"
        halve = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if halve else torch.float32
        cast = [halve and self._cast[i] and x.dtype == torch.float32 for i, x in zip(chosen, dense, strict=True)]
        parts = self._selection(chosen, dense).gather(dense, cast, dtype)
        for i, part, tensor in zip(chosen, parts, dense, strict=True):
            stand_in(part, tensor, self._kept[i])
        return parts

    def _selection(self, chosen: tuple[int, ...], dense: Sequence[Tensor] | None = None) -> Selection:
        dense = [self._dense(i) for i in chosen] if dense is None else dense
        found = self._selections.get(chosen)
        if found is None or not found.is_for(dense):
            found = self._selections[chosen] = Selection(dense, [self._kept[i] for i in chosen])
        return found


def _kept_positions(
    model: nn.Module, groups: Groups, keep: Mapping[str, Tensor], held: Mapping[str, Tensor]
) -> dict[str, Kept]:
    """For every tensor that something is dropped of: what is kept along each dimension, -1 where zeros run."""
    running, found = stays(model, groups, held), dict[str, dict[int, Tensor]]()
    for (name, dim), mask in stays(model, groups, keep).items():
        runs = running.get((name, dim), np.ones_like(mask))
        positions = np.flatnonzero(runs)
        found.setdefault(name, {})[dim] = torch.from_numpy(np.where(mask[positions], positions, -1))
    return dict(found)


def _slots(model: nn.Module, tensors: Sequence[Tensor]) -> list[list[_Slot]]:
    """The places of each tensor; one that modules share has several."""
    found: dict[int, list[_Slot]] = {id(tensor): [] for tensor in tensors}
    for module in model.modules():
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                if id(tensor) in found:
                    found[id(tensor)].append(_Slot(module, holder, name))
    return [found[id(tensor)] for tensor in tensors]

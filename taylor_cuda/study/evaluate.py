"""Losses of a mini-batch without these or those units, the fast way where a model allows it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from taylor_cuda.errors import InputError
from taylor_cuda.graph.groups import Groups
from taylor_cuda.graph.observe import tolerance
from taylor_cuda.graph.recorder import copy_model
from taylor_cuda.study.batches import Batch, LossFn
from taylor_cuda.study.naive import Drops, loss_without
from taylor_cuda.study.recording import Recording, record
from taylor_cuda.study.replay import Part, part_after

__all__ = ["Evaluator", "default_memory"]

_ON_CPU = 32 * 2**20


def default_memory(device: torch.device) -> int:
    """Bytes that copies of a mini-batch may take: half of what is free on a GPU; on a CPU about what caches hold."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else _ON_CPU


def _to_channels_last(model: nn.Module) -> bool:
    """Lay out the weights of two-dimensional convolutions with channels last; whether there are any, on a CPU."""
    weights = [tensor for tensor in model.parameters() if tensor.dim() == 4 and tensor.device.type == "cpu"]
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return bool(weights)


class Evaluator:
    """Measures one model on one mini-batch after another.

    The first removal of each group is measured in both ways. Where they differ, or the pass can't be recorded, a
    warning says why, and from then on removals are whole forward passes.

    Args:
        model: in eval mode; call everything inside ``evaluating(model)``.
        groups: of this model.
        loss_fn: ``(outputs, targets)`` to the mean loss.
        memory: bytes that copies of a mini-batch may take; ``None``: :func:`default_memory`.

    Attributes:
        base: float64 scalar, the loss with nothing removed but what is ``off``.
        macs: products computed so far; those of whole passes are counted where one was recorded.
    """

    def __init__(self, model: nn.Module, groups: Groups, loss_fn: LossFn, memory: int | None = None) -> None:
        self._model, self._groups, self._loss_fn, self._memory = model, groups, loss_fn, memory
        self._twin: nn.Module | None = None
        self._recording: Recording | None = None
        self._parts: dict[str, Part] = {}
        self._whole: set[str] = set()
        self._checked: set[str] = set()
        self._off: dict[str, Tensor] = {}
        self.base = torch.zeros(())
        self.macs = 0
        try:
            self._twin = copy_model(model).eval()
        except Exception as error:
            self._go_whole(groups.sizes(), f"the model can't be copied: {error}")
        # oneDNN's convolutions of few channels take half the time with channels last
        self._channels_last = self._twin is not None and _to_channels_last(self._twin)

    def _go_whole(self, names: Sequence[str] | dict[str, int], why: str) -> None:
        """From now on these groups take whole forward passes."""
        fresh = [name for name in names if name not in self._whole]
        self._whole.update(fresh)
        what = "every removal" if len(self._whole) == len(self._groups) else f"removals from {', '.join(fresh)}"
        warnings.warn(f"oracle: {what} takes a whole forward pass: {why}", RuntimeWarning, stacklevel=2)

    def start(self, batch: Batch, names: Sequence[str], count: int = 1, off: Drops | None = None) -> None:
        """Take a mini-batch.

        Args:
            batch: on the model's device.
            names: the groups that will be asked for, in this order, each once.
            count: units in each removal.
            off: ``{group name: bool [size]}`` on the CPU, True = off in all that follows.
        """
        self._batch, self._off = batch, dict(off or {})
        self._recording, self._parts = None, {}
        fast = [name for name in names if name not in self._whole]
        if fast and self._twin is not None:
            keep = {name: (~drop).nonzero().flatten() for name, drop in self._off.items()}
            try:
                self._recording = self._record(self._twin, keep)
                self._parts = {name: part_after(self._recording, self._groups[name], count) for name in fast}
            except InputError:  # the arguments are at fault, not the way they are used
                raise
            except Exception as error:
                self._recording, self._parts = None, {}
                self._go_whole(self._groups.sizes(), f"{type(error).__name__}: {error}")
        if self._recording is None:
            self.base = self._whole_pass({})
        else:
            self.base = self._recording.base.double()
            self.macs += self._recording.macs
            self._forget()

    def _record(self, twin: nn.Module, keep: dict[str, Tensor]) -> Recording:
        try:
            return record(twin, self._groups, self._loss_fn, self._batch, keep)
        except InputError:
            raise
        except Exception:
            if not self._channels_last:
                raise
        # code may ask for views that only the model's own layout allows
        self._channels_last, self._twin = False, copy_model(self._model).eval()
        return record(self._twin, self._groups, self._loss_fn, self._batch, keep)

    def _forget(self) -> None:
        """Let go of what no group that is still to come reads."""
        if self._recording is not None:
            needed = frozenset[int]().union(*(part.recorded for part in self._parts.values()))
            values = self._recording.values
            for value in values.keys() - needed:
                del values[value]

    def losses(self, name: str, units: Tensor) -> Tensor:
        """The loss without the units of each row.

        Args:
            name: of the group.
            units: int64 ``[K, count]`` on the CPU, distinct in a row, none of them off already.

        Returns:
            float64 ``[K]`` on the model's device; but for the first call for a group, nothing waits for it.
        """
        part = self._parts.pop(name, None)
        found: Tensor | None = None
        if part is not None and len(units):
            try:
                found = self._replayed(part, units)
            except Exception as error:
                self._go_whole([name], f"{type(error).__name__}: {error}")
        if part is not None:
            del part
            self._forget()
        if found is not None and name not in self._checked:
            self._checked.add(name)
            expected = self._whole_pass({name: units[0]})
            if not self._equal(found[0], expected):
                self._go_whole([name], f"replayed the loss is {float(found[0]):.9g} instead of {float(expected):.9g}")
                found = None
        if found is None:
            found = self.base.new_empty(len(units))
            for at, row in enumerate(units):
                found[at] = self._whole_pass({name: row})
        return found

    def _replayed(self, part: Part, units: Tensor) -> Tensor:
        assert self._recording is not None
        memory = default_memory(self.base.device) if self._memory is None else self._memory
        copies = min(max(1, memory // part.bytes), len(units))
        found: list[Tensor] = []
        done = 0
        while done < len(units):
            try:
                found.append(part.losses(self._recording, units[done : done + copies]))
                done += len(found[-1])
            except torch.OutOfMemoryError:
                if copies == 1:
                    raise
                copies //= 2
        self.macs += part.macs * len(units)
        return torch.cat(found)

    def _whole_pass(self, units: dict[str, Tensor]) -> Tensor:
        drops = {name: drop.clone() for name, drop in self._off.items()}
        for name, row in units.items():
            drop = drops.setdefault(name, torch.zeros(self._groups[name].size, dtype=torch.bool))
            drop[row] = True
        self.macs += 0 if self._recording is None else self._recording.macs
        return loss_without(self._model, self._groups, self._loss_fn, self._batch, drops).double()

    def _equal(self, found: Tensor, expected: Tensor) -> bool:
        """Equal to rounding, or not finite in the same way."""
        bound = tolerance(self._model.parameters()) * max(0.1, abs(float(expected)), abs(float(self.base)))
        return bool(torch.isclose(found, expected, rtol=0, atol=bound, equal_nan=True))

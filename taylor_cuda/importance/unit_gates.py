"""A gate of 1 on every unit, multiplied in where the unit is read: exact derivatives of any order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from taylor_cuda.errors import InputError
from taylor_cuda.graph.checks import check_not_compacted
from taylor_cuda.graph.groups import ChannelGroup, named_tensors
from taylor_cuda.graph.sites import ReaderInputs, active_in_forward
from taylor_cuda.ops.reference import result_dtype

__all__ = ["UnitGates"]

TOGETHER = 16
"""Rows of the Hessian in one backward pass, where every operation of the model allows it."""


class UnitGates:
    """Gates z in a model, all of them 1, and what E(z) does around there.

    Every forward pass with gradients multiplies the inputs of all readers by their units' gates, which all readers of a
    unit share. The Hessian's diagonal takes a backward pass for each unit, through a graph of the gradient that holds
    as much again as that of the loss.

    Args:
        model: the traced module.
        groups: its groups.
    """

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        check_not_compacted(model, "taylor_so_hessian")
        self._model = model
        self._gates: Tensor | None = None
        self._together = TOGETHER
        readers = dict.fromkeys(member.tensor for group in groups for member in group.role("read"))
        self._inputs = ReaderInputs(model, readers, self._gated)
        self._handles = active_in_forward(model, self._inputs)

    def lay_out(self, groups: Sequence[ChannelGroup]) -> None:
        """Find the gate of every channel of every reader; what is in no unit has the last one, which stays 1."""
        tensors = named_tensors(self._model)
        self._units = sum(group.size for group in groups)
        self._gate_of: dict[str, Tensor] = {}
        first = 0
        for group in groups:
            for member in group.role("read"):
                length = tensors[member.tensor].shape[member.dim]
                index = self._gate_of.setdefault(member.tensor, torch.full((length,), self._units))
                index[member.index] = torch.arange(first, first + group.size)[:, None].expand_as(member.index)
            first += group.size
        self._gates = None

    def _gated(self, name: str, x: Tensor, dim: int) -> Tensor:
        if not torch.is_grad_enabled():
            return x
        if self._gates is None:
            self._gates = torch.ones(self._units, dtype=result_dtype(x.dtype), device=x.device, requires_grad=True)
        index = self._gate_of[name]
        if index.device != x.device:
            index = self._gate_of[name] = index.to(x.device)
        gates = torch.cat([self._gates, self._gates.new_ones(1)])[index].to(x.dtype)
        return x * gates.view(-1, *(1,) * (x.dim() - 1 - dim))

    def slope_and_curve(self, loss: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
        """dE/dz and the diagonal of d²E/dz², flat ``[units]``. The graph of the loss stays.

        Args:
            loss: of forward passes through the gates.
            most: take the curvature of so many units only, the first ones; the others have 0.

        Raises:
            InputError: no forward pass since the last call, or an operation has no second derivative.
        """
        gates = self._gates
        slope = None
        if gates is not None and loss.requires_grad:
            (slope,) = torch.autograd.grad(loss, gates, create_graph=True, allow_unused=True)
        if gates is None or slope is None:
            raise InputError("no forward pass with gradients that this loss is of; call the model, then backward")
        curve = torch.zeros_like(slope)
        if slope.requires_grad:
            for units in torch.arange(self._units, device=gates.device)[:most].split(self._together):
                curve[units] = self._rows(slope, gates, units)
        return slope.detach(), curve

    def _rows(self, slope: Tensor, gates: Tensor, units: Tensor) -> Tensor:
        """The diagonal at some units."""
        if self._together > 1:
            wanted = torch.zeros(len(units), len(gates), dtype=gates.dtype, device=gates.device)
            wanted.scatter_(1, units[:, None], 1.0)
            try:
                (rows,) = torch.autograd.grad(slope, gates, wanted, retain_graph=True, is_grads_batched=True)
                return rows.gather(1, units[:, None]).flatten()
            except (RuntimeError, NotImplementedError):  # something has no batched form, or too little memory
                self._together = 1
        found = []
        for unit in units:
            (row,) = torch.autograd.grad(slope.index_select(0, unit.view(1)).sum(), gates, retain_graph=True)
            found.append(row.index_select(0, unit.view(1)))
        return torch.cat(found)

    def clear(self) -> None:
        """Forget what the loss's own backward pass left at the gates."""
        if self._gates is not None:
            self._gates.grad = None

    def close(self) -> None:
        """Take the gates out of the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

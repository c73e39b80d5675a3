"""Kept rows and columns of dense tensors as one autograd function, whose backward pass scatters the gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from taylor_cuda.ops import library
from taylor_cuda.ops.checks import SUPPORTED

__all__ = ["Kept", "Selection"]

Kept = Mapping[int, Tensor]
"""``{dimension: int64 positions that are kept, ascending, or -1 for zeros}`` of one tensor, on the CPU."""


class Selection:
    """What is kept of several dense tensors.

    Args:
        tensors: parameters and buffers, on one device.
        kept: what is kept of each.
    """

    def __init__(self, tensors: Sequence[Tensor], kept: Sequence[Kept]) -> None:
        self.kept = tuple(kept)
        self._kinds = [(tensor.device, tensor.dtype) for tensor in tensors]
        self._fused = [i for i, tensor in enumerate(tensors) if _is_fused(tensor, kept[i])]
        self._lists = _Lists.of([kept[i] for i in self._fused], tensors[0].device) if tensors else None

    def is_for(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these have the dtypes of those it was made for, and lie where they did."""
        return self._kinds == [(tensor.device, tensor.dtype) for tensor in tensors]

    def gather(self, tensors: Sequence[Tensor], cast: Sequence[bool], dtype: torch.dtype) -> list[Tensor]:
        """The kept part of every tensor: one launch for those that require grad, which get it, and one for the others.

        Args:
            tensors: those that the selection was made for, or others like them.
            cast: of which the part is to be of ``dtype`` instead of their own.
            dtype: see ``cast``.
        """
        parts: list[Any] = [None] * len(tensors)
        trained = torch.is_grad_enabled()
        for wanted, run in ((True, _Gather.apply), (False, _gather)):
            chosen = [k for k, i in enumerate(self._fused) if (trained and tensors[i].requires_grad) is wanted]
            places = [self._fused[k] for k in chosen]
            if not places or self._lists is None:
                continue
            found = run(self._lists.some(chosen), [cast[i] for i in places], dtype, *[tensors[i] for i in places])
            for i, part in zip(places, found, strict=True):
                parts[i] = part
        for i, tensor in enumerate(tensors):
            if parts[i] is None:
                parts[i] = _select(tensor, self.kept[i]).to(dtype if cast[i] else tensor.dtype)
        return parts

    @torch.no_grad()
    def write_back(self, values: Sequence[Tensor | None], targets: Sequence[Tensor]) -> None:
        """Put gathered values back to where they came from; what was not kept stays as it is, as do those of None."""
        fused = [k for k, i in enumerate(self._fused) if values[i] is not None]
        if fused and self._lists is not None:
            lists, places = self._lists.some(fused), [self._fused[k] for k in fused]
            given = [value for i in places if (value := values[i]) is not None]
            library.scatter_kept(given, [targets[i] for i in places], lists.keep, lists.bounds, False)
        for i, (value, target) in enumerate(zip(values, targets, strict=True)):
            if value is not None and i not in self._fused:
                chosen = _spread(torch.ones_like(value, dtype=torch.bool), target, self.kept[i], torch.bool)
                target.copy_(torch.where(chosen, _spread(value, target, self.kept[i]), target))


class _Lists:
    """The lists of some tensors as ``ops.gather_kept`` takes them."""

    def __init__(self, kept: Sequence[Kept], keep: Tensor, bounds: list[int]) -> None:
        self.kept, self.keep, self.bounds = kept, keep, bounds
        self._parts: dict[tuple[int, ...], _Lists] = {}

    @classmethod
    def of(cls, kept: Sequence[Kept], device: torch.device) -> _Lists:
        """In one transfer."""
        none = torch.empty(0, dtype=torch.int64)
        parts = [each.get(dim, none) for each in kept for dim in (0, 1)]
        bounds = torch.tensor([0, *(part.numel() for part in parts)]).cumsum(0).tolist()
        return cls(kept, torch.cat([none, *parts]).to(device), bounds)

    def some(self, chosen: Sequence[int]) -> _Lists:
        """Those of some of the tensors; made once."""
        if len(chosen) == len(self.kept):
            return self
        key = tuple(chosen)
        if key not in self._parts:
            self._parts[key] = self.of([self.kept[i] for i in chosen], self.keep.device)
        return self._parts[key]


def _gather(lists: _Lists, cast: list[bool], dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    found: list[Tensor] = library.gather_kept(list(tensors), lists.keep, lists.bounds, cast, dtype)
    return found


class _Gather(torch.autograd.Function):
    """One launch for all tensors, there and back."""

    @staticmethod
    def forward(ctx: Any, lists: _Lists, cast: list[bool], dtype: torch.dtype, *tensors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        # No saved tensors: their values are of no concern to the backward pass, and several may run.
        ctx.lists, ctx.tensors = lists, tensors
        return tuple(_gather(lists, cast, dtype, *tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [i for i, gradient in enumerate(gradients) if gradient is not None]
        found: list[Tensor | None] = [None] * len(gradients)
        if torch.is_grad_enabled():  # somebody will differentiate the gradients
            for i in there:
                found[i] = _spread(gradients[i], ctx.tensors[i], ctx.lists.kept[i])
        else:
            lists = ctx.lists.some(there)
            targets = [torch.empty_like(ctx.tensors[i]) for i in there]
            given = [gradient for i in there if (gradient := gradients[i]) is not None]
            library.scatter_kept(given, targets, lists.keep, lists.bounds, True)
            for i, target in zip(there, targets, strict=True):
                found[i] = target
        return (None, None, None, *found)


def _is_fused(tensor: Tensor, kept: Kept) -> bool:
    """Whether ``ops.gather_kept`` takes this tensor: rows and columns, of a dtype that it has on the device."""
    there = tensor.dtype in SUPPORTED and (tensor.dtype != torch.float64 or tensor.device.type == "cpu")
    return there and tensor.layout == torch.strided and all(dim in (0, 1) for dim in kept)


def _select(tensor: Tensor, kept: Kept) -> Tensor:
    """``gather_kept`` for one tensor of any kind, of ops that autograd knows."""
    for dim, positions in kept.items():
        positions = positions.to(tensor.device)
        there = (positions >= 0).view(-1, *[1] * (tensor.dim() - 1 - dim))
        tensor = tensor.index_select(dim, positions.clamp(min=0))
        tensor = torch.where(there, tensor, tensor.new_zeros(()))
    return tensor


def _spread(value: Any, like: Tensor, kept: Kept, dtype: torch.dtype | None = None) -> Tensor:
    """``scatter_kept`` with ``clear`` for one tensor of any kind, of ops that autograd knows."""
    result: Tensor = value.to(dtype or like.dtype)
    for dim, positions in kept.items():
        positions = positions.to(result.device)
        chosen = (positions >= 0).nonzero().flatten()
        shape = [*result.shape[:dim], like.shape[dim], *result.shape[dim + 1 :]]
        result = result.new_zeros(shape).index_copy(dim, positions[chosen], result.index_select(dim, chosen))
    return result

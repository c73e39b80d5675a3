"""The model as it will be after a cut, with its shapes as they are: ``tc.masked``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from taylor_cuda.graph.checks import check_model, check_not_compacted
from taylor_cuda.graph.groups import Groups, Role, named_tensors, units_to_keep
from taylor_cuda.graph.sites import RMS_NORMS, ReaderInputs, active_in_forward
from taylor_cuda.graph.slicing import stays

__all__ = ["MaskedForward", "masked", "position_masks"]


def position_masks(model: nn.Module, groups: Groups, keep: Mapping[str, Tensor], role: Role) -> dict[str, Tensor]:
    """For every tensor with a member of ``role``: bool over the positions of that member's dimension, True = kept.

    Tensors of which everything is kept are left out.
    """
    tensors = named_tensors(model)
    found = stays(model, groups, keep, role)
    return {name: torch.from_numpy(mask).to(tensors[name].device) for (name, _dim), mask in found.items()}


class MaskedForward(ReaderInputs):
    """Zeroes dropped positions at the inputs of readers, and lets a LayerNorm or RMSNorm see kept positions only."""

    def __init__(self, model: nn.Module, groups: Groups, keep: Mapping[str, Tensor]) -> None:
        self._read = position_masks(model, groups, keep, "read")
        super().__init__(model, self._read, self._zero_dropped)
        tensors = named_tensors(model)
        norms = position_masks(model, groups, keep, "norm")
        self._norm = {id(tensors[name]): mask.nonzero().flatten() for name, mask in norms.items()}

    def _zero_dropped(self, name: str, x: Tensor, dim: int) -> Tensor:
        mask = self._read[name]
        return torch.where(mask.view(-1, *(1,) * (x.dim() - 1 - dim)), x, x.new_zeros(()))

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Layer normalisations in a way of their own, everything else as it is."""
        if func is F.layer_norm:
            return self._layer_norm(*args, **kwargs)
        if func in RMS_NORMS:
            return self._rms_norm(func, *args, **kwargs)
        return func(*args, **kwargs)

    def weights(self) -> set[int]:
        """The readers, and the normalisations whose statistics change."""
        return super().weights() | self._norm.keys()

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        return self._normalised(F.layer_norm, input, normalized_shape, (weight, bias), eps)

    def _rms_norm(
        self, func: Any, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        return self._normalised(func, input, normalized_shape, (weight,), eps)

    def _normalised(
        self, func: Any, input: Tensor, shape: Any, vectors: tuple[Tensor | None, ...], eps: float | None
    ) -> Tensor:
        kept = self._norm.get(id(next((vector for vector in vectors if vector is not None), None)))
        if kept is None:
            return cast(Tensor, func(input, shape, *vectors, eps))
        some = [None if vector is None else vector[kept] for vector in vectors]
        y = func(input.index_select(-1, kept), [kept.numel()], *some, eps)
        return torch.zeros(input.shape, dtype=y.dtype, device=y.device).index_copy(-1, kept, y)


@contextmanager
def masked(model: nn.Module, groups: Groups, plan: Any) -> Iterator[None]:
    """The channels a plan drops are off, shapes as they were. What ``tc.cut`` will compute, before it is done.

    Args:
        model: the traced module itself, not a compiled or wrapped one.
        groups: from ``tc.trace`` of this model.
        plan: a ``tc.Plan``, or ``{group name: int64 indices of the units to keep}``.

    Dropped units are zeroed at the inputs of their readers; a LayerNorm inside a group takes its statistics over what
    is kept.
    """
    check_model(model, "masked")
    check_not_compacted(model, "masked")
    keep = units_to_keep(groups, plan)
    masks = MaskedForward(model, groups, keep)
    mode: TorchFunctionMode = masks
    handles = active_in_forward(model, masks)
    try:
        with mode:  # here, not in the hooks: what was compiled around the model looks at modes, but not at hooks
            yield
    finally:
        for handle in handles:
            handle.remove()

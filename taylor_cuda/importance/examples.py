"""What per-example criteria make of t[n, unit], the Σ_l a·g of each example at the inputs of a unit's readers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taylor_cuda.errors import InputError
from taylor_cuda.graph.groups import ChannelGroup
from taylor_cuda.importance.activations import ForwardPass

__all__ = ["mean_magnitude", "sum_of_squares"]


def sum_of_squares(group: ChannelGroup, passes: Sequence[ForwardPass]) -> Tensor:
    """Σ_n t² of every unit, over all forward passes."""
    return torch.stack([_examples(group, forward, mean=False).square().sum(0) for forward in passes]).sum(0)


def mean_magnitude(group: ChannelGroup, passes: Sequence[ForwardPass]) -> Tensor:
    """mean_n |t / L| of every unit, over all forward passes."""
    return torch.cat([_examples(group, forward, mean=True) for forward in passes]).abs().mean(0)


def _examples(group: ChannelGroup, forward: ForwardPass, *, mean: bool) -> Tensor:
    """t[n, unit] of one forward pass, added up over readers; with ``mean`` each reader's sum is divided by its L."""
    total: Tensor | None = None
    for member in group.role("read"):
        sums = forward.sums.get(member.tensor)
        if sums is None:
            continue
        t = sums[:, member.index.to(sums.device)].sum(dim=2)
        t = t / forward.length[member.tensor] if mean else t
        if total is not None and total.shape != t.shape:
            raise InputError(
                f"group {group.name!r}: its readers see {total.shape[0]} and {t.shape[0]} examples in one forward "
                "pass; per-example criteria need one batch size, use criterion='taylor_fo'"
            )
        total = t if total is None else total + t
    if total is None:
        raise InputError(f"group {group.name!r}: none of its readers ran in the last forward pass")
    return total

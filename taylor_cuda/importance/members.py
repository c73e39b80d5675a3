"""Which members of a group a criterion looks at."""

from __future__ import annotations

from torch import Tensor

from taylor_cuda.graph.groups import ChannelGroup, Member

__all__ = ["scales_of", "trained_gate"]


def trained_gate(group: ChannelGroup, tensors: dict[str, Tensor]) -> tuple[Member, ...]:
    """The members whose Σ w·dw is the gate's gradient (DESIGN 3.2 or 3.3), or none where one of them is frozen.

    The affine form is preferred: it reads 2 numbers a channel, and normalisations accumulate in fp32 under autocast.
    """
    for members in (group.affine, group.role("read")):
        if members and all(tensors[member.tensor].requires_grad for member in members):
            return members
    return ()


def scales_of(group: ChannelGroup) -> tuple[Member, ...]:
    """The γ members of a group's normalisations."""
    return tuple(member for member in group.role("norm") if member.tensor.rpartition(".")[2] == "weight")

"""Which members of a group a criterion looks at."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from taylor_cuda.graph.groups import ChannelGroup, Member

__all__ = ["affine_of", "blocks_of", "scales_of", "trained_gate"]


def trained_gate(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> tuple[Member, ...]:
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


def affine_of(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> tuple[Member, ...]:
    """The γ and β members of a group's normalisations."""
    owners = {member.tensor.rpartition(".")[0] for member in scales_of(group)}
    wanted = {f"{owner}.{name}" for owner in owners for name in ("weight", "bias")} & set(tensors)
    return tuple(member for member in group.role("norm") if member.tensor in wanted)


def blocks_of(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> int:
    """How many additions a group's stream has: one less than the layers that write into it; 1 where none is added.

    A depthwise filter carries a stream on and adds nothing to it.
    """
    writers = {member.tensor for member in group.role("write")}
    adding = [name for name in writers if tensors[name].dim() < 3 or tensors[name].shape[1] > 1]
    return max(1, len(adding) - 1)

"""Where the gate of a unit can be read off a normalisation (DESIGN 3.2).

γ·dγ + β·dβ is the gradient of a gate right after a normalisation. It is the gate of the unit (the sum of W·dW over its
readers) when every path from that output ends in a reader of the unit and meets nothing but positively homogeneous maps
on the way, and every reader's input came that way. (Euler: for f(z·x) = z·f(x), the gate before f is the gate after.)
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from taylor_cuda.graph.groups import ChannelGroup, Member
from taylor_cuda.graph.labels import Bools
from taylor_cuda.graph.units import Units

__all__ = ["with_affine"]


def _consumed(units: Units) -> tuple[Bools, Bools]:
    """Origins that reached readers, bool ``[nodes]``; and classes one of whose readers met another input, by root."""
    root = units.classes.root
    intact = units.flow.origins()
    consumed, spoiled = np.zeros(root.size + 1, dtype=bool), np.zeros(root.size, dtype=bool)
    for read in units.flow.reads:
        if read.labels is None:
            continue
        labels = read.labels[read.labels >= 0]
        good = intact[labels]
        consumed[labels[good]] = True
        spoiled[root[labels[~good]]] = True
    return consumed[:-1], spoiled


def _pair(units: Units, group: ChannelGroup, weight: Member) -> tuple[Member, Member] | None:
    """The weight of a normalisation and its bias, where the bias takes the same positions."""
    bias_name = units.flow.affine[weight.tensor]
    for bias in group.members:
        if bias.tensor == bias_name and bias.dim == 0 and bias.index.equal(weight.index):
            return weight, bias
    return None


def _of_group(units: Units, group: ChannelGroup, consumed: Bools, spoiled: Bools) -> tuple[Member, ...]:
    root = units.classes.root
    first = group.members[0]
    start = units.places[units.at[first.tensor, first.dim]].start
    if spoiled[root[start + first.index[:, 0].numpy()]].any():
        return ()
    pairs: list[Member] = []
    for member in group.members:
        if member.tensor not in units.flow.affine:
            continue
        used = consumed[units.places[units.at[member.tensor, member.dim]].start + member.index.numpy()]
        if not used.any():
            continue
        pair = _pair(units, group, member)
        if pair is None or not used.all():
            return ()
        pairs.extend(pair)
    return tuple(pairs)


def with_affine(units: Units, groups: list[ChannelGroup]) -> list[ChannelGroup]:
    """The groups with ``affine`` filled in where it holds."""
    consumed, spoiled = _consumed(units)
    return [replace(group, affine=_of_group(units, group, consumed, spoiled)) for group in groups]

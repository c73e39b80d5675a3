"""From vectors over positions of tensors to one flat vector over units: one gather and one sum, however many layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from taylor_cuda.graph.groups import ChannelGroup, Member

Place = tuple[str, int]
"""A tensor's name and one of its dimensions."""


class UnitSums:
    """Adds up, for every unit of ``groups``, the entries at all of its positions.

    Args:
        groups: the groups, in the order of the result.
        members: which members of each group count.
        length: positions along one dimension of one tensor.
    """

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        members: Callable[[ChannelGroup], Sequence[Member]],
        length: Callable[[str, int], int],
    ) -> None:
        self.places: list[Place] = []
        self.start: list[int] = []
        offset: dict[Place, int] = {}
        total = 0
        columns: list[Tensor] = []
        for group in groups:
            parts = []
            for member in members(group):
                place = (member.tensor, member.dim)
                if place not in offset:
                    offset[place] = total
                    self.places.append(place)
                    self.start.append(total)
                    total += length(*place)
                parts.append(member.index + offset[place])
            columns.append(torch.cat(parts, dim=1) if parts else torch.empty(group.size, 0, dtype=torch.int64))
        self.total = total
        # One more entry, always 0, fills the rows of units that have fewer positions than the widest.
        widest = max((column.shape[1] for column in columns), default=0)
        padded = [torch.nn.functional.pad(column, (0, widest - column.shape[1]), value=total) for column in columns]
        self._index = torch.cat(padded) if padded else torch.empty(0, widest, dtype=torch.int64)

    def __call__(self, vectors: Mapping[Place, Tensor]) -> Tensor:
        """Flat ``[units]``: the sum over each unit's positions. A place missing from ``vectors`` counts as zeros."""
        some = next(iter(vectors.values()))
        ends = [*self.start[1:], self.total]
        pieces = [
            vectors[place] if place in vectors else some.new_zeros(end - start)
            for place, start, end in zip(self.places, self.start, ends, strict=True)
        ]
        flat = torch.cat([*pieces, some.new_zeros(1)])
        if self._index.device != flat.device:
            self._index = self._index.to(flat.device)
        return flat[self._index].sum(dim=1)


def split_by_group(flat: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """The flat vector over all units as one vector a group."""
    return dict(zip(sizes, flat.split(list(sizes.values())), strict=True))

"""From vectors over positions of tensors to one flat vector over units: one call, however many layers and groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from taylor_cuda import ops
from taylor_cuda.graph.groups import ChannelGroup, Member

Place = tuple[str, int]
"""A tensor's name and one of its dimensions."""

Members = Callable[[ChannelGroup], Sequence[Member]]


class UnitSums:
    """Where the units of ``groups`` lie among vectors over positions, as ``ops.accumulate_importance`` wants it.

    What sums over positions are made of may come from several sources (parameters, gates). The vectors of a source are
    those of its places, in their order, and the sources follow one another.

    Args:
        groups: the groups, in the order of the result.
        sources: for each source, which members of each group count.
        length: positions along one dimension of one tensor.

    Attributes:
        places: for each source, the places its members are in.
        lengths: positions of each of them.
        units: units of all groups.
        entries: int64 ``[E]``, the positions of all units, counted through all sources.
        offsets: int64 ``[units + 1]``: unit u has the entries from offsets[u] up to offsets[u + 1].
        group_of: int64 ``[units]``: the group of each unit, by number.
    """

    def __init__(
        self, groups: Sequence[ChannelGroup], sources: Sequence[Members], length: Callable[[str, int], int]
    ) -> None:
        self.places: list[list[Place]] = []
        self.lengths: list[list[int]] = []
        start: dict[tuple[int, Place], int] = {}
        total = 0
        for source, members in enumerate(sources):
            places = dict.fromkeys((m.tensor, m.dim) for group in groups for m in members(group))
            self.places.append(list(places))
            self.lengths.append([length(*place) for place in places])
            for place, size in zip(places, self.lengths[-1], strict=True):
                start[source, place] = total
                total += size
        rows = []
        for group in groups:
            positions = [
                member.index + start[source, (member.tensor, member.dim)]
                for source, members in enumerate(sources)
                for member in members(group)
            ]
            rows.append(torch.cat([torch.empty(group.size, 0, dtype=torch.int64), *positions], dim=1))
        sizes = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        widths = torch.tensor([row.shape[1] for row in rows], dtype=torch.int64)
        self.group_of = torch.repeat_interleave(sizes)
        self.units = self.group_of.numel()
        self.entries = torch.cat([torch.empty(0, dtype=torch.int64), *(row.flatten() for row in rows)])
        self.offsets = torch.nn.functional.pad(widths[self.group_of].cumsum(0), (1, 0))
        self._zeros = torch.zeros(0)

    def accumulate(
        self,
        sums: Sequence[Tensor],
        window: Tensor,
        counts: Tensor | None,
        reduction: str,
        scale: float | Tensor = 1.0,
        added: Tensor | None = None,
        finite: Tensor | None = None,
    ) -> None:
        """``ops.accumulate_importance`` with these units, for sums of any floating types and a scale of any kind."""
        if self.entries.device != window.device:
            self.entries, self.offsets = self.entries.to(window.device), self.offsets.to(window.device)
            self.group_of = self.group_of.to(window.device)
        dtype = window.dtype
        if any(each.dtype != dtype for each in sums):
            sums = [each.to(dtype) for each in sums]
        added = None if added is None else added.to(dtype)
        divisor = scalar_beside(scale, window)
        ops.accumulate_importance(sums, self.entries, self.offsets, window, counts, reduction, divisor, added, finite)

    def values(self, sums: Sequence[Tensor], reduction: str, scale: float | Tensor = 1.0) -> Tensor:
        """Flat ``[units]``: the importance itself, NaN where it is NaN."""
        window = self.new_window(sums)
        self.accumulate(sums, window, None, reduction, scale)
        return window

    def new_window(self, like: Sequence[Tensor]) -> Tensor:
        """Flat ``[units]`` of zeros: float64 if one of the given tensors is, otherwise float32."""
        dtype = torch.float64 if any(each.dtype == torch.float64 for each in like) else torch.float32
        return torch.zeros(self.units, dtype=dtype, device=like[0].device)

    def completed(self, source: int, found: Sequence[Tensor | None]) -> list[Tensor]:
        """The vectors ``[C_i]`` of a source's places, with zeros for those that are missing; one is there at least."""
        some = next(each for each in found if each is not None)
        pairs = zip(found, self.lengths[source], strict=True)
        return [self.zeros(length, some) if each is None else each for each, length in pairs]

    def zeros(self, count: int, like: Tensor) -> Tensor:
        """``[count]`` of zeros beside ``like``, to read only: all that are asked for share their memory."""
        zeros = self._zeros
        if zeros.device != like.device or zeros.dtype != like.dtype or len(zeros) < count:
            self._zeros = zeros = like.new_zeros(count)
        return zeros[:count]


def scalar_beside(value: float | Tensor, like: Tensor) -> Tensor | None:
    """A divisor as a scalar tensor of the device and dtype of ``like``, or none for 1. The host waits for no device."""
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(like)
    return None if value == 1.0 else torch.full((), value, dtype=like.dtype, device=like.device)


def split_by_group(flat: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """The flat vector over all units as one vector a group."""
    return dict(zip(sizes, flat.split(list(sizes.values())), strict=True))

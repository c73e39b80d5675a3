"""Which kept counts a group may have: floors and rounding, for every tensor that is sliced.

A group may keep all of its units, or a multiple of its **quantum** that is no less than its floor. The quantum makes
what the group takes of every dimension it lies in a multiple of ``round_to``: a unit that takes ``width`` positions
needs ``round_to / gcd(round_to, width)`` units, and the group the least common multiple of these over its members.

Where several groups share a dimension (a concatenation) and one of them does not start at a multiple, slicing another
alone would leave the sum off. Such groups are **joined**: the first removal takes all that start off a multiple down to
one together, and only then does each move on its own. Positions that nothing can move (frozen channels, a group already
at its floor) are beyond rounding: a dimension that holds them is a multiple of ``round_to`` plus those.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from torch import nn

from taylor_cuda.errors import InputError
from taylor_cuda.graph.groups import ChannelGroup, Groups

__all__ = ["Rungs", "allowed_counts", "resolve_round_to"]


@dataclass(frozen=True)
class Rungs:
    """The kept counts that each group may have: ``size``, then ``first``, ``first - quantum``, …, ``lowest``.

    Attributes:
        first: the greatest count below the size; the size itself where the group can't move.
        lowest: the least count; the size itself where the group can't move.
        quantum: the step between counts.
        joined: groups whose first removal is a common one, as a number; -1 for a group of its own.
    """

    first: tuple[int, ...]
    lowest: tuple[int, ...]
    quantum: tuple[int, ...]
    joined: tuple[int, ...]


def resolve_round_to(model: nn.Module, round_to: int | str) -> int:
    """``"auto"`` as a number: 8 where CUDA parameters have 16 bits (what tensor cores need), 1 elsewhere."""
    if round_to == "auto":
        parameters = list(model.parameters())
        return 8 if any(p.is_cuda and p.is_floating_point() and p.element_size() == 2 for p in parameters) else 1
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise InputError(f'round_to: wanted "auto" or a whole number of at least 1, got {round_to!r}')
    return round_to


def allowed_counts(groups: Groups, round_to: int = 1, min_keep: int = 1, max_ratio: float = 1.0) -> Rungs:
    """The counts every group may have.

    Args:
        groups: from ``tc.trace``.
        round_to: what every sliced dimension stays a multiple of.
        min_keep: units that every group keeps at least.
        max_ratio: largest fraction of a group's *original* units that may be gone, over all cuts together.

    Raises:
        InputError: a floor that isn't one.
    """
    if isinstance(min_keep, bool) or not isinstance(min_keep, int) or min_keep < 1:
        raise InputError(f"min_keep: wanted a whole number of at least 1, got {min_keep!r}")
    if isinstance(max_ratio, bool) or not isinstance(max_ratio, (int, float)) or not 0 <= max_ratio <= 1:
        raise InputError(f"max_ratio: wanted a fraction from 0 to 1, got {max_ratio!r}")
    first, lowest, quantum = [], [], []
    for group in groups:
        step = math.lcm(1, *(round_to // math.gcd(round_to, member.width) for member in group.members))
        # The small addend keeps 0.29 * 100 from being 28 by the rounding of floats.
        floor = max(min_keep, group.original_size - math.floor(group.original_size * max_ratio + 1e-9))
        low, high = -(-floor // step) * step, (group.size - 1) // step * step
        movable = low <= high
        first.append(high if movable else group.size)
        lowest.append(low if movable else group.size)
        quantum.append(step)
    return Rungs(tuple(first), tuple(lowest), tuple(quantum), _join(groups, first, quantum))


def _join(groups: Groups, first: list[int], quantum: list[int]) -> tuple[int, ...]:
    """Number the sets of movable groups that share a dimension with one that starts off a multiple."""
    movable = [group.size != count for group, count in zip(groups, first, strict=True)]
    off = [m and group.size % q != 0 for group, m, q in zip(groups, movable, quantum, strict=True)]
    sharing: dict[tuple[str, int], set[int]] = defaultdict(set)
    for number, group in enumerate(groups):
        if movable[number]:
            for place in _places(group):
                sharing[place].add(number)
    parent = list(range(len(groups)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for together in sharing.values():
        if len(together) > 1 and any(off[number] for number in together):
            least = min(root(number) for number in together)
            for number in together:
                parent[root(number)] = least
    count = [0] * len(groups)
    for number in range(len(groups)):
        count[root(number)] += 1
    return tuple(root(number) if count[root(number)] > 1 else -1 for number in range(len(groups)))


def _places(group: ChannelGroup) -> set[tuple[str, int]]:
    return {(member.tensor, member.dim) for member in group.members}

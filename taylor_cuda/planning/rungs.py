"""Which kept counts a group may have: floors and rounding, for every tensor that is sliced.

A group may keep all of its units, or a multiple of its **quantum** that is no less than its floor. The quantum makes
what the group takes of every dimension it lies in a multiple of ``round_to``: a unit that takes ``width`` positions
needs ``round_to / gcd(round_to, width)`` units, and the group the least common multiple of these over its members.

Where several groups share a dimension (a concatenation) and one of them does not start at a multiple, slicing another
alone would leave the sum off. Such groups are **joined**: the first removal takes all that start off a multiple down to
one together, and only then does each move on its own. Positions that nothing can move (frozen channels, a group with no
smaller count) may be beyond rounding: a dimension that they keep off a multiple today is left so, the rest of it
rounded; but a dimension that is a multiple today never stops being one, so a group that makes it one together with
them can't move either.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from torch import nn

from taylor_cuda.errors import InputError
from taylor_cuda.graph.groups import Groups
from taylor_cuda.planning.cost import Factor, Lengths

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


def allowed_counts(
    groups: Groups, lengths: Lengths, round_to: int = 1, min_keep: int = 1, max_ratio: float = 1.0
) -> Rungs:
    """The counts every group may have.

    Args:
        groups: from ``tc.trace``.
        lengths: the dimensions that they lie in.
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
    sizes = [group.size for group in groups]
    first, lowest, quantum = [], [], []
    for group in groups:
        step = math.lcm(1, *(round_to // math.gcd(round_to, member.width) for member in group.members))
        # The small addend keeps 0.29 * 100 from being 28 by the rounding of floats.
        floor = max(min_keep, group.original_size - math.floor(group.original_size * max_ratio + 1e-9))
        first.append((group.size - 1) // step * step)
        lowest.append(-(-floor // step) * step)
        quantum.append(step)
    movable = [low <= high for low, high in zip(lowest, first, strict=True)]
    joined = [-1] * len(sizes)
    if round_to > 1:
        places = list(set(lengths.places.values()))
        _hold(places, sizes, movable, round_to)
        joined = _join(places, sizes, movable, quantum, round_to)
    return Rungs(
        first=tuple(count if moves else size for count, moves, size in zip(first, movable, sizes, strict=True)),
        lowest=tuple(count if moves else size for count, moves, size in zip(lowest, movable, sizes, strict=True)),
        quantum=tuple(quantum),
        joined=tuple(joined),
    )


def _fixed(place: Factor, sizes: list[int], movable: list[bool]) -> int:
    """Positions along a dimension that nothing can move."""
    return place.constant + sum(width * sizes[group] for group, width in place.widths if not movable[group])


def _hold(places: list[Factor], sizes: list[int], movable: list[bool], round_to: int) -> None:
    """Make unmovable what only makes up a multiple together with positions that can't move."""
    held = True
    while held:
        held = False
        for place in places:
            if place.at(sizes) % round_to == 0 and _fixed(place, sizes, movable) % round_to != 0:
                for group, width in place.widths:
                    if movable[group] and width * sizes[group] % round_to != 0:
                        movable[group], held = False, True


def _join(places: list[Factor], sizes: list[int], movable: list[bool], quantum: list[int], round_to: int) -> list[int]:
    """Number the sets of movable groups that share a dimension with one that starts off a multiple."""
    parent = list(range(len(sizes)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for place in places:
        together = [group for group, _ in place.widths if movable[group]]
        rounds = _fixed(place, sizes, movable) % round_to == 0
        if len(together) > 1 and rounds and any(sizes[group] % quantum[group] for group in together):
            least = min(root(group) for group in together)
            for group in together:
                parent[root(group)] = least
    members = Counter(root(group) for group in range(len(sizes)))
    return [root(group) if members[root(group)] > 1 else -1 for group in range(len(sizes))]

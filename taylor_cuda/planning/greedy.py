"""The planner in Python: what ``csrc/planner`` computes, bit for bit, and its stand-in where that wasn't built.

Removal. Each group offers one **chunk**: its least valued units, down to its next allowed count. The chunk with the
least value per unit of cost saved goes next, until every limit holds; the saving is the sum, over limits not yet met,
of the fraction of the original cost that goes, at the widths of that moment. What is met stays met, since costs only
fall.

Why a lazy heap is exact. Costs are polynomials of the kept counts without negative coefficients, so what removing a
chunk saves only falls as other groups shrink and as limits are met: value ÷ saving only rises (and so does value ·
saving where the value is negative), in floating point too, because rounding is monotone. An entry that is out of date
therefore stands too early in the heap, never too late; if it still is the least after it was brought up to date, it is
the least of all.

Giving back. The last chunk usually overshoots. Chunks go back in order of their value, highest first, as long as every
limit holds; a chunk that doesn't fit once never will, since giving back only raises costs.

Ties go to the group that comes first, then to the unit that comes first.
"""

from __future__ import annotations

import heapq
import math

from taylor_cuda.planning.problem import Problem

__all__ = ["solve"]

Moves = list[tuple[int, int]]
"""``(group, its new count)``, one or several groups at once."""


def solve(problem: Problem) -> list[int]:
    """The kept count of every group.

    Raises:
        ValueError: the limits don't hold even at the lowest counts.
    """
    state = _State(problem)
    _remove(state)
    _give_back(state)
    return state.counts


class _State:
    """Kept counts with the costs they imply."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.counts = list(problem.sizes)
        self.lengths = [
            constant + sum(width * self.counts[group] for group, width in widths)
            for constant, widths in zip(problem.constants, problem.widths, strict=True)
        ]
        self.elements = [math.prod([self.lengths[factor] for factor in product]) for product in problem.products]
        self.totals = [sum(c * n for c, n in zip(row, self.elements, strict=True)) for row in problem.coefficients]
        self.factors_of: list[list[tuple[int, int]]] = [[] for _ in self.counts]
        for factor, widths in enumerate(problem.widths):
            for group, width in widths:
                self.factors_of[group].append((factor, width))
        terms_of_factor: list[list[int]] = [[] for _ in problem.constants]
        for term, product in enumerate(problem.products):
            for factor in set(product):
                terms_of_factor[factor].append(term)
        self.terms_of = [sorted({t for f, _ in row for t in terms_of_factor[f]}) for row in self.factors_of]
        # A joined set is entered when those of its groups that start off a multiple have come down to one, all at once.
        self.members: dict[int, list[int]] = {}
        for group, least in enumerate(problem.joined):
            if least >= 0:
                self.members.setdefault(least, []).append(group)
        self.entered = dict.fromkeys(self.members, False)

    def entry(self, least: int) -> Moves:
        """The first removal of a joined set."""
        p = self.problem
        return [(g, p.first[g]) for g in self.members[least] if p.sizes[g] % p.quantum[g]]

    def top(self, group: int) -> int:
        """The count of a group before its first removal of its own."""
        p = self.problem
        return p.first[group] if p.joined[group] >= 0 and p.sizes[group] % p.quantum[group] else p.sizes[group]

    def down(self, item: int) -> Moves:
        """The next removal that starts with group ``item``: its own, or that of the set it is the least of."""
        p, count = self.problem, self.counts[item]
        least = p.joined[item]
        if least >= 0 and not self.entered[least]:
            return self.entry(least) if least == item else []
        lower = p.first[item] if count == p.sizes[item] else count - p.quantum[item]
        return [(item, lower)] if p.lowest[item] <= lower < count else []

    def up(self, group: int) -> Moves:
        """The last removal of a group, undone."""
        p, count = self.problem, self.counts[group]
        if count >= self.top(group):
            return []
        return [(group, p.sizes[group] if count == p.first[group] else count + p.quantum[group])]

    def up_together(self, least: int) -> Moves:
        """The common removal of a joined set, undone: once every group in it is back where that left it."""
        if not self.entered[least] or any(self.up(group) for group in self.members[least]):
            return []
        return [(group, self.problem.sizes[group]) for group, _ in self.entry(least)]

    def opens(self, item: int) -> bool:
        """The next removal of ``item`` is the common one of the joined set it is the least of."""
        return self.problem.joined[item] == item and not self.entered[item]

    def value(self, moves: Moves) -> float:
        """The value of the units between the counts now and those after ``moves``."""
        total = 0.0
        for group, count in moves:
            size = self.problem.sizes[group]
            low, high = size - max(self.counts[group], count), size - min(self.counts[group], count)
            for value in self.problem.values[group][low:high]:
                total += value  # one by one: sum() of floats compensates on some versions, which the twin doesn't
        return total

    def unmet(self) -> list[int]:
        """The limits that don't hold yet."""
        return [
            i for i, (total, limit) in enumerate(zip(self.totals, self.problem.limits, strict=True)) if total > limit
        ]

    def falls(self, moves: Moves) -> list[int]:
        """How much each cost falls with ``moves`` (negative: rises)."""
        return self._walk(moves)[2]

    def apply(self, moves: Moves) -> None:
        """Carry out ``moves``."""
        lengths, elements, falls = self._walk(moves)
        for factor, length in lengths.items():
            self.lengths[factor] = length
        for term, count in elements.items():
            self.elements[term] = count
        self.totals = [total - fall for total, fall in zip(self.totals, falls, strict=True)]
        for group, count in moves:
            self.counts[group] = count

    def _walk(self, moves: Moves) -> tuple[dict[int, int], dict[int, int], list[int]]:
        """The factors and terms that ``moves`` change, as they will be, and how much each cost falls."""
        lengths: dict[int, int] = {}
        elements: dict[int, int] = {}
        for group, count in moves:
            for factor, width in self.factors_of[group]:
                lengths[factor] = lengths.get(factor, self.lengths[factor]) - width * (self.counts[group] - count)
        falls = [0] * len(self.totals)
        for term in {term for group, _ in moves for term in self.terms_of[group]}:
            product = 1
            for factor in self.problem.products[term]:
                product *= lengths.get(factor, self.lengths[factor])
            elements[term] = product
            for limit, row in enumerate(self.problem.coefficients):
                falls[limit] += row[term] * (self.elements[term] - product)
        return lengths, elements, falls


def _priority(state: _State, item: int, unmet: list[int]) -> float | None:
    """What the next removal of ``item`` is ordered by, least first; ``None``: there is none, or it saves nothing."""
    moves = state.down(item)
    if not moves:
        return None
    falls = state.falls(moves)
    if not any(falls[limit] for limit in unmet):
        # Savings only fall, so it never will save anything, but what opens a joined set lets other groups move.
        return math.inf if state.opens(item) else None
    value = state.value(moves)
    if not state.problem.per_cost:
        return value / float(sum(state.counts[group] - count for group, count in moves))
    saving = 0.0
    for limit in unmet:
        saving += float(falls[limit]) / float(state.problem.originals[limit])
    return value / saving if value >= 0 else value * saving


def _remove(state: _State) -> None:
    unmet = state.unmet()
    heap = [(priority, g) for g in range(len(state.counts)) if (priority := _priority(state, g, unmet)) is not None]
    heapq.heapify(heap)
    while unmet:
        if not heap:
            raise ValueError("the limits don't hold even at the lowest counts")
        item = heap[0][1]
        priority = _priority(state, item, unmet)
        if priority is None:
            heapq.heappop(heap)
            continue
        heapq.heapreplace(heap, (priority, item))
        if heap[0][1] != item:
            continue  # it was out of date, and isn't the least any more
        heapq.heappop(heap)
        offered = [item]
        moves = state.down(item)
        if state.opens(item):
            state.entered[item] = True
            offered = state.members[item]
        state.apply(moves)
        unmet = state.unmet()
        for group in offered:
            if (priority := _priority(state, group, unmet)) is not None:
                heapq.heappush(heap, (priority, group))


def _give_back(state: _State) -> None:
    heap: list[tuple[float, int, bool]] = []

    def offer(group: int, common: bool) -> None:
        moves = state.up_together(group) if common else state.up(group)
        # What is worth nothing stays out: it would only cost.
        if moves and (value := state.value(moves)) > 0:
            heapq.heappush(heap, (-value, group, common))

    for group in range(len(state.counts)):
        offer(group, common=False)
    for least in state.members:
        offer(least, common=True)
    while heap:
        _, group, common = heapq.heappop(heap)
        moves = state.up_together(group) if common else state.up(group)
        falls = state.falls(moves)
        if any(t - fall > limit for t, fall, limit in zip(state.totals, falls, state.problem.limits, strict=True)):
            continue
        state.apply(moves)
        if not common:
            offer(group, common=False)
            if state.problem.joined[group] >= 0:
                offer(state.problem.joined[group], common=True)

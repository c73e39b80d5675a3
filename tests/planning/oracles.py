"""Slow, plain restatements of the planner that share no code with it, and a strategy for its problems."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from hypothesis import strategies as st

from taylor_cuda.planning.problem import Problem


def totals(p: Problem, counts: list[int]) -> list[int]:
    """Every cost, from nothing but the problem's lists."""
    lengths = [c + sum(w * counts[g] for g, w in row) for c, row in zip(p.constants, p.widths, strict=True)]
    elements = [math.prod(lengths[f] for f in product) for product in p.products]
    return [sum(c * n for c, n in zip(row, elements, strict=True)) for row in p.coefficients]


def holds(p: Problem, counts: list[int]) -> bool:
    return all(cost <= limit for cost, limit in zip(totals(p, counts), p.limits, strict=True))


def ladder(p: Problem, group: int) -> list[int]:
    """The counts a group may have, greatest first."""
    smaller = range(p.first[group], p.lowest[group] - 1, -p.quantum[group])
    return [p.sizes[group], *(smaller if p.first[group] < p.sizes[group] else ())]


def off(p: Problem, group: int) -> bool:
    return p.sizes[group] % p.quantum[group] != 0


def allowed(p: Problem) -> Iterator[list[int]]:
    """Every combination of counts that floors, rounding and joined sets allow."""
    for counts in itertools.product(*(ladder(p, g) for g in range(len(p.sizes)))):
        closed = {p.joined[g] for g in range(len(counts)) if off(p, g) and counts[g] == p.sizes[g]}
        if all(p.joined[g] < 0 or p.joined[g] not in closed or counts[g] == p.sizes[g] for g in range(len(counts))):
            yield list(counts)


def removed_value(p: Problem, counts: list[int]) -> float:
    return math.fsum(v for g, count in enumerate(counts) for v in p.values[g][: p.sizes[g] - count])


def lowest_counts(p: Problem) -> list[int]:
    return [ladder(p, g)[-1] for g in range(len(p.sizes))]


def closed(p: Problem, counts: list[int], least: int) -> bool:
    """The common removal of this joined set hasn't happened."""
    return any(j == least >= 0 and off(p, g) and counts[g] == p.sizes[g] for g, j in enumerate(p.joined))


def common_steps(p: Problem, counts: list[int], direction: int) -> list[tuple[int, list[int]]]:
    """``(least group, counts after)`` of the common removals (direction 1) or restorations (-1) that are open now."""
    result = []
    for least in sorted(set(p.joined) - {-1}):
        entered = [p.first[g] if off(p, g) else p.sizes[g] for g in range(len(counts))]
        target = entered if direction > 0 else p.sizes
        origin = p.sizes if direction > 0 else entered
        together = [g for g, j in enumerate(p.joined) if j == least]
        if all(counts[g] == origin[g] for g in together):
            result.append((least, [target[g] if g in together else count for g, count in enumerate(counts)]))
    return result


def single_steps(p: Problem, counts: list[int], direction: int) -> list[tuple[int, list[int]]]:
    """``(group, counts after)`` of the removals or restorations that one group can make on its own."""
    result = []
    for g, count in enumerate(counts):
        if closed(p, counts, p.joined[g]):
            continue
        rungs = ladder(p, g)[1:] if p.joined[g] >= 0 and off(p, g) else ladder(p, g)
        place = rungs.index(count) + direction
        if 0 <= place < len(rungs):
            result.append((g, [*counts[:g], rungs[place], *counts[g + 1 :]]))
    return result


def difference(p: Problem, counts: list[int], after: list[int]) -> float:
    """Value of the units between two states, added in the planner's order."""
    total = 0.0
    for g, (a, b) in enumerate(zip(counts, after, strict=True)):
        for value in p.values[g][p.sizes[g] - max(a, b) : p.sizes[g] - min(a, b)]:
            total += value
    return total


def eager(p: Problem) -> list[int]:
    """The greedy with no heap and no bookkeeping: every step looks at every removal afresh."""
    counts = list(p.sizes)
    while not holds(p, counts):
        open_now = [(priority(p, counts, after, math.inf), g, after) for g, after in common_steps(p, counts, 1)]
        open_now += [(priority(p, counts, after, None), g, after) for g, after in single_steps(p, counts, 1)]
        counts = min(step for step in open_now if step[0] is not None)[2]
    return restore(p, counts)


def priority(p: Problem, counts: list[int], after: list[int], useless: float | None) -> float | None:
    """What a removal is ordered by; ``useless`` where no unmet limit gains by it."""
    now, then = totals(p, counts), totals(p, after)
    unmet = [i for i, limit in enumerate(p.limits) if now[i] > limit]
    if all(now[i] == then[i] for i in unmet):
        return useless
    value = difference(p, counts, after)
    if not p.per_cost:
        return value / (sum(counts) - sum(after))
    saving = 0.0
    for i in unmet:
        saving += (now[i] - then[i]) / p.originals[i]
    return value / saving if value >= 0 else value * saving


def restore(p: Problem, counts: list[int]) -> list[int]:
    """Give back the highest valued chunk that fits, until none does."""
    while True:
        restorations = common_steps(p, counts, -1) + single_steps(p, counts, -1)
        worth = [(-difference(p, counts, after), g, after) for g, after in restorations]
        fits = [entry for entry in worth if entry[0] < 0 and holds(p, entry[2])]
        if not fits:
            return counts
        counts = min(fits)[2]


@st.composite
def problems(draw: st.DrawFn, costs: int = 3, joined: bool = True, feasible: bool = True) -> Problem:
    """Problems of up to five groups with ties, zero and negative values, and up to three limits."""
    count = draw(st.integers(1, 5))
    small = st.integers(1, 9)
    sizes = draw(st.lists(small, min_size=count, max_size=count))
    quantum = draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    floors = [draw(st.integers(1, size)) for size in sizes]
    first, lowest = [], []
    for size, step, floor in zip(sizes, quantum, floors, strict=True):
        low, high = -(-floor // step) * step, (size - 1) // step * step
        first.append(high if low <= high else size)
        lowest.append(low if low <= high else size)
    number = st.sampled_from([-2.5, 0.0, 0.1, 0.3, 1.0, 1.0, 2.0, 3.3, 7.0])
    values = [sorted(draw(st.lists(number, min_size=size, max_size=size))) for size in sizes]
    factor = st.dictionaries(st.integers(0, count - 1), st.integers(1, 3), min_size=1, max_size=3)
    widths = [list(w.items()) for w in draw(st.lists(factor, min_size=1, max_size=5))]
    constants = draw(st.lists(st.integers(0, 4), min_size=len(widths), max_size=len(widths)))
    product = st.lists(st.integers(0, len(widths) - 1), min_size=1, max_size=3)
    products = draw(st.lists(product, min_size=1, max_size=5))
    rows = draw(st.integers(1, costs))
    coefficient = st.lists(st.integers(0, 5), min_size=len(products), max_size=len(products))
    coefficients = [draw(coefficient) for _ in range(rows)]
    sets = [-1] * count
    if joined:
        members = [g for g in range(count) if first[g] < sizes[g] and draw(st.booleans())]
        if len(members) > 1 and any(sizes[g] % quantum[g] for g in members):
            for g in members:
                sets[g] = members[0]
    unlimited = Problem(
        *(sizes, first, lowest, quantum, sets, values, constants, widths, products, coefficients),
        originals=[1] * rows,
        limits=[0] * rows,
        per_cost=draw(st.booleans()),
    )
    start, end = totals(unlimited, sizes), totals(unlimited, lowest_counts(unlimited))
    unlimited.originals[:] = [max(cost, 1) for cost in start]
    unlimited.limits[:] = [
        draw(st.integers(low if feasible else 0, high)) for low, high in zip(end, start, strict=True)
    ]
    return unlimited

"""Slow, plain restatements of the planner that share no code with it, and a strategy for its problems."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace

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


def random_problem(seed: int, groups: int, costs: int, joined: bool = True, feasible: bool = True) -> Problem:
    """Coupled costs, odd quanta, ties, zero and negative values, and limits anywhere between least and full cost."""
    rng = random.Random(seed)
    sizes = [rng.randint(1, 14) for _ in range(groups)]
    quantum = [rng.choice([1, 2, 3, 4]) for _ in range(groups)]
    lowest = [-(-rng.randint(1, 1 + size // 3) // step) * step for size, step in zip(sizes, quantum, strict=True)]
    first = [(size - 1) // step * step for size, step in zip(sizes, quantum, strict=True)]
    for g, size in enumerate(sizes):
        if lowest[g] > first[g]:
            lowest[g] = first[g] = size
    draw_value = rng.choice(
        [lambda: rng.choice([-2.5, 0.0, 0.1, 1.0, 1.0, 2.0, 7.0]), lambda: rng.random() ** 2 - 0.02]
    )
    values = [sorted(draw_value() for _ in range(size)) for size in sizes]
    # Every group has a length of its own; further ones are shared, as by the branches of a concatenation.
    widths = [[(g, rng.randint(1, 3))] for g in range(groups)]
    widths += [[(g, rng.randint(1, 2)) for g in rng.sample(range(groups), min(groups, 2))] for _ in range(groups // 2)]
    products = [[f, *rng.choices(range(len(widths)), k=rng.randint(0, 2))] for f in range(len(widths))]
    coefficients = [[rng.choice([0, 1, 3, 30]) * 7**cost for _ in products] for cost in range(costs)]
    sets = [-1] * groups
    members = [g for g in range(groups) if first[g] < sizes[g] and rng.random() < 0.6]
    if joined and len(members) > 1 and any(sizes[g] % quantum[g] for g in members):
        for g in members:
            sets[g] = members[0]
    problem = Problem(
        *(sizes, first, lowest, quantum, sets, values, [rng.randint(0, 4) for _ in widths], widths, products),
        coefficients=coefficients,
        originals=[1] * costs,
        limits=[0] * costs,
        per_cost=rng.random() < 0.8,
    )
    start, end = totals(problem, sizes), totals(problem, lowest_counts(problem))
    share = rng.uniform(0.05 if feasible else -0.3, 0.95)
    limits = [math.ceil(low + share * rng.uniform(0.8, 1) * (high - low)) for low, high in zip(end, start, strict=True)]
    return replace(problem, originals=[max(cost, 1) for cost in start], limits=limits)


def problems(groups: int = 5, costs: int = 3, joined: bool = True, feasible: bool = True) -> st.SearchStrategy[Problem]:
    """``random_problem`` with up to ``groups`` groups and ``costs`` limits."""
    return st.builds(
        random_problem,
        seed=st.integers(0, 2**32),
        groups=st.integers(1, groups),
        costs=st.integers(1, costs),
        joined=st.just(joined),
        feasible=st.just(feasible),
    )

"""Both solvers against a plain restatement, against every possible plan, and against each other."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from taylor_cuda.planning import greedy, native_planner
from taylor_cuda.planning.problem import Problem
from tests.planning.oracles import (
    allowed,
    common_steps,
    eager,
    holds,
    lowest_counts,
    problems,
    removed_value,
    single_steps,
    totals,
)

NATIVE = native_planner()
needs_native = pytest.mark.skipif(NATIVE is None, reason="installed without the compiled planner")
SOLVERS = [greedy.solve, *([NATIVE.solve] if NATIVE is not None else [])]
IDS = ["python", "native"][: len(SOLVERS)]


@pytest.mark.parametrize("solve", SOLVERS, ids=IDS)
@settings(max_examples=600)
@given(problem=problems())
def test_same_counts_as_the_plain_restatement(solve, problem: Problem) -> None:
    assert solve(problem) == eager(problem)


@pytest.mark.parametrize("solve", SOLVERS, ids=IDS)
def test_a_joined_set_goes_and_comes_back_together(solve) -> None:
    """Groups 0 and 1 have 5 and 3 units and keep all or even counts; group 2 can save 10 of 28.

    In order: 1 + 1 of the set for 2; 2 + 2 of group 0 for 2; 40 of group 2 for 10. That leaves 14.
    """
    problem = Problem(
        *([5, 3, 2], [4, 2, 1], [2, 2, 1], [2, 2, 1], [0, 0, -1], [[1.0, 2, 2, 9, 9], [1.0, 5, 5], [40.0, 50]]),
        *([0, 0, 0], [[(0, 1)], [(1, 1)], [(2, 1)]], [[0], [1], [2]], [[1, 1, 10]], [28], [18], True),
    )
    assert solve(problem) == [5, 3, 1]  # group 0's chunk comes back, and then the set's
    assert solve(replace(problem, limits=[17])) == [4, 2, 1]
    assert solve(replace(problem, limits=[15])) == [2, 2, 1]
    assert solve(replace(problem, limits=[24])) == [2, 2, 2]
    assert solve(replace(problem, limits=[27])) == [4, 2, 2]
    # Where group 0's own chunk is too dear to go at all, the set's comes back just the same.
    dear = replace(problem, values=[[1.0, 90, 90, 90, 90], [1.0, 5, 5], [40.0, 50]])
    assert solve(dear) == [5, 3, 1]
    assert solve(replace(dear, limits=[16])) == [4, 2, 1]


@pytest.mark.parametrize("solve", SOLVERS, ids=IDS)
def test_a_term_of_two_joined_groups_is_saved_once(solve) -> None:
    """The set's 1 + 1 take 3 · 3 to 2 · 2 and save 5, a worse buy than group 2's 3 for 10, not a better one."""
    problem = Problem(
        *([3, 3, 2], [2, 2, 1], [2, 2, 1], [2, 2, 1], [0, 0, -1], [[1.0, 5, 5], [1.0, 5, 5], [3.0, 9]]),
        *([0, 0, 0], [[(0, 1)], [(1, 1)], [(2, 1)]], [[0, 1], [2]], [[1, 10]], [29], [19], True),
    )
    assert solve(problem) == [3, 3, 1]


@pytest.mark.parametrize("solve", SOLVERS, ids=IDS)
@settings(max_examples=150)
@given(problem=problems(groups=4))
def test_limits_and_floors_hold_and_nothing_more_can_be_given_back(solve, problem: Problem) -> None:
    counts = solve(problem)
    assert holds(problem, counts)
    assert counts in list(allowed(problem))
    for _, after in common_steps(problem, counts, -1) + single_steps(problem, counts, -1):
        assert removed_value(problem, after) >= removed_value(problem, counts) or not holds(problem, after)


@pytest.mark.parametrize("solve", SOLVERS, ids=IDS)
@settings(max_examples=60)
@given(problem=problems(feasible=False))
def test_infeasible_limits_are_refused_and_only_those(solve, problem: Problem) -> None:
    if holds(problem, lowest_counts(problem)):
        assert holds(problem, solve(problem))
    else:
        with pytest.raises(ValueError, match="don't hold even at the lowest counts"):
            solve(problem)


@pytest.mark.parametrize("solve", SOLVERS, ids=IDS)
@settings(max_examples=60)
@given(problem=problems(groups=3, costs=1, joined=False))
def test_optimal_where_units_cost_the_same(solve, problem: Problem) -> None:
    """With one unit at a time and one cost for all, the least valued units are the best choice there is."""
    count = len(problem.sizes)
    values = [[abs(value) for value in row] for row in problem.values]
    uniform = replace(
        problem,
        quantum=[1] * count,
        first=[size - 1 if size > 1 else 1 for size in problem.sizes],
        lowest=[1] * count,
        values=[sorted(row) for row in values],
        constants=[0] * count,
        widths=[[(g, 1)] for g in range(count)],
        products=[[g] for g in range(count)],
        coefficients=[[3] * count],
        originals=[3 * sum(problem.sizes)],
        limits=[3 * (count + problem.limits[0] % (sum(problem.sizes) - count + 1))],
    )
    best = min(removed_value(uniform, counts) for counts in allowed(uniform) if holds(uniform, counts))
    assert removed_value(uniform, solve(uniform)) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("solve", SOLVERS, ids=IDS)
@settings(max_examples=60)
@given(problem=problems(groups=3, costs=1, joined=False))
def test_at_most_one_unit_from_the_optimum_where_costs_are_linear(solve, problem: Problem) -> None:
    """Fixed costs per unit make a knapsack: taking the best ratios first loses less than the last unit's value."""
    count = len(problem.sizes)
    prices = [1 + sum(problem.coefficients[0][g % len(problem.products) :]) for g in range(count)]
    linear = replace(
        problem,
        quantum=[1] * count,
        first=[size - 1 if size > 1 else 1 for size in problem.sizes],
        lowest=[1] * count,
        values=[sorted(abs(value) for value in row) for row in problem.values],
        constants=[0] * count,
        widths=[[(g, 1)] for g in range(count)],
        products=[[g] for g in range(count)],
        coefficients=[prices],
        per_cost=True,
    )
    (start,), (end,) = totals(linear, linear.sizes), totals(linear, lowest_counts(linear))
    linear = replace(linear, originals=[start], limits=[end + (start - end) * (problem.limits[0] % 7) // 7])
    best = min(removed_value(linear, counts) for counts in allowed(linear) if holds(linear, counts))
    highest = max(value for row in linear.values for value in row)
    assert removed_value(linear, solve(linear)) <= best + highest + 1e-9


def large(groups: int, size: int, seed: int = 0) -> Problem:
    """A chain of layers: every group read by the next, values with many exact ties."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.rand(groups, size, generator=generator) * 50).round().div(7).sort(1).values.tolist()
    problem = Problem(
        sizes=[size] * groups,
        first=[(size - 1) // (g % 3 + 1) * (g % 3 + 1) for g in range(groups)],
        lowest=[g % 3 + 1 for g in range(groups)],
        quantum=[g % 3 + 1 for g in range(groups)],
        joined=[-1] * groups,
        values=values,
        constants=[g % 2 for g in range(groups)],
        widths=[[(g, 1 + g % 2)] if g % 5 else [(g, 1), ((g + 3) % groups, 2)] for g in range(groups)],
        products=[[g, (g + 1) % groups] for g in range(groups)] + [[g] for g in range(groups)],
        coefficients=[[9 + g % 4 for g in range(2 * groups)], [1] * (2 * groups)],
        originals=[1, 1],
        limits=[0, 0],
        per_cost=True,
    )
    start = totals(problem, problem.sizes)
    return replace(problem, originals=start, limits=[start[0] // 3, start[1] // 3])


@needs_native
@pytest.mark.parametrize("per_cost", [True, False])
def test_native_and_python_agree_on_thousands_of_units(per_cost: bool) -> None:
    problem = replace(large(30, 120), per_cost=per_cost)
    counts = NATIVE.solve(problem)
    assert counts == greedy.solve(problem)
    assert holds(problem, counts)
    assert counts != lowest_counts(problem)


@needs_native
def test_native_lets_other_threads_run() -> None:
    problem = large(150, 200)
    everything = [[(g, 1) for g in range(150)]] * 150  # every factor changes with every removal
    problem = replace(problem, widths=everything, originals=[10**15] * 2)
    start = totals(problem, problem.sizes)
    problem = replace(problem, limits=[start[0] // 2, start[1] // 2])
    started, ended = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        NATIVE.solve(problem)
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    ticks = 0
    while not ended.is_set():
        time.sleep(0.001)
        ticks += 1
    thread.join()
    assert ticks > 10  # with the lock held, this thread would get a turn or two before and after, and none between


@needs_native
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("values", [[1.0], []], "one value a unit"),
        ("first", [3], "one entry a group"),
        ("lowest", [4, 1], "lowest <= first <= size"),
        ("quantum", [0, 1], "at least 1"),
        ("joined", [2, -1], "joined to none there is"),
        ("widths", [[(2, 1)], [(1, 1)]], "names no group"),
        ("widths", [[(0, -1)], [(1, 1)]], "negative"),
        ("products", [[5]], "names no factor"),
        ("constants", [0], "one constant a factor"),
        ("coefficients", [[1, 2]], "one coefficient a term"),
        ("limits", [1, 2], "one limit"),
    ],
)
def test_native_checks_what_it_is_given(field: str, value: object, message: str) -> None:
    good = Problem(
        *([3, 2], [2, 1], [1, 1], [1, 1], [-1, -1], [[1.0, 2.0, 3.0], [1.0, 2.0]]),
        *([0, 0], [[(0, 1)], [(1, 1)]], [[0, 1]], [[1]], [6], [4], True),
    )
    assert NATIVE.solve(good) == greedy.solve(good)
    with pytest.raises(ValueError, match=message):
        NATIVE.solve(replace(good, **{field: value}))


def test_costs_beyond_64_bits_go_to_the_twin() -> None:
    problem = large(3, 8)
    assert problem.exact_in_64_bits
    assert not replace(problem, coefficients=[[2**61] * 6, [1] * 6]).exact_in_64_bits

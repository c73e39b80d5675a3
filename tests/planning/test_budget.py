"""Budgets and schedules."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from taylor_cuda.errors import BudgetError, InputError
from taylor_cuda.planning import budgets_at, parse_budget
from taylor_cuda.planning.budget import budget_limits, check_feasible
from taylor_cuda.planning.schedule import cubic, linear


@pytest.mark.parametrize(
    ("budget", "parsed"),
    [
        ({"macs": 0.5}, {"macs": 0.5}),
        ({"channels": 1, "macs": 0.25}, {"macs": 0.25, "channels": 1.0}),
        ({"params": np.float32(0.5)}, {"params": 0.5}),
        ("macs=0.5", {"macs": 0.5}),
        (" params = .6 , macs=5e-1,", {"macs": 0.5, "params": 0.6}),
    ],
    ids=str,
)
def test_parse(budget: object, parsed: dict[str, float]) -> None:
    result = parse_budget(budget)
    assert result == parsed
    assert list(result) == list(parsed)  # always in the same order
    assert all(type(value) is float for value in result.values())


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"macs": 0}, "macs=0 isn't a fraction"),
        ({"macs": 1.01}, r"macs=1.01 isn't a fraction"),
        ({"macs": -0.5}, "macs=-0.5 isn't"),
        ({"macs": math.nan}, "macs=nan isn't"),
        ({"macs": math.inf}, "macs=inf isn't"),
        ({"macs": "half"}, "macs='half' isn't"),
        ({"macs": True}, "macs=True isn't"),
        ({"macs": None}, "macs=None isn't"),
        ({"flops": 0.5}, "unknown 'flops'; wanted"),
        ({}, "it is empty"),
        (0.5, "got 0.5"),
        ("", "it is empty"),
        ("macs", "can't read 'macs'"),
        ("macs=half", "can't read 'macs=half'"),
        ("macs=0.5,macs=0.6", "macs stands in it twice"),
        ("macs=0.5;params=0.6", "can't read"),
        ("latency=0.5", "unknown 'latency'"),
        ("macs=0", "macs=0.0 isn't"),
        ("macs=nan", "macs=nan isn't"),
    ],
    ids=str,
)
def test_parse_refuses(budget: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_budget(budget)


def test_limits_hold_as_anybody_would_check_them() -> None:
    originals = (10, 100, 7)
    assert budget_limits({"macs": 0.7, "channels": 4 / 7}, originals) == {"macs": 7, "channels": 4}
    assert 0.29 * 100 < 29
    assert budget_limits({"params": 0.29}, originals) == {"params": 28}
    assert budget_limits({"macs": 1.0, "channels": 1.0}, (3**20, 0, 2**50 + 1)) == {
        "macs": 3**20,
        "channels": 2**50 + 1,
    }


def test_infeasible_names_the_nearest_of_every_budget() -> None:
    check_feasible({"macs": 0.1235, "params": 0.3}, (10000, 100, 1), (1235, 30, 0), "min_keep=1")
    with pytest.raises(BudgetError) as error:
        check_feasible({"macs": 0.1, "params": 0.5}, (10000, 100, 1), (1234, 30, 0), "min_keep=4")
    assert str(error.value) == (
        "budget: macs=0.1, params=0.5 can't be met with min_keep=4 (too low: macs); "
        "the nearest feasible budget is macs=0.1234,params=0.5"
    )
    # A third, rounded up: 0.3333 would not be feasible.
    with pytest.raises(BudgetError, match=r"macs=0\.3334$"):
        check_feasible({"macs": 0.2}, (3, 1, 1), (1, 0, 0), "x")
    # 0.29 * 100 falls short of 29.
    with pytest.raises(BudgetError, match=r"macs=0\.2901$"):
        check_feasible({"macs": 0.2}, (100, 1, 1), (29, 0, 0), "x")
    with pytest.raises(InputError, match="has no macs to be a fraction of"):
        check_feasible({"macs": 0.2}, (0, 1, 1), (0, 0, 0), "x")


def test_schedules_by_hand() -> None:
    assert [linear(0.5, step, 4) for step in range(5)] == [1.0, 0.875, 0.75, 0.625, 0.5]
    assert [cubic(0.5, step, 4) for step in range(5)] == [1.0, 0.5 + 0.5 * 0.421875, 0.5625, 0.5078125, 0.5]
    assert linear(0.2, 1, 2, start=0.6) == pytest.approx(0.4, abs=1e-15)
    assert cubic(0.2, 1, 2, start=0.6) == pytest.approx(0.25, abs=1e-15)
    assert budgets_at("cubic", {"macs": 0.5, "params": 0.25}, 2, 4) == {"macs": 0.5625, "params": 0.34375}


@pytest.mark.parametrize("schedule", ["linear", "cubic"])
def test_schedules_fall_and_end_exactly_at_the_budget(schedule: str) -> None:
    for target in (0.1, 0.3, 1 / 3, 0.7, 1.0):
        for steps in (1, 3, 7, 30):
            path = [budgets_at(schedule, {"macs": target}, step, steps)["macs"] for step in range(steps + 1)]
            assert path[0] == 1.0
            assert path[-1] == target
            assert all(a >= b for a, b in itertools.pairwise(path))
            parse_budget({"macs": path[0]})


def test_schedules_refuse() -> None:
    with pytest.raises(InputError, match=r"unknown 'cosine'; there are \['cubic', 'linear'\]"):
        budgets_at("cosine", {"macs": 0.5}, 1, 2)
    for step in (-1, 3):
        with pytest.raises(InputError, match=f"wanted 0 to 2, got {step}"):
            budgets_at("linear", {"macs": 0.5}, step, 2)
    with pytest.raises(InputError, match="at least 1, got 0"):
        budgets_at("linear", {"macs": 0.5}, 0, 0)

"""Budgets: what a pruned model may cost, as fractions of the model as it was traced."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from taylor_cuda.errors import BudgetError, InputError
from taylor_cuda.planning.cost import COSTS

__all__ = ["budget_limits", "check_feasible", "parse_budget"]

_WANTED = 'wanted {"macs": 0.5}, {"params": 0.6}, {"channels": 0.7} or several of them'


def parse_budget(budget: Mapping[str, float] | str) -> dict[str, float]:
    """A budget, checked, in the order of ``COSTS``.

    Args:
        budget: fractions in (0, 1] of the original model by ``"macs"``, ``"params"``, ``"channels"``; or the same as
            text, ``"macs=0.5,params=0.6"``.

    Raises:
        InputError: nothing in it, an unknown name, or a value that isn't a fraction.
    """
    if isinstance(budget, str):
        pairs: Iterable[tuple[Any, Any]] = _read(budget)
    elif isinstance(budget, Mapping):
        pairs = budget.items()
    else:
        raise InputError(f"budget: {_WANTED}, got {budget!r}")
    fractions: dict[str, float] = {}
    for name, value in pairs:
        if name not in COSTS:
            raise InputError(f"budget: unknown {name!r}; {_WANTED}")
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= 1:
            raise InputError(f"budget: {name}={value!r} isn't a fraction of the original model above 0 and at most 1")
        fractions[name] = float(value)
    if not fractions:
        raise InputError(f"budget: it is empty; {_WANTED}")
    return {name: fractions[name] for name in COSTS if name in fractions}


def _read(text: str) -> list[tuple[str, float]]:
    pairs: list[tuple[str, float]] = []
    for part in text.split(","):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        if not name and not equals and not number:
            continue
        try:
            value = float(number)
        except ValueError:
            raise InputError(
                f'budget: can\'t read {part.strip()!r}; wanted "macs=0.5" or "macs=0.5,params=0.6"'
            ) from None
        if name in dict(pairs):
            raise InputError(f"budget: {name} stands in it twice: {text!r}")
        pairs.append((name, value))
    return pairs


def budget_limits(budget: Mapping[str, float], originals: Sequence[int]) -> dict[str, int]:
    """The greatest cost that each budget allows, in the units of ``originals`` (which is in the order of ``COSTS``).

    The product is that of floats, so that ``cost <= budget * original`` holds as anybody would check it.
    """
    return {name: math.floor(value * originals[COSTS.index(name)]) for name, value in budget.items()}


def check_feasible(budget: Mapping[str, float], originals: Sequence[int], lowest: Sequence[int], floors: str) -> None:
    """Raise unless the budget can be met.

    Args:
        budget: parsed.
        originals: the costs of the original model, in the order of ``COSTS``.
        lowest: the costs with every group at its lowest count, where all of them are least at once.
        floors: what keeps the groups from going lower, in words.

    Raises:
        BudgetError: with the nearest feasible value of every budget that was asked for.
        InputError: the model has none of what the budget limits.
    """
    free = [name for name in budget if originals[COSTS.index(name)] == 0]
    if free:
        raise InputError(f"budget: this model has no {' and no '.join(free)} to be a fraction of")
    limits = budget_limits(budget, originals)
    missed = [name for name in budget if lowest[COSTS.index(name)] > limits[name]]
    if not missed:
        return
    nearest = {name: _least_fraction(name, value, originals, lowest) for name, value in budget.items()}
    asked = ", ".join(f"{name}={value:g}" for name, value in budget.items())
    raise BudgetError(
        f"budget: {asked} can't be met with {floors} (too low: {', '.join(missed)}); "
        f"the nearest feasible budget is {','.join(f'{name}={_in_full(value)}' for name, value in nearest.items())}"
    )


def _in_full(value: float) -> str:
    """With every digit that it has: one third cut to six of them is less than a third, and may not be feasible."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _least_fraction(name: str, asked: float, originals: Sequence[int], lowest: Sequence[int]) -> float:
    """The fraction asked for where it is feasible, otherwise the least of four decimals that is."""
    place = COSTS.index(name)
    fraction, steps = asked, math.floor(lowest[place] / originals[place] * 10**4)
    while budget_limits({name: fraction}, originals)[name] < lowest[place]:
        fraction, steps = min(1.0, steps / 10**4), steps + 1
    return fraction

"""How a budget is approached: pure functions from a prune step to the fraction of the original cost to meet then."""

from __future__ import annotations

from collections.abc import Mapping

from taylor_cuda.errors import InputError

__all__ = ["SCHEDULES", "budgets_at", "cubic", "linear"]


def linear(target: float, step: int, steps: int, start: float = 1.0) -> float:
    """The same share of the original cost at every step: ``target + (start - target) · (1 - step/steps)``.

    Args:
        target: the fraction after the last step.
        step: from 0 (nothing done yet) to ``steps``.
        steps: prune steps in all.
        start: the fraction before the first step.

    Raises:
        InputError: a step outside 0 … steps.
    """
    return target + (start - target) * _remaining(step, steps)


def cubic(target: float, step: int, steps: int, start: float = 1.0) -> float:
    """Much at first, with much to spare, and little at the end: ``target + (start - target) · (1 - step/steps)³``.

    Zhu & Gupta, "To prune, or not to prune", 2017, equation 1, written for what is kept instead of the sparsity.

    Args:
        target: the fraction after the last step.
        step: from 0 (nothing done yet) to ``steps``.
        steps: prune steps in all.
        start: the fraction before the first step.

    Raises:
        InputError: a step outside 0 … steps.
    """
    return target + (start - target) * _remaining(step, steps) ** 3


SCHEDULES = {"cubic": cubic, "linear": linear}


def budgets_at(schedule: str, budget: Mapping[str, float], step: int, steps: int) -> dict[str, float]:
    """The budget to meet at one prune step.

    Args:
        schedule: ``"linear"`` or ``"cubic"``.
        budget: the budget after the last step, fractions of the original model by name.
        step: from 0 (everything is kept) to ``steps`` (exactly ``budget``).
        steps: prune steps in all.

    Raises:
        InputError: an unknown schedule, or a step outside 0 … steps.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"schedule: unknown {schedule!r}; there are {sorted(SCHEDULES)}")
    return {name: SCHEDULES[schedule](target, step, steps) for name, target in budget.items()}


def _remaining(step: int, steps: int) -> float:
    """Fraction of the way that is still ahead: 0 at the last step, so that the target is met exactly."""
    if steps < 1:
        raise InputError(f"steps: wanted at least 1, got {steps}")
    if not 0 <= step <= steps:
        raise InputError(f"step: wanted 0 to {steps}, got {step}")
    return 1.0 - step / steps

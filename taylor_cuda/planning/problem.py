"""The planner's problem as plain lists: what the compiled solver and its Python twin both take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from taylor_cuda.planning.cost import COSTS, CostTerms
from taylor_cuda.planning.rungs import Rungs

__all__ = ["Problem", "pose"]


@dataclass(frozen=True)
class Problem:
    """How many units to keep in each group so that every limit holds, at the least value.

    Attributes:
        sizes: units of each group now.
        first: the greatest count below the size that each group may have (the size: it can't move).
        lowest: the least count that each group may have.
        quantum: the step between the counts from ``first`` to ``lowest``.
        joined: number of the set of groups whose first removal is a common one, the least group in it; -1 for none.
        values: value of the units of each group, ascending: the order in which they go.
        constants: constant part of each factor.
        widths: ``(group, width)`` of each factor.
        products: factors of each term.
        coefficients: one list of term coefficients for each limited cost.
        originals: what each limited cost is compared with: savings are fractions of it.
        limits: what each limited cost may be at most.
        per_cost: order by value per saving; otherwise by value per unit.
    """

    sizes: list[int]
    first: list[int]
    lowest: list[int]
    quantum: list[int]
    joined: list[int]
    values: list[list[float]]
    constants: list[int]
    widths: list[list[tuple[int, int]]]
    products: list[list[int]]
    coefficients: list[list[int]]
    originals: list[int]
    limits: list[int]
    per_cost: bool

    @property
    def exact_in_64_bits(self) -> bool:
        """No cost on the way overflows the compiled solver's integers: every one is at most today's."""
        lengths = [
            c + sum(w * self.sizes[g] for g, w in row) for c, row in zip(self.constants, self.widths, strict=True)
        ]
        elements = []
        for product in self.products:
            total = 1
            for factor in product:
                total *= max(lengths[factor], 1)
            elements.append(total)
        highest = [sum(max(c, 1) * n for c, n in zip(row, elements, strict=True)) for row in self.coefficients]
        return max([*highest, *self.originals], default=0) < 2**63


def pose(
    terms: CostTerms,
    rungs: Rungs,
    values: list[list[float]],
    limits: dict[str, int],
    originals: Sequence[int],
    per_cost: bool,
) -> Problem:
    """The problem of meeting ``limits`` (by name of the cost) from the widths that ``terms`` was compiled at."""
    rows = [COSTS.index(name) for name in limits]
    # Terms that no limited cost contains would only be carried along.
    used = [t for t in range(len(terms.products)) if terms.products[t] and any(terms.coefficients[r][t] for r in rows)]
    constant = {
        r: sum(c for c, product in zip(terms.coefficients[r], terms.products, strict=True) if not product) for r in rows
    }
    return Problem(
        sizes=list(terms.sizes),
        first=list(rungs.first),
        lowest=list(rungs.lowest),
        quantum=list(rungs.quantum),
        joined=list(rungs.joined),
        values=values,
        constants=[factor.constant for factor in terms.factors],
        widths=[list(factor.widths) for factor in terms.factors],
        products=[list(terms.products[t]) for t in used],
        coefficients=[[terms.coefficients[r][t] for t in used] for r in rows],
        originals=[originals[r] for r in rows],
        limits=[limit - constant[r] for r, limit in zip(rows, limits.values(), strict=True)],
        per_cost=per_cost,
    )

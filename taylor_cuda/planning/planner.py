"""``tc.plan``: which units to keep so that every budget holds, at the least predicted change of the loss."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from taylor_cuda.errors import InputError
from taylor_cuda.graph.groups import Groups
from taylor_cuda.planning import greedy
from taylor_cuda.planning.budget import budget_limits, check_feasible, parse_budget
from taylor_cuda.planning.cost import Cost, CostTerms, Lengths, as_cost, compile_cost, original_totals
from taylor_cuda.planning.problem import Problem, pose
from taylor_cuda.planning.rungs import allowed_counts, resolve_round_to
from taylor_cuda.text import table

__all__ = ["Plan", "plan", "solver"]

RANKS = ("value_per_cost", "value")


@dataclass(frozen=True, eq=False)
class Plan:
    """What to keep, and what that costs.

    Attributes:
        keep: for every group, the sorted int64 indices (into its current units) of those that stay.
        cost: the model's cost after the cut.
        cost_before: its cost now.
        cost_original: its cost when it was traced, which budgets are fractions of.
        budget: what had to hold, as fractions of ``cost_original``.
        removed_value: predicted |loss change| of each group's removed units, Σ √score.
        sizes_before: units of each group now.
    """

    keep: dict[str, Tensor]
    cost: Cost
    cost_before: Cost
    cost_original: Cost
    budget: dict[str, float]
    removed_value: dict[str, float] = field(default_factory=dict)
    sizes_before: dict[str, int] = field(default_factory=dict)

    @property
    def predicted_change(self) -> float:
        """Predicted |loss change| of everything that goes, if nothing is trained in between: Σ √score."""
        return math.fsum(self.removed_value.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Units that each group keeps."""
        return {name: kept.numel() for name, kept in self.keep.items()}

    @property
    def digest(self) -> str:
        """SHA-256 of ``keep`` as canonical JSON: equal exactly where two processes would cut the same."""
        keep = {name: kept.tolist() for name, kept in self.keep.items()}
        return hashlib.sha256(json.dumps(keep, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON-able data; ``from_dict`` reads it back."""
        data = {name: value for name, value in vars(self).items() if name != "keep"}
        for name in ("cost", "cost_before", "cost_original"):
            data[name] = asdict(data[name])
        return {"keep": {name: kept.tolist() for name, kept in self.keep.items()}, **data}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that ``to_dict`` wrote.

        Raises:
            InputError: something is missing or malformed.
        """
        try:
            fields = dict(data)
            fields["keep"] = {n: torch.tensor(kept, dtype=torch.int64) for n, kept in fields["keep"].items()}
            for name in ("cost", "cost_before", "cost_original"):
                fields[name] = Cost(**fields[name])
            return cls(**fields)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"plan: this isn't what Plan.to_dict writes: {error!r}") from error

    def table(self) -> str:
        """One line a group (units before and after, predicted |loss change|), then one a cost."""
        rows: list[tuple[object, ...]] = [
            (name, size, self.keep[name].numel(), f"{self.removed_value.get(name, 0.0):.3g}")
            for name, size in self.sizes_before.items()
        ]
        for name, before in asdict(self.cost_before).items():
            rows.append((f"total {name}", before, getattr(self.cost, name), ""))
        return table(("group", "before", "after", "|loss change|"), rows)


def plan(
    model: nn.Module,
    groups: Groups,
    scores: Mapping[str, Tensor],
    budget: Mapping[str, float] | str,
    round_to: int | str = "auto",
    min_keep: int = 1,
    max_ratio: float = 1.0,
    rank: str = "value_per_cost",
) -> Plan:
    """Decide which units to keep so that every budget holds, at the least predicted change of the loss.

    Scores are squares, and squares don't add: the value of a unit is √score, the predicted |loss change|, and that of
    several is their sum. Units go in the order of value per cost saved, at the exact cost of coupled layers as they
    shrink; at the end, what more than the budget asks for is given back. A model that meets its budget already keeps
    everything.

    Args:
        model: the traced module.
        groups: from ``tc.trace`` of this model.
        scores: for every group a tensor ``[size]`` of any real dtype, on any device; higher = keep. A criterion that
            can be negative (removing the unit is predicted to lower the loss) has value -√|score|: such units go first.
        budget: fractions in (0, 1] of the original model by ``"macs"``, ``"params"``, ``"channels"``, or the same as
            text (``"macs=0.5"``). Several must all hold.
        round_to: what every sliced dimension stays a multiple of; ``"auto"`` is 8 for 16-bit parameters on CUDA and 1
            elsewhere.
        min_keep: units that every group keeps at least.
        max_ratio: largest fraction of a group's original units that may be gone, over all cuts together.
        rank: ``"value_per_cost"``, or ``"value"`` for the plain global order by value.

    Raises:
        BudgetError: no plan can meet the budget; names the nearest that can be met.
        InputError: scores that are missing, NaN, infinite or of the wrong length, or another argument that can't be
            used.
    """
    wanted = parse_budget(budget)
    if rank not in RANKS:
        raise InputError(f"rank: unknown {rank!r}; there are {list(RANKS)}")
    multiple = resolve_round_to(model, round_to)
    lengths = Lengths(model, groups)
    rungs = allowed_counts(groups, lengths, multiple, min_keep, max_ratio)
    terms = compile_cost(lengths, groups)
    orders, values = _ordered(groups, scores)
    originals = original_totals(groups)
    floors = f"min_keep={min_keep}, max_ratio={max_ratio:g}, round_to={multiple}"
    check_feasible(wanted, originals, terms.totals(rungs.lowest), floors)
    problem = pose(terms, rungs, values, budget_limits(wanted, originals), originals, rank == "value_per_cost")
    counts = solver(problem)(problem)
    return _decided(groups, terms, wanted, orders, values, counts)


def solver(problem: Problem) -> Callable[[Problem], list[int]]:
    """The compiled solver where it was built and its 64-bit integers suffice, otherwise its twin; both agree."""
    native = native_planner()
    if native is None or not problem.exact_in_64_bits:
        return greedy.solve
    solve: Callable[[Problem], list[int]] = native.solve
    return solve


def native_planner() -> ModuleType | None:
    """The compiled planner, or ``None`` where the package was installed without it."""
    name = "taylor_cuda._planner"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None


def _decided(
    groups: Groups,
    terms: CostTerms,
    budget: dict[str, float],
    orders: list[Tensor],
    values: list[list[float]],
    counts: list[int],
) -> Plan:
    keep = {
        name: order[size - count :].sort().values
        for name, size, order, count in zip(terms.names, terms.sizes, orders, counts, strict=True)
    }
    removed = {
        name: math.fsum(value[: size - count])
        for name, size, value, count in zip(terms.names, terms.sizes, values, counts, strict=True)
    }
    return Plan(
        keep=keep,
        cost=as_cost(groups, terms.totals(counts)),
        cost_before=as_cost(groups, terms.totals(terms.sizes)),
        cost_original=as_cost(groups, original_totals(groups)),
        budget=budget,
        removed_value=removed,
        sizes_before=groups.sizes(),
    )


def _ordered(groups: Groups, scores: Mapping[str, Tensor]) -> tuple[list[Tensor], list[list[float]]]:
    """For every group: unit indices by ascending value (ties by index), and those values."""
    sizes = groups.sizes()
    _check_names(sizes, scores)
    if not sizes:
        return [], []
    parts = [scores[name].detach().reshape(-1) for name in sizes]
    if len({part.device for part in parts}) > 1:
        parts = [part.cpu() for part in parts]
    # One transfer, however many groups there are; float64 only on the CPU, since not every device has it.
    flat = torch.cat(parts).cpu().double()
    finite = flat.isfinite()
    if not finite.all():
        _refuse(sizes, flat)
    value = flat.sign() * flat.abs().sqrt()
    ordered = [part.sort(stable=True) for part in torch.split(value, list(sizes.values()))]
    return [part.indices for part in ordered], [part.values.tolist() for part in ordered]


def _check_names(sizes: Mapping[str, int], scores: Mapping[str, Tensor]) -> None:
    missing = [name for name in sizes if name not in scores]
    unknown = [name for name in scores if name not in sizes]
    if missing or unknown:
        raise InputError(
            f"scores: wanted one tensor for each of {len(sizes)} groups; missing {missing[:5]}, unknown {unknown[:5]}"
        )
    for name, size in sizes.items():
        score = scores[name]
        if not isinstance(score, Tensor) or score.is_complex():
            raise InputError(f"scores[{name!r}]: wanted a real tensor, got {type(score).__name__}")
        if tuple(score.shape) != (size,):
            raise InputError(f"scores[{name!r}]: wanted shape [{size}], one score a unit, got {list(score.shape)}")


def _refuse(sizes: Mapping[str, int], flat: Tensor) -> None:
    """Raise for the scores that aren't finite, by group."""
    found = []
    for (name, size), part in zip(sizes.items(), torch.split(flat, list(sizes.values())), strict=True):
        nan, infinite = int(part.isnan().sum()), int(part.isinf().sum())
        if nan:
            found.append(f"{nan} of {size} in {name!r} are NaN")
        if infinite:
            found.append(f"{infinite} of {size} in {name!r} are infinite")
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    raise InputError(f"scores: wanted finite numbers, but {'; '.join(found[:5])}{more}")

"""What ``tc.compare`` found, as data, as text and as a file."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from taylor_cuda.files import replacing
from taylor_cuda.study.correlation import Agreement
from taylor_cuda.text import table

__all__ = ["After", "Comparison", "Row", "plain"]


@dataclass(frozen=True)
class After:
    """What is left of a model with units off: the mean loss, and the metric where there is one."""

    loss: float
    metric: float | None = None


@dataclass(frozen=True)
class Row:
    """One criterion.

    Attributes:
        criterion: its name.
        reason: why this model can't have it; everything else is empty then.
        seconds: its pass over the batches, from making the estimator to its scores.
        pass_seconds: a plain forward and backward pass over them, right before.
        agreement: of its scores with the squared change of the loss.
        after: by budget (``"macs=0.9"``), what removing the least valued units left, without fine-tuning; ``None``
            where no plan meets the budget.
        scores: ``{group: fp32 [size]}``.
    """

    criterion: str
    reason: str = ""
    seconds: float = math.nan
    pass_seconds: float = math.nan
    agreement: Agreement | None = None
    after: dict[str, After | None] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def relative(self) -> float:
        """Its seconds in plain forward and backward passes."""
        return self.seconds / self.pass_seconds


@dataclass(frozen=True)
class Comparison:
    """Criteria against the oracle.

    Attributes:
        rows: best Spearman correlation over all units first; criteria that the model can't have last.
        truth: ``{group: float64 [size]}``, the signed change of the loss without each unit.
        intact: the model as it is.
        oracle_after: as ``Row.after``, with the squared truth for scores.
        examples: that everything was measured on.
        batches: that they came in.
        oracle_seconds: what the truth took; about 0 where it was given.
    """

    rows: tuple[Row, ...]
    truth: dict[str, Tensor] = field(repr=False)
    intact: After
    oracle_after: dict[str, After | None]
    examples: int
    batches: int
    oracle_seconds: float

    @property
    def pass_seconds(self) -> float:
        """The median of the plain forward and backward passes over the examples, one of them beside each criterion."""
        return statistics.median([row.pass_seconds for row in self.rows if row.agreement is not None] or [math.nan])

    def __getitem__(self, criterion: str) -> Row:
        for row in self.rows:
            if row.criterion == criterion:
                return row
        raise KeyError(f"no criterion {criterion!r}; there are {[row.criterion for row in self.rows]}")

    def table(self) -> str:
        """Correlations and cost of each criterion, then what removal leaves, then what could not be had."""
        units = sum(len(change) for change in self.truth.values())
        head = (
            f"{units:,} units in {len(self.truth)} groups, {self.examples:,} examples in {self.batches} batches; "
            f"loss {self.intact.loss:.4g}{_metric(self.intact)}\n"
            f"forward and backward passes {self.pass_seconds:.2f} s, oracle {self.oracle_seconds:.1f} s"
        )
        found = [row for row in self.rows if row.agreement is not None]
        parts = [head, _agreements(found)]
        if self.oracle_after:
            parts.append(_removals([*found, Row("oracle", after=self.oracle_after)], list(self.oracle_after)))
        missing = [f"{row.criterion}: not on this model: {row.reason}" for row in self.rows if row.agreement is None]
        return "\n\n".join([*parts, *(["\n".join(missing)] if missing else [])])

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values that JSON can hold; a number that isn't finite is ``None``."""
        result: dict[str, Any] = plain(self)
        return result

    def to_json(self) -> str:
        """``to_dict`` as text."""
        return json.dumps(self.to_dict(), indent=1)

    def save(self, path: str | Path) -> None:
        """Write ``to_json`` to a file, whole or not at all."""
        with replacing(Path(path)) as temporary:
            temporary.write_text(self.to_json() + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """Dataclasses, tensors and containers as values that JSON can hold; a number that isn't finite is ``None``."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


_SHORT = {"pearson": "r", "spearman": "ρ", "kendall": "τ"}


def _agreements(rows: list[Row]) -> str:
    kinds = list(_SHORT)
    header = ["estimate vs oracle", *_SHORT.values(), *(f"{short} in group" for short in _SHORT.values())]
    lines = []
    for row in rows:
        assert row.agreement is not None
        values = [getattr(part, kind) for part in (row.agreement.overall, row.agreement.mean) for kind in kinds]
        lines.append([row.criterion, *map(_correlation, values), f"{row.seconds:.2f}", f"{row.relative:.2f}"])
    return (
        table([*header, "seconds", "× passes"], lines)
        + "\nPearson r, Spearman ρ, Kendall τ_b of scores with squared changes: all units together, mean over groups"
    )


def _correlation(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _removals(rows: list[Row], budgets: list[str]) -> str:
    lines = [[row.criterion, *(_after(row.after.get(budget)) for budget in budgets)] for row in rows]
    return table(["loss right after removal", *budgets], lines)


def _after(after: After | None) -> str:
    return "not possible" if after is None else f"{after.loss:.4g}{_metric(after)}"


def _metric(after: After) -> str:
    return "" if after.metric is None else f" ({after.metric:.4g})"

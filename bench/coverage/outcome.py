"""What was found out about one network, as a row and as a verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from taylor_cuda.bench.rows import Row

BUDGET = 0.6
WITHIN = 0.02
TRACE_SECONDS = 5.0


@dataclass
class Outcome:
    """One network by one provider.

    Attributes:
        case: the network.
        source: the package it comes from.
        shape: of one example.
        provider: ``"ours"`` or ``"torch-pruning"``.
        verdict: ``"ok"``, ``"wrong"``, ``"error"``, ``"nothing"`` (to cut) or ``"over 60 s"``.
        seconds: of finding the groups.
        cpu_seconds: of all processors that this took: less than ``seconds`` where the machine was busy with others.
        share: of the parameters that can shrink.
        macs: after the cut, as a fraction of those before.
        difference: between cut and zeroed.
        verified: what ``tc.cut`` itself measured, at every reader and output.
        effect: between cut and whole, at the least: how much there was to compare.
        groups: how many are offered.
        units: how many channels they have.
        frozen: the main reasons for what stays, with the number of channels, without the outputs of the network.
        note: an error's text, what a budget ran into.
    """

    case: str
    source: str
    shape: str
    provider: str
    verdict: str = "error"
    seconds: float | None = None
    cpu_seconds: float | None = None
    share: float | None = None
    macs: float | None = None
    difference: float | None = None
    verified: float | None = None
    effect: float | None = None
    groups: int | None = None
    units: int | None = None
    frozen: tuple[tuple[str, int], ...] = ()
    note: str = ""

    @property
    def in_budget(self) -> bool:
        """Whether the cut came to the budget, from below, within two per cent of it."""
        return self.macs is not None and (1 - WITHIN) * BUDGET <= self.macs <= BUDGET

    def row(self, record: dict[str, Any]) -> Row:
        """As a JSON-able row, with what ``bench.environment`` says about the run."""
        names = {"suite": "coverage", "op": "cut", "dtype": "float32", "layout": "contiguous", "budget": BUDGET}
        return {**names, **asdict(self), **record}


def shortcomings(outcome: Outcome) -> list[str]:
    """Where one of our rows falls short of what is promised."""
    found = []
    if outcome.verdict != "ok":
        found.append(f"{outcome.verdict} {outcome.note}".strip())
    seconds = [one for one in (outcome.seconds, outcome.cpu_seconds) if one is not None]
    if seconds and min(seconds) > TRACE_SECONDS:
        found.append(f"the trace took {min(seconds):.1f} s, wanted at most {TRACE_SECONDS:g}")
    if outcome.verdict == "ok" and not outcome.in_budget:
        found.append(f"macs={BUDGET:g} was not reached within {WITHIN:.0%}: {outcome.macs:.4f}. {outcome.note}")
    return found

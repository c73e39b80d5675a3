"""The small races through pytest-benchmark: ``pytest bench --benchmark-only``.

Cases, checks and rows are those of ``python -m taylor_cuda.bench``.
"""

from __future__ import annotations

import functools
from itertools import cycle
from typing import Any

import pytest

from taylor_cuda.bench.environment import environment
from taylor_cuda.bench.measure import Ceilings, Timing, check, make_row, measure_ceilings
from taylor_cuda.bench.race import Options, Race
from taylor_cuda.bench.rows import check_row
from taylor_cuda.bench.suites import entries

OPTIONS = Options(quick=True)
ENTRIES = {str(entry.key): entry for entry in entries(OPTIONS)}
PAIRS = [(label, provider) for label, entry in ENTRIES.items() for provider in entry.providers]


@functools.lru_cache(maxsize=1)
def built(label: str) -> Race:
    """The race; kept until the next one is asked for."""
    return ENTRIES[label].build(ENTRIES[label].key)


@functools.cache
def run_record() -> tuple[Ceilings, dict[str, Any]]:
    """The ceilings and the environment of this session."""
    return measure_ceilings(OPTIONS), environment(OPTIONS.device)


@pytest.mark.parametrize(("label", "name"), PAIRS, ids=[f"{label}-{provider}" for label, provider in PAIRS])
def test_race(label: str, name: str, benchmark: Any) -> None:
    """Check one provider, then time it; its row is in ``extra_info``."""
    race = built(label)
    reasons = [reason for skipped, reason in race.skipped if skipped == name]
    if reasons:
        pytest.skip(reasons[0])
    provider = next(provider for provider in race.providers if provider.name == name)
    checked = check(race, provider, OPTIONS)
    turn = cycle(race.inputs)
    benchmark.group = label
    with provider.context():
        benchmark.pedantic(provider.run, setup=lambda: ((next(turn),), {}), rounds=20 if checked.seconds < 0.02 else 3)
    if benchmark.stats is not None:
        timing = Timing(checked, "wall", [seconds * 1e6 for seconds in benchmark.stats.stats.data])
        row = make_row(race, timing, [], OPTIONS, *run_record())
        check_row(row)
        benchmark.extra_info.update(row)

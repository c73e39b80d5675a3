"""What is measured: one file a subject, each a function ``entries(options)``."""

from __future__ import annotations

from taylor_cuda.bench.race import Entry, Options
from taylor_cuda.bench.suites import (
    batch_norm_relu,
    conv,
    curvature,
    gather,
    graph,
    modes,
    network,
    planner,
    rank,
    relu,
    scoring,
    step,
    throughput,
    weights,
)

MODULES = (
    scoring,
    weights,
    relu,
    batch_norm_relu,
    rank,
    network,
    planner,
    graph,
    step,
    throughput,
    curvature,
    conv,
    gather,
    modes,
)


def entries(options: Options) -> list[Entry]:
    """Every race of a run on this device, the most important ones first."""
    found = [entry for module in MODULES for entry in module.entries(options)]
    return sorted(found, key=lambda entry: entry.priority)

"""From scores and a budget to widths."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from taylor_cuda.bench.race import Entry, Key, Options, Provider, Race
from taylor_cuda.bench.suites.networks import images, make
from taylor_cuda.graph import trace
from taylor_cuda.graph.groups import check_keep
from taylor_cuda.planning import native_planner, plan
from taylor_cuda.surgery import cut

BUDGET = {"macs": 0.5}


def build(key: Key, size: int) -> Race:
    """The race for one network; the image size changes the costs, not the work."""
    model = make(key.case)
    x = images(1, size)
    groups = trace(model, x)
    generator = torch.Generator().manual_seed(0)
    # Spread over decades, as scores of trained networks are.
    scores = {group.name: (3 * torch.randn(group.size, generator=generator)).exp() for group in groups}

    def check(result: Any, _index: int) -> float:
        """Valid indices, the budget kept, and the cost what a FLOP counter finds on the network that was really cut."""
        check_keep(groups, result.keep)
        smaller, smaller_groups = copy.deepcopy((model, groups))
        cut(smaller, smaller_groups, result, verify=False)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            smaller.eval()(x)
        macs = counter.get_total_flops() // 2
        if macs != result.cost.macs:
            return float("inf")
        return float(macs / (BUDGET["macs"] * groups.original_macs / groups.batch_size))

    units = sum(groups.sizes().values())
    ours = Provider(
        "ours:native" if native_planner() else "ours:reference",
        lambda _: plan(model, groups, scores, budget=BUDGET),
        check,
        note=f"{units} units in {len(groups)} groups to half of the MACs",
    )
    return Race(key, [ours])


def entries(options: Options) -> list[Entry]:
    """The planner runs on the host whatever the device, so a CPU run is where it is measured."""
    if options.cuda:
        return []
    wanted = [("resnet18", 64, 5)] if options.quick else [("resnet101", 224, 6), ("resnet50", 224, 40)]
    return [
        Entry(Key("planner", "plan", network), partial(build, size=size), ("ours:native",), priority)
        for network, size, priority in wanted
    ]

"""Planning on traced networks of torchvision: the cost of the plan is the cost of the network that is really cut."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

from taylor_cuda.graph import trace
from taylor_cuda.graph.slicing import slice_model
from taylor_cuda.planning import model_cost, original_cost, plan
from tests.planning.nets import random_scores


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "mobilenet_v2"])
def test_planned_cost_is_that_of_the_cut_network_and_every_dimension_is_rounded(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None, num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    groups = trace(model, x, prove=False)
    assert model_cost(model, groups) == original_cost(groups)
    for round_to, budget in ((1, {"macs": 0.4, "params": 0.7}), (8, {"macs": 0.5})):
        decided = plan(model, groups, random_scores(groups), budget, round_to=round_to)
        smaller = copy.deepcopy(model)
        slice_model(smaller, groups, decided.keep)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            smaller(x)
        assert counter.get_total_flops() == 2 * 2 * decided.cost.macs  # two examples, two operations a MAC
        assert sum(p.numel() for p in smaller.parameters()) == decided.cost.params
        for limited, fraction in budget.items():
            whole = getattr(decided.cost_original, limited)
            # What is given back leaves the budget used to the full, but for a chunk or two.
            assert 0.97 * fraction * whole <= getattr(decided.cost, limited) <= fraction * whole or len(budget) > 1
        for before, after in zip(model.parameters(), smaller.parameters(), strict=True):
            sliced = [new for old, new in zip(before.shape, after.shape, strict=True) if new != old]
            assert all(new % round_to == 0 for new in sliced)

"""Groups of small networks, against what was worked out by hand, and cut against masked."""

from __future__ import annotations

import pytest
import torch

from taylor_cuda.graph.tracer import trace
from tests.graph.checks import cut_error, no_zeros, places, random_plan
from tests.graph.expected import FROZEN, GROUPS
from tests.graph.nets import NETS, C2f, Concat, Flatten, Grouped

# fp32, nets of a few layers whose sums have at most 200 terms: 30 roundings are ample, a wrong channel is of order 1
TOLERANCE = 30 * torch.finfo(torch.float32).eps


def traced(name: str, **kwargs: bool):
    torch.manual_seed(0)
    make, inputs = NETS[name]
    model = no_zeros(make()).eval()
    return model, trace(model, inputs(), **kwargs)


@pytest.mark.parametrize("name", NETS)
def test_groups_are_those_worked_out_by_hand(name):
    _, groups = traced(name)
    assert {group.name: (group.size, places(group)) for group in groups} == GROUPS[name]
    assert groups.notes == []


@pytest.mark.parametrize("name", NETS)
def test_frozen_channels_are_named_with_their_reason(name):
    _, groups = traced(name)
    found = {entry.name: entry for entry in groups.frozen}
    expected = FROZEN.get(name, {})
    for layer, (size, reason) in expected.items():
        entry = found.pop(layer)
        assert entry.size == size
        assert reason in entry.reason
    assert {entry.reason for entry in found.values()} <= {"an output of the network"}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_cut_equals_masked(name, seed):
    model, groups = traced(name)
    plan = random_plan(groups, seed)
    assert cut_error(model, groups, plan) < TOLERANCE
    one_each = {group: units[:1] for group, units in plan.items()}
    assert cut_error(model, groups, one_each) < TOLERANCE


def test_positions_of_concatenated_channels():
    groups = trace(Concat(), torch.randn(2, 3, 8, 8))
    index = {(group.name, m.tensor): m.index.flatten().tolist() for group in groups for m in group.members}
    assert index["a", "c.weight"] == [0, 1, 2, 3]
    assert index["b", "c.weight"] == index["b", "bn.running_var"] == [4, 5, 6, 7, 8, 9]
    assert index["b", "b.weight"] == [0, 1, 2, 3, 4, 5]


def test_positions_of_a_convolution_group():
    groups = trace(Grouped(), torch.randn(2, 3, 8, 8))
    index = {m.tensor: m.index.tolist() for m in groups["a"].members}
    assert index["a.weight"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert index["g.weight"] == index["b.weight"] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_positions_of_chunks():
    groups = trace(C2f(), torch.randn(2, 3, 8, 8))
    index = {m.tensor: m.index.tolist() for m in groups["a"].members}
    assert index["a.weight"] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert index["m1.weight"] == [[0], [1], [2], [3]]
    assert index["b.weight"] == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]


def test_positions_of_flattened_channels():
    groups = trace(Flatten(), torch.randn(2, 3, 8, 8))
    index = {m.tensor: m.index.tolist() for m in groups["a"].members}
    assert index["fc.weight"][:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_without_proof_the_rules_alone_decide():
    _, groups = traced("constant_scale", prove=False)
    assert set(groups.sizes()) == {"a", "b"}

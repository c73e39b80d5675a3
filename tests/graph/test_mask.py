"""``tc.masked``: what it takes, and that nothing that calls the model escapes it."""

from __future__ import annotations

import pytest
import torch

import taylor_cuda as tc
from tests.graph.base import image
from tests.graph.nets import ConvBN


def test_what_was_compiled_around_the_model_sees_the_mask():
    torch.manual_seed(0)
    model, x = ConvBN().eval(), image()
    groups, keep = tc.trace(model, x), {"a": torch.tensor([0, 5])}
    with tc.masked(model, groups, keep):
        expected = model(x)
    around = torch.compile(lambda x: model(x), backend="eager")
    before = around(x)
    with tc.masked(model, groups, keep):
        assert torch.equal(around(x), expected)
    assert torch.equal(around(x), before)
    assert not torch.equal(before, expected)


def test_a_compiled_model_is_refused_by_name():
    model, x = ConvBN(), image()
    groups = tc.trace(model, x)
    with (
        pytest.raises(tc.InputError, match="masked: model was compiled"),
        tc.masked(torch.compile(model), groups, {"a": torch.tensor([0])}),
    ):
        pass


def test_a_plan_from_before_a_cut_is_refused():
    model, x = ConvBN(), image()
    groups = tc.trace(model, x)
    scores = {group.name: torch.rand(group.size) for group in groups}
    stale = tc.plan(model, groups, scores, {"macs": 0.7})
    tc.cut(model, groups, {"a": torch.arange(7)})
    with pytest.raises(tc.InputError, match="before another cut"), tc.masked(model, groups, stale):
        pass

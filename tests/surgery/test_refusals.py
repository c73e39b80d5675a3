"""What ``tc.cut`` refuses, before it touches anything."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from taylor_cuda.errors import InputError
from taylor_cuda.planning import Plan
from taylor_cuda.surgery import cut
from tests.surgery.nets import ConvBias, ConvBN, make, random_keep
from tests.surgery.state import differences, fingerprint


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"conv9": torch.tensor([0])}, "no group named 'conv9'"),
        ({"conv1": torch.tensor([], dtype=torch.int64)}, "not empty"),
        ({"conv1": torch.tensor([1, 0])}, "sorted"),
        ({"conv1": torch.tensor([6])}, "below 6"),
        ({"conv1": [0, 1]}, "int64"),
        ([0, 1], "wanted a tc.Plan or a dict"),
    ],
)
def test_a_bad_plan_is_refused(plan, message):
    model, _, groups = make(ConvBN)
    before = fingerprint(model, groups=groups)
    with pytest.raises(InputError, match=message):
        cut(model, groups, plan)
    assert not differences(before, fingerprint(model, groups=groups))


def test_a_plan_from_before_another_cut_is_refused():
    model, _, groups = make(ConvBN)
    keep = {"conv1": torch.tensor([0, 1]), "conv2": torch.tensor([0, 1])}
    cost = object()
    plan = Plan(keep, cost, cost, cost, {}, {}, sizes_before=groups.sizes())
    cut(model, groups, {"conv1": torch.tensor([0, 1, 2])})
    with pytest.raises(InputError, match="before another cut"):
        cut(model, groups, plan)


def test_groups_of_another_model_or_from_before_a_cut_are_refused():
    model, x, groups = make(ConvBN)
    other, _, other_groups = make(ConvBias)
    with pytest.raises(InputError, match="another model"):
        cut(other, groups, {"conv1": torch.tensor([0])})
    stale = model.groups(x)
    fresh_copy = copy.deepcopy(model)
    cut(model, groups, {"conv1": torch.tensor([0, 1, 4])})
    with pytest.raises(InputError, match="trace it anew"):
        cut(model, stale, {"conv1": torch.tensor([0])})
    with pytest.raises(InputError, match="another copy"):
        cut(fresh_copy, groups, {"conv1": torch.tensor([0])})
    assert other_groups.sizes() == {"conv1": 6, "conv2": 5}


def test_wrapped_and_compiled_models_are_refused_by_name():
    model, _, groups = make(ConvBN)
    keep = random_keep(groups)
    with pytest.raises(InputError, match=r"model\.module"):
        cut(nn.DataParallel(model), groups, keep)
    with pytest.raises(InputError, match="original module"):
        cut(torch.compile(model), groups, keep)
    holder = nn.Module()
    holder.inner = nn.DataParallel(model)
    with pytest.raises(InputError, match=r"DataParallel \(at inner\)"):
        cut(holder, groups, keep)
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        cut("resnet18", groups, keep)


def test_a_module_compiled_in_place_is_cut():
    model, x, groups = make(ConvBN)
    model.compile(backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(x)
        cut(model, groups, random_keep(groups))
        model(x).sum().backward()
    assert groups.verified < 1e-5


def test_parameters_tied_by_memory_alone_are_refused():
    model, _, groups = make(ConvBN)
    model.bn1.bias.data = model.bn1.weight.data
    with pytest.raises(InputError, match=r"bn1\.weight and bn1\.bias share memory"):
        cut(model, groups, {"conv1": torch.tensor([0])})
    cut(model, groups, {"conv2": torch.tensor([0])})  # which leaves the pair alone


def test_lazy_modules_are_refused():
    model, _, groups = make(ConvBN)
    model.extra = nn.LazyLinear(3)
    with pytest.raises(InputError, match=r"extra\.weight has no shape yet"):
        cut(model, groups, random_keep(groups))


def test_sharded_models_are_refused():
    class FSDPModule:
        """What ``fully_shard`` mixes into a module's class."""

    class Sharded(ConvBN, FSDPModule):
        pass

    model, _, groups = make(Sharded)
    with pytest.raises(InputError, match="sharded by FSDP"):
        cut(model, groups, random_keep(groups))
    model, _, groups = make(ConvBN)
    model.conv1.weight.placements = ()
    with pytest.raises(InputError, match=r"conv1\.weight is distributed over devices"):
        cut(model, groups, random_keep(groups))

"""The bare cut: what stays of each tensor, the layers' sizes, and groups that go on being right afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from taylor_cuda.graph.groups import Groups, named_tensors
from taylor_cuda.graph.mask import position_masks
from taylor_cuda.graph.slicing import (
    layer_sizes,
    shrink_groups,
    slice_model,
    slice_tensor,
    tensor_keeps,
    update_attributes,
)
from taylor_cuda.graph.tracer import trace
from tests.graph.base import image
from tests.graph.checks import cut_error, no_zeros, random_plan, run
from tests.graph.nets import NETS, Concat, Depthwise, GroupNormed, LayerNormed, Transposed

NAMES = ["residual", "concat", "depthwise", "grouped", "transposed", "group_norm", "layer_norm", "c2f", "flatten"]


def traced(name: str) -> tuple[nn.Module, Groups]:
    torch.manual_seed(0)
    make, inputs = NETS[name]
    model = no_zeros(make()).eval()
    return model, trace(model, inputs())


@pytest.mark.parametrize("name", NAMES)
def test_a_second_cut_composes(name):
    """Cutting twice, with renumbered groups, is cutting once."""
    model, groups = traced(name)
    first = random_plan(groups, 1)
    keeps = tensor_keeps(model, groups, first)
    once = copy.deepcopy(model)
    slice_model(once, groups, first)
    smaller = copy.copy(groups)
    smaller.groups = shrink_groups(groups, first, keeps)
    assert smaller.sizes() == {group: kept.numel() for group, kept in first.items()}
    second = random_plan(smaller, 2)
    assert cut_error(once, smaller, second) < 1e-5
    twice = copy.deepcopy(once)
    slice_model(twice, smaller, second)
    both = {group: first[group][second[group]] for group in first}
    direct = copy.deepcopy(model)
    slice_model(direct, groups, both)
    a, b = named_tensors(twice), named_tensors(direct)
    assert all(torch.equal(a[tensor], b[tensor]) for tensor in a)
    again = shrink_groups(smaller, second, tensor_keeps(once, smaller, second))
    assert {group.name: group.kept.tolist() for group in again} == {
        group: kept.tolist() for group, kept in both.items()
    }
    assert all(group.original_size == groups[group.name].size for group in again)


def test_positions_shift_where_another_group_shrinks():
    groups = trace(Concat(), image())
    plan = {"a": torch.tensor([1, 3])}
    shrunk = shrink_groups(groups, plan, tensor_keeps(Concat(), groups, plan))
    index = {(group.name, m.tensor): m.index.flatten().tolist() for group in shrunk for m in group.members}
    assert index["a", "c.weight"] == [0, 1]
    assert index["b", "c.weight"] == index["b", "bn.weight"] == [2, 3, 4, 5, 6, 7]
    assert index["b", "b.weight"] == [0, 1, 2, 3, 4, 5]


def test_affine_members_are_renumbered_too():
    groups = trace(GroupNormed(), image())
    plan = {"a": torch.tensor([0, 3])}
    (a, _) = shrink_groups(groups, plan, tensor_keeps(GroupNormed(), groups, plan))
    assert [(m.tensor, m.index.tolist()) for m in a.affine] == [
        ("gn.weight", [[0, 1, 2], [3, 4, 5]]),
        ("gn.bias", [[0, 1, 2], [3, 4, 5]]),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_restore_puts_everything_back(name):
    model, groups = traced(name)
    before = {name: (id(t), t.data_ptr(), t.clone()) for name, t in named_tensors(model).items()}
    attributes = [vars(module).copy() for module in model.modules()]
    expected = run(model, groups)
    done = slice_model(model, groups, random_plan(groups, 3))
    assert done.tensors
    assert done.attributes
    done.restore()
    after = named_tensors(model)
    assert all((id(after[n]), after[n].data_ptr()) == (i, p) for n, (i, p, _) in before.items())
    assert all(torch.equal(after[n], value) for n, (_, _, value) in before.items())
    assert all(torch.equal(a, b) for a, b in zip(expected, run(model, groups), strict=True))
    for module, old in zip(model.modules(), attributes, strict=True):
        assert {k: v for k, v in vars(module).items() if isinstance(v, (int, tuple))} == {
            k: v for k, v in old.items() if isinstance(v, (int, tuple))
        }


def test_attributes_follow():
    model = Transposed()
    groups = trace(model, image(2, 4))
    slice_model(model, groups, {"a": torch.tensor([0, 5]), "up": torch.tensor([1, 2, 3])})
    assert (model.a.out_channels, model.up.in_channels, model.up.out_channels) == (2, 2, 6)
    assert (model.g.groups, model.g.in_channels, model.g.out_channels, model.b.in_channels) == (3, 6, 9, 9)
    model = Depthwise()
    slice_model(model, trace(model, image()), {"a": torch.tensor([2]), "b": torch.tensor([0, 1, 2])})
    assert (model.d.groups, model.d.in_channels, model.d.out_channels, model.bn.num_features) == (1, 1, 2, 2)
    assert (model.fc.in_features, model.fc.out_features) == (3, 2)
    model = GroupNormed()
    slice_model(model, trace(model, image()), {"a": torch.tensor([0, 2, 3])})
    assert (model.gn.num_groups, model.gn.num_channels) == (3, 9)
    model = LayerNormed()
    slice_model(model, trace(model, torch.randn(2, 5, 6)), {"embed": torch.arange(5)})
    assert model.norm.normalized_shape == (5,)
    assert update_attributes(model) == []


def test_sizes_of_other_layers():
    layer = nn.Embedding(10, 6)
    layer.weight.data = layer.weight.data[:, :4]
    assert layer_sizes(layer) == {"num_embeddings": 10, "embedding_dim": 4}
    layer = nn.PReLU(8)
    layer.weight.data = layer.weight.data[:3]
    assert layer_sizes(layer) == {"num_parameters": 3}
    layer = nn.BatchNorm2d(8, affine=False)
    layer.running_mean = layer.running_mean[:5]
    assert layer_sizes(layer) == {"num_features": 5}
    assert layer_sizes(nn.BatchNorm2d(8, affine=False, track_running_stats=False)) == {}
    assert layer_sizes(nn.ReLU()) == {}


def test_memory_formats_stay():
    kept = {0: torch.tensor([0, 2]), 1: torch.tensor([1, 2, 4])}
    weight = torch.randn(4, 5, 3, 3).to(memory_format=torch.channels_last)
    small = slice_tensor(weight, kept)
    assert small.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(small, weight[[0, 2]][:, [1, 2, 4]])
    plain = slice_tensor(weight.contiguous(), kept)
    assert plain.is_contiguous()
    volume = torch.randn(4, 5, 3, 3, 2).to(memory_format=torch.channels_last_3d)
    assert slice_tensor(volume, kept).is_contiguous(memory_format=torch.channels_last_3d)


def test_masks_are_the_complement_of_what_is_sliced():
    model, groups = traced("concat")
    plan = random_plan(groups, 4)
    keeps = tensor_keeps(model, groups, plan)
    masks = position_masks(model, groups, plan, "read")
    assert set(masks) <= set(keeps)
    for name, mask in masks.items():
        assert mask.nonzero().flatten().tolist() == keeps[name][1].tolist()


def test_groups_that_are_not_named_keep_all():
    model, groups = traced("concat")
    assert tensor_keeps(model, groups, {}) == {}
    keeps = tensor_keeps(model, groups, {"c": torch.tensor([1]), "a": torch.arange(4)})
    assert {name: list(dims) for name, dims in keeps.items()} == {"c.weight": [0], "c.bias": [0], "fc.weight": [1]}

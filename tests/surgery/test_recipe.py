"""The recipe of cuts: original positions, composed over cuts, replayed on a fresh model."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

from taylor_cuda.errors import InputError
from taylor_cuda.graph.groups import ChannelGroup
from taylor_cuda.surgery import apply_recipe, cut
from taylor_cuda.surgery.recipe import parse_positions, recipe_of, write_positions
from tests.surgery.nets import NETS, ConvBias, ConvBN, Residual, Tied, make, random_keep, train_steps
from tests.surgery.state import all_tensors, differences, fingerprint


def test_the_recipe_says_what_is_left_in_original_positions():
    model, _, groups = make(ConvBias)
    cut(model, groups, {"conv1": torch.tensor([0, 1, 2, 5])})
    cut(model, groups, {"conv1": torch.tensor([1, 2, 3]), "conv2": torch.tensor([4])})
    conv1 = {"length": 6, "kept": "1-2,5"}
    conv2 = {"length": 5, "kept": "4"}
    assert model.taylor_cuda_recipe == {
        "format": 1,
        "tensors": {
            "conv1.weight": {"0": conv1},
            "conv1.bias": {"0": conv1},
            "conv2.weight": {"1": conv1, "0": conv2},
            "conv2.bias": {"0": conv2},
            "head.weight": {"1": conv2},
        },
        "groups": {"conv1": {"size": 6, "kept": "1-2,5"}, "conv2": {"size": 5, "kept": "4"}},
    }
    assert json.loads(json.dumps(model.taylor_cuda_recipe)) == model.taylor_cuda_recipe


def test_the_recipe_goes_where_the_model_goes():
    model, _, groups = make(ConvBN)
    cut(model, groups, random_keep(groups))
    recipe = model.taylor_cuda_recipe
    assert copy.deepcopy(model).taylor_cuda_recipe == recipe
    assert pickle.loads(pickle.dumps(model)).taylor_cuda_recipe == recipe
    kept = json.dumps(recipe)
    cut(model, groups, {"conv1": torch.tensor([0])})
    assert json.dumps(recipe) == kept  # a recipe handed out before does not change


@pytest.mark.parametrize("net", NETS)
def test_replay_equals_two_cuts(net):
    model, x, groups = make(net)
    fresh = make(net)[0]
    for seed in (0, 2):
        cut(model, groups, random_keep(groups, seed))
    before = {name: id(tensor) for name, tensor in all_tensors(fresh).items()}
    apply_recipe(fresh, model.taylor_cuda_recipe)
    for (name, a), b in zip(all_tensors(model).items(), all_tensors(fresh).values(), strict=True):
        assert torch.equal(a, b), name
        assert id(b) == before[name]
    for a, b in zip(model.modules(), fresh.modules(), strict=True):
        assert repr(a) == repr(b)
    assert torch.equal(model.eval()(x), fresh.eval()(x))
    assert fresh.taylor_cuda_recipe == model.taylor_cuda_recipe
    assert fresh.taylor_cuda_recipe is not model.taylor_cuda_recipe


def test_replay_brings_optimizer_average_and_groups_along():
    model, x, groups = make(Residual)
    cut(model, groups, {"stem": torch.tensor([0, 2, 3, 4]), "a1": torch.tensor([1, 2])})
    other, _, other_groups = make(Residual)
    optimizer = torch.optim.Adam(other.parameters())
    ema = AveragedModel(other)
    train_steps(other, x, optimizer, 2)
    apply_recipe(other, model.taylor_cuda_recipe, optimizer, ema, other_groups)
    assert other_groups.sizes() == groups.sizes()
    for one, two in zip(groups, other_groups, strict=True):
        assert torch.equal(one.kept, two.kept)
        assert all(torch.equal(a.index, b.index) for a, b in zip(one.members, two.members, strict=True))
    assert (
        optimizer.state[other.stem.weight]["exp_avg"].shape == other.stem.weight.shape == ema.module.stem.weight.shape
    )
    train_steps(other, x, optimizer, 1)
    cut(other, other_groups, {"stem": torch.tensor([0, 3])}, optimizer, ema)
    assert other.taylor_cuda_recipe["groups"]["stem"] == {"size": 6, "kept": "0,4"}


def test_replay_goes_on_from_an_earlier_cut_and_does_nothing_twice():
    model, x, groups = make(Residual)
    cut(model, groups, {"stem": torch.tensor([0, 2, 3, 4])})
    early = copy.deepcopy(model)
    cut(model, groups, {"stem": torch.tensor([1, 3]), "a1": torch.tensor([0])})
    apply_recipe(early, model.taylor_cuda_recipe)
    assert torch.equal(early.eval()(x), model.eval()(x))
    before = fingerprint(early)
    apply_recipe(early, model.taylor_cuda_recipe)
    assert not differences(before, fingerprint(early))


def test_a_model_that_was_loaded_and_traced_again_composes():
    """Its groups start at the smaller widths; the recipe goes on in original positions."""
    model, x, groups = make(ConvBias)
    cut(model, groups, {"conv1": torch.tensor([0, 2, 3, 5]), "conv2": torch.tensor([1, 2, 4])})
    again = model.groups(x)
    traced = []
    for group in groups:
        traced.append(ChannelGroup(group.name, group.members, torch.arange(group.size), group.size))
    again.groups = tuple(traced)
    cut(model, again, {"conv1": torch.tensor([1, 3])})
    assert model.taylor_cuda_recipe["groups"]["conv1"] == {"size": 6, "kept": "2,5"}
    assert model.taylor_cuda_recipe["tensors"]["conv2.weight"]["1"] == {"length": 6, "kept": "2,5"}
    assert model.taylor_cuda_recipe["tensors"]["conv2.weight"]["0"] == {"length": 5, "kept": "1-2,4"}


def test_replay_on_a_model_it_does_not_fit_is_refused():
    model, _, groups = make(ConvBN)
    cut(model, groups, {"conv1": torch.tensor([0, 1, 5])})
    recipe = model.taylor_cuda_recipe

    class Wider(ConvBN):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1, self.conv2 = nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.Conv2d(7, 5, 3)

    cut_otherwise, _, other_groups = make(ConvBN)
    cut(cut_otherwise, other_groups, {"conv1": torch.tensor([0, 1, 2, 4])})
    cut_elsewhere, _, other_groups = make(ConvBN)
    cut(cut_elsewhere, other_groups, {"conv2": torch.tensor([0, 1])})
    cases = [
        (make(Tied)[0], "no tensor named conv1.weight"),
        (Wider(), r"conv1\.weight, dimension 0 had 6 positions there, here 7"),
        (cut_otherwise, "has lost positions that the recipe keeps"),
        (cut_elsewhere, "of this model was cut, in the recipe it wasn't"),
    ]
    for other, message in cases:
        before = fingerprint(other)
        with pytest.raises(InputError, match=message):
            apply_recipe(other, recipe)
        assert not differences(before, fingerprint(other))


def test_a_model_changed_by_hand_since_its_cut_is_refused():
    model, x, groups = make(ConvBN)
    cut(model, groups, {"conv1": torch.tensor([0, 1, 5]), "conv2": torch.tensor([0, 1])})
    model.head = nn.Linear(5, 4)
    again = make(ConvBN)[2]
    again.groups = (again["conv2"],)
    model.conv2, model.bn2 = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
    with pytest.raises(InputError, match="the cuts of this model left 2"):
        cut(model, again, {"conv2": torch.tensor([0])})
    model.taylor_cuda_recipe["groups"].clear()
    with pytest.raises(InputError, match="changed by other means"):
        cut(model, again, {"conv2": torch.tensor([0])})
    assert model(x).shape == (2, 4)


def test_groups_that_do_not_fit_are_refused():
    model, _, groups = make(ConvBN)
    cut(model, groups, {"conv1": torch.tensor([0, 1, 5])})
    fresh = make(ConvBN)[0]
    before = fingerprint(fresh)
    with pytest.raises(InputError, match="no conv1 of 6 units"):
        apply_recipe(fresh, model.taylor_cuda_recipe, groups=make(Residual)[2])
    other, _, cut_groups = make(ConvBN)
    cut(other, cut_groups, {"conv1": torch.tensor([2, 3])})
    with pytest.raises(InputError, match="lost units"):
        apply_recipe(fresh, model.taylor_cuda_recipe, groups=cut_groups)
    assert not differences(before, fingerprint(fresh))


ENTRY = {"length": 6, "kept": "0-2"}


@pytest.mark.parametrize(
    "recipe",
    [
        None,
        [],
        {},
        {"format": 2, "tensors": {}, "groups": {}},
        {"format": 1, "tensors": [], "groups": {}},
        {"format": 1, "tensors": {"conv1.weight": 3}, "groups": {}},
        {"format": 1, "tensors": {"conv1.weight": {"x": ENTRY}}, "groups": {}},
        {"format": 1, "tensors": {"conv1.weight": {"9": ENTRY}}, "groups": {}},
        {"format": 1, "tensors": {"conv1.weight": {"0": {"length": 6}}}, "groups": {}},
        {"format": 1, "tensors": {"conv1.weight": {"0": {"length": 6, "kept": ""}}}, "groups": {}},
        {"format": 1, "tensors": {"conv1.weight": {"0": {"length": 6, "kept": "3-1"}}}, "groups": {}},
        {"format": 1, "tensors": {"conv1.weight": {"0": {"length": 6, "kept": "0-9"}}}, "groups": {}},
        {"format": 1, "tensors": {"conv1.weight": {"0": {"length": 6, "kept": "0-999999999999999"}}}, "groups": {}},
        {"format": 1, "tensors": {}, "groups": {"conv1": "0-2"}},
    ],
    ids=str,
)
def test_a_malformed_recipe_is_refused(recipe):
    model, *_ = make(ConvBN)
    before = fingerprint(model)
    with pytest.raises(InputError, match="recipe"):
        apply_recipe(model, recipe)
    assert not differences(before, fingerprint(model))


@given(st.sets(st.integers(0, 300), min_size=1))
@settings(max_examples=200)
def test_positions_survive_being_written(positions):
    tensor = torch.tensor(sorted(positions))
    assert torch.equal(parse_positions(write_positions(tensor), 301), tensor)


def test_positions_are_written_as_ranges():
    assert write_positions(torch.tensor([0, 1, 2, 3, 5, 7, 8])) == "0-3,5,7-8"
    assert write_positions(torch.tensor([4])) == "4"


@given(st.data())
@settings(max_examples=25)
def test_any_number_of_cuts_composes(data):
    model, x, groups = make(Residual, dtype=torch.float64)
    fresh = copy.deepcopy(model)
    left = {group.name: list(range(group.size)) for group in groups}
    for _ in range(data.draw(st.integers(1, 4))):
        keep = {}
        for group in groups:
            chosen = data.draw(st.sets(st.sampled_from(range(group.size)), min_size=1))
            keep[group.name] = torch.tensor(sorted(chosen))
            left[group.name] = [left[group.name][i] for i in sorted(chosen)]
        cut(model, groups, keep)
    apply_recipe(fresh, recipe_of(model), groups=(fresh_groups := fresh.groups(x)))
    assert {group.name: group.kept.tolist() for group in groups} == left
    assert {group.name: group.kept.tolist() for group in fresh_groups} == left
    assert torch.equal(fresh.eval()(x), model.eval()(x))

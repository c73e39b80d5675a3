"""``tc.plan``: worked by hand, on real cuts, and what it refuses."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from torch import Tensor, nn

from taylor_cuda.errors import BudgetError, InputError
from taylor_cuda.graph.groups import Groups, check_keep
from taylor_cuda.graph.slicing import shrink_groups, slice_model, tensor_keeps
from taylor_cuda.planning import Plan, model_cost, plan
from taylor_cuda.planning import planner as planner_module
from taylor_cuda.planning.cost import Lengths
from taylor_cuda.planning.rungs import Rungs, allowed_counts, resolve_round_to
from tests.planning.nets import (
    NETS,
    Place,
    chain,
    concat,
    grouped,
    hand_groups,
    layer,
    random_scores,
    residual,
    two_layers,
)


def squares(**values: list[float]) -> dict[str, Tensor]:
    """Scores whose roots are these values, by group name without its underscore."""
    return {name.lstrip("_"): torch.tensor(value, dtype=torch.float64) ** 2 for name, value in values.items()}


def kept(decided: Plan) -> dict[str, list[int]]:
    return {name: indices.tolist() for name, indices in decided.keep.items()}


def test_greedy_and_giving_back_by_hand() -> None:
    """2·a + a·b + b parameters, from 22 to at most 11.

    (a, b) = (3, 4): a's least unit saves 2 + 4 for 1, b's saves 3 + 1 for 0.9: a goes (1/6 < 0.9/4).
    (2, 4): a: 2 for 6; b: 0.9 for 2 + 1: b goes (0.3 < 1/3).
    (2, 3): a: 2 for 2 + 3; b: 3 for 3: a goes (0.4 < 1). (1, 3) costs 8: met.
    Giving back: a's 2 would cost 13, too much; b's 0.9 costs 10, which holds.
    """
    model, groups = two_layers()
    scores = squares(_0=[4, 1, 2], _1=[6, 0.9, 3.5, 3])
    decided = plan(model, groups, scores, {"params": 0.5})
    assert kept(decided) == {"0": [0], "1": [0, 1, 2, 3]}
    assert decided.cost.params == 10
    assert decided.cost_before.params == decided.cost_original.params == 22
    assert decided.predicted_change == pytest.approx(3, rel=1e-12)
    assert decided.removed_value == pytest.approx({"0": 3, "1": 0}, rel=1e-12)
    assert decided.sizes == {"0": 1, "1": 4}
    # At most 8: (1, 3) holds, and there is nothing to give back. At most 6: a is at its floor, b's 3 goes as well.
    assert kept(plan(model, groups, scores, {"params": 0.37})) == {"0": [0], "1": [0, 2, 3]}
    assert kept(plan(model, groups, scores, {"params": 0.31})) == {"0": [0], "1": [0, 2]}


def test_rank_by_value_ignores_what_units_cost() -> None:
    """At most 12 of 22 parameters; by value, a's 1 (16 left), b's 1.5 (13) and b's 2 (10) go.

    By value per cost, a's 1 for 6 goes first; then a's 2.2 for 5 + 1 is a better buy than b's 1.5 for 2 + 1: 10 left.
    """
    model, groups = two_layers()
    scores = squares(_0=[1, 2.2, 6], _1=[1.5, 2, 3, 7])
    assert kept(plan(model, groups, scores, {"params": 12 / 22}, rank="value")) == {"0": [1, 2], "1": [2, 3]}
    assert kept(plan(model, groups, scores, {"params": 12 / 22})) == {"0": [2], "1": [0, 1, 2, 3]}


def test_squares_are_not_added() -> None:
    """Two units worth 3 + 3 are more than two worth 0 + 5, though 9 + 9 < 0 + 25."""
    model = nn.Sequential(*(nn.Linear(i, o, bias=False) for i, o in ((2, 4), (4, 2), (2, 4), (4, 2))))
    places = {name: [*layer(name), (f"{reader}.weight", 1, "read", 1, 0)] for name, reader in (("0", 1), ("2", 3))}
    calls = [(f"{i}.weight", 1) for i in range(4)]
    groups = hand_groups(model, {"0": 4, "2": 4}, places, calls, torch.randn(1, 2))
    scores = squares(_0=[3, 3, 9, 9], _2=[0, 5, 9, 9])
    decided = plan(model, groups, scores, {"channels": 0.75}, round_to=2)
    assert kept(decided) == {"0": [0, 1, 2, 3], "2": [2, 3]}


def test_several_budgets_hold_at_once_and_each_matters() -> None:
    model, groups = chain()
    scores = random_scores(groups)
    both = plan(model, groups, scores, {"macs": 0.6, "params": 0.45})
    assert both.cost.macs <= 0.6 * both.cost_original.macs
    assert both.cost.params <= 0.45 * both.cost_original.params
    assert plan(model, groups, scores, {"macs": 0.6}).cost.params > 0.45 * both.cost_original.params
    assert plan(model, groups, scores, {"params": 0.45}).cost.macs > 0.3 * both.cost_original.macs
    # One that is met from the start changes nothing.
    assert kept(plan(model, groups, scores, {"macs": 0.5, "params": 1})) == kept(
        plan(model, groups, scores, {"macs": 0.5})
    )


def test_savings_of_several_budgets_are_fractions_of_the_original() -> None:
    """One unit of either group meets both; 1 of conv2 saves 404 of 11984 MACs and 27 of 287 parameters, together 0.128.

    One of conv1 costs 3 and saves 64 · 31 MACs and 33 parameters, together 0.28: more than twice as much, for three
    times the value. Were MACs and parameters added as they are, it would be 4.7 times as much.
    """
    model, groups = chain()
    scores = squares(conv1=[3, 9, 9, 9, 9, 9], conv2=[9, 9, 9, 1])
    decided = plan(model, groups, scores, {"macs": 0.97, "params": 0.95})
    assert decided.sizes == {"conv1": 6, "conv2": 3}
    assert (decided.cost.macs, decided.cost.params) == (11984 - 404, 287 - 27)


def test_a_budget_that_is_met_keeps_everything() -> None:
    model, groups = chain()
    decided = plan(model, groups, random_scores(groups), {"macs": 1.0, "channels": 1})
    assert kept(decided) == {"conv1": list(range(6)), "conv2": list(range(4))}
    assert decided.cost == decided.cost_before
    assert decided.predicted_change == 0


@pytest.mark.parametrize("net", NETS)
def test_what_was_planned_is_what_the_cut_model_costs(net: str) -> None:
    model, groups = NETS[net]()
    decided = plan(model, groups, random_scores(groups), {"macs": 0.6})
    check_keep(groups, decided.keep)
    assert 0 < decided.cost.macs <= 0.6 * decided.cost_before.macs
    assert decided.cost == model_cost(model, groups, decided.sizes)
    smaller = copy.deepcopy(model)
    slice_model(smaller, groups, decided.keep)
    assert sum(p.numel() for p in smaller.parameters()) == decided.cost.params
    smaller(*groups.example_inputs[0])


def cut_once(model: nn.Module, groups: Groups, decided: Plan) -> None:
    """The bare cut, with the groups as they are afterwards."""
    keeps = tensor_keeps(model, groups, decided.keep)
    slice_model(model, groups, decided.keep)
    groups.groups = shrink_groups(groups, decided.keep, keeps)


def test_budgets_and_max_ratio_refer_to_the_original_model_over_several_cuts() -> None:
    model, groups = residual()
    for fraction, left in ((0.9, 9), (0.7, 7), (0.6, 6)):
        decided = plan(model, groups, random_scores(groups), {"channels": fraction}, max_ratio=0.5)
        cut_once(model, groups, decided)
        assert decided.cost.channels == left
        assert decided.cost_original.channels == 11
        assert model_cost(model, groups) == decided.cost
    assert groups.sizes() == {"stem": 3, "down": 3}  # the floor of 6 and of 5, from whichever width one comes
    with pytest.raises(BudgetError, match=r"max_ratio=0\.5"):
        plan(model, groups, random_scores(groups), {"channels": 0.3}, max_ratio=0.5)


def counts_of(net: tuple[nn.Module, Groups], **options: float) -> Rungs:
    model, groups = net
    return allowed_counts(groups, Lengths(model, groups), **options)


def test_quantum_follows_the_width_of_a_unit() -> None:
    """Units of two, four and four positions: multiples of 8 need multiples of 4, 2 and 2 units."""
    assert counts_of(grouped(), round_to=8).quantum == (4,)
    assert counts_of(grouped(), round_to=4).quantum == (2,)
    assert counts_of(grouped(), round_to=2).quantum == (1,)
    assert counts_of(chain(), round_to=3).quantum == (3, 3)
    rungs = counts_of(chain(), round_to=4, min_keep=2)
    assert (rungs.first, rungs.lowest) == ((4, 4), (4, 4))  # conv2 has 4 and nothing below that is allowed


def test_quantum_is_common_to_all_members() -> None:
    """Units of two rows here and three columns there: multiples of 6 need multiples of 3 and of 2."""
    model = nn.Sequential(nn.Linear(2, 24, bias=False), nn.Linear(36, 2, bias=False))
    places: dict[str, list[Place]] = {"0": [("0.weight", 0, "write", 2, 0), ("1.weight", 1, "read", 3, 0)]}
    groups = hand_groups(model, {"0": 12}, places, [("0.weight", 1)], torch.randn(1, 2))
    rungs = counts_of((model, groups), round_to=6)
    assert (rungs.quantum, rungs.first, rungs.lowest) == ((6,), (6,), (6,))


def test_floors_by_hand() -> None:
    """The two groups have 6 and 4 units."""
    assert counts_of(chain(), min_keep=3).lowest == (3, 3)
    assert counts_of(chain(), min_keep=5).lowest == (5, 4)
    assert counts_of(chain(), max_ratio=0.5).lowest == (3, 2)
    assert counts_of(chain(), max_ratio=0.4).lowest == (4, 3)
    assert counts_of(chain(), max_ratio=0).first == (6, 4)
    assert counts_of(chain(), round_to=2, max_ratio=0.5).lowest == (4, 2)
    assert counts_of(concat(100, 20), max_ratio=0.29).lowest[0] == 71  # 0.29 * 100 == 28.999999999999996


def test_branches_of_a_concatenation_are_rounded_together() -> None:
    """12 + 20 = 32 channels side by side: neither 8 + 20 nor 12 + 16 is a multiple of 8, so both move, or none."""
    model, groups = concat(12, 20)
    assert counts_of((model, groups), round_to=8).joined == (0, 0, -1)
    assert counts_of((model, groups), round_to=4).joined == (-1, -1, -1)
    scores = random_scores(groups)
    scores["left"] *= 1e-6
    for fraction, left, right in ((0.95, 8, 16), (0.8, 8, 16), (0.65, 8, 8)):
        decided = plan(model, groups, scores, {"channels": fraction}, round_to=8)
        assert decided.sizes == {"left": left, "right": right, "both": 8}
    assert plan(model, groups, scores, {"channels": 0.95}, round_to=4).sizes == {"left": 8, "right": 20, "both": 8}


def test_a_dimension_that_is_a_multiple_stays_one() -> None:
    """A branch of 4 has no multiple of 8 below it, and the input's 3 channels are frozen."""
    model, groups = concat(4, 16)  # 20 together, never a multiple: the branch of 16 is rounded on its own
    decided = plan(model, groups, random_scores(groups), {"channels": 0.8}, round_to=8)
    assert decided.sizes == {"left": 4, "right": 8, "both": 8}
    assert counts_of(concat(4, 20), round_to=8).first == (4, 20, 8)  # 24 together, which 4 + 16 would not be
    assert counts_of(concat(4, 24), round_to=8).first == (4, 16, 8)  # 28 together
    assert counts_of(concat(16, 13, skip=True), round_to=8).first == (8, 13, 8)  # 13 + 3 stay, 16 may become 8
    assert counts_of(concat(16, 13, skip=True), round_to=8).joined == (-1, -1, -1)
    assert counts_of(concat(16, 12, skip=True), round_to=8).first == (8, 8, 8)  # 31 together, never a multiple
    assert counts_of(concat(12, 20, skip=True), round_to=8).joined == (-1, -1, -1)  # nothing to be gained together


def test_round_to_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = chain()
    assert resolve_round_to(model.half(), "auto") == 1
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda _: True))
    assert resolve_round_to(model, "auto") == 8
    assert resolve_round_to(model.bfloat16(), "auto") == 8
    assert resolve_round_to(model.float(), "auto") == 1
    assert resolve_round_to(model, 3) == 3


def test_ties_go_to_the_first_group_and_the_first_unit() -> None:
    model, groups = chain()
    equal = {group.name: torch.ones(group.size) for group in groups}
    assert kept(plan(model, groups, equal, {"channels": 0.7}, rank="value")) == {
        "conv1": [3, 4, 5],
        "conv2": [0, 1, 2, 3],
    }


def test_negative_scores_go_first() -> None:
    """A signed criterion that predicts a lower loss without the unit."""
    model, groups = chain()
    scores = {"conv1": torch.tensor([1.0, -0.1, 3, 1, 2, 1]), "conv2": torch.tensor([0.0, -4, 1, 1])}
    for rank in ("value", "value_per_cost"):
        decided = plan(model, groups, scores, {"channels": 0.8}, rank=rank)
        assert kept(decided) == {"conv1": [0, 2, 3, 4, 5], "conv2": [0, 2, 3]}
        assert decided.predicted_change == pytest.approx(-2 - 0.1**0.5, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_scores_of_any_real_dtype(dtype: torch.dtype) -> None:
    model, groups = chain()
    scores = {"conv1": torch.tensor([5, 1, 9, 7, 8, 6]), "conv2": torch.tensor([9, 9, 2, 9])}
    decided = plan(
        model,
        groups,
        {n: s.to(dtype).requires_grad_(dtype.is_floating_point) for n, s in scores.items()},
        "channels=.8",
    )
    assert kept(decided) == {"conv1": [0, 2, 3, 4, 5], "conv2": [0, 1, 3]}


def test_infeasible_names_a_budget_that_works() -> None:
    model, groups = chain()
    scores = random_scores(groups)
    with pytest.raises(BudgetError, match=r"min_keep=2, max_ratio=1, round_to=1 \(too low: macs\)") as error:
        plan(model, groups, scores, {"macs": 0.01, "params": 0.9}, min_keep=2)
    nearest = re.search(r"nearest feasible budget is (\S+)$", str(error.value))
    assert nearest is not None
    decided = plan(model, groups, scores, nearest[1], min_keep=2)
    assert decided.sizes == {"conv1": 2, "conv2": 2}
    fraction = float(nearest[1].split(",")[0].removeprefix("macs="))
    with pytest.raises(BudgetError):  # one step of the fourth decimal lower
        plan(model, groups, scores, {"macs": fraction - 0.0001}, min_keep=2)


def test_refuses_scores_it_cannot_use() -> None:
    model, groups = chain()
    good = random_scores(groups)
    bad = good["conv1"].clone()
    bad[[1, 4]] = torch.nan
    with pytest.raises(InputError, match="2 of 6 in 'conv1' are NaN"):
        plan(model, groups, {**good, "conv1": bad}, {"macs": 0.5})
    with pytest.raises(InputError, match="1 of 4 in 'conv2' are infinite"):
        plan(model, groups, {**good, "conv2": torch.tensor([1, 2, torch.inf, 0])}, {"macs": 0.5})
    with pytest.raises(InputError, match=r"missing \['conv2'\], unknown \[\]"):
        plan(model, groups, {"conv1": good["conv1"]}, {"macs": 0.5})
    with pytest.raises(InputError, match=r"unknown \['conv7'\]"):
        plan(model, groups, {**good, "conv7": good["conv1"]}, {"macs": 0.5})
    with pytest.raises(InputError, match=r"scores\['conv1'\]: wanted shape \[6\], one score a unit, got \[5\]"):
        plan(model, groups, {**good, "conv1": torch.ones(5)}, {"macs": 0.5})
    with pytest.raises(InputError, match=r"got \[6, 1\]"):
        plan(model, groups, {**good, "conv1": torch.ones(6, 1)}, {"macs": 0.5})
    with pytest.raises(InputError, match="wanted a real tensor, got list"):
        plan(model, groups, {**good, "conv1": [1.0] * 6}, {"macs": 0.5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": "best"}, r"rank: unknown 'best'; there are \['value_per_cost', 'value'\]"),
        ({"round_to": 0}, 'round_to: wanted "auto" or a whole number of at least 1, got 0'),
        ({"round_to": "big"}, "got 'big'"),
        ({"round_to": 2.0}, r"got 2\.0"),
        ({"min_keep": 0}, "min_keep: wanted a whole number of at least 1, got 0"),
        ({"min_keep": 1.5}, r"got 1\.5"),
        ({"max_ratio": 1.5}, r"max_ratio: wanted a fraction from 0 to 1, got 1\.5"),
        ({"max_ratio": -0.1}, r"got -0\.1"),
        ({"max_ratio": float("nan")}, "got nan"),
    ],
    ids=str,
)
def test_refuses_options(options: dict[str, object], message: str) -> None:
    model, groups = chain()
    with pytest.raises(InputError, match=message):
        plan(model, groups, random_scores(groups), {"macs": 0.5}, **options)


def test_round_trip_and_digest() -> None:
    model, groups = chain()
    decided = plan(model, groups, random_scores(groups), {"macs": 0.5, "params": 0.9})
    again = Plan.from_dict(json.loads(json.dumps(decided.to_dict())))
    assert kept(again) == kept(decided)
    assert all(indices.dtype == torch.int64 for indices in again.keep.values())
    assert again.to_dict() == decided.to_dict()
    assert again.digest == decided.digest
    assert re.fullmatch("[0-9a-f]{64}", decided.digest)
    reordered = Plan.from_dict({**decided.to_dict(), "keep": dict(reversed(decided.to_dict()["keep"].items()))})
    assert reordered.digest == decided.digest
    other = decided.to_dict()
    other["keep"]["conv1"] = other["keep"]["conv1"][1:]
    assert Plan.from_dict(other).digest != decided.digest
    with pytest.raises(InputError, match=r"isn't what Plan.to_dict writes: KeyError\('keep'\)"):
        Plan.from_dict({})
    with pytest.raises(InputError, match="isn't what"):
        Plan.from_dict({**decided.to_dict(), "cost": {"flops": 1}})


def test_table_names_every_group_and_cost() -> None:
    model, groups = two_layers()
    decided = plan(model, groups, squares(_0=[4, 1, 2], _1=[6, 0.9, 3.5, 3]), {"params": 0.5})
    lines = [line.split() for line in decided.table().splitlines()]
    assert ["0", "3", "1", "3"] in lines
    assert ["1", "4", "4", "0"] in lines
    assert ["total", "params", "22", "10"] in lines


def test_no_groups() -> None:
    model, groups = chain()
    groups.groups = ()
    assert plan(model, groups, {}, {"macs": 1.0}).keep == {}
    with pytest.raises(BudgetError, match=r"nearest feasible budget is macs=1$"):
        plan(model, groups, {}, {"macs": 0.5})


def test_without_the_extension_the_twin_decides_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, groups = concat(12, 20)
    scores = random_scores(groups)
    native = plan(model, groups, scores, {"macs": 0.5}, round_to=4)
    monkeypatch.setattr(planner_module, "native_planner", lambda: None)
    assert kept(plan(model, groups, scores, {"macs": 0.5}, round_to=4)) == kept(native)

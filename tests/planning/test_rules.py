"""Whatever the widths, floors and budgets: every plan keeps every rule, on every tensor it slices."""

from __future__ import annotations

import copy

import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from taylor_cuda.errors import BudgetError
from taylor_cuda.graph.groups import ChannelGroup, check_keep, named_tensors
from taylor_cuda.graph.slicing import slice_model
from taylor_cuda.planning import model_cost, plan
from tests.planning.nets import NETS, concat, random_scores

fractions = st.floats(0.05, 1.0)
budgets = st.dictionaries(st.sampled_from(["macs", "params", "channels"]), fractions, min_size=1)


@settings(max_examples=120)
@given(
    left=st.integers(1, 24),
    right=st.integers(1, 24),
    skip=st.booleans(),
    budget=budgets,
    round_to=st.sampled_from([1, 2, 3, 4, 8]),
    min_keep=st.integers(1, 5),
    max_ratio=st.sampled_from([0.3, 0.5, 0.9, 1.0]),
    rank=st.sampled_from(["value_per_cost", "value"]),
    seed=st.integers(0, 9),
)
@example(1, 12, False, {"channels": 1 / 3, "macs": 0.125}, 1, 3, 0.9, "value_per_cost", 0)  # a third has no last digit
def test_floors_rounding_and_budgets_hold(
    left: int,
    right: int,
    skip: bool,
    budget: dict[str, float],
    round_to: int,
    min_keep: int,
    max_ratio: float,
    rank: str,
    seed: int,
) -> None:
    model, groups = concat(left, right, skip)
    scores = random_scores(groups, seed)
    options = {"round_to": round_to, "min_keep": min_keep, "max_ratio": max_ratio, "rank": rank}
    try:
        decided = plan(model, groups, scores, budget, **options)
    except BudgetError as error:
        nearest = str(error).rpartition("nearest feasible budget is ")[2]
        decided = plan(model, groups, scores, nearest, **options)
        assert any(decided.budget[name] > budget[name] for name in budget)
    check_keep(groups, decided.keep)
    now = decided.cost_before
    for name, fraction in decided.budget.items():
        assert getattr(decided.cost, name) <= fraction * getattr(now, name)
    for group in groups:
        kept = decided.keep[group.name]
        if kept.numel() < group.size:
            assert kept.numel() >= max(min_keep, (1 - max_ratio) * group.size - 1e-9)
            dropped = torch.ones(group.size, dtype=torch.bool)
            dropped[kept] = False
            assert scores[group.name][dropped].max() <= scores[group.name][kept].min()
    check_every_tensor(model, groups, decided.keep, round_to, min_keep, max_ratio)


def check_every_tensor(model, groups, keep, round_to: int, min_keep: int, max_ratio: float) -> None:
    """Floors on what the cut model really has, dimension by dimension."""
    smaller = copy.deepcopy(model)
    slice_model(smaller, groups, keep)
    before, after = named_tensors(model), named_tensors(smaller)

    def stands(group: ChannelGroup) -> bool:
        """No multiple from its floor to below its size: this group can't move. Units are one position wide here."""
        floor = max(min_keep, group.size - int(max_ratio * group.size + 1e-9))
        return not any(count % round_to == 0 for count in range(floor, group.size))

    for name, tensor in after.items():
        for dim, (old, new) in enumerate(zip(before[name].shape, tensor.shape, strict=True)):
            if new == old:
                continue
            assert new >= max(min_keep, (1 - max_ratio) * old - 1e-9)
            if new % round_to:
                # Only beside positions that can't move at all, and only where they were off a multiple before.
                assert old % round_to
                taken = sum(g.size for g in groups for m in g.members if (m.tensor, m.dim) == (name, dim))
                stuck = [g.size for g in groups for m in g.members if (m.tensor, m.dim) == (name, dim) and stands(g)]
                assert (old - taken + sum(stuck)) % round_to


@settings(max_examples=60)
@given(net=st.sampled_from(sorted(NETS)), low=fractions, high=fractions, seed=st.integers(0, 9))
def test_a_tighter_channel_budget_keeps_a_subset(net: str, low: float, high: float, seed: int) -> None:
    """Each unit saves one channel, so nothing overshoots or is given back, and plans are nested."""
    assume(low <= high)
    model, groups = NETS[net]()
    channels = sum(group.size for group in groups)
    assume(int(low * channels) >= len(groups))
    scores = random_scores(groups, seed)
    for rank in ("value", "value_per_cost"):
        tight, loose = (plan(model, groups, scores, {"channels": value}, rank=rank) for value in (low, high))
        for name, kept in tight.keep.items():
            assert set(kept.tolist()) <= set(loose.keep[name].tolist())
        assert tight.cost.channels == int(low * channels)


@settings(max_examples=40)
@given(
    net=st.sampled_from(sorted(NETS)),
    fraction=fractions,
    scale=st.sampled_from([4.0**-20, 4.0, 4.0**15]),
    seed=st.integers(0, 9),
)
def test_scaling_all_scores_by_a_power_of_four_changes_nothing(
    net: str, fraction: float, scale: float, seed: int
) -> None:
    model, groups = NETS[net]()
    scores = random_scores(groups, seed)
    lowest = model_cost(model, groups, dict.fromkeys(groups.sizes(), 1))
    assume(lowest.macs <= fraction * model_cost(model, groups).macs)
    one = plan(model, groups, {name: score.double() for name, score in scores.items()}, {"macs": fraction})
    other = plan(model, groups, {name: score.double() * scale for name, score in scores.items()}, {"macs": fraction})
    assert one.digest == other.digest

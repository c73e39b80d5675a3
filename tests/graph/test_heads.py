"""Heads as units: what their attention costs, the numbers that code counts them with, and when they stay."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import taylor_cuda as tc
from taylor_cuda.errors import InputError
from taylor_cuda.graph.groups import Number
from taylor_cuda.planning.cost import model_cost
from taylor_cuda.surgery.recipe import apply_recipe
from tests.graph.attention_nets import CountedHeads, HeadsByHand, OpenHeads, WidthFromInput
from tests.graph.base import Net


def macs(model: nn.Module, x: torch.Tensor) -> int:
    counter = FlopCounterMode(display=False)
    # not every release counts every fused attention: the two products it is made of are counted by all of them
    with sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(("net", "name"), [(OpenHeads, "qkv"), (CountedHeads, "q"), (HeadsByHand, "q")])
def test_macs_of_attention_follow_its_heads(net, name):
    torch.manual_seed(0)
    model, x = net().eval(), torch.randn(2, 5, 6)
    groups = tc.trace(model, x)
    assert groups.original_macs == macs(model, x)
    promised = model_cost(model, groups, {name: 1}).macs
    assert promised < model_cost(model, groups).macs
    tc.cut(model, groups, {name: torch.tensor([1])})
    assert model_cost(model, groups).macs == promised == macs(model, x) / 2


def test_numbers_follow_a_cut_and_a_file(tmp_path):
    model, x = CountedHeads().eval(), torch.randn(2, 5, 6)
    groups = tc.trace(model, x)
    assert set(groups["q"].numbers) == {Number("", "num_heads", 1), Number("", "attn_dim", 5)}
    tc.cut(model, groups, {"q": torch.tensor([0, 2])})
    tc.cut(model, groups, {"q": torch.tensor([1])})
    assert (model.num_heads, model.attn_dim, model.head_dim) == (1, 5, 5)
    tc.save(model, tmp_path / "small.safetensors")
    again = tc.load(CountedHeads(), tmp_path / "small.safetensors").eval()
    assert (again.num_heads, again.attn_dim) == (1, 5)
    assert torch.equal(again(x), model(x))


def test_numbers_are_put_back_with_everything_else(monkeypatch):
    from taylor_cuda.surgery import verify

    model, x = CountedHeads().eval(), torch.randn(2, 5, 6)
    groups = tc.trace(model, x)
    before = model(x)
    monkeypatch.setattr(verify, "relative_difference", lambda *_: 1.0)
    with pytest.raises(tc.CutError):
        tc.cut(model, groups, {"q": torch.tensor([0])})
    assert (model.num_heads, model.attn_dim) == (3, 15)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"": {"training": 1}}, "no whole number .training"),
        ({"": {"num_heads": 4}}, "num_heads is 3 in this model, the recipe says 4"),
        ({"gone": {"num_heads": 1}}, "no whole number gone.num_heads"),
        ({"": 3}, "malformed"),
    ],
)
def test_a_recipe_sets_nothing_but_counts_of_heads(numbers, message):
    model, x = CountedHeads(), torch.randn(2, 5, 6)
    small = copy.deepcopy(model)
    tc.cut(small, tc.trace(small, x), {"q": torch.tensor([0])})
    recipe = {**small.taylor_cuda_recipe, "numbers": numbers}
    with pytest.raises(InputError, match=message):
        apply_recipe(model, recipe)
    assert model.q.out_features == 15


class Twice(Net):
    """Two blocks of a kind whose heads can't go, and two of a kind whose can."""

    def __init__(self) -> None:
        super().__init__(a=WidthFromInput(), b=WidthFromInput(), c=CountedHeads(), d=CountedHeads())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(x) + self.c(x[..., :6]) + self.d(x[..., 6:])


def test_a_kind_that_fails_takes_no_other_with_it():
    groups = tc.trace(Twice(), torch.randn(2, 5, 12))
    assert {name for name in groups.sizes() if name.endswith(("qkv", "q"))} == {"c.q", "d.q"}
    frozen = {entry.name: entry.reason for entry in groups.frozen}
    assert "can't run with fewer" in frozen["a.qkv"]
    assert "can't run with fewer" in frozen["b.qkv"]


class Blocks(nn.ModuleList):
    """A layer, and the sum of all blocks after it."""

    def __init__(self) -> None:
        super().__init__(WidthFromInput() for _ in range(16))
        self.embed = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        return sum(self[i](x) for i in range(16))


def test_a_kind_that_fails_is_tested_once(monkeypatch):
    """Sixteen blocks of a kind whose heads can't go: one test, after one on a single example, says so for all."""
    from taylor_cuda.graph.prove import Proof

    tests = []
    failure = Proof.failure
    monkeypatch.setattr(Proof, "failure", lambda proof, chosen: tests.append(len(chosen)) or failure(proof, chosen))
    groups = tc.trace(Blocks(), torch.randn(2, 5, 12))
    assert len(groups) == 32
    assert len(tests) <= 5


class Checkpointed(Net):
    """Run once more in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__(a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 6, 1), c=nn.Conv2d(6, 2, 1))
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(checkpoint(self.b, self.a(x).relu(), use_reentrant=self.reentrant)).relu().mean((2, 3))


@pytest.mark.parametrize("reentrant", [False, True])
def test_masks_reach_what_is_recomputed(reentrant):
    """The gradient under a mask is that of the cut model, where the layer runs again in the backward pass too."""
    torch.manual_seed(0)
    model, x = Checkpointed(reentrant), torch.randn(2, 3, 4, 4)
    groups, keep = tc.trace(model, x), {"a": torch.tensor([1, 4, 6])}
    with tc.masked(model, groups, keep):
        model(x).square().sum().backward()
    expected = model.b.weight.grad[:, keep["a"]].clone()
    model.zero_grad()
    tc.cut(model, groups, keep)
    model(x).square().sum().backward()
    torch.testing.assert_close(model.b.weight.grad, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_scores_see_what_is_recomputed_once(reentrant):
    torch.manual_seed(0)
    model, x = Checkpointed(reentrant), torch.randn(2, 3, 4, 4)
    scores = []
    for source in ("parameters", "activations"):
        importance = tc.Importance(model, tc.trace(model, x), source=source)
        importance.backward(model(x).square().sum())
        scores.append(importance.scores()["a"])
        importance.close()
        model.zero_grad()
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=0)

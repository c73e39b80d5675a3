"""Where units lie, and the criteria over several passes, several batch sizes and readers that don't run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_cuda as tc
from taylor_cuda.graph.groups import ChannelGroup, Member
from taylor_cuda.importance.units import UnitSums, scalar_beside
from tests.importance.gated_nets import ConvBN, GatedNet, Residual, gate_gradients, make


def group(name: str, size: int, *members: tuple[str, list[list[int]]]) -> ChannelGroup:
    made = tuple(Member(tensor, 0, torch.tensor(index), "read") for tensor, index in members)
    return ChannelGroup(name, made, torch.arange(size), size)


def test_positions_count_through_the_places_of_all_sources() -> None:
    a = group("a", 2, ("w", [[1], [0]]), ("v", [[0, 2], [1, 3]]))
    b = group("b", 3)
    c = group("c", 1, ("w", [[2]]))
    lengths = {"w": 3, "v": 4}
    units = UnitSums(
        [a, b, c],
        (lambda g: g.members if g.name == "a" else (), lambda g: g.members if g.name == "c" else ()),
        lambda tensor, _dim: lengths[tensor],
    )
    assert units.places == [[("w", 0), ("v", 0)], [("w", 0)]]  # a place of two sources has two vectors
    assert units.lengths == [[3, 4], [3]]
    assert units.offsets.tolist() == [0, 3, 6, 6, 6, 6, 7]
    assert units.entries.tolist() == [1, 3, 5, 0, 4, 6, 9]
    assert units.group_of.tolist() == [0, 0, 1, 1, 1, 2]
    sums = [torch.tensor([1.0, 2.0, 4.0]), torch.tensor([10.0, 20.0, 40.0, 80.0]), torch.tensor([0.0, 0.0, 7.0])]
    assert units.values(sums, "sum").tolist() == [52.0, 101.0, 0.0, 0.0, 0.0, 7.0]
    window = units.values([each.double() for each in sums], "batch", torch.tensor([2.0]))
    assert window.dtype == torch.float64
    assert window.tolist() == [26.0**2, 50.5**2, 0.0, 0.0, 0.0, 3.5**2]
    completed = units.completed(0, [None, sums[1]])
    assert [each.tolist() for each in completed] == [[0.0] * 3, sums[1].tolist()]


def test_no_groups_have_no_units() -> None:
    units = UnitSums([], (lambda g: g.members,), lambda _tensor, _dim: 0)
    assert (units.units, units.entries.tolist(), units.offsets.tolist()) == (0, [], [0])


def test_a_factor_is_a_scalar_beside_the_window() -> None:
    window = torch.zeros(3, dtype=torch.float64)
    assert scalar_beside(1.0, window) is None
    for value in (4.0, torch.tensor(4.0), torch.tensor([4.0], requires_grad=True)):
        scale = scalar_beside(value, window)
        assert scale is not None
        assert (scale.shape, scale.dtype, float(scale)) == ((), torch.float64, 4.0)


def full_gradient(model: GatedNet, x: Tensor, target: Tensor, share: float) -> dict[str, Tensor]:
    """Σ_n t² of a loss that is ``share`` of the batch's mean, example by example, for a network in eval mode."""
    total = {name: torch.zeros(size, dtype=x.dtype) for name, size in model.group_sizes.items()}
    for n in range(len(x)):
        for name, gradient in gate_gradients(model, x[n : n + 1], target[n : n + 1]).items():
            total[name] += (gradient * share / len(x)).square()
    return total


def test_examples_of_several_passes_are_one_batch() -> None:
    model, x, target = make(Residual)
    model.eval()
    est = tc.Importance(model, tc.trace(model, x), "taylor_fg")
    parts = [(slice(0, 3), 0.75), (slice(3, 4), 0.25)]  # of different sizes
    for part, share in parts:
        (F.cross_entropy(model(x[part]), target[part]) * share).backward()
    est.update()
    est.close()
    first, second = (full_gradient(model, x[part], target[part], share) for part, share in parts)
    for name, score in est.scores().items():
        torch.testing.assert_close(score.double(), first[name] + second[name], rtol=1e-5, atol=1e-14)


def test_taylor_output_is_a_mean_over_the_examples_of_all_passes() -> None:
    model, x, target = make(ConvBN)
    model.eval()
    halves, whole = (tc.Importance(model, tc.trace(model, x), "taylor_output") for _ in range(2))
    whole.backward(F.cross_entropy(model(x), target, reduction="sum"))
    halves.reset()
    for part in (slice(0, 3), slice(3, 4)):
        F.cross_entropy(model(x[part]), target[part], reduction="sum").backward()
    halves.update()
    for name, score in whole.scores().items():
        torch.testing.assert_close(halves.scores()[name], score, rtol=1e-5, atol=1e-12)


class Views(nn.Module):
    """Two views of every image from the second layer on: its reader sees twice as many examples."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3)
        self.three, self.head = nn.Conv2d(5, 4, 3), nn.Linear(4, 2)
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        a = F.silu(self.one(x))
        b = F.silu(self.two(a))
        c = torch.cat([b, b.flip(-1) * 0.5])
        if a.requires_grad:
            a.retain_grad()
            c.retain_grad()
        self.inputs = [a, c]
        return self.head(F.silu(self.three(c)).mean((2, 3)))


@pytest.mark.parametrize("criterion", ["taylor_fg", "taylor_output"])
def test_groups_may_see_different_numbers_of_examples(criterion: str) -> None:
    torch.manual_seed(0)
    model, x = Views(), torch.randn(3, 3, 8, 8)
    est = tc.Importance(model, tc.trace(model, x), criterion)
    est.backward(model(x).square().mean())
    scores = est.scores()
    for name, value in zip(("one", "two"), model.inputs, strict=True):
        products = value.detach().double() * value.grad.double()
        expected = products.sum((2, 3)).square().sum(0)
        if criterion == "taylor_output":
            expected = products.mean((2, 3)).abs().mean(0)
            expected = expected / (expected.norm() + 1e-8)
        torch.testing.assert_close(scores[name].double(), expected, rtol=1e-4, atol=1e-10)
    assert len(model.inputs[1]) == 2 * len(model.inputs[0])


class Uneven(nn.Module):
    """A channel with two readers, of which one sees twice as many examples."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.one(x))
        return torch.cat([self.two(a), self.three(torch.cat([a, -a]))])


class Auxiliary(nn.Module):
    """A branch that only evaluation has."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.two, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.one(x))
        return self.head(a) if self.training else self.head(a) + self.last(torch.tanh(self.two(a)))


def test_what_examples_cannot_say_is_named() -> None:
    model, x = Uneven(), torch.randn(3, 4)
    est = tc.Importance(model, tc.trace(model, x), "taylor_fg")
    with pytest.raises(tc.InputError, match=r"group 'one': its readers see [36] and [36] examples"):
        est.backward(model(x).square().mean())
    model = Auxiliary()
    est = tc.Importance(model, tc.trace(model, x), "taylor_fg")
    with pytest.raises(tc.InputError, match="group 'two': none of its readers ran in the last forward pass"):
        est.backward(model(x).square().mean())
    est.close()
    with pytest.raises(tc.InputError, match=r"close\(\) has taken the gates out"):
        est.update()


@pytest.mark.parametrize("criterion", ["taylor_fg", "taylor_output", "taylor_weight"])
def test_a_step_that_is_not_finite_leaves_every_bit(criterion: str) -> None:
    model, x, target = make(ConvBN)
    est = tc.Importance(model, tc.trace(model, x), criterion)
    est.backward(F.cross_entropy(model(x), target))
    before = est.state_dict()["window"]
    bad = x.clone()
    bad[-1, 0, 0, 0] = float("nan")
    model.zero_grad()
    est.backward(F.cross_entropy(model(bad), target))
    assert (est.steps, est.skipped) == (1, 1)
    assert torch.equal(est.state_dict()["window"], before)


def test_nan_in_a_weight_shows_in_its_unit_only() -> None:
    model, x, _ = make(ConvBN)
    groups = tc.trace(model, x)
    with torch.no_grad():
        model.conv1.weight[2] = float("nan")
        model.bn1.weight[3] = float("nan")
    for criterion, unit in (("magnitude", 2), ("bn_scale", 3)):
        scores = tc.Importance(model, groups, criterion).scores()
        assert scores["conv1"].isnan().nonzero().flatten().tolist() == [unit]
        assert scores["conv2"].isfinite().all()

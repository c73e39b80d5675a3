"""Networks with ``tc.BatchNormReLU``: pruned as those with separate BatchNorm, addition and ReLU are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import taylor_cuda as tc

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Separate(nn.Module):
    """A norm, an addition and a ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        return torch.relu(y if residual is None else y + residual)


class Fused(Separate):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.norm = tc.BatchNormReLU(channels)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.norm(x, residual)


class Residual(nn.Module):
    """A stem, a block with a skip connection, a head."""

    def __init__(self, after: type[Separate]) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.after_stem, self.after_a, self.after_b = after(8), after(12), after(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.after_stem(self.stem(x))
        x = self.after_b(self.b(self.after_a(self.a(x))), x)
        return self.head(x.mean((2, 3)))


def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = Residual(Separate)
    fused = Residual(Fused)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def test_groups_are_those_of_separate_ops() -> None:
    plain, fused = (tc.trace(net, X) for net in nets())
    assert {group.name: group.size for group in plain} == {group.name: group.size for group in fused}
    assert sorted(plain.sizes().values()) == [8, 12]
    for one, other in zip(plain, fused, strict=True):
        assert {(m.tensor, m.dim, m.role) for m in one.members} == {(m.tensor, m.dim, m.role) for m in other.members}
        assert [m.tensor for m in one.affine] == [m.tensor for m in other.affine]


@pytest.mark.parametrize("source", ["parameters", "activations"])
def test_scores_are_those_of_separate_ops(source: str) -> None:
    scores = []
    for net in nets():
        net = net.double()
        est = tc.Importance(net, tc.trace(net, X.double()), source=source)
        est.backward(net(X.double()).square().mean())
        scores.append(est.scores())
    for name, expected in scores[0].items():
        torch.testing.assert_close(scores[1][name], expected, rtol=1e-5, atol=1e-12)


def test_a_cut_is_what_masking_says_and_trains_on() -> None:
    _, net = nets()
    net.eval()
    groups = tc.trace(net, X)
    scores = {name: torch.arange(size).remainder(2).float() + 0.1 for name, size in groups.sizes().items()}
    plan = tc.plan(net, groups, scores, budget={"channels": 0.5})
    with tc.masked(net, groups, plan):
        expected = net(X)
    small = copy.deepcopy(net)
    tc.cut(small, tc.trace(small, X), plan)
    torch.testing.assert_close(small(X), expected, rtol=1e-4, atol=1e-5)
    assert 0 < small.after_a.norm.num_features < 12
    small.train()(X).sum().backward()
    assert small.after_a.norm.weight.grad.shape == (small.after_a.norm.num_features,)


def test_an_addition_of_a_stream_that_stays_freezes() -> None:
    class Fixed(Residual):
        def forward(self, x: Tensor) -> Tensor:
            stream = torch.ones(x.shape[0], 8, x.shape[2] - 2, x.shape[3] - 2, dtype=x.dtype)
            x = self.after_stem(self.stem(x), stream)
            return self.head(self.after_b(self.b(self.after_a(self.a(x))), x).mean((2, 3)))

    sizes = {}
    for after in (Separate, Fused):
        torch.manual_seed(0)
        sizes[after] = sorted(tc.trace(Fixed(after), X).sizes().values())
    assert sizes[Separate] == sizes[Fused] == [12]

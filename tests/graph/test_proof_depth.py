"""What the proof would miss if it looked once, in one mode, at one number of channels, or at zeros."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_cuda.errors import CutError, InputError
from taylor_cuda.graph.groups import Groups
from taylor_cuda.graph.mask import MaskedForward
from taylor_cuda.graph.tracer import trace
from taylor_cuda.surgery import cut
from tests.graph.base import Net, conv


class Between(Net):
    """Two layers with a line of code between them."""

    def __init__(self, line: Callable[[Between, Tensor], Tensor]) -> None:
        super().__init__(a=conv(3, 8, 1), b=conv(8, 6, 1), fc=nn.Linear(6, 3))
        self.shift = nn.Parameter(torch.full((8, 1, 1), 0.2))
        self.gain = nn.Parameter(torch.ones(8))
        self.line = line

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.line(self, self.a(x))).relu().mean((2, 3)))


def dead_shift(net: Between, x: Tensor) -> Tensor:
    return F.relu(0.5 * x.sigmoid() - net.shift) * x.shape[1]


def dead_norm(net: Between, x: Tensor) -> Tensor:
    return F.relu(F.group_norm(x, 2, net.gain, net.gain - 1)) * x.shape[1]


LINES: dict[str, Callable[[Between, Tensor], Tensor]] = {
    "train mode only": lambda net, x: x / x.shape[1] if net.training else x,
    "another number in train mode": lambda net, x: x / (x.shape[1] if net.training else 2),
    "a branch on the number": lambda net, x: x if x.shape[1] > 3 else -x,
    "the lesser of two numbers": lambda net, x: x * min(x.shape[1], 4),
    "random values make it dead": dead_shift,
    "a norm whose weight has another name": dead_norm,
}


def offered(groups: Groups | None) -> set[str]:
    return set() if groups is None else set(groups.sizes())


@pytest.mark.parametrize("line", LINES)
def test_code_that_counts_channels_is_seen(line):
    groups = trace(Between(LINES[line]), torch.randn(2, 3, 4, 4))
    assert offered(groups) == {"b"}
    assert "cut and masked differ at the input of b" in next(f.reason for f in groups.frozen if f.name == "a")


def test_a_network_that_is_dead_at_any_values_is_proved_near_its_own():
    groups = trace(Between(lambda net, x: F.relu(0.5 * x.sigmoid() - net.shift)), torch.randn(2, 3, 4, 4))
    assert offered(groups) == {"a", "b"}


def test_outputs_that_are_not_finite_prove_nothing():
    with pytest.raises(InputError, match="not finite"):
        trace(Between(lambda net, x: x / 0.0), torch.randn(2, 3, 4, 4))


class NearlyEqual(Net):
    """A LayerNorm over channels that hardly differ: with two of them left, rounding is magnified a thousand times."""

    def __init__(self) -> None:
        super().__init__(h=nn.Linear(6, 64), e=nn.Linear(64, 8), n=nn.LayerNorm(8), fc=nn.Linear(8, 3))
        self.e.weight.data = torch.randn(1, 64) + 1e-3 * torch.randn(8, 64)
        self.e.bias.data.fill_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.n(self.e(F.relu(self.h(x))))))


def test_rounding_that_a_norm_magnifies_is_no_difference():
    torch.manual_seed(1)
    for _ in range(4):
        model, x = NearlyEqual(), torch.randn(40, 6)
        groups = trace(model, x)
        cut(model, groups, {"e": torch.tensor([0, 1]), "h": torch.arange(40)})
        assert model.e.out_features == 2
        assert groups.verified < 1e-10, "settled in float64"


def test_a_difference_that_is_none_of_rounding_stays_one(monkeypatch):
    torch.manual_seed(1)
    model, x = NearlyEqual(), torch.randn(40, 6)
    groups = trace(model, x)
    monkeypatch.setattr(MaskedForward, "_layer_norm", lambda _self, *args, **kwargs: F.layer_norm(*args, **kwargs))
    with pytest.raises(CutError, match="cut and masked differ"):
        cut(model, groups, {"e": torch.tensor([0, 1])})
    assert model.e.out_features == 8


def test_a_network_that_takes_no_single_example_is_proved_on_all():
    """Batch statistics of one example are nothing, and the code below wants an even number of them."""
    net = Between(lambda _net, x: x.view(-1, 2, *x.shape[1:]).flatten(0, 1))
    assert offered(trace(net, torch.randn(4, 3, 4, 4))) == {"a", "b"}
    wrong = Between(lambda _net, x: x.view(-1, 2, *x.shape[1:]).flatten(0, 1) / x.shape[1])
    assert offered(trace(wrong, torch.randn(4, 3, 4, 4))) == {"b"}

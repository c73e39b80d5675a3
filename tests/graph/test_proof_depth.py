"""What the proof would miss if it looked once, in one mode, at one number of channels, or at zeros."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_cuda.errors import InputError
from taylor_cuda.graph.groups import Groups
from taylor_cuda.graph.tracer import trace
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

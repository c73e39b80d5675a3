"""The proof: a wrong rule must not get through, whatever the model's own weights hide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_cuda.errors import InputError
from taylor_cuda.graph import rules
from taylor_cuda.graph.flow import Flow
from taylor_cuda.graph.groups import Groups
from taylor_cuda.graph.rules import RULES, Op, tensors_in
from taylor_cuda.graph.tracer import trace
from tests.graph.base import Net, conv, image
from tests.graph.checks import cut_error, no_zeros, random_plan
from tests.graph.nets import C2f, Concat, ConvBN, Residual, SqueezeExcite
from tests.graph.odd_nets import Unknown

Rule = Callable[[Flow, Op], None]


def changed_output(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Rule:
    """The real rule, then ``change`` of the labels along dimension 1 of what comes out."""
    right = RULES[name]

    def wrong(flow: Flow, op: Op) -> None:
        right(flow, op)
        for out in tensors_in(op.out):
            dims = flow.of(out)
            if out.dim() > 1 and dims[1] is not None:
                dims[1] = change(dims[1])
                flow.put(out, dims)

    return wrong


def elementwise(flow: Flow, op: Op) -> None:
    """Passes labels on, whatever the op does."""
    flow.put(op.out, flow.of(op.x) if op.out.shape == op.x.shape else [None] * op.out.dim())


def mean_over_anything(flow: Flow, op: Op) -> None:
    """Freezes nothing."""
    over, keepdim = op.dims(1, "dim", op.x.dim()), op.arg(2, "keepdim", False)
    dims = flow.of(op.x)
    flow.put(op.out, [None if d in over else x for d, x in enumerate(dims) if keepdim or d not in over])


def first_operand(flow: Flow, op: Op) -> None:
    """Joins nothing."""
    flow.put(op.out, flow.of(op.x))


def unjoined_norm(flow: Flow, op: Op) -> None:
    """Forgets that weight, bias and statistics lie along the channels."""
    flow.put(op.out[0] if isinstance(op.out, tuple) else op.out, flow.of(op.x))


def split_apart(flow: Flow, op: Op) -> None:
    """Takes the parts for independent channels."""
    labels = flow.of(op.x)[1]
    at = 0
    for part in op.out:
        width = part.shape[1]
        flow.put(part, [None, labels[at : at + width], None, None])
        at += width


def broken(name: str) -> dict[str, Rule]:
    return {
        "reversed cat": {"cat": changed_output("cat", lambda x: x[::-1].copy())},
        "rolled pool": {"max_pool2d_with_indices": changed_output("max_pool2d_with_indices", lambda x: np.roll(x, 1))},
        "rolled relu": {"relu": changed_output("relu", lambda x: np.roll(x, 1))},
        "softmax passes": {"_softmax": elementwise},
        "mean passes": {"mean": mean_over_anything},
        "add joins nothing": {"add": first_operand},
        "norm joins nothing": {"native_batch_norm": unjoined_norm},
        "split apart": {"split": split_apart},
        "mul joins nothing": {"mul": first_operand},
    }[name]


@pytest.mark.parametrize(
    ("fault", "make", "holds"),
    [
        ("reversed cat", Concat, {"c"}),
        ("reversed cat", C2f, {"m1", "b"}),
        ("rolled pool", ConvBN, {"b"}),
        ("rolled relu", Residual, set()),
        ("softmax passes", Unknown, {"d", "e"}),
        ("mean passes", Unknown, {"d", "e"}),
        ("add joins nothing", Residual, {"one"}),
        ("norm joins nothing", ConvBN, {"b"}),
        ("split apart", C2f, {"m1", "b"}),
        ("mul joins nothing", SqueezeExcite, {"down", "b"}),
    ],
)
def test_a_wrong_rule_is_caught(monkeypatch, fault, make, holds):
    torch.manual_seed(0)
    model = no_zeros(make()).eval()
    for name, wrong in broken(fault).items():
        monkeypatch.setitem(rules.RULES, name, wrong)
    offered = trace(model, image(), prove=False)
    # the fault is one: what it offers can't be cut
    with pytest.raises((RuntimeError, AssertionError)):
        assert greatest_error(model, offered) < 1e-5
    if not holds:
        with pytest.raises(InputError, match="cut and masked differ"):
            trace(model, image())
        return
    proved = trace(model, image())
    assert set(proved.sizes()) == holds
    assert greatest_error(model, proved) < 1e-5


def greatest_error(model: nn.Module, groups: Groups) -> float:
    return max(cut_error(model, groups, random_plan(groups, seed)) for seed in range(5))


class Hidden(Net):
    """A wrong rule behind a norm whose weight is zero, a layer scale of 1e-6 and a head of zeros."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), bn=nn.BatchNorm2d(6), b=conv(6, 4), fc=nn.Linear(4, 2))
        self.scale = nn.Parameter(torch.full((4, 1, 1), 1e-6))
        nn.init.zeros_(self.bn.weight)
        nn.init.zeros_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.relu(self.bn(self.a(x))))
        return self.fc(F.relu(x * self.scale).mean((2, 3)))


def test_zero_weights_hide_nothing(monkeypatch):
    model = Hidden()
    assert set(trace(model, image()).sizes()) == {"a", "b"}
    monkeypatch.setitem(rules.RULES, "relu", changed_output("relu", lambda x: np.roll(x, 1)))
    with pytest.raises(InputError, match="cut and masked differ"):
        trace(model, image())


class Awkward(Net):
    """Numbers of channels that a comparison of readers in eval mode alone would miss."""

    def __init__(self, kind: str) -> None:
        super().__init__(a=conv(3, 6), b=conv(6, 4), fc=nn.Linear(4, 5), out=nn.Linear(5, 2), aux=conv(6, 2))
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.a(x))
        y = F.relu(self.fc(F.relu(self.b(x)).mean((2, 3))))
        out = self.out(y)
        if self.kind == "after the last reader":
            return out / y.shape[1]
        if self.kind == "comes to nothing":
            y.split([y.shape[1] - 2, 2], 1)
        if self.kind == "in train mode" and self.training:
            return out, self.aux(x / x.shape[1])
        return out


@pytest.mark.parametrize(
    ("kind", "holds", "reason"),
    [
        ("nothing", {"a", "b", "fc"}, ""),
        ("after the last reader", {"a", "b"}, "an output of the network"),
        ("comes to nothing", {"a", "b"}, "split"),
        ("in train mode", {"b", "fc"}, "the input of aux"),
    ],
)
def test_every_place_is_compared(monkeypatch, kind, holds, reason):
    # parts of other sizes are refused by their rule: here what is wanted is the proof
    monkeypatch.setitem(rules.RULES, "split_with_sizes", lambda flow, op: None)
    groups = trace(Awkward(kind), image())
    assert set(groups.sizes()) == holds
    assert not reason or any(reason in entry.reason for entry in groups.frozen if entry.name not in holds | {"out"})


class Exponent(Net):
    """Parameters that can't be just any numbers: a square root of one, an exponent."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), b=conv(6, 4), fc=nn.Linear(4, 2))
        self.power = nn.Parameter(torch.full((6, 1, 1), 2.0))
        self.log_scale = nn.Parameter(torch.full((4, 1, 1), -80.0))

    def forward(self, x: Tensor) -> Tensor:
        x = F.softplus(self.a(x)) ** self.power
        x = self.b(x) * torch.exp(self.log_scale + 80) / torch.sqrt(-self.log_scale)
        return self.fc(F.relu(x).mean((2, 3)))


def test_parameters_with_a_range_are_proved_near_their_own_values():
    groups = trace(Exponent(), image())
    assert groups.sizes() == {"a": 6, "b": 4}

"""γ·dγ + β·dβ against the gate of a unit, by autograd in float64, where ``affine`` is given; and where it isn't."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_cuda.graph.groups import ChannelGroup, Groups, named_tensors
from taylor_cuda.graph.sites import ReaderInputs, active_in_forward
from taylor_cuda.graph.tracer import trace
from tests.graph.base import Net, conv, image
from tests.graph.checks import no_zeros, outputs
from tests.graph.nets import NETS


class Branches(Net):
    """Two normalised branches, pooled and concatenated, read by two layers: directly or through a norm each."""

    def __init__(self, first: bool, second: bool) -> None:
        super().__init__(
            a=conv(3, 4), na=nn.BatchNorm2d(4), b=conv(3, 6), nb=nn.BatchNorm2d(6), n1=nn.BatchNorm2d(10),
            n2=nn.BatchNorm2d(10), c=conv(10, 5), d=conv(10, 5, 1), nc=nn.BatchNorm2d(5), fc=nn.Linear(20, 3),
        )  # fmt: skip
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        a = F.max_pool2d(F.relu(self.na(self.a(x))), 3, 1, 1)
        b = F.avg_pool2d(F.leaky_relu(self.nb(self.b(x)), 0.2), 3, 1, 1)
        x = torch.cat([a, b], 1)
        y = self.c(F.relu(self.n1(x) if self.first else x)) + self.d(F.relu(self.n2(x) if self.second else x))
        y = F.dropout(F.relu(self.nc(y)), 0.0, self.training)
        return self.fc(F.adaptive_avg_pool2d(y, 2).permute(0, 2, 3, 1).flatten(1))


class Variant(Net):
    """conv, norm, something, conv: ``kind`` says what."""

    def __init__(self, kind: str, norm: nn.Module | None = None) -> None:
        super().__init__(
            a=conv(3, 6), n=norm or nn.BatchNorm2d(6), m=conv(6, 6), dw=conv(6, 6, groups=6),
            b=conv(6, 4), c=conv(6, 4), fc=nn.Linear(4, 2),
        )  # fmt: skip
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        kind, x = self.kind, self.n(self.a(x))
        extra = None
        if kind in ("silu", "gelu", "hardtanh", "sigmoid"):
            x = getattr(F, kind)(x) if kind != "sigmoid" else torch.sigmoid(x)
        elif kind == "add":
            x = x + self.m(F.relu(x))
        elif kind == "add_scalar":
            x = x + 1
        elif kind == "scale":
            x = F.relu(x) * 0.5 / 3
        elif kind == "depthwise":
            x = self.dw(x)
        elif kind == "product":
            x = x * torch.sigmoid(self.m(F.relu(x)))
        elif kind == "square":
            x = x * x
        elif kind == "where":
            x = torch.where(x > 0, x, x * 2)
        elif kind == "side":
            extra = self.c(torch.tanh(x))
        elif kind == "two_readers":
            extra = self.c(F.relu(x))
        elif kind == "detached":
            extra = self.c(x.detach())
        elif kind == "train_side" and self.training:
            extra = self.c(torch.exp(x))
        elif kind == "filled":
            x = x * 1.0
            x[:, :, 0] = 1.0
        x = self.b(x)
        return self.fc((x if extra is None else x + extra).mean((2, 3)))


def by_gate(model: nn.Module, groups: Groups, group: ChannelGroup) -> Tensor:
    """dE/dz of a gate on every unit of ``group``, put before each of its readers."""
    gate = torch.ones(group.size, dtype=torch.float64, requires_grad=True)
    members = {member.tensor: member for member in group.role("read")}

    def multiply(name: str, x: Tensor, dim: int) -> Tensor:
        member = members[name]
        length = named_tensors(model)[name].shape[member.dim]
        scale = torch.ones(length, dtype=torch.float64).index_put(
            (member.index.flatten(),), gate.repeat_interleave(member.width)
        )
        return x * scale.view(-1, *(1,) * (x.dim() - 1 - dim))

    handles = active_in_forward(model, ReaderInputs(model, members, multiply))
    (gradient,) = torch.autograd.grad(energy(model, groups), gate)
    for handle in handles:
        handle.remove()
    return gradient


def energy(model: nn.Module, groups: Groups) -> Tensor:
    args, kwargs = groups.example_inputs
    out = outputs(model(*[x.double() for x in args], **{k: x.double() for k, x in kwargs.items()}))
    return sum((x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)).sin().sum() for x in out)


def by_affine(model: nn.Module, groups: Groups, group: ChannelGroup) -> Tensor:
    model.zero_grad()
    energy(model, groups).backward()
    tensors = named_tensors(model)
    total = torch.zeros(group.size, dtype=torch.float64)
    for member in group.affine:
        product = (tensors[member.tensor] * tensors[member.tensor].grad).detach()
        total += product[member.index].sum(1)
    return total


def check(model: nn.Module, groups: Groups, with_affine: set[str]) -> None:
    assert {group.name for group in groups if group.affine} == with_affine
    model = no_zeros(model).double()
    for training in (False, True):
        model.train(training)
        for group in groups:
            expected = by_gate(model, groups, group)
            assert float(expected.abs().max()) > 1e-6
            if group.affine:
                # float64, a few thousand terms
                torch.testing.assert_close(by_affine(model, groups, group), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "with_affine"),
    [
        ("conv_bn", {"a"}),
        ("residual", {"one"}),
        ("group_norm", {"a"}),
        ("one_d", {"a", "fc"}),
        ("three_d", {"a"}),
        ("concat", set()),
        ("depthwise", set()),
        ("mlp", set()),
        ("squeeze_excite", set()),
    ],
)
def test_affine_is_the_gate(name, with_affine):
    make, inputs = NETS[name]
    model = make()
    groups = trace(model, inputs())
    check(model, groups, with_affine)


@pytest.mark.parametrize(
    ("first", "second", "norms"),
    [(False, False, {"na"}), (True, True, {"n1", "n2"}), (False, True, set()), (True, False, set())],
)
def test_affine_of_branches_pools_and_concatenations(first, second, norms):
    model = Branches(first, second)
    groups = trace(model, image())
    # where one reader follows a norm and the other doesn't, the branch's own norm meets a norm: neither sum is the gate
    check(model, groups, {"a", "b", "c"} if norms else {"c"})
    assert {member.tensor.partition(".")[0] for member in groups["a"].affine} == norms


@pytest.mark.parametrize("kind", ["scale", "two_readers"])
def test_affine_where_it_holds(kind):
    model = Variant(kind)
    groups = trace(model, image())
    check(model, groups, {"a"})


NOT_HOMOGENEOUS = ["silu", "gelu", "hardtanh", "sigmoid", "add", "add_scalar", "depthwise", "product", "square"]


@pytest.mark.parametrize("kind", [*NOT_HOMOGENEOUS, "where", "side", "detached", "train_side", "filled"])
def test_no_affine_where_it_does_not(kind):
    groups = trace(Variant(kind), image())
    assert not groups["a"].affine


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(6, affine=False), nn.Identity()])
def test_no_affine_without_a_weight(norm):
    groups = trace(Variant("scale", norm), image())
    assert not groups["a"].affine

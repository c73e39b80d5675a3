"""What other pruning tools get wrong, one case each: here it is exact, or it stays and the message says where."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_cuda as tc
from tests.graph.base import Net, conv, image
from tests.graph.nets import C2f, GroupNormed, Residual, Shuffle
from tests.graph.odd_nets import BufferAdd, ConstantSlice, SecondOutput, TrainHead
from tests.graph.random_nets import TOLERANCE, compare, random_keeps, randomise
from tests.graph.test_rules import Chain


class Code(nn.Module):
    """A function as a module, so that a message has a module to name."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def chain(function: Callable[[Tensor], Tensor] | nn.Module, width: int = 8) -> Callable[[], nn.Module]:
    """``a`` (8 channels), the construct as the module ``middle``, ``b``."""
    return lambda: Chain(function if isinstance(function, nn.Module) else Code(function), width)


class Flattened(Net):
    """Channels last, then flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), fc=nn.Linear(6 * 16, 5), out=nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.a(x), 4).permute(0, 2, 3, 1).flatten(1)
        return self.out(F.relu(self.fc(x)))


class Attention(Net):
    """Queries, keys and values of one layer, two heads, every number but that of the heads left to the shape."""

    def __init__(self, view: tuple[int, ...]) -> None:
        super().__init__(embed=nn.Linear(6, 8), qkv=nn.Linear(8, 24), proj=nn.Linear(8, 8), head=nn.Linear(8, 2))
        self.view = view

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = self.qkv(x).view(*x.shape[:2], *self.view).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        x = x + self.proj((weights @ v).transpose(1, 2).flatten(2))
        return self.head(x.mean(1))


class RootMean(nn.Module):
    """RMSNorm written out."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt() * self.gain


def last(norm: nn.Module) -> nn.Module:
    """A norm over channels that stand last."""
    return nn.Sequential(Code(lambda x: x.permute(0, 2, 3, 1)), norm, Code(lambda x: x.permute(0, 3, 1, 2)))


def tokens() -> Tensor:
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))


# a line of this file, in the module that runs there
HERE = r"\(middle(\.\d)?, test_peer_faults\.py:\d+\)"
# torch's own modules have no line of the user's: the line that calls them
CALLED = r"\(middle(\.\d)?, test_rules\.py:\d+\)"
NEVER = "nothing may be frozen here"

# the network, its input, the layer whose channels meet the construct, and what a message must hold if they stay
FAULTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str, str]] = {
    "mean over channels": (chain(lambda x: x * x.mean(1)[:, None].sigmoid()), image, "a", f"mean.*{HERE}"),
    "softmax over channels": (chain(lambda x: x.softmax(1)), image, "a", f"softmax.*{HERE}"),
    "Softmax2d": (chain(nn.Softmax2d()), image, "a", f"softmax.*{CALLED}"),
    "normalize over channels": (chain(lambda x: F.normalize(x, dim=1)), image, "a", f"norm.*{HERE}"),
    "LocalResponseNorm": (chain(nn.LocalResponseNorm(3)), image, "a", CALLED),
    "GroupNorm": (GroupNormed, image, "a", NEVER),
    "GroupNorm of one group": (chain(nn.GroupNorm(1, 8)), image, "a", "one unit in all"),
    "GroupNorm by function": (chain(lambda x: F.group_norm(x, 4)), image, "a", f"group normalisation.*{HERE}"),
    "GLU by chunk": (chain(lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].sigmoid(), 4), image, "a", NEVER),
    "permute, flatten": (Flattened, image, "a", NEVER),
    "an inner second output": (SecondOutput, image, "b", "an output of the network"),
    "channel shuffle": (Shuffle, image, "b", r"\(nets\.py:\d+\)"),
    "ChannelShuffle": (chain(nn.ChannelShuffle(2)), image, "a", CALLED),
    "C2f": (C2f, image, "a", NEVER),
    "x[:, :8]": (ConstantSlice, image, "a", r"sliced.*\(odd_nets\.py:\d+\)"),
    "padded channels": (chain(lambda x: F.pad(x, (0, 0, 0, 0, 0, 2)), 10), image, "a", f"padding.*{HERE}"),
    "pixel_shuffle": (chain(lambda x: F.pixel_shuffle(x, 2), 2), image, "a", f"pixel_shuffle.*{HERE}"),
    "RMSNorm": (chain(last(nn.RMSNorm(8))), image, "a", rf"mean.*{CALLED}"),
    "RMSNorm written out": (chain(RootMean()), image, "a", f"mean.*{HERE}"),
    "qkv, heads free": (lambda: Attention((3, 2, -1)), tokens, "qkv", r"\(test_peer_faults\.py:\d+\)"),
    "qkv, widths fixed": (lambda: Attention((3, -1, 4)), tokens, "qkv", r"\(test_peer_faults\.py:\d+\)"),
    "qkv, all fixed": (lambda: Attention((3, 2, 4)), tokens, "qkv", r"\(test_peer_faults\.py:\d+\)"),
    "a buffer [1, C, 1, 1]": (BufferAdd, image, "a", NEVER),
}


def check_exact(model: nn.Module, groups: tc.Groups, x: Tensor) -> None:
    """Masked and cut agree in fp64, outputs and gradients, in both modes, whatever is kept."""
    twin = copy.deepcopy(model).double()
    randomise(twin, 0)
    for plan in random_keeps(groups, 0):
        for training in (False, True):
            assert compare(twin, groups, plan, x.double(), training) <= TOLERANCE


@pytest.mark.parametrize("name", FAULTS)
def test_exact_or_named(name):
    make, inputs, layer, message = FAULTS[name]
    torch.manual_seed(0)
    model, x = make(), inputs()
    groups = tc.trace(model, x)
    written = [member for group in groups for member in group.members if member.tensor == f"{layer}.weight"]
    offered = sum(member.index.numel() for member in written if member.role == "write")
    frozen = [entry for entry in groups.frozen if entry.name == layer]
    assert offered + sum(entry.size for entry in frozen) == model.get_submodule(layer).weight.shape[0]
    for entry in frozen:
        assert re.search(message, entry.reason), entry
    assert len(groups)
    check_exact(model, groups, x)


def hooks(model: nn.Module) -> int:
    """Every hook of every module."""
    return sum(len(value) for m in model.modules() for key, value in vars(m).items() if key.endswith("hooks"))


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_hooks_stay_through_a_whole_prune(training):
    model = Residual().train(training)
    model.bn1.train(not training)
    modes = {name: module.training for name, module in model.named_modules()}
    model.fc.register_forward_hook(lambda *_: None)
    groups = tc.trace(model, image())
    plan = {"stem": torch.arange(3), "one": torch.arange(2)}
    with tc.masked(model, groups, plan):
        model(image())
    tc.cut(model, groups, plan)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert hooks(model) == 1


def test_frozen_parameters_are_neither_lost_nor_set_free():
    torch.manual_seed(0)
    model, x = Residual(), image()
    free = tc.trace(model, x)
    model.stem.requires_grad_(False)
    model.two.requires_grad_(False)
    groups = tc.trace(model, x)
    assert [(group.name, group.size, [(m.tensor, m.dim) for m in group.members]) for group in groups] == [
        (group.name, group.size, [(m.tensor, m.dim) for m in group.members]) for group in free
    ]
    check_exact(model, groups, x)
    wants = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    tc.cut(model, groups, {"stem": torch.arange(3), "one": torch.arange(2)})
    assert model.stem.weight.shape[0] == model.two.weight.shape[0] == 3
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wants
    assert sum(not wanted for wanted in wants.values()) == 4


def test_heads_of_train_mode_are_not_missed(monkeypatch):
    # it would draw other channels for other widths
    monkeypatch.setattr(F, "dropout2d", lambda x, *_: x)
    torch.manual_seed(0)
    model, x = TrainHead().eval(), image()
    groups = tc.trace(model, x)
    tc.cut(model, groups, {"a": torch.tensor([1, 4, 6])})
    assert model.aux.weight.shape[1] == 3
    assert [tuple(y.shape) for y in model.train()(x)] == [(2, 2), (2, 3)]
    fresh = TrainHead()
    check_exact(fresh, tc.trace(fresh, x), x)


@pytest.mark.parametrize("make", [Residual, GroupNormed, C2f, Shuffle])
def test_one_example_is_one_argument(make):
    torch.manual_seed(0)
    model = make()
    one, two = tc.trace(model, image(1)), tc.trace(model, image(2))
    args, kwargs = one.example_inputs
    assert [tuple(x.shape) for x in args] == [(1, 3, 8, 8)]
    assert not kwargs
    assert one.batch_size == 1
    assert one.sizes() == two.sizes()

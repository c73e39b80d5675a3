"""Passes that go another way than the recorded one: the sums are right, or an error says what is wrong."""

from __future__ import annotations

import copy
import re
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_cuda as tc
from taylor_cuda.graph.program import Program, Ride
from taylor_cuda.graph.recorder import leaves
from tests.graph.draw_nets import draw_program
from tests.graph.random_nets import randomise
from tests.importance.riding import Passes, Step, close_to, gate_sums, made, step
from tests.importance.riding_nets import RidingNet

pytestmark = pytest.mark.usefixtures("one_thread")


class Fickle(RidingNet):
    """Does something else in every pass, and none of it was recorded."""

    shape = (3, 3, 8, 8)
    way = 0

    def forward(self, x: Tensor) -> Tensor:
        z = F.max_pool2d(F.relu(self.a(x)), 2)
        if self.way == 0:  # as recorded
            y = F.relu(self.b(z))
        elif self.way == 1:  # one use more
            y = F.relu(self.b(z)) + torch.sigmoid(z)
        elif self.way == 2:  # another order of ReLUs
            y = F.relu(self.b(F.relu(torch.tanh(z)))) + F.relu(z)
        elif self.way == 3:  # a function in between that keeps no sum
            y = F.relu(self.b(z.mean((0, 2), keepdim=True).expand_as(z)))
        elif self.way == 4:  # dropout in place
            y = F.relu(self.b(F.dropout(z, 0.5, True, True) + z))
        elif self.way == 5:  # changed in place before it is read
            z.mul_(2)
            y = F.relu(self.b(z))
        elif self.way == 6:  # read at another length, and past the graph of the mode
            y = F.relu(self.b(z)) + self.b(F.max_pool2d(z, 2)).mean((2, 3), keepdim=True) + Cube.apply(z)
        elif self.way == 7:  # transposed: other channels
            y = F.relu(self.b(z.transpose(0, 1)))
        elif self.way == 8:  # changed in place behind a reader whose result nobody wants
            self.b(z)
            y = F.relu(self.b(z.mul_(2)))
        return self.head(F.relu(self.c(y)).mean((2, 3)))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


@pytest.mark.filterwarnings("ignore:the activation before")
@pytest.mark.parametrize("boldly", [False, True], ids=["recorded", "boldly"])
@pytest.mark.parametrize("way", range(8))
def test_a_pass_that_goes_another_way_has_the_right_sums(way: int, boldly: bool) -> None:
    model, x = made(Fickle), torch.randn(6, 3, 8, 8, dtype=torch.float64)
    groups = tc.trace(model, x)
    with tc.fuse_scoring(model, groups) as sums:
        assert not sums.gated
        if boldly:  # everything that could be a way to a reader is taken for one
            ride = Ride(1, True, ())
            for _ in range(2):
                ride = Ride(1, True, (ride, ride, ride))
            sums._sums._sites._programs = {True: Program([ride] * 9)}
        model.way = way
        plain = step(copy.deepcopy(model), x)
        fused = step(model, x)
        taken = sums.take()
    expected = gate_sums(copy.deepcopy(model), groups, x)
    for name, value in plain.items():  # what was not recorded may be added up in another order
        torch.testing.assert_close(fused[name], value, rtol=1e-12, atol=1e-14)
    for name, value in expected.items():
        torch.testing.assert_close(taken[name].sum(0), value.sum(0), rtol=1e-10, atol=1e-14)


def wrong(random: Random, deep: int, dim: int) -> Ride | None:
    """A tree that nothing was recorded for."""
    if random.random() < 0.2:
        return None
    ways = tuple(wrong(random, deep - 1, dim) for _ in range(3)) if deep else ()
    return Ride(dim, random.random() < 0.5, ways)


@pytest.mark.filterwarnings("ignore:the activation before", "ignore:input.s size at dim=1")
@pytest.mark.parametrize("seed", range(12))
def test_a_wrong_record_gives_the_right_sums(seed: int) -> None:
    """Which ReLUs give rides is a matter of cost: at random, on random networks, sums and gradients are the same."""
    random = Random(seed)
    program = draw_program(random)
    program.steps = [re.sub(r"F\.gelu|F\.silu|torch\.tanh|F\.hardswish", "F.relu", step) for step in program.steps]
    program.steps = [re.sub(r"= (self\.l\d+\(\w+\))$", r"= F.relu(\1, True)", step) for step in program.steps]
    model, x = program.build().double(), program.input(3, seed)
    randomise(model, seed)

    def run(model: nn.Module, x: Tensor) -> Step:
        torch.manual_seed(1)
        model.zero_grad()
        next(iter(leaves(model(x)))).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    groups = tc.trace(model, x)
    plain, expected = run(copy.deepcopy(model), x), gate_sums(copy.deepcopy(model), groups, x, run)
    with tc.fuse_scoring(model, groups) as sums:
        rides = [wrong(random, 2, random.choice((1, 1, 1, 2))) for _ in range(40)]
        sums._sums._sites._programs = {True: Program(rides)}
        for name, value in run(model, x).items():
            torch.testing.assert_close(value, plain[name], rtol=1e-9, atol=1e-11 * float(plain[name].abs().max()))
        for name, value in sums.take().items():
            bound = 1e-10 * float(expected[name].abs().max()) + 1e-14
            assert (value - expected[name]).abs().max() <= bound, name


@pytest.mark.filterwarnings("ignore:the activation before")
def test_a_pass_that_cannot_be_summed_is_an_error() -> None:
    model, x = made(Fickle), torch.randn(6, 3, 8, 8, dtype=torch.float64)
    groups = tc.trace(model, x)
    with tc.fuse_scoring(model, groups):
        model.way = 8
        with pytest.raises(tc.InputError, match=r"on its way to b\.weight was changed in place .*fuse=False"):
            step(model, x)


def test_what_holds_an_activation_gets_a_gate_from_then_on(
    residual: tuple[nn.Module, Tensor, tc.Groups], passes: Passes
) -> None:
    model, x, groups = residual
    model.eval()
    expected = gate_sums(copy.deepcopy(model), groups, x)
    passes.count = 0
    with tc.fuse_scoring(model, groups) as sums:
        held: list[Tensor] = []
        model.down.register_forward_pre_hook(lambda _m, args: held.append(args[0]))
        with pytest.warns(UserWarning, match=r"the activation before down\.weight is held after the forward pass"):
            step(model, x)
        close_to(sums.take(), expected)
        assert passes.count == 0
        step(model, x, lambda loss: (held[-1].retain_grad(), loss.backward()))
        close_to(sums.take(), expected)
        assert passes.count == 1
    assert held[-1].grad is not None
    t = (held[-1] * held[-1].grad).sum((2, 3))
    torch.testing.assert_close(t, expected["up"], rtol=1e-10, atol=0)


@pytest.mark.filterwarnings("ignore:the activation before")
@pytest.mark.parametrize("reader", ["b", "up", "down", "c"])
def test_what_is_held_may_be_part_of_the_loss(reader: str, residual: tuple[nn.Module, Tensor, tc.Groups]) -> None:
    """A use that no mode sees, and that comes beside those of the record: an addition, another reader, or nothing."""
    model, x, groups = residual

    def distilled(model: nn.Module, x: Tensor) -> Step:
        held: list[Tensor] = []
        handle = model.get_submodule(reader).register_forward_pre_hook(lambda _m, args: held.append(args[0]))
        found = step(model, x, lambda loss: (loss + held[0].square().mean()).backward())
        handle.remove()
        return found

    plain, expected = distilled(copy.deepcopy(model), x), gate_sums(copy.deepcopy(model), groups, x, distilled)
    with tc.fuse_scoring(model, groups) as sums:
        for name, value in distilled(model, x).items():
            torch.testing.assert_close(value, plain[name], rtol=1e-11, atol=1e-13)
        close_to(sums.take(), expected)


def test_asking_for_a_gradient_that_is_taken_apart_is_an_error(
    residual: tuple[nn.Module, Tensor, tc.Groups],
) -> None:
    model, x, groups = residual
    with tc.fuse_scoring(model, groups):
        handle = model.down.register_forward_pre_hook(lambda _m, args: args[0].retain_grad())
        with pytest.raises(tc.InputError, match="retain_grad: the gradient of this activation is taken apart"):
            model(x)
        handle.remove()
        step(model, x)


def test_a_model_that_cannot_be_recorded_has_gates(residual: tuple[nn.Module, Tensor, tc.Groups]) -> None:
    model, x, groups = residual
    groups.example_inputs = ((), {})
    expected = gate_sums(copy.deepcopy(model), groups, x)
    with tc.fuse_scoring(model, groups) as sums:
        assert not sums.fused
        step(model, x)
        close_to(sums.take(), expected)
    with pytest.raises(tc.InputError, match="fuse_scoring: model was compiled"):
        tc.fuse_scoring(torch.compile(model, backend="eager"), groups)

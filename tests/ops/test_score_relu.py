"""``score_relu``: a ReLU bit by bit, and the gradients of explicit gates as a by-product of its backward pass."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import taylor_cuda as tc

Maker = Callable[[Tensor], Tensor]
LAYOUTS: dict[str, Maker] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "cropped": lambda x: nn.functional.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1],
    "every second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}
GRADIENTS: dict[str, Maker] = {**LAYOUTS, "expanded": lambda x: x[:, :, :1, :1].expand(x.shape)}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def random(dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 6, 5, 4, generator=generator, dtype=torch.float64).to(dtype)


def plain(x: Tensor, skip: Tensor | None, inplace: bool) -> Tensor:
    if inplace:
        return torch.relu_(x if skip is None else x.add_(skip))
    return torch.relu(x) if skip is None else torch.add(x, skip).relu_()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient_layout", GRADIENTS)
def test_bit_equal_to_pytorch(layout: str, gradient_layout: str) -> None:
    for dtype, with_skip, inplace in itertools.product(DTYPES, (False, True), (False, True)):
        gradient = GRADIENTS[gradient_layout](random(dtype, 2))
        results = []
        for scored in (False, True):
            inputs = [LAYOUTS[layout](random(dtype, seed)).requires_grad_() for seed in range(1 + with_skip)]
            x, skip = [*(tensor.mul(1) for tensor in inputs), None][:2]
            sums = torch.zeros(2, 6, dtype=torch.promote_types(dtype, torch.float32))
            if scored:
                y = tc.score_relu(x, sums[0], skip, sums[1] if with_skip else None, inplace)
            else:
                y = plain(x, skip, inplace)
            assert not inplace or y.data_ptr() == x.data_ptr()
            results.append([y, *torch.autograd.grad(y, inputs, gradient)])
        for expected, actual in zip(*results, strict=True):
            assert torch.equal(actual, expected)
            assert (actual.dtype, actual.stride()) == (expected.dtype, expected.stride())


@pytest.mark.parametrize("per_example", [False, True], ids=["[C]", "[N, C]"])
def test_sums_are_the_gradients_of_explicit_gates(per_example: bool) -> None:
    x, skip = (random(torch.float64, seed).requires_grad_() for seed in (0, 1))
    shape = (3, 6) if per_example else (1, 6)
    gate, skip_gate = (torch.ones(*shape, 1, 1, dtype=torch.float64, requires_grad=True) for _ in (0, 1))
    loss = (torch.relu(x + skip * skip_gate) * gate).sin().sum()
    expected = torch.autograd.grad(loss, (x, skip, gate, skip_gate))
    sums, skip_sums = torch.zeros(2, *shape, dtype=torch.float64).reshape(2, *shape[not per_example :])
    actual = torch.autograd.grad(tc.score_relu(x, sums, skip, skip_sums).sin().sum(), (x, skip))
    assert all(map(torch.equal, actual, expected))
    torch.testing.assert_close(sums, expected[2].view_as(sums), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(skip_sums, expected[3].view_as(sums), rtol=1e-13, atol=1e-13)


def test_gradcheck_twice() -> None:
    def both(x: Tensor, skip: Tensor) -> Tensor:
        sums, skip_sums = torch.zeros(2, 2, dtype=torch.float64)
        return tc.score_relu(x, sums, skip, skip_sums).sin()

    def overwritten(x: Tensor) -> Tensor:
        return tc.score_relu(x * 1, torch.zeros(2, dtype=torch.float64), inplace=True).sin()

    x, skip = (random(torch.float64, seed)[:2, :2, :2, 0].requires_grad_() for seed in (0, 1))
    for function, inputs in ((both, (x, skip)), (overwritten, (x,))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_a_second_backward_pass_adds_its_own_products() -> None:
    """E = Σ y³: the first pass brings 3y² to the ReLU, and that of Σ dE/dx another 6y where x > 0."""
    x = torch.tensor([[2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    sums = torch.zeros(2, dtype=torch.float64)
    (first,) = torch.autograd.grad(tc.score_relu(x, sums).pow(3).sum(), x, create_graph=True)
    assert (first.tolist(), sums.tolist()) == ([[12.0, 0.0]], [24.0, 0.0])
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    assert (second.tolist(), sums.tolist()) == ([[12.0, 0.0]], [24.0 + 24.0, 0.0])
    (third,) = torch.autograd.grad(second.sum(), x)
    assert third.tolist() == [[6.0, 0.0]]


def test_only_the_skip_may_need_a_gradient() -> None:
    x, skip, (sums, skip_sums) = random(torch.float32, 0), random(torch.float32, 1), torch.zeros(2, 6)
    y = tc.score_relu(x, sums, skip.requires_grad_(), skip_sums)
    y.backward(torch.ones_like(y))
    assert torch.equal(skip.grad, (x + skip > 0).float())
    torch.testing.assert_close(sums, y.detach().sum((0, 2, 3)))
    torch.testing.assert_close(skip_sums, (skip * (y > 0)).detach().sum((0, 2, 3)))


def test_nothing_arrives_where_nothing_needs_a_gradient() -> None:
    sums = torch.zeros(6)
    x = random(torch.float32, 0)
    assert not tc.score_relu(x, sums).requires_grad
    with torch.no_grad():
        assert not tc.score_relu(x.requires_grad_(), sums, inplace=True).requires_grad
    assert torch.equal(sums, torch.zeros(6))


def test_layers_may_share_their_sums() -> None:
    x, both, one = random(torch.float32, 0).requires_grad_(), torch.zeros(6), torch.zeros(6)
    (tc.score_relu(x, both).square() + tc.score_relu(x, both).square()).sum().backward()
    tc.score_relu(x, one).square().sum().backward()
    torch.testing.assert_close(both, 2 * one)


@pytest.mark.parametrize("which", ["output", "skip"])
@pytest.mark.parametrize("inplace", [False, True])
def test_writing_over_what_was_saved_raises(which: str, inplace: bool) -> None:
    x, skip = (random(torch.float32, seed).requires_grad_() * 1 for seed in (0, 1))
    y = tc.score_relu(x, torch.zeros(6), skip, torch.zeros(6), inplace)
    loss = (y * torch.ones(())).sum()  # which saves no y
    with torch.no_grad():
        (y if which == "output" else skip).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_is_not_needed_is_not_saved() -> None:
    x, skip = (random(torch.float32, seed).requires_grad_() * 1 for seed in (0, 1))
    y = tc.score_relu(x, torch.zeros(6), skip)
    with torch.no_grad():
        skip.mul_(2)
        x.mul_(2)
    y.sum().backward()


def test_two_halves_of_one_tensor_may_be_added_in_place() -> None:
    whole = random(torch.float32, 0)
    expected = torch.relu(whole[:, :3] + whole[:, 3:])
    y = tc.score_relu(whole[:, :3], torch.zeros(3), whole[:, 3:], torch.zeros(3), inplace=True)
    assert torch.equal(y, expected)


def test_inplace_refuses_what_pytorch_refuses() -> None:
    leaf = random(torch.float32, 0).requires_grad_()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        tc.score_relu(leaf, torch.zeros(6), inplace=True)
    x = leaf.sin()
    squared = x.square()
    tc.score_relu(x, torch.zeros(6), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("with_skip", [False, True])
def test_compiles_as_one_graph(with_skip: bool, inplace: bool) -> None:
    torch._dynamo.reset()

    def step(x: Tensor, weight: Tensor, sums: Tensor, skip_sums: Tensor) -> Tensor:
        hidden, skip = x.sin(), x.cos()
        if with_skip:
            y = tc.score_relu(hidden, sums, skip, skip_sums, inplace)
        else:
            y = tc.score_relu(hidden, sums, inplace=inplace)
        return nn.functional.conv2d(y + hidden, weight).square().mean()

    weight = torch.randn(5, 6, 3, 3, requires_grad=True)
    runs = []
    for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        x, (sums, skip_sums) = random(torch.float32, 0).requires_grad_(), torch.zeros(2, 6)
        gradients = torch.autograd.grad(run(x, weight, sums, skip_sums), (x, weight))
        runs.append((sums, skip_sums, *gradients))
    for eager, compiled in zip(*runs, strict=True):
        torch.testing.assert_close(compiled, eager)
    assert runs[1][0].abs().sum() > 0
    assert bool(runs[1][1].abs().sum() > 0) == with_skip


def test_autocast_leaves_the_dtype_alone() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert tc.score_relu(random(torch.float32, 0), torch.zeros(6)).dtype == torch.float32
        assert tc.score_relu(random(torch.bfloat16, 0), torch.zeros(6)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_two_dtypes_are_promoted_as_an_addition_does(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    results = []
    for scored in (False, True):
        x, skip = (random(dtype, seed).requires_grad_() for seed, dtype in enumerate(dtypes))
        sums = torch.zeros(2, 6)
        y = tc.score_relu(x, sums[0], skip, sums[1]) if scored else plain(x, skip, False)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, skip))])
    assert all(map(torch.equal, *results))
    assert [tensor.dtype for tensor in results[0]] == [tensor.dtype for tensor in results[1]]


def test_module_owns_its_sums() -> None:
    layer = tc.ScoreReLU(4, inplace=True)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.Conv2d(4, 2, 3))
    model(torch.randn(2, 3, 6, 6)).square().sum().backward()
    assert layer.sums.abs().sum() > 0
    assert "sums" not in str(list(model.state_dict()))
    kept = copy.deepcopy(layer).sums
    layer.reset()
    assert layer.sums.abs().sum() == 0
    assert kept.abs().sum() > 0
    assert model.bfloat16()[1].sums.dtype == torch.float32
    assert model.double()[1].sums.dtype == torch.float64
    assert repr(layer) == "ScoreReLU(4, inplace=True)"


def test_module_with_a_skip() -> None:
    layer = tc.ScoreReLU(6, skip=True)
    x, skip = (random(torch.float32, seed).requires_grad_() for seed in (0, 1))
    y = layer(x, skip)
    y.square().sum().backward()
    torch.testing.assert_close(layer.sums, (2 * y * y).detach().sum((0, 2, 3)))
    torch.testing.assert_close(layer.skip_sums, (2 * y * skip).detach().sum((0, 2, 3)))
    layer.reset()
    assert layer.skip_sums.abs().sum() == 0
    assert layer.double().skip_sums.dtype == torch.float64
    assert repr(layer) == "ScoreReLU(6, skip=True)"


def test_bad_input_is_named() -> None:
    x = random(torch.float32, 0)
    with pytest.raises(tc.InputError, match=r"x: wanted \[N, C"):
        tc.score_relu(torch.randn(3), torch.zeros(3))
    with pytest.raises(tc.InputError, match="sums: wanted shape"):
        tc.score_relu(x, torch.zeros(2))
    with pytest.raises(tc.InputError, match="skip: wanted the shape of x"):
        tc.score_relu(x, torch.zeros(6), x[:1])
    with pytest.raises(tc.InputError, match="skip_sums: wanted None where skip is None"):
        tc.score_relu(x, torch.zeros(6), None, torch.zeros(6))
    with pytest.raises(tc.InputError, match=r"skip: wanted a dtype that torch.bfloat16, .* got torch.float32"):
        tc.score_relu(x.bfloat16(), torch.zeros(6), x, inplace=True)
    with pytest.raises(tc.InputError, match="skip: wanted memory of its own"):
        tc.score_relu(x, torch.zeros(6), x.view_as(x), torch.zeros(6), inplace=True)

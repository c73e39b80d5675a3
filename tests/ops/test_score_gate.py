"""``score_gate``: identity forward, the gradient of an explicit gate as a by-product of the backward pass."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import taylor_cuda as tc

SHAPES = [(3, 4), (3, 4, 7), (3, 4, 5, 5), (2, 4, 3, 2, 5)]


def explicit(x: Tensor, per_example: bool) -> tuple[Tensor, Tensor]:
    """The loss of these tests behind an explicit gate, and the gate."""
    shape = x.shape[:2] if per_example else x.shape[1:2]
    gate = torch.ones(shape, dtype=x.dtype, requires_grad=True)
    view = gate.reshape(*(shape if per_example else (1, -1)), *(1,) * (x.dim() - 2))
    return (x * view).sin().sum(), gate


@pytest.mark.parametrize("per_example", [False, True], ids=["[C]", "[N, C]"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_the_gradient_of_an_explicit_gate(shape: tuple[int, ...], per_example: bool) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    loss, gate = explicit(x, per_example)
    (expected_x, expected_gate) = torch.autograd.grad(loss, (x, gate))
    sums = torch.zeros_like(gate.detach())
    tc.score_gate(x, sums).sin().sum().backward()
    assert torch.equal(x.grad, expected_x)
    torch.testing.assert_close(sums, expected_gate, rtol=1e-13, atol=1e-13)


def test_gradient_is_that_of_the_identity() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tc.score_gate(x, torch.zeros(4, dtype=torch.float64)), (x,))
    assert torch.autograd.gradgradcheck(lambda x: tc.score_gate(x, torch.zeros(4, dtype=torch.float64)).sin(), (x,))


def test_output_is_a_view_and_keeps_its_layout() -> None:
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = tc.score_gate(x, torch.zeros(8))
    assert y.data_ptr() == x.data_ptr()
    assert y.stride() == x.stride()


def test_several_gates_may_share_their_sums() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    one, both = torch.zeros(3), torch.zeros(3)
    (tc.score_gate(x, both).square() + tc.score_gate(x, both).square()).sum().backward()
    tc.score_gate(x, one).square().sum().backward()
    torch.testing.assert_close(both, 2 * one)


def test_nothing_arrives_where_nothing_needs_a_gradient() -> None:
    sums = torch.zeros(3)
    x = torch.randn(2, 3, 4)
    assert not tc.score_gate(x, sums).requires_grad
    with torch.no_grad():
        tc.score_gate(x.requires_grad_(), sums)
    assert torch.equal(sums, torch.zeros(3))


def test_writing_over_the_input_raises() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True) * 1
    y = tc.score_gate(x, torch.zeros(3)).sin()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified inplace"):
        y.sum().backward()


def test_writing_over_the_result_raises() -> None:
    """An in-place ReLU behind the gate would change what the gate has to multiply with."""
    x = torch.randn(2, 3, 4, requires_grad=True) * 1
    with pytest.raises(RuntimeError, match=r"modified inplace|modified by an inplace"):
        torch.relu_(tc.score_gate(x, torch.zeros(3))).sum().backward()


def test_a_second_backward_pass_adds_its_own_products() -> None:
    """E = Σ y³: the first pass brings 3y² to the gate, and that of Σ dE/dx another 6y."""
    x, sums = torch.tensor([[2.0, 3.0]], dtype=torch.float64, requires_grad=True), torch.zeros(2, dtype=torch.float64)
    (first,) = torch.autograd.grad(tc.score_gate(x, sums).pow(3).sum(), x, create_graph=True)
    assert sums.tolist() == [24.0, 81.0]
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.tolist() == [[12.0, 18.0]]
    assert sums.tolist() == [24.0 + 24.0, 81.0 + 54.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_activations_leave_float32_sums(dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, 9, dtype=dtype, requires_grad=True)
    sums = torch.zeros(6)
    gradient = torch.randn(4, 6, 9).to(dtype)
    tc.score_gate(x, sums).backward(gradient)
    products = x.detach().double() * gradient.double()
    bound = 8 * torch.finfo(torch.float32).eps * products.abs().sum((0, 2))
    assert ((sums - products.sum((0, 2))).abs() <= bound).all()


def test_module_owns_its_sums() -> None:
    gate = tc.ScoreGate(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), gate, nn.ReLU())
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    assert gate.sums.abs().sum() > 0
    assert "sums" not in str(list(model.state_dict()))
    kept = copy.deepcopy(gate).sums
    gate.reset()
    assert gate.sums.abs().sum() == 0
    assert kept.abs().sum() > 0
    assert model.bfloat16()[1].sums.dtype == torch.float32
    assert model.double()[1].sums.dtype == torch.float64


def test_bad_input_is_named() -> None:
    with pytest.raises(tc.InputError, match=r"x: wanted \[N, C"):
        tc.score_gate(torch.randn(3), torch.zeros(3))
    with pytest.raises(tc.InputError, match="sums: wanted shape"):
        tc.score_gate(torch.randn(2, 3), torch.zeros(2))
    with pytest.raises(tc.InputError, match=r"sums: wanted torch\.float32"):
        tc.score_gate(torch.randn(2, 3).bfloat16(), torch.zeros(3).bfloat16())

"""``channel_sums``; its layouts and dtypes are part of ``check_channel_ops`` in test_channel_importance."""

from __future__ import annotations

import torch

import taylor_cuda as tc
from tests.ops.checks import each_backend, ops_of


@each_backend
def test_by_hand(backend: str) -> None:
    activation = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[0.0, 1.0], [-1.0, 2.0]]])
    gradient = torch.tensor([[[1.0, -1.0], [2.0, 5.0]], [[1.0, 4.0], [2.0, 2.0]]])
    assert torch.equal(ops_of(backend).channel_sums(activation, gradient), torch.tensor([[-1.0, 6.0], [4.0, 2.0]]))


@each_backend
def test_products_of_16_bit_numbers_are_not_rounded(backend: str) -> None:
    """1.0078125² has 15 significant bits, of which bf16 keeps 8."""
    activation = torch.full((1, 1, 4), 1.0078125, dtype=torch.bfloat16)
    assert ops_of(backend).channel_sums(activation, activation).item() == 4 * 1.0078125**2


@each_backend
def test_cancellation_is_exact_to_the_last_bit_of_float32(backend: str) -> None:
    """A running fp32 sum would lose the 1 next to 1e8."""
    activation = torch.tensor([[[1e8, 1.0, -1e8]]])
    if backend == "native":
        assert ops_of(backend).channel_sums(activation, torch.ones_like(activation)).item() == 1.0


def test_has_no_gradient() -> None:
    activation, gradient = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4)
    assert not tc.channel_sums(activation, gradient).requires_grad

"""``accumulate_channel_sums``; its layouts and dtypes are part of ``check_channel_ops`` in test_channel_importance."""

from __future__ import annotations

import pytest
import torch

import taylor_cuda as tc
from taylor_cuda.ops import accumulate_channel_sums
from tests.ops.checks import each_backend, ops_of


@each_backend
def test_adds_to_what_is_there(backend: str) -> None:
    activation, gradient = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]), torch.tensor([[[1.0, 1.0]], [[2.0, 0.5]]])
    by_example, by_channel = torch.tensor([[10.0], [20.0]]), torch.tensor([100.0])
    ops_of(backend).accumulate_channel_sums(activation, gradient, by_example)
    ops_of(backend).accumulate_channel_sums(activation, gradient, by_channel)
    assert torch.equal(by_example, torch.tensor([[13.0], [28.0]]))
    assert torch.equal(by_channel, torch.tensor([111.0]))


def test_a_stale_saved_tensor_is_noticed() -> None:
    """The op changes its argument in place, and autograd must know."""
    sums = torch.ones(3)
    saved = (torch.ones(3, requires_grad=True) * sums).sum()
    accumulate_channel_sums(torch.ones(2, 3), torch.ones(2, 3), sums)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


@pytest.mark.parametrize(
    ("sums", "message"),
    [
        (torch.zeros(4), r"sums: wanted shape \(3,\) or \(2, 3\)"),
        (torch.zeros(3).double(), "sums: wanted torch.float32"),
        (torch.zeros(3, requires_grad=True), "sums: wanted a tensor that does not require grad"),
        (torch.zeros(6)[::2], "sums: wanted a contiguous tensor"),
    ],
)
def test_bad_sums_are_named(sums: torch.Tensor, message: str) -> None:
    with pytest.raises(tc.InputError, match=message):
        accumulate_channel_sums(torch.ones(2, 3), torch.ones(2, 3), sums)

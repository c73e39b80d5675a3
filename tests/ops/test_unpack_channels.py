"""``unpack_channels`` by hand, in every layout, differentiated, compiled, and with input that it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import taylor_cuda as tc
from tests.ops.checks import each_implementation
from tests.ops.test_pack_channels import DTYPES, KEEP, LAYOUTS


@each_implementation("unpack_channels")
def test_by_hand(run: Callable[..., Tensor]) -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    whole = run(x, torch.tensor([1, 3, -1]), 4)
    assert whole.tolist() == [[[0.0, 0.0], [1.0, 2.0], [0.0, 0.0], [3.0, 4.0]]]


@each_implementation("unpack_channels")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_and_order_in_memory(run: Callable[..., Tensor], layout: str) -> None:
    for dtype in DTYPES:
        for keep in KEEP:
            x = LAYOUTS[layout](torch.randn(3, len(keep), 5, 4, dtype=torch.float64).to(dtype))
            whole = run(x, torch.tensor(keep, dtype=torch.int64), 7)
            expected = torch.zeros(3, 7, 5, 4, dtype=dtype)
            for k, channel in enumerate(keep):
                if channel >= 0:
                    expected[:, channel] = x[:, k]
            assert whole.dtype == dtype
            assert torch.equal(whole, expected)
            if len(keep) > 1:
                by_stride = [sorted(range(4), key=lambda d, t=t: t.stride(d)) for t in (x, whole)]
                assert by_stride[0] == by_stride[1]


def test_what_minus_one_marks_is_left_out() -> None:
    x = torch.full((2, 3, 4), math.nan)
    x[:, 0] = 1.0
    assert tc.unpack_channels(x, torch.tensor([1, -1, -1]), 2).sum((0, 2)).tolist() == [0.0, 8.0]


def test_no_channels_on_either_side() -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert torch.equal(tc.unpack_channels(torch.randn(2, 0, 3), none, 4), torch.zeros(2, 4, 3))
    assert tc.unpack_channels(torch.randn(2, 0, 3), none, 0).shape == (2, 0, 3)


def test_packing_undoes_it() -> None:
    (keep,) = tc.keep_lists([torch.rand(50) < 0.5])
    x = torch.randn(3, len(keep), 4, 4)
    assert torch.equal(tc.pack_channels(tc.unpack_channels(x, keep, 50), keep), x)


def test_gradients_of_any_order() -> None:
    keep = torch.tensor([0, 2, -1])
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.arange(1.0, 6.0, dtype=torch.float64).view(1, 5, 1)
    (gradient,) = torch.autograd.grad((tc.unpack_channels(x, keep, 5) * weights).sum(), x)
    assert gradient[0, :, 0].tolist() == [1.0, 3.0, 0.0]

    def function(x: Tensor) -> Tensor:
        return tc.unpack_channels(x, keep, 5).sin()

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, keep: tc.unpack_channels(x.sin(), keep, 6).cos(), backend="aot_eager", fullgraph=True
    )
    keep = torch.tensor([0, 2, 5])
    x = torch.randn(2, 3, 3, 3, requires_grad=True)
    eager = tc.unpack_channels(x.sin(), keep, 6).cos()
    torch.testing.assert_close(compiled(x, keep), eager)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (compiled(x, keep), eager)]
    torch.testing.assert_close(*gradients)


X = torch.randn(2, 2, 3, 3)
BAD: list[tuple[Any, Any, str]] = [
    (torch.tensor([0, 1, 2]), 4, "keep: wanted 2 entries, the channels of x, got 3"),
    (torch.tensor([0, 4]), 4, "keep: wanted channels below 4, got 4"),
    (torch.tensor([1, 0]), 4, "keep: wanted ascending channels"),
    (torch.ones(2, dtype=torch.bool), 4, r"keep: wanted an int64 list \[K\], got torch.bool"),
    (torch.tensor([0, 1]), -1, "channels: wanted an int of at least 0, got -1"),
    (torch.tensor([0, 1]), 4.0, "channels: wanted an int of at least 0, got 4.0"),
    (torch.tensor([0, 1]), True, "channels: wanted an int of at least 0, got True"),
]


@pytest.mark.parametrize(("keep", "channels", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_named(keep: Any, channels: Any, message: str) -> None:
    with pytest.raises(tc.InputError, match=message):
        tc.unpack_channels(X, keep, channels)

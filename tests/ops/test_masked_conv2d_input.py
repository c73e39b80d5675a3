"""What ``masked_conv2d`` refuses, and how it says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import taylor_cuda as tc
from taylor_cuda.ops import backends

X, WEIGHT = torch.randn(2, 4, 7, 7), torch.randn(6, 4, 3, 3)
OUT, IN = torch.arange(6) % 2 == 0, torch.arange(4) < 3
OUTS, INS = tc.keep_lists([OUT, IN])

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no tensor": ({"x": [1]}, "x: wanted a tensor, got list"),
    "whole numbers": ({"x": X.long()}, "x: wanted float32, .* got torch.int64"),
    "two dimensions": ({"x": X[0, 0]}, r"x: wanted \[N, C_in, H, W\] or \[C_in, H, W\], got shape \(7, 7\)"),
    "channels of x": ({"x": X[:, :3]}, r"x: wanted 4 channels, got shape \(2, 3, 7, 7\)"),
    "channels of a compact x": ({"keep_in": INS, "keep_out": OUTS, "packed": True}, "x: wanted 3 channels, got shape"),
    "small x": ({"x": X[..., :2]}, r"x: wanted at least the 3 rows or columns .* got shape \(2, 4, 7, 2\)"),
    "small for dilated filters": ({"dilation": 4}, "x: wanted at least the 9 rows or columns"),
    "weight of two dimensions": ({"weight": WEIGHT[0, 0]}, r"weight: wanted \[C_out, C_in / groups, R, S\], got"),
    "weight of nothing": ({"weight": WEIGHT[:, :, :0]}, r"weight: wanted .* got shape \(6, 4, 0, 3\)"),
    "weight's dtype": ({"weight": WEIGHT.bfloat16()}, "weight: wanted torch.float32, the dtype of x, got torch.bf"),
    "weight's device": ({"weight": WEIGHT.to("meta")}, "weight: wanted it on cpu, where x is, got it on meta"),
    "groups": ({"groups": 4}, "groups: wanted a divisor of 6, the outputs of weight, got 4"),
    "no groups": ({"groups": 0}, "groups: wanted a divisor of 6, the outputs of weight, got 0"),
    "groups of x": ({"groups": 2}, r"x: wanted 8 channels, got shape \(2, 4, 7, 7\)"),
    "mask's length": ({"keep_out": OUT[:5]}, r"keep_out: wanted a mask of shape \(6,\), got \(5,\)"),
    "mask of inputs' length": ({"keep_in": OUT}, r"keep_in: wanted a mask of shape \(4,\), got \(6,\)"),
    "mask's dtype": (
        {"keep_out": OUT.float()},
        r"keep_out: wanted a bool mask \[C\] or an int64 list \[K\], got torch.f",
    ),
    "mask's dimensions": ({"keep_in": IN[None]}, r"keep_in: wanted a bool mask .* got torch.bool \(1, 4\)"),
    "mask's device": ({"keep_out": OUT.to("meta")}, "keep_out: wanted it on cpu, got it on meta"),
    "no mask": ({"keep_out": [0, 1]}, r"keep_out: wanted a bool mask \[C\] or an int64 list \[K\], got list"),
    "sparse mask": ({"keep_out": OUT.to_sparse()}, "keep_out: wanted a dense tensor, got layout torch.sparse_coo"),
    "list's device": ({"keep_in": INS.to("meta")}, "keep_in: wanted it on cpu, got it on meta"),
    "list's dtype": (
        {"keep_in": INS.int()},
        r"keep_in: wanted a bool mask \[C\] or an int64 list \[K\], got torch.int32",
    ),
    "unsorted": ({"keep_out": OUTS.flip(0)}, r"keep_out: wanted ascending channels, each once, got \[4, 2, 0\]"),
    "repeated": ({"keep_in": INS // 2}, r"keep_in: wanted ascending channels, each once, got \[0, 0, 1\]"),
    "out of range": ({"keep_in": INS + 2}, "keep_in: wanted channels below 4, got 4"),
    "below -1": ({"keep_out": OUTS - 2}, r"keep_out: wanted channels from 0 on .* got -2"),
    "-1 in front": ({"keep_out": OUTS - 1}, r"keep_out: wanted -1 at the end only, got \[-1, 1, 3\]"),
    "mask with packed": ({"packed": True}, "keep_out: wanted a keep list with packed=True, .* keep_lists makes lists"),
    "one mask with packed": ({"packed": True, "keep_out": OUTS}, "keep_in: wanted a keep list with packed=True"),
    "bias's length": ({"bias": torch.randn(4)}, r"bias: wanted shape \(6,\), got \(4,\)"),
    "bias's dtype": ({"bias": torch.randn(6).double()}, "bias: wanted torch.float32, .* got torch.float64"),
    "bias's device": ({"bias": torch.randn(6, device="meta")}, "bias: wanted it on cpu, where x is, got it on meta"),
    "scale's length": ({"scale": torch.randn(3)}, r"scale: wanted shape \(6,\), got \(3,\)"),
    "scale's gradient": (
        {"scale": torch.randn(6).requires_grad_()},
        "scale: wanted a tensor that does not require grad",
    ),
    "stride": ({"stride": 0}, "stride: wanted an int of at least 1 or two of them, got 0"),
    "three strides": ({"stride": (1, 1, 1)}, r"stride: wanted an int .* got \(1, 1, 1\)"),
    "dilation": ({"dilation": 1.5}, "dilation: wanted an int of at least 1 or two of them, got 1.5"),
    "padding": ({"padding": (1, -1)}, r"padding: wanted an int of at least 0 or two of them, got \(1, -1\)"),
    "padding's name": (
        {"padding": "reflect"},
        "padding: wanted ints, 'valid', or 'same' with a stride of 1, got 'refl",
    ),
    "same with a stride": ({"padding": "same", "stride": 2}, r"padding: .* got 'same' with \[2, 2\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    changes, message = BAD[name]
    arguments = {"x": X, "weight": WEIGHT, "keep_out": OUT, "keep_in": IN, **changes}
    with pytest.raises(tc.InputError, match=message):
        tc.masked_conv2d(**arguments)


def test_a_scale_that_requires_grad_is_fine_without_gradients() -> None:
    scale = torch.rand(6).requires_grad_()
    with torch.no_grad():
        y = tc.masked_conv2d(X, WEIGHT, None, OUT, IN, scale=scale)
    torch.testing.assert_close(y, tc.masked_conv2d(X, WEIGHT, None, OUT, IN, scale=scale.detach()))


def test_a_list_that_is_too_long_for_its_channels_is_filled_with_nothing() -> None:
    """Rounding up may pass the number of channels; what is above counts as zeros."""
    long = tc.keep_lists([IN], 8)[0]
    assert long.shape == (8,)
    expected = tc.masked_conv2d(X, WEIGHT, None, None, IN)
    torch.testing.assert_close(tc.masked_conv2d(X, WEIGHT, None, None, long), expected)
    packed = tc.masked_conv2d(tc.pack_channels(X, long), WEIGHT, None, None, long, packed=True)
    torch.testing.assert_close(packed, expected)


def test_a_backend_that_is_missing_is_named() -> None:
    with (
        backends.use("triton"),
        pytest.raises(tc.InputError, match="'triton' was asked for, but has no masked_conv2d_f"),
    ):
        tc.masked_conv2d(X, WEIGHT, None, OUT, IN)

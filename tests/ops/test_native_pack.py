"""``pack_channels`` and ``unpack_channels`` of every backend: by hand, then bit by bit against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ops import kept_cases as cases
from tests.ops.checks import BACKENDS, Backend, each_backend

X = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])  # [1, 3, 2]


@each_backend
def test_by_hand(backend: str) -> None:
    ops: Any = Backend(backend)
    y = ops.pack_channels(X, torch.tensor([0, 2, -1]))
    assert y.tolist() == [[[1.0, 2.0], [5.0, 6.0], [0.0, 0.0]]]
    assert ops.unpack_channels(y + 1, torch.tensor([0, 2, -1]), 4).tolist() == [[[2, 3], [0, 0], [6, 7], [0, 0]]]


@each_backend
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("layout", cases.ACTIVATIONS)
def test_every_layout(backend: str, layout: str, dtype: str) -> None:
    x = cases.ACTIVATIONS[layout](cases.maker(cases.DTYPES[dtype]))
    for kind in cases.LISTS:
        assert cases.check_pack(Backend(backend), x, cases.kept_of(x.shape[1], kind)) == [], kind
    assert cases.check_pack(Backend(backend), x, []) == []


@each_backend
@pytest.mark.parametrize("layout", ["nchw 7x7", "nhwc 7x7", "[N, C]"])
def test_the_cpu_takes_lists_in_any_order(backend: str, layout: str) -> None:
    x = cases.ACTIVATIONS[layout](cases.maker(torch.float32))
    assert cases.check_pack(Backend(backend), x, [5, -1, 2, 11, -1, 0]) == []


@each_backend
def test_numbers_keep_their_bits(backend: str) -> None:
    patterns = torch.tensor([0x7FC00001, 0x7F800001, -1, -2147483648], dtype=torch.int32).view(torch.float32)
    x = patterns.view(1, 4, 1)
    keep = torch.tensor([0, 1, 2, 3])
    ops: Any = Backend(backend)
    assert torch.equal(ops.pack_channels(x, keep).view(torch.int32), x.view(torch.int32))
    assert torch.equal(ops.unpack_channels(x, keep, 4).view(torch.int32), x.view(torch.int32))


@pytest.mark.skipif("native" not in BACKENDS, reason="the C++ parts were not built")
@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("pack_channels", (X, torch.tensor([3])), "keep has an entry 3 for a dimension of length 3"),
        ("pack_channels", (X, torch.tensor([2**40])), "keep has an entry 1099511627776"),
        ("pack_channels", (X, torch.tensor([0]).int()), "keep must be a contiguous vector of int64"),
        ("pack_channels", (X, torch.tensor([[0]])), "keep must be a contiguous vector of int64"),
        ("pack_channels", (X.int(), torch.tensor([0])), "wanted float32, float16, bfloat16 or float64"),
        ("pack_channels", (X[0, 0], torch.tensor([0])), r"wanted \[N, C, ...\], got 1 dimensions"),
        ("unpack_channels", (X, torch.tensor([0, 1, 3]), 3), "keep has an entry 3 for a dimension of length 3"),
        ("unpack_channels", (X, torch.tensor([0]), 3), "as many channels as keep has entries"),
        ("unpack_channels", (X[:, :0], torch.tensor([]).long(), -1), "wanted a number of channels, got -1"),
        ("unpack_channels", (X.int(), torch.tensor([0, 1, 2]), 3), "wanted float32, float16, bfloat16 or float64"),
    ],
)
def test_bad_arguments_are_refused(op: str, arguments: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.taylor_cuda_native, op)(*arguments)

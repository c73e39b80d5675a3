"""``pack_channels`` by hand, in every layout, differentiated, compiled, and with input that it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import taylor_cuda as tc
from tests.ops.checks import each_implementation

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "cropped": lambda x: torch.nn.functional.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1],
    "every second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "spatial first": lambda x: x.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
}
KEEP = [[1, 2, 5], [], [0, 1, 2, 3, 4, 5], [4, -1, -1], [-1]]


@each_implementation("pack_channels")
def test_by_hand(run: Callable[..., Tensor]) -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    packed = run(x, torch.tensor([0, 2, -1]))
    assert packed.tolist() == [[[1.0, 2.0], [5.0, 6.0], [0.0, 0.0]]]


@each_implementation("pack_channels")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_and_order_in_memory(run: Callable[..., Tensor], layout: str) -> None:
    for dtype in DTYPES:
        x = LAYOUTS[layout](torch.randn(3, 6, 5, 4, dtype=torch.float64).to(dtype))
        for keep in KEEP:
            packed = run(x, torch.tensor(keep, dtype=torch.int64))
            zeros = torch.zeros_like(x[:, :1])
            expected = torch.cat([x[:, :0], *(x[:, k : k + 1] if k >= 0 else zeros for k in keep)], 1)
            assert packed.dtype == dtype
            assert torch.equal(packed, expected)
            if len(keep) > 1:
                by_stride = [sorted(range(4), key=lambda d, t=t: t.stride(d)) for t in (x, packed)]
                assert by_stride[0] == by_stride[1]
                assert packed.numel() == packed.untyped_storage().nbytes() // packed.element_size()


def test_matrices_sequences_and_nothing() -> None:
    keep = torch.tensor([1, 3])
    for shape in ((5, 4), (5, 4, 7), (2, 4, 3, 2, 2), (0, 4, 3, 3), (2, 4, 0)):
        x = torch.randn(shape)
        assert torch.equal(tc.pack_channels(x, keep), x[:, [1, 3]])


def test_dropped_channels_are_not_read() -> None:
    x = torch.full((2, 4, 3, 3), math.nan)
    x[:, 1] = 1.0
    assert torch.equal(tc.pack_channels(x, torch.tensor([1, -1])).sum((0, 2, 3)), torch.tensor([18.0, 0.0]))


def test_gradients_of_any_order() -> None:
    keep = torch.tensor([0, 2, -1])
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(tc.pack_channels(x, keep).sum(), x)
    assert gradient.sum((0, 2)).tolist() == [6.0, 0.0, 6.0, 0.0]

    def function(x: Tensor) -> Tensor:
        return tc.pack_channels(x, keep).sin()

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, keep: tc.pack_channels(x.sin(), keep), backend="aot_eager", fullgraph=True)
    (keep,) = tc.keep_lists([torch.tensor([True, False, True, True])])
    for given in (keep, torch.tensor([0, 1, 3])):
        x = torch.randn(2, 4, 3, 3, requires_grad=True)
        assert torch.equal(compiled(x, given), tc.pack_channels(x.sin(), given))
        compiled(x, given).square().sum().backward()
        mine = x.grad
        (expected,) = torch.autograd.grad(tc.pack_channels(x.sin(), given).square().sum(), x)
        torch.testing.assert_close(mine, expected)


X = torch.randn(2, 4, 3, 3)
BAD_LISTS: list[tuple[Any, str]] = [
    ([0, 1], r"keep: wanted an int64 list \[K\], got list"),
    (torch.ones(4, dtype=torch.bool), r"keep: wanted an int64 list \[K\], got torch.bool \(4,\)"),
    (torch.tensor([0, 1], dtype=torch.int32), r"keep: wanted an int64 list \[K\], got torch.int32"),
    (torch.tensor([[0, 1]]), r"keep: wanted an int64 list \[K\], got torch.int64 \(1, 2\)"),
    (torch.tensor([0, 1, 2])[::2], r"keep: wanted a contiguous list, got strides \(2,\)"),
    (torch.tensor([0, 1]).to_sparse(), r"keep: wanted a dense tensor, got layout torch.sparse_coo"),
    (torch.tensor([0, 1], device="meta"), "keep: wanted it on cpu, got it on meta"),
    (torch.tensor([0, 4]), "keep: wanted channels below 4, got 4"),
    (torch.tensor([-2, 1]), r"keep: wanted channels from 0 on \(-1 for a channel of zeros\), got -2"),
    (torch.tensor([2, 1]), r"keep: wanted ascending channels, each once, got \[2, 1\]"),
    (torch.tensor([1, 1]), r"keep: wanted ascending channels, each once, got \[1, 1\]"),
    (torch.tensor([1, -1, 2]), r"keep: wanted -1 at the end only, got \[1, -1, 2\]"),
    (torch.arange(9).flip(0), r"keep: wanted ascending .* got \[8, 7, 6, 5, 4, 3, 2, 1, \.\.\.\]"),
]


@pytest.mark.parametrize(("keep", "message"), BAD_LISTS, ids=lambda value: str(value)[:40])
def test_bad_lists_are_named(keep: Any, message: str) -> None:
    for _ in range(2):  # what was refused is not remembered as good
        with pytest.raises(tc.InputError, match=message):
            tc.pack_channels(X, keep)


def test_bad_tensors_are_named() -> None:
    keep = torch.tensor([0])
    with pytest.raises(tc.InputError, match=r"x: wanted \[N, C, \*spatial\], got shape \(3,\)"):
        tc.pack_channels(torch.randn(3), keep)
    with pytest.raises(tc.InputError, match="x: wanted float32, float16, bfloat16 or float64"):
        tc.pack_channels(torch.ones(2, 3, dtype=torch.int64), keep)

"""``masked_conv2d`` by hand, against dense convolutions with masks, and at its edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import taylor_cuda as tc
from taylor_cuda.ops import backends, packed_conv
from tests.ops.masked_conv_cases import each_engine, random_case, running, without

OUT, IN = torch.tensor([True, False, True]), torch.tensor([False, True, True, False])


def tensors(dtype: torch.dtype = torch.float64, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 4, 7, 6), (3 * groups, 4 // groups, 3, 3), (3 * groups,))
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return x, weight, bias


@each_engine
@pytest.mark.parametrize("listed", [False, True])
def test_by_hand(engine: str, listed: bool) -> None:
    """Two inputs, three outputs, 1×1: y0 = 2·x1 + 10, and the others are dropped or read a dropped input only."""
    x = torch.tensor([[[[1.0, 2.0]], [[3.0, -9.0]]]])
    weight = torch.tensor([[5.0, 2.0], [7.0, 7.0], [5.0, 0.0]]).view(3, 2, 1, 1)
    bias = torch.tensor([10.0, 20.0, 30.0])
    keep_out, keep_in = torch.tensor([True, False, True]), torch.tensor([False, True])
    if listed:
        keep_out, keep_in = tc.keep_lists([keep_out, keep_in])
    with running(engine):
        y = tc.masked_conv2d(x, weight, bias, keep_out, keep_in)
        assert y.tolist() == [[[[16.0, -8.0]], [[0.0, 0.0]], [[30.0, 30.0]]]]
        scale = torch.tensor([0.5, math.nan, 3.0])
        y = tc.masked_conv2d(x, weight, bias, keep_out, keep_in, scale=scale, relu=True)
        assert y.tolist() == [[[[13.0, 1.0]], [[0.0, 0.0]], [[30.0, 30.0]]]]


@each_engine
def test_packed_by_hand(engine: str) -> None:
    keep_out, keep_in = tc.keep_lists([torch.tensor([False, True, True]), torch.tensor([True, False])], 3)
    x = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 6.0]]]])  # of the one kept channel, and of two -1
    weight = torch.arange(6.0).view(3, 2, 1, 1)
    with running(engine):
        y = tc.masked_conv2d(x, weight, torch.tensor([7.0, 8.0, 9.0]), keep_out, keep_in, packed=True)
    assert y.tolist() == [[[[10.0, 12.0]], [[13.0, 17.0]], [[0.0, 0.0]]]]


@each_engine
def test_gradients_by_hand(engine: str) -> None:
    x = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]], requires_grad=True)
    weight = torch.tensor([[5.0, 2.0], [7.0, 7.0]]).view(2, 2, 1, 1).requires_grad_()
    bias = torch.zeros(2, requires_grad=True)
    with running(engine):
        y = tc.masked_conv2d(x, weight, bias, torch.tensor([True, False]), torch.tensor([False, True]))
        y.backward(torch.tensor([[[[1.0, 10.0]], [[100.0, 1000.0]]]]))
    assert x.grad.tolist() == [[[[0.0, 0.0]], [[2.0, 20.0]]]]
    assert weight.grad.flatten().tolist() == [0.0, 43.0, 0.0, 0.0]
    assert bias.grad.tolist() == [11.0, 0.0]


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.integers(0, 2**32))
def test_any_configuration_equals_the_dense_one(seed: int) -> None:
    case = random_case(seed)
    inputs = case.inputs()
    expected = case.dense(*inputs)
    gradient = torch.randn_like(expected)
    of_dense = torch.autograd.grad(expected, inputs, gradient, allow_unused=True)
    for engine in ("native", "reference"):
        mine = case.inputs()
        with running(engine):
            y = case.masked(*mine)
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
            found = torch.autograd.grad(y, mine, gradient)
        for name, each, other, like in zip("xwb", found, of_dense, mine, strict=False):
            wanted = torch.zeros_like(like) if other is None else other
            torch.testing.assert_close(each, wanted, rtol=1e-12, atol=1e-12, msg=lambda text, n=name: f"d{n}: {text}")
            assert each.stride() == like.stride() or 1 in like.shape or 0 in like.shape


def test_counts_that_are_rounded_up_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: every compact convolution has a multiple of 16 channels, and computes the same."""
    monkeypatch.setattr(packed_conv, "_is_rounded", lambda x, packed: not packed)
    convolve, counts = torch.conv2d, []
    monkeypatch.setattr(torch, "conv2d", lambda *args: (counts.append(args[1].shape[0]), convolve(*args))[1])
    for seed in range(60):
        case = random_case(seed)
        mine, inputs = case.inputs(), case.inputs()
        expected = case.dense(*inputs)
        counts.clear()
        with running("native"):
            y = case.masked(*mine)
        if counts and (case.groups == 1 or case.weight.shape[:2] == (case.groups, 1)):
            whole = case.keep_out is None or (not case.listed and bool(case.keep_out.all()))
            assert case.packed or whole or counts[-1] % 16 == 0
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        found = torch.autograd.grad(y.sin().sum(), mine)
        wanted = torch.autograd.grad(expected.sin().sum(), inputs, allow_unused=True)
        for each, other, like in zip(found, wanted, mine, strict=True):
            torch.testing.assert_close(each, torch.zeros_like(like) if other is None else other, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@each_engine
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padding", ["same", "valid", 2, (1, 0), [2], (0, 3)], ids=str)
@pytest.mark.parametrize(("kernel", "dilation"), [((3, 3), 1), ((2, 4), 1), ((2, 3), (3, 2))], ids=str)
def test_padding_of_every_kind(engine: str, packed: bool, padding: Any, kernel: Any, dilation: Any) -> None:
    x, weight = torch.randn(2, 4, 9, 8, dtype=torch.float64), torch.randn(3, 4, *kernel, dtype=torch.float64)
    expected = without(F.conv2d(without(x, IN), weight, None, 1, padding, dilation), OUT)
    keep_out, keep_in = tc.keep_lists([OUT, IN])
    with running(engine):
        if packed:
            compact = tc.masked_conv2d(
                x[:, IN], weight, None, keep_out, keep_in, padding=padding, dilation=dilation, packed=True
            )
            y = tc.unpack_channels(compact, keep_out, 3)
        else:
            y = tc.masked_conv2d(x, weight, None, OUT, IN, padding=padding, dilation=dilation)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@each_engine
def test_one_image_without_a_batch(engine: str) -> None:
    x, weight, bias = tensors()
    with running(engine):
        y = tc.masked_conv2d(x[1], weight, bias, OUT, IN, stride=2, padding="valid")
        assert torch.equal(y, tc.masked_conv2d(x, weight, bias, OUT, IN, stride=2)[1])


def test_without_masks_it_is_a_convolution() -> None:
    x, weight, bias = tensors(torch.float32)
    assert torch.equal(tc.masked_conv2d(x, weight, bias, padding="same"), F.conv2d(x, weight, bias, padding="same"))
    assert torch.equal(tc.masked_conv2d(x[0], weight, packed=True), F.conv2d(x[0], weight))


@each_engine
def test_an_epilogue_without_masks(engine: str) -> None:
    x, weight, bias = tensors()
    scale = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    with running(engine):
        y = tc.masked_conv2d(x, weight, bias, scale=scale, relu=True)
        assert torch.equal(tc.masked_conv2d(x, weight, relu=True), F.conv2d(x, weight).relu())
    expected = (F.conv2d(x, weight) * scale.view(-1, 1, 1) + bias.view(-1, 1, 1)).relu()
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@each_engine
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("listed", [False, True])
def test_all_channels_dropped(engine: str, layout: torch.memory_format, groups: int, listed: bool) -> None:
    x, weight, bias = tensors(groups=groups)
    x = x.contiguous(memory_format=layout)
    no_out, no_in = torch.zeros(3 * groups, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    out = OUT.repeat(groups)
    masks = [(no_out, None), (no_out, no_in), (no_out, IN), (out, no_in), (None, no_in)]
    for keep_out, keep_in in masks:
        expected = torch.zeros(2, 3 * groups, 7, 6, dtype=torch.float64)
        if keep_out is not no_out:
            expected = without(expected + bias.relu().view(-1, 1, 1), keep_out)
        mine = [each.clone().requires_grad_() for each in (x, weight, bias)]
        kept = [None if keep is None else tc.keep_lists([keep])[0] if listed else keep for keep in (keep_out, keep_in)]
        with running(engine):
            y = tc.masked_conv2d(*mine, *kept, padding=1, groups=groups, relu=True)
            assert torch.equal(y, expected)
            assert y.is_contiguous(memory_format=layout)
            y.sum().backward()
        assert mine[0].grad.count_nonzero() == mine[1].grad.count_nonzero() == 0
        torch.testing.assert_close(mine[2].grad, (expected[0, :, 0, 0] > 0).double() * 2 * 7 * 6)


@each_engine
def test_all_channels_dropped_and_packed(engine: str) -> None:
    none, some = torch.empty(0, dtype=torch.int64), torch.tensor([0, 2])
    _, weight, bias = tensors()
    with running(engine):
        y = tc.masked_conv2d(torch.randn(2, 0, 7, 6).double(), weight, bias, some, none, packed=True)
        assert torch.equal(y, bias[[0, 2]].view(-1, 1, 1).expand(2, 2, 5, 4))
        x = torch.randn(2, 2, 7, 6, dtype=torch.float64, requires_grad=True)
        y = tc.masked_conv2d(x, weight, bias, none, some, packed=True)
        assert y.shape == (2, 0, 5, 4)
        y.sum().backward()
        assert x.grad.count_nonzero() == 0


@each_engine
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("listed", [False, True])
def test_nan_in_dropped_channels_stays_there(engine: str, groups: int, listed: bool) -> None:
    """Wherever it is: in the input, the weight, the bias, the scale, and in the gradient of the result."""
    inputs, outputs = 8, 12 if groups == 2 else 8
    out, into = torch.arange(outputs) % 3 != 0, torch.arange(inputs) % 3 != 0  # of two groups, 2 and 3 inputs
    if groups == 4:  # depthwise
        groups, out = 8, torch.arange(8) % 5 != 1
    x, weight = torch.randn(2, inputs, 6, 6), torch.randn(outputs, inputs // groups, 3, 3)
    bias, scale, gradient = torch.randn(outputs), torch.rand(outputs), torch.randn(2, outputs, 6, 6)
    results = []
    for bad in (0.0, math.nan):
        given = [each.clone() for each in (x, weight, bias, scale, gradient)]
        given[0][:, ~into] = given[4][:, ~out] = bad
        for each in given[1:4]:
            each[~out] = bad
        by_group = given[1].view(groups, -1, inputs // groups, 3, 3)
        by_group.transpose(1, 2)[~into.view(groups, -1)] = bad
        leaves = [each.requires_grad_() for each in given[:3]]
        kept = tc.keep_lists([out, into]) if listed else [out, into]
        with running(engine):
            y = tc.masked_conv2d(*leaves, *kept, padding=1, groups=groups, scale=given[3], relu=True)
            found = torch.autograd.grad(y, leaves, given[4], create_graph=True)
            plain = torch.autograd.grad(y, leaves, given[4])
        results.append([y, *found, *plain])
    for clean, tainted in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, tainted)


@each_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_types_agree_with_float64(engine: str, dtype: torch.dtype) -> None:
    x, weight, bias = tensors(dtype)
    scale = torch.tensor([1.5, 1.0, -0.7])
    wide = [each.double() for each in (x, weight, bias, scale)]
    expected = F.conv2d(without(wide[0], IN), wide[1]) * wide[3].view(-1, 1, 1) + wide[2].view(-1, 1, 1)
    with running(engine):
        y = tc.masked_conv2d(x, weight, bias, OUT, IN, scale=scale, relu=True)
    assert y.dtype == dtype
    # Of a sum of 18 products, and of what is rounded on the way: weight · scale, or the sum before it is scaled.
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    torch.testing.assert_close(y.double(), without(expected.relu(), OUT), **close)


def test_the_scale_is_not_rounded_before_it_multiplies() -> None:
    """1.003 is 1 as a bfloat16, but 255 times it is 256."""
    x, weight = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), torch.full((1, 1, 1, 1), 255.0, dtype=torch.bfloat16)
    with running("native"):
        y = tc.masked_conv2d(x, weight, scale=torch.tensor([1.003]))
    assert y.item() == 256.0


def call(
    kept_out: int, kept_in: int, groups: int = 1, kernel: int = 3, listed: bool = True, packed: bool = False
) -> Any:
    weight = torch.empty(100, 100 // groups, kernel, kernel)
    masks = [torch.arange(100) < kept for kept in (kept_out, kept_in)]
    lists = tc.keep_lists(masks) if listed else masks
    return (torch.empty(7, 9, 1, 1), weight, None, *lists, [1, 1], [0, 0], [1, 1], groups, packed, None, False)


@pytest.mark.parametrize("op", ["masked_conv2d_forward", "masked_conv2d_backward"])
@pytest.mark.parametrize("listed", [False, True])
def test_the_choice_follows_what_is_kept(op: str, listed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(*kept: int, **kind: Any) -> str:
        given = call(*kept, **{"listed": listed, **kind})
        given = given if op.endswith("forward") else (None, *given[:2], *given[3:10], [True] * 3)
        return backends.select(op, "cpu", given).__module__.rpartition(".")[2]

    for position, (name, kind) in enumerate(
        {"1x1": {"kernel": 1}, "kxk": {}, "grouped": {"groups": 10}, "depthwise": {"groups": 100}}.items()
    ):
        for each in backends.COMPACT_UP_TO:
            monkeypatch.setitem(backends.COMPACT_UP_TO, each, 0.36 if each == name else 9.0)
        below, above = ((60, 60), (60, 61)) if position < 2 else ((36, 90), (37, 90))
        assert (chosen(*below, **kind), chosen(*above, **kind)) == ("packed_conv", "reference_conv")
        assert (chosen(*below[::-1], **kind), chosen(*above[::-1], **kind)) == ("packed_conv", "reference_conv")
        assert chosen(100, 100, packed=True, listed=True, **kind) == "packed_conv"
        with backends.use("reference"):
            assert chosen(*below, **kind) == "reference_conv"
        with backends.use("native"):
            assert chosen(*above, **kind) == "packed_conv"
        with backends.use("triton"), pytest.raises(tc.InputError, match="'triton' was asked for"):
            chosen(*below, **kind)


def test_on_a_gpu_masks_and_lists_go_different_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs: which backend would, if all were there."""
    monkeypatch.setattr(backends, "_first", lambda op, device, order: order)
    op = "masked_conv2d_forward"
    assert backends.select(op, "cuda", call(60, 60)) == ("native", "reference", "triton")
    assert backends.select(op, "cuda", call(60, 60, listed=False)) == ("reference", "native", "triton")
    assert backends.select(op, "mps", call(60, 60)) == ("native", "reference")

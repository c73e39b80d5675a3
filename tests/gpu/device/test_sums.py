"""Sums of activations and weights on a GPU: every layout and type against float64, past 2**31 elements, in a graph."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.gpu import cases
from tests.gpu.cases import Ops
from tests.gpu.device.common import NETWORK_SHAPES, capture_and_compare

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "fp64"])
@pytest.mark.parametrize("layout", cases.PAIRS)
def test_channel_ops_match_float64(ops: Ops, layout: str, dtype: str) -> None:
    assert cases.check_channel_ops(ops, *cases.make_pair(layout, cases.DTYPES[dtype], device="cuda")) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", NETWORK_SHAPES, ids=str)
def test_shapes_of_networks_match_float64(
    ops: Ops, shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    pair = [torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for _ in range(2)]
    if channels_last:
        pair = [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in pair]
    assert cases.check_channel_ops(ops, *pair) == []


@pytest.mark.parametrize("types", cases.WEIGHT_DTYPES)
def test_weight_importance_matches_float64(native: Ops, types: str) -> None:
    assert cases.check_weight_importance(native, *cases.make_weights(list(cases.WEIGHTS), types, device="cuda")) == []


def test_more_tensors_than_a_table_holds(native: Ops) -> None:
    names = ["depthwise", "vector", "linear, input side", "one number", "filters"] * 129 + ["cut"] * 201
    weights = cases.make_weights(names, "fp32", device="cuda")
    assert cases.check_weight_importance(native, *weights, reductions=("sum",)) == []


def test_large_weights_match_float64(native: Ops) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(512, 512, 3, 3), (2048, 512, 1, 1), (4096, 9216), (64, 3, 7, 7), (1000, 2048), (2048,)]
    weights, gradients = (
        [torch.randn(s, generator=generator, device="cuda") for s in shapes for _ in (0, 1)] for _ in (0, 1)
    )
    dims = [min(dim, len(shape) - 1) for shape in shapes for dim in (0, 1)]
    assert cases.check_weight_importance(native, weights, gradients, dims) == []


# As they lie in memory. In the last two, one channel of one sample spans more than 2**31 elements.
LARGE = {
    "nchw": (36, 64, 1024, 1024),
    "nhwc": (36, 1024, 1024, 64),
    "nchw, one channel": (1, 2, 46_400, 46_400),
    "nhwc, one channel": (1, 16_400, 16_400, 8),
}


def _sums_in_pieces(activation: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Σ a·g of every sample and channel in float64, and how much a result may differ; a stretch of rows at a time."""
    expected = torch.zeros(activation.shape[:2], dtype=torch.float64)
    allowed = torch.zeros_like(expected)
    for n in range(activation.shape[0]):
        for a, g in zip(activation[n].split(1024, 1), gradient[n].split(1024, 1), strict=True):
            terms = a.double() * g.double()
            expected[n] += terms.sum((1, 2)).cpu()
            allowed[n] += cases.tolerance(activation.dtype) * terms.abs().sum((1, 2)).cpu()
    return expected, allowed


@pytest.mark.parametrize("layout", LARGE)
def test_more_than_two_to_the_31_elements(ops: Ops, layout: str) -> None:
    shape = LARGE[layout]
    if torch.cuda.mem_get_info()[0] < 5 * math.prod(shape) + 4 * 2**30:
        pytest.skip("needs 5 bytes of free GPU memory for each of the elements, and 4 GiB")
    generator = torch.Generator("cuda").manual_seed(0)
    pair = [torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(generator=generator) for _ in range(2)]
    activation, gradient = pair if layout.startswith("nchw") else [x.permute(0, 3, 1, 2) for x in pair]
    assert activation.numel() > 2**31
    wanted, error = _sums_in_pieces(activation, gradient)
    assert cases.difference("sums", ops.channel_sums(activation, gradient), wanted, error) == ""
    total, error = wanted.sum(0), error.sum(0)
    bounds = total.square(), (2 * total.abs() + error) * error
    assert cases.difference("batch", ops.channel_importance(activation, gradient, "batch"), *bounds) == ""
    assert cases.difference("all", ops.channel_importance(activation, gradient, "all")[0], *bounds) == ""


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", cases.CUT_ALIKE)
def test_all_reductions_at_once_are_the_same_bits(native: Ops, layout: str, dtype: str) -> None:
    """But for what one fused operation adds: the squares of packed rows, and all terms where L = 1."""
    pair = cases.make_pair(layout, cases.DTYPES[dtype], device="cuda")
    if pair[0].numel() == pair[0].shape[0] * pair[0].shape[1] > 0:
        pytest.skip("a product is rounded where several sums need it, and not where one fused operation adds it")
    rows = native.channel_importance(*pair, "all")
    for row, reduction in list(zip(rows, cases.REDUCTIONS, strict=True))[:3]:
        assert torch.equal(row, native.channel_importance(*pair, reduction))


def test_a_graph_captures_the_channel_ops(ops: Ops) -> None:
    activation, gradient = cases.make_pair("nhwc 7x7", torch.bfloat16, device="cuda")
    sums = torch.zeros(activation.shape[:2], device="cuda")

    def everything() -> list[Tensor]:
        ops.accumulate_channel_sums(activation, gradient, sums)
        return [
            ops.channel_sums(activation, gradient),
            *(ops.channel_importance(activation, gradient, r) for r in (*cases.REDUCTIONS, "all")),
        ]

    capture_and_compare(everything, [activation, gradient], sums)


def test_a_graph_captures_weight_importance(native: Ops) -> None:
    weights, gradients, dims = cases.make_weights(
        ["filters", "filters, input side", "vector", "cut"], "fp32", device="cuda"
    )
    capture_and_compare(lambda: native.weight_importance(weights, gradients, dims, "sum"), [*weights, *gradients], None)


def test_nothing_waits_for_the_gpu(ops: Ops, no_synchronization: Callable[[], None]) -> None:
    activation, gradient = cases.make_pair("nchw 14x14", torch.bfloat16, device="cuda")
    sums = torch.zeros(activation.shape[1], device="cuda")
    ops.channel_importance(activation, gradient, "sample")  # Triton loads its binaries
    no_synchronization()
    ops.channel_importance(activation, gradient, "sample")
    ops.channel_sums(activation, gradient)
    ops.accumulate_channel_sums(activation, gradient, sums)


def test_weight_importance_does_not_wait_for_the_gpu(native: Ops, no_synchronization: Callable[[], None]) -> None:
    weights = cases.make_weights(list(cases.WEIGHTS), "fp32", device="cuda")
    no_synchronization()
    native.weight_importance(*weights, "sum")

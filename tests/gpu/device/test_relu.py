"""The ReLU with gate sums on a GPU."""

from __future__ import annotations

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


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("layout", cases.PAIRS)
def test_relu_matches_pytorch_and_float64(ops: Ops, layout: str, dtype: str) -> None:
    relu = cases.make_relu(layout, cases.DTYPES[dtype], device="cuda")
    assert cases.check_score_relu_backward(ops, *relu) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", NETWORK_SHAPES, ids=str)
def test_relu_of_networks(ops: Ops, shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    relu = [torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for _ in range(3)]
    if channels_last:
        relu = [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in relu]
    assert cases.check_score_relu_backward(ops, relu[0].relu_(), *relu[1:]) == []


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_relu_of_more_than_two_to_the_31_elements(ops: Ops, layout: str) -> None:
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    shape = (36, 64, 1024, 1024) if layout == "nchw" else (36, 1024, 1024, 64)
    generator = torch.Generator("cuda").manual_seed(0)
    pair = [torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(generator=generator) for _ in range(2)]
    output, gradient = pair if layout == "nchw" else [x.permute(0, 3, 1, 2) for x in pair]
    sums = torch.zeros(output.shape[:2], device="cuda")
    gx = ops.score_relu_backward(output.relu_(), gradient, sums)
    expected, allowed = [], []
    for n, (o, g) in enumerate(zip(output, gradient, strict=True)):
        assert torch.equal(gx[n], torch.ops.aten.threshold_backward(g, o, 0))
        terms = o.double() * g.double()
        expected.append(terms.sum((1, 2)).cpu())
        allowed.append(cases.tolerance(torch.bfloat16) * terms.abs().sum((1, 2)).cpu())
    assert cases.difference("sums", sums, torch.stack(expected), torch.stack(allowed)) == ""


@pytest.mark.parametrize("layout", ["nhwc 7x7", "nchw 7x7", "nchw 24x24"])
def test_a_graph_captures_the_relu(ops: Ops, layout: str) -> None:
    output, gradient, skip = cases.make_relu(layout, torch.bfloat16, device="cuda")
    sums = torch.zeros(4, *output.shape[:2], device="cuda")

    def everything() -> list[Tensor]:
        one = ops.score_relu_backward(output, gradient, sums[0], skip, sums[1])
        return [one, ops.score_relu_backward(output, gradient, sums[2, 0], skip, sums[3, 0])]

    capture_and_compare(everything, [output, gradient, skip], sums)


def test_the_relu_does_not_wait_for_the_gpu(ops: Ops, no_synchronization: Callable[[], None]) -> None:
    output, gradient, skip = cases.make_relu("nchw 14x14", torch.bfloat16, device="cuda")
    sums = torch.zeros(2, output.shape[1], device="cuda")
    ops.score_relu_backward(output, gradient, sums[0], skip, sums[1])  # Triton loads its binaries
    no_synchronization()
    ops.score_relu_backward(output, gradient, sums[0], skip, sums[1])

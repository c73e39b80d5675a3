"""Strided convolutions of few channels on a GPU, with pixels folded into channels, in 16 bits."""

from __future__ import annotations

import pytest
import torch

import taylor_cuda as tc
from taylor_cuda.ops import folded_conv
from tests.ops.test_folded_conv import SHAPES, tensors

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

pytestmark = [pytest.mark.gpu]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_it_is_the_convolution_and_its_gradients(name: str, dtype: torch.dtype) -> None:
    """Sums of -1, 0 and 1 are exact in 32 bits and rounded once."""
    x, weight, _, geometry = tensors(name)
    x, weight = (each.detach().round().clamp(-1, 1).requires_grad_() for each in (x, weight))
    expected = torch.conv2d(x, weight, None, *geometry)
    gradient = torch.randn_like(expected).round().clamp(-1, 1)
    wanted = torch.autograd.grad(expected, (x, weight), gradient)
    given, filters, back = (
        each.detach().to("cuda", dtype).contiguous(memory_format=torch.channels_last) for each in (x, weight, gradient)
    )
    folding = folded_conv.folding_of(given, filters, *geometry)
    assert folding is not None
    y = folded_conv.convolve(given, filters, None, folding)
    gx, gw, _ = folded_conv.convolve_backward(back, given, filters, folding, [True, True, False])
    for ours, theirs in zip((y, gx, gw), (expected, *wanted), strict=True):
        torch.testing.assert_close(ours.double().cpu(), theirs.detach().to(dtype).double(), rtol=0, atol=0)


def test_the_choice_is_made_once_and_captured() -> None:
    x = torch.randn(4, 3, 64, 64, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    weight = torch.randn(32, 3, 7, 7, device="cuda", dtype=torch.bfloat16)
    kept = torch.arange(0, 32, 2, device="cuda")

    def run() -> torch.Tensor:
        return tc.masked_conv2d(x, weight, None, kept, stride=2, padding=3, packed=True)

    with torch.backends.cudnn.flags(benchmark=True), torch.no_grad():
        before = len(folded_conv._faster)
        expected = run()
        assert len(folded_conv._faster) == before + 1
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run()
        graph.replay()
        assert len(folded_conv._faster) == before + 1
    torch.testing.assert_close(y, expected)
    wanted = torch.conv2d(x.double(), weight[kept].double(), None, 2, 3)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-2, atol=1e-1)

"""The kernels on a GPU: every layout and type against float64, past 2**31 elements, in a CUDA graph, without a sync."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from taylor_cuda import ops as public
from taylor_cuda.ops import backends
from tests.gpu import cases
from tests.gpu.cases import Ops

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]


def _ops(backend: str) -> Ops:
    return Ops(SimpleNamespace(**{op: backends.find(op, backend, "cuda") for op in backends.OPS}))


@pytest.fixture(params=["native", "triton"])
def ops(request: pytest.FixtureRequest) -> Ops:
    """The ops of one backend; weight_importance is None for triton."""
    found = _ops(request.param)
    if found.channel_sums is None:
        pytest.skip(f"the {request.param} backend is not installed (python -m taylor_cuda.info says why)")
    return found


@pytest.fixture
def native() -> Ops:
    found = _ops("native")
    if found.weight_importance is None:
        pytest.skip("taylor_cuda/_C_cuda.so was not built")
    return found


@pytest.fixture
def no_synchronization() -> Iterator[Callable[[], None]]:
    """From the call on, an operation that waits for the GPU raises."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "fp64"])
@pytest.mark.parametrize("layout", cases.PAIRS)
def test_channel_ops_match_float64(ops: Ops, layout: str, dtype: str) -> None:
    assert cases.check_channel_ops(ops, *cases.make_pair(layout, cases.DTYPES[dtype], device="cuda")) == []


NETWORK_SHAPES = [(64, 64, 56, 56), (32, 256, 28, 28), (32, 1024, 14, 14), (64, 512, 7, 7), (16, 768, 197), (512, 4096)]


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


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_more_than_two_to_the_31_elements(ops: Ops, layout: str) -> None:
    shape = (36, 64, 1024, 1024) if layout == "nchw" else (36, 1024, 1024, 64)
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of free GPU memory")
    generator = torch.Generator("cuda").manual_seed(0)
    pair = [torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(generator=generator) for _ in range(2)]
    activation, gradient = pair if layout == "nchw" else [x.permute(0, 3, 1, 2) for x in pair]
    assert activation.numel() > 2**31
    expected, allowed = [], []
    for a, g in zip(activation, gradient, strict=True):
        terms = a.double() * g.double()
        expected.append(terms.sum((1, 2)).cpu())
        allowed.append(cases.tolerance(torch.bfloat16) * terms.abs().sum((1, 2)).cpu())
    wanted, error = torch.stack(expected), torch.stack(allowed)
    assert cases.difference("sums", ops.channel_sums(activation, gradient), wanted, error) == ""
    total, error = wanted.sum(0), error.sum(0)
    importance = ops.channel_importance(activation, gradient, "batch")
    assert cases.difference("batch", importance, total.square(), (2 * total.abs() + error) * error) == ""


def test_a_graph_captures_the_channel_ops(ops: Ops) -> None:
    activation, gradient = cases.make_pair("nhwc 7x7", torch.bfloat16, device="cuda")
    sums = torch.zeros(activation.shape[:2], device="cuda")

    def everything() -> list[Tensor]:
        ops.accumulate_channel_sums(activation, gradient, sums)
        return [
            ops.channel_sums(activation, gradient),
            *(ops.channel_importance(activation, gradient, r) for r in cases.REDUCTIONS),
        ]

    _capture_and_compare(everything, [activation, gradient], sums)


def test_a_graph_captures_weight_importance(native: Ops) -> None:
    weights, gradients, dims = cases.make_weights(
        ["filters", "filters, input side", "vector", "cut"], "fp32", device="cuda"
    )
    _capture_and_compare(
        lambda: native.weight_importance(weights, gradients, dims, "sum"), [*weights, *gradients], None
    )


def _capture_and_compare(run: Callable[[], list[Tensor]], inputs: list[Tensor], sums: Tensor | None) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()  # Triton compiles and allocators fill before the capture
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for x in inputs:
        x.mul_(1.25)
    if sums is not None:
        sums.zero_()
    graph.replay()
    replayed = [x.clone() for x in (*results, *([] if sums is None else [sums]))]
    if sums is not None:
        sums.zero_()
    again = run()
    expected = [*again, *([] if sums is None else [sums])]
    assert all(torch.equal(a, b) for a, b in zip(replayed, expected, strict=True))


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


@pytest.mark.parametrize("n", [0, 1, 33, 9000, 65_536, 1_000_003])
def test_keep_mask_keeps_what_a_sorted_list_does(native: Ops, n: int) -> None:
    for kinds, keep in ((1, n // 2), (40, n - 1), (10**6, 0), (10**6, n // 3), (10**6, n + 1)):
        scores = cases.make_scores(n, kinds, seed=kinds, device="cuda")
        assert cases.check_keep_mask(native.keep_mask, scores, keep) == []
        assert cases.check_keep_mask(native.keep_mask, scores[::2], keep // 2) == []


def test_keep_mask_is_captured_and_does_not_wait(native: Ops, no_synchronization: Callable[[], None]) -> None:
    """How many stay is in device memory: a replay takes the number that is there then."""
    scores, keep = cases.make_scores(20_000, 10**6, seed=0, device="cuda"), torch.tensor(5000, device="cuda")
    _capture_and_compare(lambda: list(native.keep_mask(scores.nan_to_num(), keep)), [scores], None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask, _ = native.keep_mask(scores, keep)
    keep.fill_(123)
    graph.replay()
    assert mask.sum().item() == 123
    no_synchronization()
    public.keep_mask(scores, 7)
    public.keep_mask(scores, keep)


def test_keep_mask_refuses_float64(native: Ops) -> None:
    with pytest.raises(RuntimeError, match="on the CPU only"):
        native.keep_mask(torch.ones(3, device="cuda").double(), torch.tensor(1, device="cuda"))


def test_the_current_stream_is_used(ops: Ops) -> None:
    activation, gradient = cases.make_pair("nchw 24x24", torch.float32, device="cuda")
    expected = ops.channel_sums(activation, gradient)
    late = torch.zeros_like(activation)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(activation)
        result = ops.channel_sums(late, gradient)
    stream.synchronize()
    assert torch.equal(result, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_than_the_current_device(ops: Ops) -> None:
    assert cases.check_channel_ops(ops, *cases.make_pair("nhwc 7x7", torch.bfloat16, device="cuda:1")) == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices_are_refused(native: Ops) -> None:
    weights = [torch.ones(4, device="cuda:0"), torch.ones(4, device="cuda:1")]
    with pytest.raises(RuntimeError, match="one device"):
        native.weight_importance(weights, weights, [0, 0], "sum")


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

    _capture_and_compare(everything, [output, gradient, skip], sums)


def test_the_relu_does_not_wait_for_the_gpu(ops: Ops, no_synchronization: Callable[[], None]) -> None:
    output, gradient, skip = cases.make_relu("nchw 14x14", torch.bfloat16, device="cuda")
    sums = torch.zeros(2, output.shape[1], device="cuda")
    ops.score_relu_backward(output, gradient, sums[0], skip, sums[1])  # Triton loads its binaries
    no_synchronization()
    ops.score_relu_backward(output, gradient, sums[0], skip, sums[1])

"""The kernels on a GPU: every layout and type against float64, past 2**31 elements, in a CUDA graph, without a sync."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import taylor_cuda as tc
from taylor_cuda.ops import backends
from tests.gpu import cases, test_not_finite
from tests.gpu.cases import Ops
from tests.ops import inputs

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


EACH_OP = pytest.mark.parametrize("op", backends.OPS)
EACH_BACKEND = pytest.mark.parametrize("backend", ["native", "triton"])


def implementation_of(op: str, backend: str) -> Callable[..., object]:
    found = backends.find(op, backend, "cuda")
    if found is None:
        pytest.skip(f"{backend} has no {op} here")
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EACH_BACKEND
@EACH_OP
def test_two_runs_of_every_op_are_bit_equal(op: str, backend: str, dtype: torch.dtype) -> None:
    run = implementation_of(op, backend)
    first = inputs.run(run, inputs.calls_of(op, dtype, "cuda"))
    busy = torch.cuda.Stream()
    with torch.cuda.stream(busy):  # other blocks on the multiprocessors change the order in which these run
        noise = torch.randn(4096, 4096, device="cuda")
        for _ in range(20):
            noise = noise.sin()
    again = inputs.run(run, inputs.calls_of(op, dtype, "cuda"))
    busy.synchronize()
    assert inputs.same_bits(first, again)


@EACH_BACKEND
@EACH_OP
def test_a_graph_captures_every_op(op: str, backend: str) -> None:
    """Replayed with other numbers it leaves what a plain run leaves, in its results and in what it adds to."""
    run = implementation_of(op, backend)
    still, fresh, warm = (inputs.calls_of(op, torch.float32, "cuda", seed) for seed in range(3))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        inputs.run(run, warm)  # Triton compiles and allocators fill before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = inputs.run(run, still)
    for mine, other in zip(inputs.tensors(still), inputs.tensors(fresh), strict=True):
        mine.copy_(other)
    graph.replay()
    replayed = [result.clone() for result in results]
    assert inputs.same_bits(replayed, inputs.run(run, fresh))


@EACH_BACKEND
@EACH_OP
def test_no_op_waits_for_the_gpu(op: str, backend: str, no_synchronization: Callable[[], None]) -> None:
    run = implementation_of(op, backend)
    warm, calls = (inputs.calls_of(op, torch.bfloat16, "cuda", seed) for seed in (0, 1))
    inputs.run(run, warm)
    torch.cuda.synchronize()
    no_synchronization()
    inputs.run(run, calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", test_not_finite.CHANNEL_OPS)
def test_what_is_not_finite_stays_in_its_channel(ops: Ops, op: str, dtype: torch.dtype) -> None:
    assert test_not_finite.channel_problems(ops, op, "cuda", dtype) == []


@pytest.mark.parametrize("reduction", cases.WEIGHT_REDUCTIONS)
def test_a_gradient_that_is_not_finite_stays_in_its_channel(native: Ops, reduction: str) -> None:
    assert test_not_finite.weight_problems(native, reduction, "cuda") == []


@pytest.mark.parametrize("dim", [0, 1])
def test_a_weight_of_more_than_two_to_the_31_elements(native: Ops, dim: int) -> None:
    shape = (2**21 + 8, 1024)
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    weight, gradient = (torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(2))
    (result,) = native.weight_importance([weight], [gradient], [dim], "sum")
    wanted, spread = torch.zeros(2, shape[dim], device="cuda", dtype=torch.float64)
    for start in range(0, shape[0], 2**16):
        terms = weight[start : start + 2**16].double() * gradient[start : start + 2**16].double()
        rows = slice(start, start + 2**16) if dim == 0 else slice(None)
        wanted[rows] += terms.sum(1 - dim)
        spread[rows] += terms.abs().sum(1 - dim)
    assert cases.difference("sum", result, wanted.cpu(), cases.tolerance(torch.bfloat16) * spread.cpu()) == ""


def test_a_tensor_that_is_not_on_the_gpu_is_named() -> None:
    here, away = torch.ones(2, 3, 4, device="cuda"), torch.ones(2, 3, 4)
    with pytest.raises(tc.InputError, match="gradient: wanted it on cuda:0, where activation is, got it on cpu"):
        tc.channel_importance(here, away)
    with pytest.raises(tc.InputError, match="sums: wanted it on cuda:0, where x is, got it on cpu"):
        tc.score_gate(here, torch.zeros(3))
    with pytest.raises(tc.InputError, match=r"gradients\[1\]: wanted it on cuda:0, where weights\[1\] is"):
        tc.weight_importance([here, here], [here, away], [0, 0])
    with pytest.raises(tc.InputError, match=r"weights\[1\]: wanted it on cuda:0, where weights\[0\] is"):
        tc.weight_importance([here, away], [here, away], [0, 0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_are_named() -> None:
    first, second = (torch.ones(2, 3, 4, device=f"cuda:{i}") for i in (0, 1))
    with pytest.raises(tc.InputError, match="gradient: wanted it on cuda:0, where activation is, got it on cuda:1"):
        tc.channel_sums(first, second)
    with pytest.raises(tc.InputError, match=r"weights\[1\]: wanted it on cuda:0, where weights\[0\] is"):
        tc.weight_importance([first, second], [first, second], [0, 0])

"""What holds of every op on a GPU: the same bits twice, graphs, streams, no waiting, NaN and infinity, two devices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import taylor_cuda as tc
from taylor_cuda.ops import backends
from tests.gpu import cases, test_not_finite
from tests.gpu.cases import Ops
from tests.ops import inputs

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]


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

"""The kernels on a GPU: every layout and type against float64, past 2**31 elements, in a CUDA graph, without a sync."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import taylor_cuda as tc
from taylor_cuda import ops as public
from taylor_cuda.ops import BatchNormReLU, backends
from tests.gpu import cases, test_not_finite
from tests.gpu.cases import Ops
from tests.ops import inputs, norm_cases

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
    """But for the squares of packed rows, which one fused operation adds."""
    pair = cases.make_pair(layout, cases.DTYPES[dtype], device="cuda")
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


@pytest.mark.parametrize("case", cases.UNITS)
def test_accumulate_importance_matches_float64(native: Ops, case: str) -> None:
    assert cases.check_accumulate_importance(native, case, torch.float32, device="cuda") == []
    assert cases.check_accumulate_importance(native, case, torch.float64, device="cuda") == []


def test_a_graph_captures_a_scoring_step_and_skips_in_replay(native: Ops) -> None:
    names = ["filters", "filters, input side", "vector", "cut"]
    weights, gradients, dims = cases.make_weights(names, "fp32", device="cuda")
    total = sum(weight.shape[dim] for weight, dim in zip(weights, dims, strict=True))
    entries, offsets = torch.arange(total, device="cuda").flip(0), torch.arange(0, total + 1, 2, device="cuda")
    entries = entries[: int(offsets[-1])].contiguous()
    window, counts = torch.zeros(len(offsets) - 1, device="cuda"), torch.zeros(2, dtype=torch.int64, device="cuda")
    scale, finite = torch.tensor(3.0, device="cuda"), torch.tensor(True, device="cuda")

    def step() -> None:
        sums = native.weight_importance(weights, gradients, dims, "sum")
        native.accumulate_importance(sums, entries, offsets, window, counts, "batch", scale, None, finite, 0.9, 0.1)

    def replayed(run: Callable[[], None]) -> tuple[Tensor, list[int]]:
        window.fill_(1.0)
        counts.zero_()
        run()
        return window.clone(), counts.tolist()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # allocators fill before the capture
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for factor in (1.25, 2.0):
        for gradient in gradients:
            gradient.mul_(factor)
        expected, result = replayed(step), replayed(graph.replay)
        assert torch.equal(result[0], expected[0])
        assert result[1] == expected[1] == [1, 0]
    finite.fill_(False)
    assert replayed(graph.replay)[1] == [0, 1]
    finite.fill_(True)
    gradients[0].fill_(float("inf"))
    left, skipped = replayed(graph.replay)
    assert torch.equal(left, torch.ones_like(left))
    assert skipped == [0, 1]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fg", "taylor_weight", "taylor_output"])
def test_a_scoring_step_does_not_wait_for_the_gpu(
    native: Ops, no_synchronization: Callable[[], None], criterion: str, scaled: bool
) -> None:
    """From activations where the criterion needs them; the scores are those of the CPU."""
    assert native.accumulate_importance is not None
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, 3), torch.nn.SiLU())
    model, x = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5)), torch.randn(4, 3, 10, 10)
    scores = []
    for device in ("cpu", "cuda"):
        here, batch = copy.deepcopy(model).to(device), x.to(device)
        scaler = torch.amp.GradScaler(device, init_scale=8.0) if scaled else None
        est = tc.Importance(here, tc.trace(here, batch), criterion)
        est.backward(here(batch).square().mean(), scaler=scaler)
        here.zero_grad()
        if device == "cuda":
            no_synchronization()
        est.backward(here(batch).square().mean(), scaler=scaler)
        torch.cuda.set_sync_debug_mode("default")
        assert (est.steps, est.skipped) == (2, 0)
        scores.append(est.scores())
    for name, expected in scores[0].items():
        torch.testing.assert_close(scores[1][name].cpu(), expected, rtol=1e-2, atol=1e-2 * float(expected.max()))


def _norm_ops() -> SimpleNamespace:
    """Forward and backward of batch_norm_relu in Triton."""
    pytest.importorskip("triton", reason="triton is not installed")
    return norm_cases.triton_ops()


@pytest.mark.parametrize("case", [*norm_cases.EVERY, *norm_cases.TRIPS], ids=lambda case: case.name)
def test_batch_norm_relu_matches_float64(case: norm_cases.Case) -> None:
    assert norm_cases.check(_norm_ops(), case, device="cuda", twice=True) == []


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("shape", [(48, 64, 56, 56), (4, 1024, 14, 14), (16, 2048, 7, 7)], ids=str)
def test_batch_norm_relu_of_networks_matches_float64(shape: tuple[int, ...], channels_last: bool) -> None:
    def image(make: cases.Source) -> Tensor:
        n, c, h, w = shape
        return make(n, h, w, c).movedim(-1, 1) if channels_last else make(*shape)

    norm_cases.LAYOUTS[str(shape)] = image
    assert norm_cases.check(_norm_ops(), norm_cases.Case(str(shape), "bf16"), device="cuda", twice=True) == []


def test_a_step_of_batch_norm_relu_is_captured_and_waits_for_nothing(
    no_synchronization: Callable[[], None],
) -> None:
    given = norm_cases.make_inputs(norm_cases.Case(dtype="bf16"), device="cuda")
    start, ops = [t.clone() for t in given.running], _norm_ops()

    def step() -> list[Tensor]:
        for running, value in zip(given.running, start, strict=True):
            running.copy_(value)
        found = norm_cases.run(ops, norm_cases.Case(dtype="bf16"), given, 0.1, 1e-5)
        return [
            found[name] for name in ("y", "gx", "residual", "weight", "bias", "running_mean", "running_var", "sums")
        ]

    _capture_and_compare(step, [given.x, given.gradient], None)
    no_synchronization()
    step()


def test_batch_norm_relu_past_two_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    generator = torch.Generator("cuda").manual_seed(0)
    x, gradient = (
        torch.empty((36, 1024, 1024, 64), device="cuda", dtype=torch.bfloat16).normal_(generator=generator)
        for _ in "xg"
    )
    x, gradient = x.permute(0, 3, 1, 2).add_(3), gradient.permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    ops, sums = _norm_ops(), torch.zeros(36, 64, device="cuda")
    y, mean, invstd = ops.forward(x, None, None, None, None, None, True, 0.1, 1e-5, True)
    gx, *_ = ops.backward(gradient, x, None, mean, invstd, None, None, sums, True, True, [True, False, False, False])
    count = x.numel() // 64
    expected = sum(image.double().sum((1, 2)) for image in x) / count
    variance = sum((image.double() - expected[:, None, None]).square().sum((1, 2)) for image in x) / count
    torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(invstd.double(), (variance + 1e-5).rsqrt(), rtol=1e-5, atol=0)
    column = (slice(None), None, None)
    xhat = (x[-1].double() - expected[column]) * invstd.double()[column]  # the last image lies past 2**31
    torch.testing.assert_close(y[-1].double(), xhat.clamp_min(0), rtol=1e-2, atol=1e-4)
    masked = gradient[-1].double() * (xhat > 0)
    torch.testing.assert_close(sums[-1].double(), (masked * xhat).sum((1, 2)), rtol=1e-3, atol=1)
    torch.testing.assert_close(gx[-1].double(), masked * invstd.double()[column], rtol=2e-2, atol=1e-2)


def test_batch_norm_relu_runs_triton_through_autograd() -> None:
    norm = BatchNormReLU(64).cuda()
    plain = torch.nn.BatchNorm2d(64).cuda()
    norm.sums = torch.zeros(8, 64, device="cuda")
    x, residual = (torch.randn(8, 64, 14, 14, device="cuda").to(memory_format=torch.channels_last) for _ in range(2))
    runs = []
    for run in (norm, lambda x, residual: torch.relu(plain(x) + residual)):
        leaves = [t.clone().requires_grad_() for t in (x, residual)]
        y = run(*leaves)
        y.square().sum().backward()
        runs.append([y, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.running_var, plain.running_var)
    terms = norm.weight * norm.weight.grad + norm.bias * norm.bias.grad
    torch.testing.assert_close(norm.sums.sum(0), terms.detach(), rtol=1e-3, atol=1e-2)


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

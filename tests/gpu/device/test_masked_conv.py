"""The masked convolution in Triton on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu import conv_cases
from tests.gpu.conv_cases import Case
from tests.gpu.device.common import capture_and_compare

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

BOTH = ("list-8", "list-8")
NETWORK = [  # of ResNet-50 and MobileNetV2, with fewer samples
    Case(64, 64, (3, 3), (56, 56), keep=BOTH, packed=True, samples=4),
    Case(64, 256, (1, 1), (56, 56), padding=(0, 0), keep=BOTH, packed=True, samples=4),
    Case(128, 128, (3, 3), (28, 28), stride=(2, 2), keep=BOTH, packed=True, samples=32),
    Case(256, 256, (3, 3), (14, 14), keep=("mask", "mask"), samples=16),
    Case(256, 256, (3, 3), (14, 14), keep=BOTH, packed=True, samples=256, epilogue=""),
    Case(512, 512, (3, 3), (7, 7), keep=("mask", "list"), samples=8),
    Case(512, 2048, (1, 1), (7, 7), padding=(0, 0), samples=64),
    Case(256, 512, (1, 1), (28, 28), stride=(2, 2), padding=(0, 0), keep=BOTH, packed=True, samples=8),
    Case(3, 64, (7, 7), (64, 64), stride=(2, 2), padding=(3, 3), keep=("mask", "all"), samples=8),
    Case(128, 128, (3, 3), (14, 14), groups=32, keep=("mask", "mask"), samples=8),
    Case(144, 144, (3, 3), (28, 28), groups=144, keep=("same", "same"), packed=True, samples=16),
    Case(144, 144, (3, 3), (28, 28), groups=144, stride=(2, 2), keep=("mask", "mask"), samples=16),
]


def _kernels() -> list[Any]:
    from taylor_cuda.kernels import _conv, _conv_depthwise, _conv_lists

    modules = (_conv, _conv_depthwise, _conv_lists)
    return [k for module in modules for name, k in vars(module).items() if name.endswith("_kernel")]


@pytest.fixture
def triton_ops() -> SimpleNamespace:
    pytest.importorskip("triton", reason="triton is not installed")
    return conv_cases.triton_ops()


@pytest.mark.parametrize("case", conv_cases.EVERY, ids=lambda case: case.name)
def test_every_case_matches_float64(triton_ops: SimpleNamespace, case: Case) -> None:
    assert conv_cases.check(triton_ops, case, device="cuda", twice=True) == []


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("case", NETWORK, ids=lambda case: case.name)
def test_shapes_of_networks_match_float64(triton_ops: SimpleNamespace, case: Case, dtype: str) -> None:
    """Sums of -1, 0 and 1 are exact in fp32, and rounded once as float64 is."""
    assert conv_cases.check(triton_ops, Case(**{**vars(case), "dtype": dtype}), device="cuda", twice=True) == []


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("keep", [("mask", "mask"), ("all", "all")], ids=str)
def test_numbers_that_round(triton_ops: SimpleNamespace, dtype: str, keep: tuple[str, str]) -> None:
    case = Case(128, 64, (3, 3), (14, 14), keep=keep, samples=8, dtype=dtype, random=True, epilogue="scale bias")
    assert conv_cases.check(triton_ops, case, device="cuda", twice=True) == []


@pytest.mark.parametrize("name", conv_cases.MORE)
def test_what_is_not_asked_for_or_not_there(triton_ops: SimpleNamespace, name: str) -> None:
    def on_the_gpu(run: Callable[..., Any]) -> Callable[..., Any]:
        def moved(*arguments: Any) -> Any:
            results = run(*(a.cuda() if isinstance(a, Tensor) else a for a in arguments))
            return results.cpu() if isinstance(results, Tensor) else [result.cpu() for result in results]

        return moved

    ops = SimpleNamespace(forward=on_the_gpu(triton_ops.forward), backward=on_the_gpu(triton_ops.backward))
    assert conv_cases.MORE[name](ops) == []


STEPS = [
    Case(64, 64, (3, 3), (14, 14), keep=("mask", "mask"), samples=4, dtype="bf16", epilogue="bias"),
    Case(64, 64, (3, 3), (14, 14), keep=("list-", "list"), samples=4, dtype="bf16", epilogue="bias"),
    Case(64, 64, (3, 3), (14, 14), keep=BOTH, packed=True, samples=4, dtype="bf16", epilogue="bias"),
    Case(64, 64, (3, 3), (14, 14), keep=("mask", "mask"), groups=4, samples=4, dtype="bf16", epilogue="bias"),
    Case(64, 64, (3, 3), (14, 14), keep=("mask", "list"), groups=64, samples=4, dtype="bf16", epilogue="bias"),
]


@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.name)
def test_a_step_is_captured_and_waits_for_nothing(
    triton_ops: SimpleNamespace, case: Case, no_synchronization: Callable[[], None]
) -> None:
    given = conv_cases.make_inputs(case, device="cuda")

    def step() -> list[Tensor]:
        return [given.forward(triton_ops.forward), *given.backward(triton_ops.backward, [True] * 3)]

    capture_and_compare(step, [given.x, given.gradient], None)
    no_synchronization()
    step()


def test_a_captured_step_follows_its_mask(triton_ops: SimpleNamespace) -> None:
    """Replayed with other masks in place, a graph skips other channels."""
    case = Case(64, 64, (3, 3), (14, 14), keep=("mask", "mask"), samples=4, dtype="bf16")
    given, other = (conv_cases.make_inputs(case, seed, "cuda") for seed in (0, 5))
    plain = conv_cases.make_inputs(Case(**{**vars(case), "keep": ("all", "all")}), device="cuda")
    masks = [keep.clone() for keep in given.common[:2]]
    arguments = (plain.x, plain.weight, None, *masks, *given.common[2:], None, False)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        triton_ops.forward(*arguments)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = triton_ops.forward(*arguments)
    for mask, changed in zip(masks, other.common[:2], strict=True):
        mask.copy_(changed)
    graph.replay()
    replayed = y.clone()
    assert torch.equal(replayed, triton_ops.forward(*arguments))
    assert not bool(replayed[:, ~masks[0]].any())
    assert bool(replayed[:, masks[0]].any(dim=(0, 2, 3)).all())


@pytest.mark.parametrize("packed", [False, True])
def test_masks_change_without_compiling(triton_ops: SimpleNamespace, packed: bool) -> None:
    device, counts = torch.cuda.current_device(), []
    for kept in (32, 8, 64, 40, 24, 56):
        x = torch.randn(2, 14, 14, kept if packed else 64, device="cuda").bfloat16().movedim(-1, 1)
        weight = torch.randn(64, 64, 3, 3, device="cuda").bfloat16()
        order = torch.randperm(64, device="cuda")[:kept].sort().values
        keep = order if packed else torch.zeros(64, dtype=torch.bool, device="cuda").index_fill_(0, order, True)
        common = (keep, keep, [1, 1], [1, 1], [1, 1], 1, packed)
        y = triton_ops.forward(x, weight, None, *common, None, False)
        triton_ops.backward(y, x, weight, *common, [True] * 3)
        counts.append(sum(len(kernel.device_caches[device][0]) for kernel in _kernels()))
    assert counts[0] > 0
    assert set(counts) == {counts[0]}


def test_past_two_to_the_31_elements(triton_ops: SimpleNamespace) -> None:
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    x = torch.randint(-1, 2, (36, 1024, 1024, 64), device="cuda", dtype=torch.int8).bfloat16().movedim(-1, 1)
    weight = torch.randint(-1, 2, (16, 64, 1, 1), device="cuda").bfloat16()
    assert x.numel() > 2**31
    common = (None, None, [1, 1], [0, 0], [1, 1], 1, False)
    y = triton_ops.forward(x, weight, None, *common, None, False)
    expected = torch.einsum("chw,oc->ohw", x[-1].float(), weight[:, :, 0, 0].float())  # lies past 2**31
    assert torch.equal(y[-1].float(), expected)
    gx, gw, _ = triton_ops.backward(y, x, weight, *common, [True, True, False])
    inner = torch.einsum("ohw,oc->chw", y[-1].float(), weight[:, :, 0, 0].float())
    assert torch.equal(gx[-1], inner.bfloat16())
    outer = sum(torch.einsum("ohw,chw->oc", a.double(), b.double()) for a, b in zip(y, x, strict=True))
    assert isinstance(outer, Tensor)
    # The sums of a split are whole numbers below 2**24 and exact; at most 512 of them add up, and bf16 rounds once.
    allowed = 2**-8 * outer.abs() + 512 * torch.finfo(torch.float32).eps * outer.abs().max()
    assert bool(((gw[:, :, 0, 0].double() - outer).abs() <= allowed).all())

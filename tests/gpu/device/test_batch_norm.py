"""BatchNorm, addition and ReLU as one op, on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from taylor_cuda.ops import BatchNormReLU
from tests.gpu import cases
from tests.gpu.device.common import capture_and_compare
from tests.ops import norm_cases

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]


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

    capture_and_compare(step, [given.x, given.gradient], None)
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

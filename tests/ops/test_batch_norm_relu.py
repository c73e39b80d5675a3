"""``batch_norm_relu`` by hand, against PyTorch's three ops in float64, in what it keeps, and with input it refuses."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_cuda as tc
from taylor_cuda.ops import backends, reference
from tests.ops import norm_cases

ROOT = Path(__file__).parent.parent.parent
DOUBLE = {"dtype": torch.float64}
REFERENCE = SimpleNamespace(forward=reference.batch_norm_relu_forward, backward=reference.batch_norm_relu_backward)


def test_by_hand() -> None:
    """Mean 2 and variance 1, so x̂ = -1, -1, 1, 1 and b = 2·x̂ - 1 = -3, -3, 1, 1; only the second example passes."""
    x = torch.tensor([[[1.0, 1.0]], [[3.0, 3.0]]], requires_grad=True)
    weight, bias = torch.tensor([2.0], requires_grad=True), torch.tensor([-1.0], requires_grad=True)
    mean, variance, sums = torch.zeros(1), torch.ones(1), torch.tensor([[10.0], [10.0]])
    y = tc.batch_norm_relu(x, mean, variance, weight, bias, True, 0.5, 0.0, sums=sums)
    assert y.tolist() == [[[0, 0]], [[1, 1]]]
    assert mean.item() == 1
    assert variance.item() == pytest.approx(0.5 + 0.5 * 4 / 3)
    y.backward(torch.tensor([[[5.0, 7.0]], [[1.0, 3.0]]]))
    assert (weight.grad.item(), bias.grad.item()) == (4, 4)
    assert x.grad.tolist() == [[[0, 0]], [[-2, 2]]]  # 2·(g' - 4/4 - x̂·4/4) with g' = 0, 0, 1, 3
    assert sums.tolist() == [[10], [14]]  # Σ b·g' = 1 + 3, and γ·dγ + β·dβ = 8 - 4


def test_by_hand_with_a_residual_in_evaluation_mode() -> None:
    x = torch.tensor([[2.0, 4.0, 6.0]], requires_grad=True)
    residual = torch.tensor([[1.0, -5.0, -1.0]], requires_grad=True)
    mean, variance, sums = torch.full((3,), 4.0), torch.full((3,), 4.0), torch.zeros(3)
    y = tc.batch_norm_relu(x, mean, variance, eps=0.0, residual=residual, sums=sums)
    assert y.tolist() == [[0, 0, 0]]  # x̂ = -1, 0, 1, so that two are exactly 0, and nothing passes there
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.zeros(1, 3))
    assert torch.equal(sums, torch.zeros(3))
    y = tc.batch_norm_relu(x, mean, variance, eps=0.0, residual=-3 * residual, sums=sums)
    assert y.tolist() == [[0, 15, 4]]
    y.backward(torch.tensor([[7.0, 8.0, 9.0]]))
    assert x.grad.tolist() == [[0, 4, 4.5]]
    assert residual.grad.tolist() == [[0, -24, -27]]
    assert sums.tolist() == [0, 0, 9]
    assert mean.tolist() == [4, 4, 4]


@pytest.mark.parametrize("case", norm_cases.EVERY, ids=lambda case: case.name)
def test_the_definition_is_within_the_bound_of_float64(case: norm_cases.Case) -> None:
    assert norm_cases.check(REFERENCE, case, twice=True) == []


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What is wrong with the Triton kernels in Triton's interpreter, by case: all of them run in one process."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    file = tmp_path_factory.mktemp("interpreted") / "problems.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.ops.norm_cases", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, list[str]] = json.loads(file.read_text())
    return result


@pytest.mark.parametrize(
    "name", [case.name for case in norm_cases.EVERY] + [f"{case.name}, many trips" for case in norm_cases.TRIPS]
)
def test_the_kernels_are_within_the_bound_of_float64(interpreted: dict[str, list[str]], name: str) -> None:
    assert interpreted[name] == []


def test_nan_stays_in_its_channel(interpreted: dict[str, list[str]]) -> None:
    assert interpreted["nan"] == []
    assert [text for case in norm_cases.MODES for text in norm_cases.nan_case(REFERENCE, case)] == []


def _three_ops(x: Tensor, *norm: object, residual: Tensor | None, relu: bool) -> Tensor:
    y = F.batch_norm(x, *norm)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


@pytest.mark.parametrize("case", norm_cases.MODES, ids=lambda case: case.name)
def test_gradients_are_those_of_three_ops(case: norm_cases.Case) -> None:
    """Through autograd, in float64; and the sums over examples are γ·dγ + β·dβ."""
    given = norm_cases.make_inputs(norm_cases.Case("nhwc 7x7", "fp64", residual=case.residual))
    affine = (given.weight, given.bias) if case.affine else (None, None)
    leaves = [t.requires_grad_() for t in (given.x, given.residual, *affine) if t is not None]
    runs, sums = [], torch.zeros(3, 16, **DOUBLE)
    for op in (functools.partial(tc.batch_norm_relu, sums=sums), _three_ops):
        running = [t.clone() for t in given.running]
        y = op(given.x, *running, *affine, case.training, 0.3, 1e-4, residual=given.residual, relu=case.relu)
        runs.append([y.detach(), *running, *torch.autograd.grad(y, leaves, given.gradient)])
    for actual, expected in zip(*runs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    if case.affine:
        terms = given.weight * runs[0][-2] + given.bias * runs[0][-1]
        torch.testing.assert_close(sums.sum(0), terms.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_sums_are_the_gradient_of_an_explicit_gate(training: bool) -> None:
    """Of every example; with a residual the gate is in front of the addition, and without one behind the ReLU too."""
    x, residual, weight, bias = (torch.randn(s, **DOUBLE) for s in ((4, 3, 5, 5), (4, 3, 5, 5), (3,), (3,)))
    x.requires_grad_()
    running = torch.randn(3, **DOUBLE), torch.rand(3, **DOUBLE) + 0.5
    for added in (residual, None):
        gate, sums = torch.ones(4, 3, 1, 1, **DOUBLE, requires_grad=True), torch.zeros(4, 3, **DOUBLE)
        branch = F.batch_norm(x, *(t.clone() for t in running), weight, bias, training)
        y = F.relu(branch * gate + added) if added is not None else F.relu(branch) * gate
        (expected,) = torch.autograd.grad(y.sin().sum(), gate)
        tc.batch_norm_relu(x, *running, weight, bias, training, 0.0, residual=added, sums=sums).sin().sum().backward()
        torch.testing.assert_close(sums, expected[..., 0, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_gradcheck(training: bool, with_residual: bool) -> None:
    x, residual, weight, bias = (
        torch.randn(s, **DOUBLE).requires_grad_() for s in ((3, 2, 2, 2), (3, 2, 2, 2), (2,), (2,))
    )
    mean, variance = torch.randn(2, **DOUBLE), torch.rand(2, **DOUBLE) + 0.5

    def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return tc.batch_norm_relu(x, mean.clone(), variance.clone(), weight, bias, training, residual=residual)

    assert torch.autograd.gradcheck(run, (x, weight, bias, *([residual] if with_residual else [])))


def test_it_has_no_second_derivative_and_says_so() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    y = tc.batch_norm_relu(x, None, None, training=True).sum()
    with pytest.raises(tc.InputError, match="no second derivative"):
        torch.autograd.grad(y, x, create_graph=True)


def _step(x: Tensor, residual: Tensor, norm: tc.BatchNormReLU, sums: Tensor) -> Tensor:
    return (
        tc.batch_norm_relu(
            x.sin(), norm.running_mean, norm.running_var, norm.weight, norm.bias, True, residual=residual, sums=sums
        )
        .square()
        .mean()
    )


def test_a_step_compiles_as_one_graph() -> None:
    runs = []
    for run in (_step, torch.compile(_step, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(0)
        x, residual = (torch.randn(4, 3, 5, 5, requires_grad=True) for _ in range(2))
        norm, sums = tc.BatchNormReLU(3), torch.zeros(4, 3)
        gradients = torch.autograd.grad(run(x, residual, norm, sums), (x, residual, *norm.parameters()))
        runs.append((*gradients, sums, norm.running_mean, norm.running_var))
    for eager, compiled in zip(*runs, strict=True):
        torch.testing.assert_close(compiled, eager)
    assert runs[1][4].abs().sum() > 0
    assert runs[1][5].abs().sum() > 0


def test_a_compiled_module_trains_as_it_does_without() -> None:
    norm = tc.BatchNormReLU(3)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    compiled(torch.randn(4, 3, 5, 5)).sum().backward()
    assert norm.num_batches_tracked == 1
    assert norm.running_mean.abs().sum() > 0
    assert norm.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (0, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_in_nothing_out(shape: tuple[int, ...], training: bool) -> None:
    x, residual = (torch.empty(shape, requires_grad=True) for _ in range(2))
    weight, running, sums = torch.ones(3, requires_grad=True), (torch.zeros(3), torch.ones(3)), torch.zeros(3)
    y = tc.batch_norm_relu(x, *running, weight, None, training, residual=residual, sums=sums)
    y.sum().backward()
    assert y.shape == x.grad.shape == residual.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(3))
    assert torch.equal(sums, torch.zeros(3))
    assert torch.equal(running[0], torch.zeros(3))
    assert torch.equal(running[1], torch.ones(3))


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
def test_one_value_per_channel_is_refused_as_by_pytorch(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with pytest.raises(ValueError, match="more than 1 value per channel when training"):
        F.batch_norm(x, None, None, training=True)
    with pytest.raises(tc.InputError, match="x: wanted more than 1 value per channel when training") as found:
        tc.batch_norm_relu(x, None, None, training=True)
    assert isinstance(found.value, ValueError)
    assert tc.batch_norm_relu(x, torch.zeros(3), torch.ones(3)).shape == shape


@pytest.mark.parametrize("frozen", ["x", "residual", "weight", "bias", "weight and bias"])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_frozen_gets_no_gradient_and_changes_none(frozen: str, training: bool) -> None:
    def run(*without: str) -> tuple[dict[str, Tensor | None], Tensor]:
        torch.manual_seed(0)
        given = {
            "x": torch.randn(4, 3, 5),
            "residual": torch.randn(4, 3, 5),
            "weight": torch.randn(3),
            "bias": torch.randn(3),
        }
        leaves = {name: tensor.requires_grad_(name not in without) for name, tensor in given.items()}
        sums = torch.zeros(4, 3)
        running = torch.zeros(3), torch.ones(3)
        tc.batch_norm_relu(
            leaves["x"], *running, leaves["weight"], leaves["bias"], training, residual=leaves["residual"], sums=sums
        ).sin().sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items()}, sums

    everything, sums = run()
    some, same = run(*frozen.split(" and "))
    assert torch.equal(sums, same)
    for name, gradient in some.items():
        assert (gradient is None) == (name in frozen.split(" and "))
        assert gradient is None or torch.equal(gradient, everything[name])


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_what_is_kept_for_the_backward_pass(residual: bool, relu: bool) -> None:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(4, 16, 6, 6, requires_grad=True)
    added = torch.randn(4, 16, 6, 6, requires_grad=True) if residual else None
    norm = tc.BatchNormReLU(16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = tc.batch_norm_relu(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, residual=added, relu=relu
        )
    images = [tensor.data_ptr() for tensor in kept if tensor.numel() > 16]
    assert images == [x.data_ptr(), *([y.data_ptr()] if residual and relu else [])]
    assert all(tensor.shape == (16,) for tensor in kept if tensor.numel() <= 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_network_may_have_16_bit_parameters_and_statistics(dtype: torch.dtype) -> None:
    x, sums = torch.randn(8, 6, 5, 5, dtype=dtype), torch.zeros(8, 6)
    runs = []
    for low in (True, False):
        norm = tc.BatchNormReLU(6)
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
        norm = norm.to(dtype) if low else norm.to(dtype).float()
        norm.sums = sums if low else None
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        y.sum().backward()
        assert norm.weight.grad.dtype == norm.weight.dtype == norm.running_mean.dtype
        runs.append([y, leaf.grad, norm.weight.grad, norm.running_mean, norm.running_var])
    for low, high in zip(*runs, strict=True):
        torch.testing.assert_close(low, high.to(dtype))
    assert sums.abs().sum() > 0


def test_sums_add_up_over_backward_passes() -> None:
    x = torch.randn(4, 3, 5, requires_grad=True)
    per_example, total = torch.zeros(4, 3), torch.zeros(3)
    for _ in range(2):
        tc.batch_norm_relu(x, None, None, training=True, sums=per_example).sin().sum().backward()
    tc.batch_norm_relu(x, None, None, training=True, sums=total).sin().sum().backward()
    torch.testing.assert_close(per_example.sum(0), 2 * total)


def test_changes_in_between_are_noticed() -> None:
    x, residual = torch.randn(4, 3, 5), torch.randn(4, 3, 5, requires_grad=True)
    for changed in (0, 1):
        y = tc.batch_norm_relu(x, None, None, training=True, residual=residual)
        (x, y.detach())[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_running_statistics_bump_their_version() -> None:
    norm = tc.BatchNormReLU(3)
    before = norm.running_mean._version, norm.running_var._version
    norm(torch.randn(4, 3, 5, 5))
    assert (norm.running_mean._version, norm.running_var._version) > before


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
def test_the_module_is_batch_norm_and_relu(options: dict[str, object]) -> None:
    ours, theirs = tc.BatchNormReLU(6, **options), nn.BatchNorm2d(6, **options)
    if theirs.affine:
        nn.init.normal_(theirs.weight)
        nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    for training in (True, True, False):
        x, residual = torch.randn(3, 6, 4, 4), torch.randn(3, 6, 4, 4)
        ours.train(training)
        theirs.train(training)
        torch.testing.assert_close(ours(x, residual), F.relu(theirs(x) + residual))
        torch.testing.assert_close(ours(x), F.relu(theirs(x)))
    for (name, mine), (other, expected) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == other
        torch.testing.assert_close(mine, expected)
    with pytest.raises(ValueError, match="4D"):
        ours(torch.randn(3, 6))


def test_a_module_that_stopped_tracking_leaves_its_statistics() -> None:
    ours, theirs = tc.BatchNormReLU(3), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5) + 2
    ours.track_running_stats = theirs.track_running_stats = False
    torch.testing.assert_close(ours(x), F.relu(theirs(x)))
    assert torch.equal(ours.running_mean, torch.zeros(3))
    assert ours.num_batches_tracked == 0
    torch.testing.assert_close(ours.eval()(x), F.relu(theirs.eval()(x)))


def test_the_sums_of_a_module_are_no_part_of_its_state() -> None:
    norm = tc.BatchNormReLU(4)
    norm.sums = torch.zeros(3, 4)
    assert list(norm.state_dict()) == list(nn.BatchNorm2d(4).state_dict())
    norm(torch.randn(3, 4, 5, 5)).sum().backward()
    torch.testing.assert_close(norm.sums.sum(0), (norm.weight * norm.weight.grad + norm.bias * norm.bias.grad).detach())


def test_triton_serves_cuda_and_the_definition_everything_else() -> None:
    for op in ("batch_norm_relu_forward", "batch_norm_relu_backward"):
        assert backends.available(op, "cpu") == ("reference",)
        if importlib.util.find_spec("triton") is not None:
            assert backends.available(op, "cuda") == ("triton", "reference")


X, VECTOR = torch.randn(2, 3, 4, 4), torch.ones(3)
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "no tensor": (lambda: tc.batch_norm_relu([1.0], VECTOR, VECTOR), "x: wanted a tensor, got list"),
    "dtype": (lambda: tc.batch_norm_relu(X.int(), VECTOR, VECTOR), "x: wanted float32"),
    "dimensions": (lambda: tc.batch_norm_relu(X[0, 0, 0], VECTOR, VECTOR), r"x: wanted \[N, C"),
    "statistics": (
        lambda: tc.batch_norm_relu(X, torch.ones(4), VECTOR),
        r"running_mean: wanted shape \(3,\) for x \(2, 3, 4, 4\), got \(4,\)",
    ),
    "no variance": (lambda: tc.batch_norm_relu(X, VECTOR, None, training=True), "running_var: wanted a tensor"),
    "no statistics": (lambda: tc.batch_norm_relu(X, None, None), "running_mean: wanted a tensor"),
    "statistics with gradients": (
        lambda: tc.batch_norm_relu(X, VECTOR.clone().requires_grad_(), VECTOR, training=True),
        "running_mean: wanted a tensor that does not require grad",
    ),
    "weight": (lambda: tc.batch_norm_relu(X, VECTOR, VECTOR, VECTOR.double()), "weight: wanted torch.float32 for x of"),
    "bias": (
        lambda: tc.batch_norm_relu(X.bfloat16(), VECTOR, VECTOR, VECTOR, VECTOR.half()),
        "bias: wanted torch.float32 or torch.bfloat16 for x of torch.bfloat16, got torch.float16",
    ),
    "bias elsewhere": (
        lambda: tc.batch_norm_relu(X, VECTOR, VECTOR, VECTOR, VECTOR.to("meta")),
        "bias: wanted it on cpu",
    ),
    "momentum": (lambda: tc.batch_norm_relu(X, VECTOR, VECTOR, momentum=None), "momentum: wanted a number, got None"),
    "residual's shape": (
        lambda: tc.batch_norm_relu(X, VECTOR, VECTOR, residual=X[:1]),
        r"residual: wanted the shape of x, \(2, 3, 4, 4\), got \(1, 3, 4, 4\)",
    ),
    "residual's dtype": (
        lambda: tc.batch_norm_relu(X, VECTOR, VECTOR, residual=X.bfloat16()),
        "residual: wanted torch.float32, the dtype of x, got torch.bfloat16",
    ),
    "residual elsewhere": (
        lambda: tc.batch_norm_relu(X, VECTOR, VECTOR, residual=X.to("meta")),
        "residual: wanted it on cpu, where x is",
    ),
    "sums' shape": (
        lambda: tc.batch_norm_relu(X, VECTOR, VECTOR, sums=torch.zeros(2)),
        r"sums: wanted shape \(3,\) or",
    ),
    "sums' dtype": (lambda: tc.batch_norm_relu(X, VECTOR, VECTOR, sums=VECTOR.double()), "sums: wanted torch.float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(tc.InputError, match=message):
        call()

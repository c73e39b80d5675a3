"""What the dispatcher knows of the ops: schemas, fakes, autograd, compilation. And who chooses the backend."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import taylor_cuda as tc
from taylor_cuda.ops import backends, reference
from tests.ops.checks import BACKENDS

PAIR = (torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5))
LISTS = ([torch.randn(3, 4, 2, 2), torch.randn(5)], [torch.randn(3, 4, 2, 2), torch.randn(5)], [1, 0])
SAMPLES: dict[str, list[tuple[object, ...]]] = {
    "channel_importance": [(*PAIR, reduction) for reduction in reference.CHANNEL_REDUCTIONS],
    "channel_sums": [
        PAIR,
        tuple(tensor.to(memory_format=torch.channels_last) for tensor in PAIR),
        tuple(tensor.bfloat16() for tensor in PAIR),
    ],
    "accumulate_channel_sums": [(*PAIR, torch.zeros(4)), (*PAIR, torch.zeros(3, 4))],
    "weight_importance": [(*LISTS, reduction) for reduction in reference.WEIGHT_REDUCTIONS],
}


def every_op() -> list[str]:
    """The ops of the namespace, so that none can be forgotten."""
    registered = torch._C._dispatch_get_all_op_names()
    return sorted({name.split("::")[1].split(".")[0] for name in registered if name.startswith("taylor_cuda::")})


def test_the_list_of_ops_is_complete() -> None:
    assert every_op() == sorted(backends.OPS) == sorted(SAMPLES)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("op", every_op())
def test_opcheck(op: str, requires_grad: bool) -> None:
    for sample in SAMPLES[op]:
        given = [value.clone() if isinstance(value, Tensor) else value for value in sample]
        if requires_grad and isinstance(given[0], Tensor):
            given[0].requires_grad_()
        torch.library.opcheck(getattr(torch.ops.taylor_cuda, op).default, tuple(given))


def test_compiles_as_one_graph() -> None:
    def scores(activation: Tensor, gradient: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (importance,) = tc.weight_importance([weight], [weight * 2], [1])
        return tc.channel_importance(activation, gradient), tc.channel_sums(activation, gradient), importance

    given = (*PAIR, torch.randn(3, 4))
    for result, expected in zip(
        torch.compile(scores, backend="aot_eager", fullgraph=True)(*given), scores(*given), strict=True
    ):
        assert torch.equal(result, expected)


def test_a_gated_step_compiles_as_one_graph() -> None:
    def loss(x: Tensor, weight: Tensor, sums: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(tc.score_gate(x.sin(), sums), weight).square().mean()

    x, weight = torch.randn(2, 4, 6, 6), torch.randn(5, 4, 3, 3, requires_grad=True)
    runs = []
    for run in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        inputs, sums = x.clone().requires_grad_(), torch.zeros(4)
        gradients = torch.autograd.grad(run(inputs, weight, sums), (inputs, weight))
        runs.append((sums, *gradients))
    for eager, compiled in zip(*runs, strict=True):
        torch.testing.assert_close(compiled, eager)
    assert runs[1][0].abs().sum() > 0


def test_fakes_have_the_right_shapes_and_dtypes() -> None:
    with torch._subclasses.FakeTensorMode() as mode:
        activation = mode.from_tensor(torch.empty(3, 4, 5, dtype=torch.bfloat16))
        assert tc.channel_importance(activation, activation).dtype == torch.float32
        sums = tc.channel_sums(activation, activation)
        assert sums.shape == (3, 4)
        assert sums.dtype == torch.float32
        wide = mode.from_tensor(torch.empty(7, 6, dtype=torch.float64))
        (result,) = tc.weight_importance([wide], [wide], [-1])
        assert result.shape == (6,)
        assert result.dtype == torch.float64


def test_a_backend_that_was_asked_for_runs() -> None:
    for backend in BACKENDS:
        with backends.use(backend):
            assert backends.select("channel_sums", "cpu") is backends.find("channel_sums", backend, "cpu")
    assert backends.asked() is None


def test_a_backend_that_is_missing_raises_and_says_what_there_is() -> None:
    with backends.use("triton"), pytest.raises(tc.InputError, match=r"'triton' was asked for, but has no channel_sums"):
        tc.channel_sums(*PAIR)
    with (
        pytest.raises(tc.InputError, match="backend: wanted one of native, triton, reference, got 'cudnn'"),
        backends.use("cudnn"),
    ):
        pass


def test_environment_asks_for_a_backend() -> None:
    code = "from taylor_cuda.ops import backends as b; print(b.select('channel_sums', 'cpu').__module__)"
    environment = {**os.environ, "TAYLOR_CUDA_BACKEND": "reference"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "taylor_cuda.ops.reference"

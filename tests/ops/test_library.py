"""What the dispatcher knows of the ops: schemas, fakes, autograd, compilation. And who chooses the backend."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import taylor_cuda as tc
from taylor_cuda.ops import backends, reference
from tests.ops.checks import BACKENDS

PAIR = (torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5))
LISTS = ([torch.randn(3, 4, 2, 2), torch.randn(5)], [torch.randn(3, 4, 2, 2), torch.randn(5)], [1, 0])
SUMS, UNITS = [torch.randn(3, 4), torch.randn(3, 2)], (torch.tensor([0, 5, 2]), torch.tensor([0, 2, 3]))
ENTRIES, NO_ENTRIES = torch.tensor([0, 2, -1]), torch.tensor([], dtype=torch.int64)
SAMPLES: dict[str, list[tuple[object, ...]]] = {
    "channel_importance": [(*PAIR, reduction) for reduction in (*reference.CHANNEL_REDUCTIONS, "all")],
    "channel_sums": [
        PAIR,
        tuple(tensor.to(memory_format=torch.channels_last) for tensor in PAIR),
        tuple(tensor.bfloat16() for tensor in PAIR),
    ],
    "accumulate_channel_sums": [(*PAIR, torch.zeros(4)), (*PAIR, torch.zeros(3, 4))],
    "weight_importance": [(*LISTS, reduction) for reduction in reference.WEIGHT_REDUCTIONS],
    "accumulate_importance": [
        (SUMS, *UNITS, torch.zeros(2), torch.zeros(2, dtype=torch.int64)),
        (SUMS, *UNITS, torch.zeros(2), None, "sample", torch.tensor(2.0)),
        ([], *UNITS, *torch.zeros(1, 2), torch.zeros(2, dtype=torch.int64), "sum", None, torch.ones(2)),
    ],
    "keep_mask": [(torch.randn(9), torch.tensor(keep)) for keep in (0, 4)] + [(torch.randn(0), torch.tensor(1))],
    "score_relu_backward": [
        (*PAIR, torch.zeros(4)),
        (*PAIR, torch.zeros(3, 4), PAIR[0], torch.zeros(3, 4)),
        (PAIR[0].to(memory_format=torch.channels_last), PAIR[1], torch.zeros(4)),
        (PAIR[0][:, :, ::2], PAIR[1][:, :, ::2], torch.zeros(4)),
    ],
    "batch_norm_relu_forward": [
        (PAIR[0], torch.zeros(4), torch.ones(4), torch.ones(4), torch.zeros(4), PAIR[1], True, 0.1, 1e-5, True),
        (PAIR[0].bfloat16(), torch.zeros(4), torch.ones(4), torch.ones(4), None, None, False, 0.1, 1e-5, True),
        (PAIR[0].to(memory_format=torch.channels_last), None, None, None, None, None, True, 0.1, 1e-5, False),
    ],
    "batch_norm_relu_backward": [
        (*PAIR, PAIR[0], *torch.ones(4, 4).unbind(), torch.zeros(3, 4), True, True, [True] * 4),
        (*PAIR, None, *torch.ones(3, 4).unbind(), None, torch.zeros(4), False, True, [True, False, False, True]),
        (
            *(t.bfloat16() for t in PAIR),
            None,
            *torch.ones(4, 4).unbind(),
            None,
            True,
            False,
            [False, True, True, False],
        ),
    ],
    "pack_channels": [
        (PAIR[0], ENTRIES),
        (PAIR[0].to(memory_format=torch.channels_last).bfloat16(), ENTRIES),
        (PAIR[0][:, :, ::2], NO_ENTRIES),
    ],
    "unpack_channels": [
        (PAIR[0][:, :3], ENTRIES, 5),
        (PAIR[0].to(memory_format=torch.channels_last)[:, :3].bfloat16(), ENTRIES, 3),
        (PAIR[0][:, :0], NO_ENTRIES, 2),
    ],
    "gather_kept": [
        (LISTS[0], ENTRIES, [0, 1, 3, 3, 3], [True, False], torch.bfloat16),
        ([LISTS[0][0].to(memory_format=torch.channels_last)], ENTRIES, [0, 0, 3], [False], torch.float32),
        (LISTS[0], NO_ENTRIES, [0] * 5, [False, True], torch.float16),
    ],
    "scatter_kept": [
        ([torch.randn(1, 2, 2, 2), torch.randn(5)], LISTS[0], ENTRIES, [0, 1, 3, 3, 3], True),
        ([torch.randn(3, 4, 2, 2).half()], LISTS[0][:1], ENTRIES, [0, 3, 3], False),
    ],
}

KEEP, CONV = torch.tensor([0, 3, -1]), ([1, 1], [1, 1], [1, 1])
WEIGHT = torch.randn(6, 4, 3, 3)
SAMPLES |= {
    "pack_channels": [
        (PAIR[0], KEEP),
        (PAIR[0].to(memory_format=torch.channels_last), KEEP),
        (PAIR[0][:, :, 0, 0], KEEP),
    ],
    "unpack_channels": [
        (PAIR[0][:, :3], KEEP, 9),
        (PAIR[0][:, :3].to(memory_format=torch.channels_last), KEEP, 5),
        (PAIR[0][:, :0], KEEP[:0], 2),
    ],
    "gather_kept": [
        ([WEIGHT, torch.randn(5)], torch.cat([KEEP, KEEP[:2], KEEP]), [0, 3, 5, 8, 8], [True, False], torch.bfloat16),
        ([WEIGHT], KEEP[:0], [0, 0, 0], [True], torch.float16),
    ],
    "scatter_kept": [
        ([WEIGHT[:3, :2]], [WEIGHT.clone()], torch.cat([KEEP, KEEP[:2]]), [0, 3, 5], clear) for clear in (False, True)
    ],
    "masked_conv2d_forward": [
        (PAIR[0], WEIGHT, torch.zeros(6), torch.arange(6) % 2 == 0, None, *CONV, 1, False, None, False),
        (PAIR[0], WEIGHT, None, KEEP, KEEP, *CONV, 1, False, torch.ones(6), True),
        (PAIR[0][:, :3], WEIGHT, torch.zeros(6), KEEP, KEEP, *CONV, 1, True, None, True),
        (PAIR[0].bfloat16(), WEIGHT[:4, :1].bfloat16(), None, KEEP, KEEP, *CONV, 4, False, torch.ones(4), False),
    ],
    "masked_conv2d_backward": [
        (torch.randn(3, 6, 5, 5), PAIR[0], WEIGHT, torch.arange(6) % 2 == 0, None, *CONV, 1, False, [True] * 3),
        (PAIR[0][:, :3], PAIR[1][:, :3], WEIGHT, KEEP, KEEP, *CONV, 1, True, [False, True, True]),
        (*PAIR, WEIGHT[:4, :1], KEEP, KEEP, *CONV, 4, False, [True, True, False]),
    ],
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
    assert tc.channel_sums(activation, activation).shape == (3, 4)  # a fake is one outside its mode too
    assert tc.weight_importance([wide], [wide], [0])[0].shape == (7,)


class Watcher(TorchDispatchMode):
    """Notes the name of every op."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op: torch._ops.OpOverload, types: object, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(op.name())
        return op(*args, **(kwargs or {}))


CALLS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "channel_importance": lambda a, g: tc.channel_importance(a, g),
    "channel_sums": lambda a, g: tc.channel_sums(a, g),
    "weight_importance": lambda a, g: tc.weight_importance([a], [g], [1])[0],
}


@pytest.mark.parametrize("op", CALLS)
def test_whoever_watches_sees_the_op(op: str) -> None:
    """A plain call goes past the dispatcher, which neither a mode nor a subclass may notice."""
    with Watcher() as watcher:
        expected = CALLS[op](*PAIR)
    assert watcher.seen[0] == f"taylor_cuda::{op}"
    graph = make_fx(CALLS[op])(*PAIR).graph
    assert f"taylor_cuda.{op}.default" in {str(node.target) for node in graph.nodes}
    wrapped = TwoTensor(PAIR[0], PAIR[0])
    result = CALLS[op](wrapped, TwoTensor(PAIR[1], PAIR[1]))
    assert isinstance(result, TwoTensor)
    assert torch.equal(result.b, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("op", ["channel_importance", "channel_sums"])
def test_vmap_calls_the_op_for_each_entry(op: str) -> None:
    stacked = [torch.stack([tensor, 2 * tensor]) for tensor in PAIR]
    mapped = torch.func.vmap(CALLS[op])(*stacked)
    assert torch.equal(mapped[0], CALLS[op](*PAIR))


@pytest.mark.parametrize("op", CALLS)
def test_a_plain_call_has_no_gradient(op: str) -> None:
    activation = PAIR[0].clone().requires_grad_()
    assert not CALLS[op](activation, PAIR[1]).requires_grad
    assert torch.is_grad_enabled()


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

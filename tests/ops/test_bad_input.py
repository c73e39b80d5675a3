"""Input that is wrong or odd in ways all ops share: other devices, other strides, nothing at all, too much."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_cuda as tc
from taylor_cuda.ops import accumulate_channel_sums, backends
from tests.importance.gated_nets import ConvBias, ConvBN, gate_gradients, make
from tests.ops.checks import each_backend, ops_of

HERE, AWAY = torch.ones(2, 3, 4), torch.ones(2, 3, 4, device="meta")

TWO_DEVICES: dict[str, tuple[Callable[[], object], str]] = {
    "channel_importance": (
        lambda: tc.channel_importance(HERE, AWAY),
        "gradient: wanted it on cpu, where activation is",
    ),
    "channel_importance, other way": (lambda: tc.channel_importance(AWAY, HERE), "gradient: wanted it on meta, where"),
    "channel_sums": (
        lambda: tc.channel_sums(HERE, AWAY),
        "gradient: wanted it on cpu, where activation is, got it on meta",
    ),
    "accumulate_channel_sums": (
        lambda: accumulate_channel_sums(HERE, HERE, torch.zeros(3, device="meta")),
        "sums: wanted it on cpu, where activation is, got it on meta",
    ),
    "score_gate": (lambda: tc.score_gate(HERE, torch.zeros(3, device="meta")), "sums: wanted it on cpu, where x is"),
    "weight_importance": (
        lambda: tc.weight_importance([HERE, HERE], [HERE, AWAY], [0, 0]),
        r"gradients\[1\]: wanted it on cpu, where weights\[1\] is, got it on meta",
    ),
    "weight_importance, two entries": (
        lambda: tc.weight_importance([HERE, AWAY], [HERE, AWAY], [0, 0]),
        r"weights\[1\]: wanted it on cpu, where weights\[0\] is, got it on meta",
    ),
}


@pytest.mark.parametrize("name", TWO_DEVICES)
def test_two_devices_are_named(name: str) -> None:
    call, message = TWO_DEVICES[name]
    with pytest.raises(tc.InputError, match=message):
        call()


@each_backend
def test_gradients_may_lie_in_any_order(backend: str) -> None:
    """Whatever the strides of weight and gradient are, the same numbers give the same scores."""
    weight, gradient = torch.randn(2, 8, 6, 3, 5, dtype=torch.float64)
    expected = (weight * gradient).sum((0, 2, 3))
    orders = [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0), (1, 0, 3, 2)]
    for first in orders:
        for second in orders:
            turned = [_in_order(x, order) for x, order in ((weight, first), (gradient, second))]
            (result,) = ops_of(backend).weight_importance([turned[0]], [turned[1]], [1], "sum")
            torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)
            sums = ops_of(backend).channel_sums(*turned)
            torch.testing.assert_close(sums, (weight * gradient).sum((2, 3)), rtol=1e-13, atol=1e-13)


def _in_order(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same numbers, outermost dimension of memory first."""
    back = sorted(range(x.dim()), key=lambda d: order[d])
    return x.permute(order).contiguous().permute(back)


@pytest.mark.parametrize("net", [ConvBN, ConvBias])
def test_importance_of_gradients_that_lie_otherwise_than_their_weights(net: type[nn.Module]) -> None:
    model, x, target = make(net)
    expected = gate_gradients(model, x, target)
    estimator = tc.Importance(model, tc.trace(model, x), source="parameters")
    F.cross_entropy(model(x), target).backward()
    model.to(memory_format=torch.channels_last)  # the weights; .grad stays as it is
    for parameter in model.parameters():
        assert parameter.grad is not None
        if parameter.dim() == 4:
            parameter.grad = parameter.grad.contiguous()
    assert any(p.stride() != p.grad.stride() for p in model.parameters())
    estimator.update()
    for name, score in estimator.scores().items():
        torch.testing.assert_close(score.double(), expected[name].square(), rtol=1e-5, atol=1e-12)


@each_backend
def test_a_list_of_nothing_has_no_scores(backend: str) -> None:
    with backends.use(backend):
        for reduction in ("sum", "square", "abs"):
            assert tc.weight_importance([], [], [], reduction) == []
            assert tc.weight_importance((), (), (), reduction) == []
            assert torch.ops.taylor_cuda.weight_importance([], [], [], reduction) == []
    with pytest.raises(tc.InputError, match="got 0, 1 and 1 entries"):
        tc.weight_importance([], [HERE], [0])


@pytest.mark.parametrize("op", [tc.channel_sums, tc.channel_importance])
def test_sizes_past_two_to_the_31_have_a_result(op: Callable[[Tensor, Tensor], Tensor]) -> None:
    """What is computed there is in tests/gpu/test_far_apart.py and tests/gpu/test_device.py."""
    large = torch.empty(2**20, 16, 2**10, 2**10, dtype=torch.bfloat16, device="meta")
    assert op(large, large).shape == ((2**20, 16) if op is tc.channel_sums else (16,))
    assert tc.weight_importance([large], [large], [0])[0].shape == (2**20,)

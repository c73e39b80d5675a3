"""NaN and infinity: the result of their channel says so, and no other channel changes by a bit.

On a GPU test_device.py asks the same.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.gpu import cases
from tests.gpu.cases import REDUCTIONS, WEIGHT_REDUCTIONS, Ops

LAYOUTS = ["nchw 7x7", "nchw 24x24", "nchw cropped", "nhwc 13 channels", "nhwc 24 channels", "[N, C]", "[N, L, C]"]
WEIGHTS = ["filters", "filters, input side", "filters, nhwc, input side", "tall, input side", "vector", "two layouts"]
VALUES = [float("nan"), float("inf"), float("-inf")]

CHANNEL_OPS: dict[str, Callable[[Ops, Tensor, Tensor], Tensor]] = {
    "channel_sums": lambda ops, a, g: ops.channel_sums(a, g),
    **{r: lambda ops, a, g, r=r: ops.channel_importance(a, g, r) for r in REDUCTIONS},
    "accumulate [C]": lambda ops, a, g: _added(ops, a, g, a.shape[1:2]),
    "accumulate [N, C]": lambda ops, a, g: _added(ops, a, g, a.shape[:2]),
}


def _added(ops: Ops, a: Tensor, g: Tensor, shape: torch.Size) -> Tensor:
    sums = torch.ones(shape, device=a.device)
    ops.accumulate_channel_sums(a, g, sums)
    return sums


def _with_last_of(tensor: Tensor, channel: int, value: float) -> Tensor:
    """A copy in the same layout, with ``value`` at the end of one channel of the last sample."""
    whole = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    whole[-1, channel][(-1,) * (tensor.dim() - 2)] = value
    return whole


def _problem(name: str, result: Tensor, clean: Tensor, at: tuple[int, ...], value: float) -> str:
    """Empty where one entry is not finite, NaN for NaN, and the others are what they are without it."""
    says_so = result[at].isnan() if value != value else result[at].isinf()
    others = result.clone()
    others[at] = clean[at]
    return "" if bool(says_so) and torch.equal(others, clean) else f"{name}, {value} at {at}: {result}, was {clean}"


def channel_problems(ops: Ops, op: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[str]:
    """What is wrong with a channel op when an activation is not finite."""
    found, run, channel = [], CHANNEL_OPS[op], 2
    for layout in LAYOUTS:
        activation, gradient = cases.make_pair(layout, dtype, device=device)
        clean = run(ops, activation, gradient)
        for value in VALUES:
            result = run(ops, _with_last_of(activation, channel, value), gradient)
            at = (-1, channel) if result.dim() == 2 else (channel,)
            found.append(_problem(layout, result, clean, at, value))
    return [problem for problem in found if problem]


def weight_problems(ops: Ops, reduction: str, device: str = "cpu") -> list[str]:
    """What is wrong with weight_importance when a gradient is not finite: in its own entry and in that beside it."""
    found = []
    for name in WEIGHTS:
        weights, gradients, dims = cases.make_weights([name, "linear"], "fp32", device=device)
        clean, others = ops.weight_importance(weights, gradients, dims, reduction)
        place = gradients[0].select(dims[0], -2)[(-1,) * (gradients[0].dim() - 1)]
        for value in VALUES:
            place.fill_(value)
            result, beside = ops.weight_importance(weights, gradients, dims, reduction)
            found.append(_problem(name, result, clean, (-2,), value))
            found.append("" if torch.equal(beside, others) else f"{name}, {value}: another tensor's scores changed")
    return [problem for problem in found if problem]


@pytest.mark.parametrize("op", CHANNEL_OPS)
def test_of_an_activation_it_stays_in_its_channel(any_ops: Ops, op: str) -> None:
    assert channel_problems(any_ops, op) == []


@pytest.mark.parametrize("reduction", WEIGHT_REDUCTIONS)
def test_of_a_gradient_it_stays_in_its_channel(any_ops: Ops, reduction: str) -> None:
    assert weight_problems(any_ops, reduction) == []


def test_infinities_of_both_signs_are_nan_where_they_meet(any_ops: Ops) -> None:
    activation, gradient = torch.ones(2, 3, 5), torch.ones(2, 3, 5)
    activation[0, 1, 0], activation[1, 1, 4] = float("inf"), float("-inf")
    assert any_ops.channel_sums(activation, gradient).tolist() == [[5.0, float("inf"), 5.0], [5.0, float("-inf"), 5.0]]
    assert any_ops.channel_importance(activation, gradient, "batch").isnan().tolist() == [False, True, False]
    gradient[:, 0, 0], activation[:, 0, 0] = float("inf"), 0.0
    assert any_ops.channel_sums(activation, gradient)[:, 0].isnan().all()

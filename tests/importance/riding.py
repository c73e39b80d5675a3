"""One step of a network with and without scoring, and what the two are compared by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_cuda as tc
from taylor_cuda.graph.observe import reader_weights
from taylor_cuda.importance.activations import ReaderSums
from taylor_cuda.importance.fused import unit_sums
from taylor_cuda.ops import library

Step = dict[str, Tensor]


def made(net: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    model = net().to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # zero or one for every channel would hide much
            nn.init.uniform_(parameter, 0.3, 1.2)
    return model


def step(model: nn.Module, x: Tensor, backward: Callable[[Tensor], None] = Tensor.backward) -> Step:
    """One forward and backward pass: outputs, loss, gradients and buffers."""
    torch.manual_seed(1)
    model.zero_grad()
    output = model(x)
    outputs = output if isinstance(output, tuple) else (output,)
    loss = F.cross_entropy(outputs[0].float(), torch.arange(len(x)) % 4).to(x.dtype)
    loss = loss + sum((0.1 * other.square().mean() for other in outputs[1:]), loss.new_zeros(()))
    backward(loss)
    found = {f"output {at}": value.detach() for at, value in enumerate(outputs)} | {"loss": loss.detach()}
    found |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def same_bits(actual: Step, expected: Step) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def gate_sums(model: nn.Module, groups: tc.Groups, x: Tensor, run: Callable[..., Any] = step) -> dict[str, Tensor]:
    """What a gate before every reader finds."""
    gates = ReaderSums(model, reader_weights(groups), per_example=True)
    run(model, x)
    (forward,) = gates.take()
    gates.close()
    return {group.name: unit_sums(group, forward) for group in groups}


def close_to(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        assert actual[name].shape == value.shape
        assert (actual[name] - value).abs().max() <= bound * value.abs().max(), name


class Passes:
    """Counts passes over an activation and its gradient that nothing but scoring needs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for name in ("accumulate_channel_sums", "channel_sums"):
            monkeypatch.setattr(library, name, self._counting(getattr(library, name)))

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.count += 1
            return function(*args)

        return run

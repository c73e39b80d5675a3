"""Scores once per optimizer step, on unscaled gradients, before clipping, and not from steps that are skipped."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD, AdamW

import taylor_cuda as tc
from tests.loops.loop import EXAMPLE, Loop, Net, Parts, batches

SOURCES = ["parameters", "activations"]


def scores_after(parts: Parts, count: int = 3, **options: Any) -> tuple[dict[str, Tensor], tc.Pruner, Loop]:
    torch.manual_seed(3)
    loop = Loop(parts, Net())
    pruner = loop.pruner(every=1000, **options)
    for batch in batches(count):
        loop.step(batch, pruner)
        pruner.step()
    return pruner.importance.scores(), pruner, loop


def close(scores: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(scores[name], value, rtol=rtol, atol=rtol * float(value.max()))


@pytest.mark.parametrize("source", SOURCES)
def test_an_accumulated_batch_is_scored_once_and_as_a_whole(source: str) -> None:
    """In eval mode the gradient of a batch is that of its micro-batches added up; squares of halves would differ."""
    torch.manual_seed(3)
    model = Net().eval()
    (x, target), (other_x, other_target) = batches(2)
    target, other_target = target.clone(), (target + 1) % 4
    whole = tc.Pruner(model, EXAMPLE, every=1000, source=source)
    whole.backward(F.cross_entropy(model(torch.cat((x, other_x))), torch.cat((target, other_target))))
    gradient = model.conv1.weight.grad.clone()
    model.zero_grad()
    parts = tc.Pruner(model, EXAMPLE, every=1000, source=source)
    whole.importance.close()
    parts.backward(F.cross_entropy(model(x), target) / 2, accumulate=True)
    with pytest.raises(tc.InputError, match="no scores yet"):
        parts.importance.scores()
    parts.backward(F.cross_entropy(model(other_x), other_target) / 2)
    torch.testing.assert_close(model.conv1.weight.grad, gradient)
    assert parts.importance.steps == 1
    close(parts.importance.scores(), whole.importance.scores(), 1e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_fp16_scores_are_those_of_fp32_within_its_precision(source: str) -> None:
    """A factor that was left in would be 2**20 or 2**-20."""
    expected, _, _ = scores_after(Parts(source=source), 1)
    scaler = partial(torch.amp.GradScaler, "cpu", init_scale=2.0**10)
    for update in ("", "before", "after"):
        parts = Parts(source=source, scaler=scaler, autocast=torch.float16, update=update)
        scores, pruner, _ = scores_after(parts, 1)
        assert pruner.importance.steps == 1
        close(scores, expected, 0.05)


def test_bf16_scores_are_those_of_fp32_within_its_precision() -> None:
    expected, _, _ = scores_after(Parts(), 1)
    close(scores_after(Parts(autocast=torch.bfloat16), 1)[0], expected, 0.2)


@pytest.mark.parametrize("update", ["", "before", "after"])
@pytest.mark.parametrize("place", ["in a score", "elsewhere"])
def test_a_step_that_the_scaler_skips_is_left_out_and_counted(update: str, place: str) -> None:
    """Wherever the overflow is: a bias of the head has no part in any score."""
    parts = Parts(scaler=partial(torch.amp.GradScaler, "cpu", init_scale=4.0), update=update)
    torch.manual_seed(3)
    loop = Loop(parts, Net())
    pruner = loop.pruner(every=3)
    first, second, third = batches(3)
    loop.step(first, pruner)
    pruner.step()
    scores = pruner.importance.scores()
    parameter = loop.model.head.bias if place == "elsewhere" else loop.model.conv3.weight
    handle = parameter.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    before = loop.results()
    loop.step(second, pruner)
    handle.remove()
    assert loop.overflows == 1
    assert torch.equal(before["model stem.weight"], loop.model.stem.weight)
    assert pruner.step() is None
    assert (pruner.importance.steps, pruner.skipped) == (1, 1)
    assert all(torch.equal(value, scores[name]) for name, value in pruner.importance.scores().items())
    loop.step(third, pruner)
    assert pruner.step() is not None
    assert (pruner.importance.skipped, pruner.skipped) == (0, 1)
    assert pruner.state_dict()["skipped"] == 1


def test_clipping_does_not_reach_the_scores() -> None:
    expected, _, _ = scores_after(Parts(), 1)
    scores, _, loop = scores_after(Parts(clip=1e-3), 1)
    assert all(torch.equal(value, expected[name]) for name, value in scores.items())
    free = scores_after(Parts(), 1)[2]
    assert not torch.equal(loop.model.head.weight, free.model.head.weight)


@pytest.mark.parametrize("source", ["auto", "activations"])
@pytest.mark.parametrize("optimizer", [partial(SGD, lr=0.05), partial(AdamW, fused=True), partial(SGD, fused=True)])
def test_watch_divides_the_factor_out_whoever_unscales(optimizer: Any, source: str) -> None:
    """A fused optimizer gets scaled gradients, and its step() is called even where it will do nothing."""

    def watched(parts: Parts) -> tuple[dict[str, Tensor], int]:
        torch.manual_seed(3)
        loop = Loop(parts, Net())
        known = loop.scaler if parts.source == "activations" else None
        with tc.watch(loop.model, EXAMPLE, source=parts.source, scaler=known) as scores:
            loop.step(batches(1)[0])
            handle = loop.model.head.bias.register_hook(lambda gradient: gradient * float("inf"))
            if parts.scaler:
                loop.step(batches(1)[0])
            handle.remove()
        return scores.scores(), scores.steps

    plain, _ = watched(Parts(optimizer))
    scaled = Parts(optimizer, scaler=partial(torch.amp.GradScaler, "cpu", init_scale=1024.0), source=source)
    for parts in (scaled, replace(scaled, clip=1e9)):
        scores, steps = watched(parts)
        assert steps == 1
        close(scores, plain, 1e-5)

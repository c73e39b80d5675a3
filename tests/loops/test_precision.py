"""With fixed weights, fp16 and compilers leave the scores of a trained network, and what is kept by them, as they are.

What fp16 changes is the network's own rounding, forward and backward: parameters and activations then give the same
scores, but for a hundredth of it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_cuda as tc
from tests.loops.loop import Net, batches

pytest.importorskip("sklearn")

from taylor_cuda.train.data import Batch, load_digits
from taylor_cuda.train.models import load_model

BATCH = 32
STEPS = 8
SCALE = 2.0**14
Found = tuple[tc.Importance, tc.Plan]


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, list[Batch]]:
    """The digits network after an epoch, and the first batches of the next one."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, data = load_model("digits").train(), load_digits(BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for x, target in data.train(0):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return model, list(data.train(1))[:STEPS]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> Iterator[None]:
    torch.compiler.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        yield
    torch.compiler.reset()


def scored(
    trained: tuple[nn.Module, list[Batch]], criterion: str, dtype: torch.dtype | None = None, compiler: str = ""
) -> Found:
    """One window, whose steps change nothing and of which every fourth overflows. The scores, and a plan by them."""
    model, data = copy.deepcopy(trained[0]), trained[1]
    groups = tc.trace(model, data[0][0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=dtype is torch.float16)
    if compiler:
        model.compile(backend=compiler)
    est = tc.Importance(model, groups, criterion)
    for i, (x, target) in enumerate(data):
        overflows = i % 4 == 1
        with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
            outputs = model(x)
            loss = F.cross_entropy(outputs, target)
        if overflows and scaler.is_enabled():
            scaler.update(2.0**40)
        elif overflows:
            loss = loss * float("inf")
        est.backward(loss, outputs, scaler=scaler if scaler.is_enabled() else None)
        if scaler.is_enabled():
            scaler.step(optimizer)
            scaler.update(SCALE)
        optimizer.zero_grad()
    return est, tc.plan(model, groups, est.scores(), {"macs": 0.5})


@pytest.fixture(scope="module")
def in_fp32(trained: tuple[nn.Module, list[Batch]]) -> Callable[[str], Found]:
    """Eager, each criterion once."""
    return functools.cache(functools.partial(scored, trained))


def check_same(found: Found, expected: Found, bound: float) -> None:
    """All scores, relative to the length of their vector, and 98 % of what is kept."""
    (est, plan), (expected_est, expected_plan) = found, expected
    assert (est.steps, est.skipped) == (expected_est.steps, expected_est.skipped) == (STEPS - 2, 2)
    scores, expected_scores = (torch.cat(list(each.scores().values())) for each in (est, expected_est))
    assert float((scores - expected_scores).norm() / expected_scores.norm()) < bound
    kept = sum(len(units) for units in expected_plan.keep.values())
    same = sum(int(torch.isin(units, plan.keep[name]).sum()) for name, units in expected_plan.keep.items())
    assert same >= 0.98 * kept


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_so"])
def test_fp16_with_steps_that_overflow(trained: Any, in_fp32: Callable[[str], Found], criterion: str) -> None:
    check_same(scored(trained, criterion, torch.float16), in_fp32(criterion), 1e-2)


def test_compiled(trained: Any, in_fp32: Callable[[str], Found]) -> None:
    check_same(scored(trained, "taylor_fo", compiler="aot_eager"), in_fp32("taylor_fo"), 1e-5)


def test_probes_of_a_compiled_network_need_a_backward_pass_that_can_be_repeated() -> None:
    """They go through the graph before the loss does. Where they can't, nothing of them is left, and it is said."""
    ((x, target),) = batches(1)

    def started(compiler: str = "") -> tuple[nn.Module, tc.Importance]:
        torch.manual_seed(0)
        model = Net()
        est = tc.Importance(model, tc.trace(model, x), "taylor_so")
        if compiler:
            model.compile(backend=compiler)
        return model, est

    def score(model: nn.Module, est: tc.Importance) -> Tensor:
        outputs = model(x)
        est.backward(F.cross_entropy(outputs, target), outputs)
        return torch.cat(list(est.scores().values()))

    model, est = started("aot_eager")
    with (
        torch._functorch.config.patch(donated_buffer=True),
        pytest.raises(tc.InputError, match=r"set torch\._functorch\.config\.donated_buffer = False"),
    ):
        score(model, est)
    assert est.steps == 0
    assert all(p.grad is None for p in model.parameters())
    torch.compiler.reset()
    torch.testing.assert_close(score(*started("aot_eager")), score(*started()))

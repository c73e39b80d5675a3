"""With fixed weights, 16 bits and compilers leave the scores of a trained network, and what is cut by them, as they are."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_cuda as tc

pytest.importorskip("sklearn")

from taylor_cuda.train.data import Batch, load_digits
from taylor_cuda.train.models import load_model

CRITERIA = ["taylor_fo", "taylor_fg", "taylor_so"]
STEPS = 12
BATCH=64
EPOCHS=3
SCALE = 2.0**14


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, list[Batch]]:
    """The digits network after three epochs, and the batches of the next one."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, data = load_model("digits").train(), load_digits(BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(EPOCHS):
        for x, target in data.train(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()
    torch.set_num_threads(threads)
    return model, list(data.train(EPOCHS))[:STEPS]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> Iterator[None]:
    torch.compiler.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        yield
    torch.compiler.reset()


def scored(
    trained: tuple[nn.Module, list[Batch]], criterion: str, dtype: torch.dtype | None = None, compiler: str = ""
) -> tuple[tc.Importance, tc.Plan]:
    """One window, whose steps change nothing and of which every fourth overflows. The scores, and a plan by them."""
    model, batches = trained
    model = copy.deepcopy(model)
    groups = tc.trace(model, batches[0][0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=dtype is torch.float16)
    if compiler:
        model.compile(backend=compiler)
    est = tc.Importance(model, groups, criterion)
    for i, (x, target) in enumerate(batches):
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


def differences(trained, criterion, **options):
    (a, p), (b, q) = scored(trained, criterion), scored(trained, criterion, **options)
    worst = max(float((b.scores()[n] - s).abs().max() / s.max()) for n, s in a.scores().items())
    same = sum(len(set(k.tolist()) & set(q.keep[n].tolist())) for n, k in p.keep.items()) / sum(len(k) for k in p.keep.values())
    return worst, same, b.skipped

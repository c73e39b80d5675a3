"""Resume in the middle of a schedule, through files, equals an uninterrupted run bit for bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import taylor_cuda as tc
from tests.loops.loop import Loop, Net, Parts, batches

LOOPS = {
    "everything": Parts(
        partial(AdamW, lr=1e-2, amsgrad=True),
        micro=2,
        scaler=partial(torch.amp.GradScaler, "cpu", init_scale=2.0**22, growth_interval=5),
        autocast=torch.float16,
        clip=0.5,
        ema=lambda model: AveragedModel(model, avg_fn=get_ema_avg_fn(0.9)),
        schedule=partial(OneCycleLR, max_lr=0.02, total_steps=60),
    ),
    "activations": Parts(partial(SGD, lr=0.05, momentum=0.9), source="activations"),
    "random": Parts(criterion="random"),
}


def run(loop: Loop, pruner: tc.Pruner, data: list) -> None:
    for batch in data:
        loop.step(batch, pruner)
        pruner.step()


def started(parts: Parts, seed: int = 0) -> tuple[Loop, tc.Pruner]:
    torch.manual_seed(seed)
    loop = Loop(parts, Net())
    return loop, loop.pruner(every=6, steps=4, seed=5)


# at once; in the first window; right after a prune step; in the middle of a later window; after the last prune step
@pytest.mark.parametrize("stop", [0, 4, 12, 15, 26])
@pytest.mark.parametrize("parts", LOOPS.values(), ids=LOOPS)
def test_resume_equals_an_uninterrupted_run(parts: Parts, stop: int, tmp_path: Path) -> None:
    data = batches(34)
    loop, pruner = started(parts)
    run(loop, pruner, data)

    first, first_pruner = started(parts)
    run(first, first_pruner, data[:stop])
    torch.save({"loop": first.state_dict(), "pruner": first_pruner.state_dict()}, tmp_path / "run.pt")

    again, again_pruner = started(parts, seed=1)
    state = torch.load(tmp_path / "run.pt")  # weights only: tensors and plain values
    again_pruner.load_state_dict(state["pruner"])
    again.load_state_dict(state["loop"])
    run(again, again_pruner, data[stop:])
    assert again_pruner.history == pruner.history
    assert again_pruner.skipped == pruner.skipped
    assert (again_pruner.done, again_pruner.batches) == (pruner.done, pruner.batches) == (True, 24)
    results, expected = again.results(), loop.results()
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


def test_a_state_is_a_copy_and_can_be_loaded_twice() -> None:
    parts, data = LOOPS["activations"], batches(6)
    loop, pruner = started(parts)
    run(loop, pruner, data[:3])
    state = pruner.state_dict()
    window = state["importance"]["window"].clone()
    run(loop, pruner, data[3:5])
    assert torch.equal(state["importance"]["window"], window)
    other, other_pruner = started(parts)
    other_pruner.load_state_dict(state)
    run(other, other_pruner, data[3:5])
    assert torch.equal(state["importance"]["window"], window)
    assert state["importance"]["counts"].tolist() == [3, 0]

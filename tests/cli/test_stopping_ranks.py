"""SIGTERM to one of two ranks: both stop after the same minibatch, save, and go on to the same end."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from taylor_cuda.cli.main import main
from taylor_cuda.surgery import load
from taylor_cuda.train import session
from taylor_cuda.train.digits import TensorData
from taylor_cuda.train.models import DigitsResNet
from tests.ranks import check_passed, on_ranks

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")

ARGUMENTS = (
    *("prune", "--epochs", "1", "--steps-limit", "4", "--every", "2", "--steps", "2", "--batch", "8", "--ema", "0.5"),
    *("--measure-seconds", "0.01", "--oracle", "0", "--recalibrate", "0", "--mixup", "0.3"),
)
STOPS = {"at the end of an epoch": (4, 0), "at a cut": (6, 1), "in fine-tuning": (10, 1), "by both": (3, None)}
"""Minibatches taken, and the rank that is told."""


@contextmanager
def told_to_stop(batch: int):
    """SIGTERM, and a Ctrl-C upon it, while the ``batch``-th minibatch is made."""
    original, seen = TensorData.train, []

    def train(self, epoch, start=0):
        for item in original(self, epoch, start):
            seen.append(1)
            if len(seen) == batch:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGINT)
            yield item

    TensorData.train = train
    try:
        yield
    finally:
        TensorData.train = original


def results_of(out: Path) -> tuple[list[str], dict[str, torch.Tensor]]:
    records = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    plans = [record["plan"] for record in records if record["event"] == "prune"]
    return plans, load(DigitsResNet(), out / "model.safetensors").state_dict()


def stop_and_go_on(taken: int, who: int | None, rank: int, folder: Path) -> None:
    out = folder / f"{taken}-{who}"
    arguments = [*ARGUMENTS, "--out", str(out)]
    with told_to_stop(taken if who in (rank, None) else 0):
        assert main(arguments) == 130
    dist.barrier()
    assert max(path.name[:8] for path in (out / "checkpoints").iterdir()) == f"{taken:08}"
    dist.barrier()
    assert main([*arguments, "--resume", "auto"]) == 0
    dist.barrier()
    plans, values = results_of(out)
    expected_plans, expected = results_of(folder / "straight")
    assert plans == expected_plans
    assert len(plans) == 2
    assert all(torch.equal(value, expected[name]) for name, value in values.items())


def straight(folder: Path) -> None:
    assert main([*ARGUMENTS, "--out", str(folder / "straight")]) == 0


def cases(rank: int, folder: Path) -> dict[str, Callable[[], None]]:
    session.ASK_EVERY = 1
    found = {name: partial(stop_and_go_on, taken, who, rank, folder) for name, (taken, who) in STOPS.items()}
    return {"straight": partial(straight, folder), **found}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("stopping")
    on_ranks(cases, found, seconds=300)
    return found


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", ["straight", *STOPS])
def test_stopped_ranks_go_on_to_the_same_end(folder, case, rank):
    check_passed(case, rank, folder)

"""Whole runs on a GPU: precision, memory format, averages, distillation, the compiler; stopping and going on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from taylor_cuda.train import RunConfig, Summary, run

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


def config(out: Path, **changes: Any) -> RunConfig:
    options = {
        **{"model": "tests.train.digits_nets:coloured", "data": "synthetic", "image_size": 16, "num_classes": 10},
        **{"epochs": 1, "steps_limit": 8, "every": 3, "steps": 2, "batch": 32, "global_batch": 64, "oracle": 0},
        **{"measure_seconds": 0.01, "lr": 0.01, "out": out, "device": "cuda"},
    }
    return RunConfig(**{**options, **changes})


def check(summary: Summary) -> None:
    assert summary.macs_after <= 0.5 * summary.macs_before
    assert summary.cut_difference <= 1e-2 * summary.cut_scale
    assert math.isfinite(summary.pruned_accuracy)


@pytest.mark.parametrize(
    "changes",
    [
        {"amp": "bf16", "channels_last": True, "ema": 0.99, "distill": 0.5, "clip": 1.0, "label_smoothing": 0.1},
        {"amp": "fp16", "channels_last": True, "criterion": "taylor_so"},
        {"amp": "bf16", "criterion": "taylor_fg", "optimizer": "adamw", "lr": 1e-3},
        {"mode": "compact", "channels_last": True},
        {"compile": True, "channels_last": True, "amp": "bf16"},
    ],
    ids=["bf16", "fp16", "examples", "compact", "compile"],
)
def test_a_run_ends_within_its_budget(tmp_path: Path, changes: dict[str, Any]) -> None:
    check(run(config(tmp_path, **changes)))


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if line.startswith("prune"):
            raise KeyboardInterrupt

    options = {"amp": "fp16", "ema": 0.9, "distill": 0.5}
    with pytest.raises(Exception, match="state saved"):
        run(config(tmp_path, **options), tell=stop)
    check(run(config(tmp_path, **options), resume=True))
    assert not (tmp_path / "checkpoints").exists()

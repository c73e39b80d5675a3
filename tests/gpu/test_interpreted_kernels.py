"""The Triton kernels against float64 in Triton's interpreter, which shows neither races nor what a GPU rounds."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.gpu import interpreted
from tests.gpu.emulator import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What is wrong, by case: all of them run in one process."""
    file = tmp_path_factory.mktemp("interpreted") / "problems.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.gpu.interpreted", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, list[str]] = json.loads(file.read_text())
    return result


@pytest.mark.parametrize(("layout", "dtype"), interpreted.PLAN)
def test_channel_ops_match_float64(problems: dict[str, list[str]], layout: str, dtype: str) -> None:
    assert problems[interpreted.name_of(layout, dtype)] == []


def test_nan_stays_in_its_channel(problems: dict[str, list[str]]) -> None:
    assert problems["nan"] == []


def test_all_reductions_at_once_are_the_same_bits(problems: dict[str, list[str]]) -> None:
    assert problems["same bits"] == []


@pytest.mark.parametrize("layout", interpreted.cases.PAIRS)
def test_relu_matches_pytorch_and_float64(problems: dict[str, list[str]], layout: str) -> None:
    assert problems[f"{layout}, ReLU"] == []

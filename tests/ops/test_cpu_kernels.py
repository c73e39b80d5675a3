"""What the CPU kernels do by shape and by processor: long and very wide rows, and the narrower instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.cases import (
    DTYPES,
    PAIRS,
    WEIGHT_DTYPES,
    WEIGHTS,
    Ops,
    check_channel_ops,
    check_score_relu_backward,
    check_weight_importance,
    make_pair,
    make_relu,
    make_weights,
    source,
)
from tests.ops.checks import BACKENDS, ops_of

pytestmark = pytest.mark.skipif("native" not in BACKENDS, reason="the C++ parts were not built")

# Input sides whose rows are long (added six at a time, some left over), wider than a piece, or joined to longer ones.
SHAPES = [(9, 1200), (64, 1024), (131, 2051), (7, 150, 3, 3), (6, 700, 3, 3), (5, 9300), (700, 3), (333, 8), (90, 5, 2)]

RELU_LAYOUTS = ("nchw 14x14", "nchw 33x31", "nhwc 7x7", "nhwc 13 channels", "[N, C] odd", "two layouts")


def wide_weights(types: str) -> tuple[list[torch.Tensor], list[torch.Tensor], list[int]]:
    weight, gradient = (source(DTYPES[name], i) for i, name in enumerate(WEIGHT_DTYPES[types]))
    return [weight(*shape) for shape in SHAPES], [gradient(*shape) for shape in SHAPES], [1] * len(SHAPES)


def problems_of(ops: Ops) -> list[str]:
    """What is wrong with every layout, shape and dtype."""
    found = []
    for name, dtype in DTYPES.items():
        for layout in PAIRS:
            found += [f"{layout} {name}: {text}" for text in check_channel_ops(ops, *make_pair(layout, dtype), False)]
        for layout in RELU_LAYOUTS:
            relu = check_score_relu_backward(ops, *make_relu(layout, dtype), twice=False)
            found += [f"{layout} {name}, ReLU: {text}" for text in relu]
    for types in WEIGHT_DTYPES:
        found += [f"{types}: {text}" for text in check_weight_importance(ops, *wide_weights(types))]
        found += [f"{types}: {text}" for text in check_weight_importance(ops, *make_weights(list(WEIGHTS), types))]
    return found


@pytest.mark.parametrize("types", WEIGHT_DTYPES)
def test_wide_rows_within_the_bound_of_float64(types: str) -> None:
    problems = check_weight_importance(ops_of("native"), *wide_weights(types))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_numbers_add_up_exactly(shape: tuple[int, ...]) -> None:
    weight, gradient = (torch.randint(-3, 4, shape).float() for _ in range(2))
    products = weight.double() * gradient.double()
    for dim in range(len(shape)):
        (result,) = ops_of("native").weight_importance([weight], [gradient], [dim], "sum")
        assert torch.equal(result.double(), products.sum([d for d in range(len(shape)) if d != dim]))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_narrower_instruction_sets_compute_the_same(capability: str) -> None:
    """The choice is made once in a process, so another one is asked; ATEN_CPU_CAPABILITY is PyTorch's own switch."""
    code = "from tests.ops import test_cpu_kernels as t; print(*t.problems_of(t.ops_of('native')), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == ""

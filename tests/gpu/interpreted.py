"""Runs the Triton kernels in Triton's interpreter, on CPU tensors: ``python -m tests.gpu.interpreted FILE``.

What is wrong goes into the file as JSON, {"layout, type": [...]}. It is a process of its own, because TRITON_INTERPRET
is read when a kernel is decorated.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.gpu import cases

# float32 everywhere; each layout takes one of the others, in turn, so that the run stays short.
OTHERS = ("bf16", "fp16", "fp64")
PLAN = [(layout, dtype) for i, layout in enumerate(cases.PAIRS) for dtype in ("fp32", OTHERS[i % len(OTHERS)])]


def name_of(layout: str, dtype: str) -> str:
    """The name under which a case is reported."""
    return f"{layout}, {dtype}"


def triton_ops() -> cases.Ops:
    """The ops of taylor_cuda.kernels."""
    from taylor_cuda.kernels.accumulate_channel_sums import accumulate_channel_sums
    from taylor_cuda.kernels.channel_importance import channel_importance
    from taylor_cuda.kernels.channel_sums import channel_sums
    from taylor_cuda.kernels.score_relu_backward import score_relu_backward

    ops = SimpleNamespace(
        channel_sums=channel_sums,
        channel_importance=channel_importance,
        accumulate_channel_sums=accumulate_channel_sums,
        score_relu_backward=score_relu_backward,
    )
    return cases.Ops(ops)


def run(ops: cases.Ops, layout: str, dtype: str) -> list[str]:
    """What is wrong with one case."""
    try:
        return cases.check_channel_ops(ops, *cases.make_pair(layout, cases.DTYPES[dtype]), twice=dtype == "fp32")
    except Exception:
        return [traceback.format_exc()]


def run_relu(ops: cases.Ops, i: int, layout: str) -> list[str]:
    """What is wrong with the ReLU in one layout: half of the forms, one type."""
    dtype = list(cases.DTYPES.values())[i % 4]
    forms = cases.RELU_FORMS[i % 2 * 2 :][:2]
    try:
        return cases.check_score_relu_backward(ops, *cases.make_relu(layout, dtype), forms, twice=i % 8 == 0)
    except Exception:
        return [traceback.format_exc()]


def nan_case(ops: cases.Ops) -> list[str]:
    """NaN in one channel of one sample must show there and nowhere else."""
    activation, gradient = cases.make_pair("nchw 7x7", torch.float32)
    gradient[-1, 2, -1, -1] = float("nan")
    found = [ops.channel_importance(activation, gradient, reduction).isnan() for reduction in cases.REDUCTIONS]
    found += [*ops.channel_importance(activation, gradient, "all").isnan()]
    return (
        [] if all(where.nonzero().flatten().tolist() == [2] for where in found) else ["NaN in another channel, or lost"]
    )


def same_bits(ops: cases.Ops) -> list[str]:
    """The rows of "all" where samples are apart anyway and no sum is split, and of [N, C]."""
    found = []
    for layout in ("nchw 7x7", "nhwc cropped", "[N, C]"):
        pair = cases.make_pair(layout, torch.float32)
        rows = ops.channel_importance(*pair, "all")
        for row, reduction in zip(rows, cases.REDUCTIONS, strict=True):
            if not torch.equal(row, ops.channel_importance(*pair, reduction)):
                found.append(f"{layout}: {reduction} of all has other bits")
    return found


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # and so memory from empty() is NaN until it is written
    interpreted = triton_ops()
    problems = {name_of(*case): run(interpreted, *case) for case in PLAN}
    problems |= {f"{layout}, ReLU": run_relu(interpreted, i, layout) for i, layout in enumerate(cases.PAIRS)}
    problems["nan"] = nan_case(interpreted)
    problems["same bits"] = same_bits(interpreted)
    Path(sys.argv[1]).write_text(json.dumps(problems))

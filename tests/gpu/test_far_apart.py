"""Offsets past 2**31 elements in every implementation, without the memory: a few numbers far apart in an empty storage.

The storage is never touched elsewhere, so that of its 4 GiB only a few pages exist. A GPU has the memory: whole tensors
of that size are in test_device.py.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.gpu import cases, emulator, interpreted, triton_launches
from tests.gpu.cases import Ops

FAR = 2**31 + 64
SHAPE = (2, 16, 3, 4)
STRIDES = {
    "samples": (FAR, 12, 4, 1),
    "channels": (12, FAR // 15, 4, 1),
    "rows": (64, 4, FAR // 2, 1),
    "samples, nhwc": (FAR, 1, 64, 16),
    "pixels, nhwc": (96, 1, FAR // 2, 16),
    "everything": (7, 100, FAR // 2, 24),
}


def new_storage() -> Tensor:
    return torch.empty(FAR + 2**24, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def storage() -> Iterator[Tensor]:
    """bfloat16, larger than any offset above."""
    if torch.utils.deterministic.fill_uninitialized_memory and torch.are_deterministic_algorithms_enabled():
        pytest.skip("empty memory would be filled")
    try:
        yield new_storage()
    except RuntimeError as error:
        pytest.skip(f"no address space for 4 GiB: {error}")


def far_and_near(storage: Tensor, place: str) -> tuple[Tensor, Tensor]:
    """The same shape twice: numbers far apart, and others side by side."""
    assert sum((size - 1) * stride for size, stride in zip(SHAPE, STRIDES[place], strict=True)) >= 2**31
    make = cases.source(torch.bfloat16, 0)
    return storage.as_strided(SHAPE, STRIDES[place]).copy_(make(*SHAPE)), make(*SHAPE)


@pytest.mark.parametrize("place", STRIDES)
def test_numbers_far_apart(any_ops: Ops, storage: Tensor, place: str) -> None:
    far, near = far_and_near(storage, place)
    assert cases.check_channel_ops(any_ops, far, near, twice=False) == []
    assert cases.check_channel_ops(any_ops, near, far, twice=False) == []
    for dim in (0, 1):
        assert cases.check_weight_importance(any_ops, [far, near], [near, far], [dim, dim], ("sum",)) == []


def interpreted_problems() -> list[str]:
    """What is wrong in Triton's interpreter, whose process this is."""
    storage, ops = new_storage(), interpreted.triton_ops()
    found = []
    for place in STRIDES:
        far, near = far_and_near(storage, place)
        terms = cases.terms_of(far, near)
        wanted, allowed = terms.sum(2), cases.tolerance(torch.bfloat16) * terms.abs().sum(2)
        found.append(cases.difference(place, ops.channel_sums(far, near), wanted, allowed))
    return [problem for problem in found if problem]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_numbers_far_apart_in_the_interpreter() -> None:
    code = "from tests.gpu import test_far_apart as t; print(*t.interpreted_problems(), sep='\\n')"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=emulator.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr[-2000:]


LARGE = {
    "nchw": ((36, 64, 1024, 1024), None),
    "nhwc": ((36, 64, 1024, 1024), (2**26, 1, 2**16, 64)),
    "[N, C]": ((2**21, 2048), None),
    "one channel": ((1, 1, 2**31 + 2**20), None),
    "many channels": ((1, 2**31 + 2**20, 2), None),
    "many samples": ((2**28, 8, 2), None),
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("op", ["channel_sums", "channel_importance"])
@pytest.mark.parametrize("name", LARGE)
def test_launches_for_more_than_two_to_the_31_elements(op: str, name: str) -> None:
    """No more programs than a grid may have, at which ``record`` looks."""
    shape, strides = LARGE[name]
    whole = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    tensor = whole if strides is None else torch.empty_strided(shape, strides, dtype=torch.bfloat16, device="meta")
    assert tensor.numel() > 2**31
    run = triton_launches.triton_op(op)
    assert run is not None
    assert triton_launches.record(lambda: run(tensor, tensor))

"""Every registered op leaves the same bits when it runs again, wherever its inputs lie and whatever else runs.

The same on a GPU is in tests/gpu/test_device.py.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from taylor_cuda.ops import backends
from tests.ops.checks import BACKENDS
from tests.ops.inputs import calls_of, run, same_bits

each_type = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
each_op = pytest.mark.parametrize("op", backends.OPS)


def implementation_of(op: str, backend: str) -> Callable[..., Any]:
    found = backends.find(op, backend, "cpu")
    if found is None:
        pytest.skip(f"{backend} has no {op} for the CPU")
    return found


@each_type
@pytest.mark.parametrize("backend", BACKENDS)
@each_op
def test_two_runs_are_bit_equal(op: str, backend: str, dtype: torch.dtype) -> None:
    implementation = implementation_of(op, backend)
    first = run(implementation, calls_of(op, dtype))
    assert same_bits(first, run(implementation, calls_of(op, dtype)))
    assert not same_bits(first, run(implementation, calls_of(op, dtype, seed=1)))  # they do depend on the input


@pytest.mark.skipif("native" not in BACKENDS, reason="the C++ parts were not built")
@each_type
@pytest.mark.parametrize("op", [op for op in backends.OPS if op not in backends.MADE_OF_OTHERS])
def test_the_number_of_threads_changes_no_bit(op: str, dtype: torch.dtype) -> None:
    """But of the library's convolutions, whose sums are divided among threads."""
    implementation = implementation_of(op, "native")
    runs = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        runs.append(run(implementation, calls_of(op, dtype)))
    assert all(same_bits(runs[0], other) for other in runs[1:])


@pytest.mark.skipif("native" not in BACKENDS, reason="the C++ parts were not built")
@each_op
def test_calls_at_the_same_time_do_not_meet(op: str) -> None:
    """Autograd calls from threads of its own."""
    implementation = implementation_of(op, "native")
    alone = run(implementation, calls_of(op, torch.float32))
    with ThreadPoolExecutor(3) as pool:
        together = list(
            pool.map(lambda calls: run(implementation, calls), [calls_of(op, torch.float32) for _ in "123"])
        )
    assert all(same_bits(alone, other) for other in together)


def test_an_op_without_inputs_is_named() -> None:
    with pytest.raises(KeyError, match=r"a_new_op has no entry in tests/ops/inputs\.py"):
        calls_of("a_new_op", torch.float32)

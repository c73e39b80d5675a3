"""The ops of each backend that a GPU has here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from taylor_cuda.ops import backends
from tests.gpu.cases import Ops


def _ops(backend: str) -> Ops:
    return Ops(SimpleNamespace(**{op: backends.find(op, backend, "cuda") for op in backends.OPS}))


@pytest.fixture(params=["native", "triton"])
def ops(request: pytest.FixtureRequest) -> Ops:
    """The ops of one backend; weight_importance is None for triton."""
    found = _ops(request.param)
    if found.channel_sums is None:
        pytest.skip(f"the {request.param} backend is not installed (python -m taylor_cuda.info says why)")
    return found


@pytest.fixture
def native() -> Ops:
    found = _ops("native")
    if found.weight_importance is None:
        pytest.skip("taylor_cuda/_C_cuda.so was not built")
    return found


@pytest.fixture
def no_synchronization() -> Iterator[Callable[[], None]]:
    """From the call on, an operation that waits for the GPU raises."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")

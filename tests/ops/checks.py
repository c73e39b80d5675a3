"""One backend seen as a set of ops, for the checks that all backends share (``tests/gpu/cases.py``)."""

from __future__ import annotations

import pytest

from taylor_cuda.ops import backends
from tests.gpu.cases import Ops

DEVICE = "cpu"
SCORES = ("channel_importance", "channel_sums", "accumulate_channel_sums", "weight_importance")  # those of Ops
BACKENDS = [name for name in ("native", "reference") if all(name in backends.available(op, DEVICE) for op in SCORES)]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


class Backend:
    """The implementations of one backend, called without the dispatcher."""

    def __init__(self, name: str) -> None:
        for op in SCORES:
            setattr(self, op, backends.find(op, name, DEVICE))


def ops_of(backend: str) -> Ops:
    return Ops(Backend(backend))

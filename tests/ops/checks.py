"""One backend seen as a set of ops, for the checks that all backends share (``tests/gpu/cases.py``)."""

from __future__ import annotations

import pytest

from taylor_cuda.ops import backends
from tests.gpu.cases import Ops

DEVICE = "cpu"
BACKENDS = [name for name in ("native", "reference") if name in backends.available("channel_importance", DEVICE)]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


class Backend:
    """The implementations of one backend, called without the dispatcher; None where it has none."""

    def __init__(self, name: str) -> None:
        for op in backends.OPS:
            setattr(self, op, backends.find(op, name, DEVICE))


def ops_of(backend: str) -> Ops:
    return Ops(Backend(backend))

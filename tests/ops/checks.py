"""One backend seen as a set of ops, for the checks that all backends share (``tests/gpu/cases.py``)."""

from __future__ import annotations

import pytest

from taylor_cuda.ops import backends
from tests.gpu.cases import Ops

DEVICE = "cpu"
BACKENDS = [name for name in ("native", "reference") if name in backends.available("channel_importance", DEVICE)]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def each_implementation(*ops: str) -> pytest.MarkDecorator:
    """``run``: the implementation of an op, or those of several, of every backend that has them."""
    names = [name for name in backends.NAMES if all(backends.find(op, name, DEVICE) is not None for op in ops)]
    found = [[backends.find(op, name, DEVICE) for op in ops] for name in names]
    return pytest.mark.parametrize("run", [each if len(each) > 1 else each[0] for each in found], ids=names)


class Backend:
    """The implementations of one backend, called without the dispatcher; None where it has none."""

    def __init__(self, name: str) -> None:
        for op in backends.OPS:
            setattr(self, op, backends.find(op, name, DEVICE))


def ops_of(backend: str) -> Ops:
    return Ops(Backend(backend))

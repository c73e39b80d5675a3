"""What the tests of the adapters share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _quiet(one_thread: None) -> Iterator[None]:
    """Torch-Pruning warns of every parameter outside a layer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        yield

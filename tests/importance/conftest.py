"""Fixtures of the tests of sums that ride on ReLUs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import taylor_cuda as tc
from tests.importance.riding import Passes, made
from tests.importance.riding_nets import Residual


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(monkeypatch)


@pytest.fixture
def residual() -> tuple[nn.Module, Tensor, tc.Groups]:
    model, x = made(Residual), torch.randn(Residual.shape, dtype=torch.float64)
    return model, x, tc.trace(model, x)

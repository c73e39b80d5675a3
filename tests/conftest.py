"""What every test relies on."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator

import pytest
import torch


def pytest_configure() -> None:
    try:
        importlib.import_module("taylor_cuda.kernels")
    except ModuleNotFoundError as error:
        raise pytest.UsageError(f"{error}: install the package first, pip install --no-build-isolation -e .") from error
    if importlib.util.find_spec("hypothesis") is not None:
        settings = importlib.import_module("hypothesis").settings
        settings.register_profile("patient", deadline=None)  # how long an example takes is for the machine to say
        settings.load_profile("patient")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """The same random numbers for every test, whichever ran before, and no setting left behind."""
    torch.manual_seed(0)
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)


@pytest.fixture
def one_thread() -> None:
    """For networks of a few hundred weights, whose threads would only wait for each other."""
    torch.set_num_threads(1)

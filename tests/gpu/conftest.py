from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu import emulator
from tests.gpu.cases import Ops
from tests.ops.checks import BACKENDS, ops_of

DEFINITIONS = torch.library.Library("taylor_cuda_emulated", "DEF")  # kept alive: the ops die with it


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Ops:
    """The CUDA ops on CPU tensors."""
    if emulator.compiler() is None:
        pytest.skip("no C++ compiler on the PATH: the CUDA sources can't be compiled for the CPU")
    library = emulator.build(tmp_path_factory.mktemp("emulated") / "csrc")
    for schema in emulator.schemas():
        DEFINITIONS.define(schema)
    torch.ops.load_library(str(library))
    return Ops(torch.ops.taylor_cuda_emulated)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that an op allocates holds NaN until it is written."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(scope="session")
def remembered(request: pytest.FixtureRequest) -> Path | None:
    """A folder for what compiled kernels use, kept from run to run; None where pytest keeps nothing."""
    cache = getattr(request.config, "cache", None)
    return None if cache is None else Path(cache.mkdir("compiled_kernels"))


@pytest.fixture(params=["emulated", *BACKENDS])
def any_ops(request: pytest.FixtureRequest) -> Ops:
    """The CUDA kernels on the CPU, and every backend of the CPU."""
    found: Ops = request.getfixturevalue("emulated") if request.param == "emulated" else ops_of(request.param)
    return found

"""What several subjects need of the peers: which of ours there are, compiling, and importing what may not be installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.race import Options
from taylor_cuda.ops import backends

CUDA_NAMES = {"ours:cuda": "native", "ours:triton": "triton"}
CPU_NAMES = {"ours:native": "native"}


def ours(op: str, options: Options) -> dict[str, str | None]:
    """``{provider: backend}`` of an op on this device; ``None`` for a backend that isn't there."""
    names = CUDA_NAMES if options.cuda else CPU_NAMES
    found = {
        name: backend for name, backend in names.items() if not (op == "weight_importance" and backend == "triton")
    }
    return {name: backend if backends.find(op, backend, options.device) else None for name, backend in found.items()}


def using(backend: str) -> Callable[[], Any]:
    """A context in which every op runs with ``backend``."""
    return partial(backends.use, backend)


def compiled(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any] | str:
    """``function`` compiled for exactly these arguments, or the reason why that does not work here."""
    torch._dynamo.reset()  # or the ninth shape of one function would silently run uncompiled
    made = torch.compile(function, dynamic=False, fullgraph=True)
    try:
        made(*arguments)
    except Exception as error:
        return f"does not compile here: {type(error).__name__}"
    return made


def installed(module: str) -> Any | None:
    """The module, or ``None`` where it isn't installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None

"""What several suites need: which backends of ours there are, compiling, importing what may not be installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from taylor_cuda.bench.race import Options
from taylor_cuda.ops import backends

CUDA_NAMES = {"ours:cuda": "native", "ours:triton": "triton"}
CPU_NAMES = {"ours:native": "native"}


def our_names(op: str, options: Options) -> list[str]:
    """Our providers of an op on this kind of device, whether they were built or not."""
    if op == "weight_importance" and options.cuda:
        return ["ours:cuda"]
    return list(CUDA_NAMES if options.cuda else CPU_NAMES)


def ours(op: str, options: Options) -> dict[str, str | None]:
    """``{provider: backend}`` of an op on this device; ``None`` for a backend that isn't there."""
    backend = CUDA_NAMES | CPU_NAMES
    return {
        name: backend[name] if backends.find(op, backend[name], options.device) else None
        for name in our_names(op, options)
    }


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

"""What several suites need: which backends of ours there are, compiling, importing what may not be installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch

from taylor_cuda.bench.race import Options, Provider
from taylor_cuda.ops import backends

CUDA_NAMES = {"ours:cuda": "native", "ours:triton": "triton"}
CPU_NAMES = {"ours:native": "native"}
WITHOUT_TRITON = ("weight_importance", "keep_mask", "gather_kept", "scatter_kept")
WITHOUT_CUDA = ("batch_norm_relu_forward",)


def our_names(op: str, options: Options) -> list[str]:
    """Our providers of an op on this kind of device, whether they were built or not."""
    if op in WITHOUT_TRITON and options.cuda:
        return ["ours:cuda"]
    if op in WITHOUT_CUDA and options.cuda:
        return ["ours:triton"]
    return list(CUDA_NAMES if options.cuda else CPU_NAMES)


def ours(op: str, options: Options) -> dict[str, str | None]:
    """``{provider: backend}`` of an op on this device; ``None`` for a backend that isn't there."""
    backend = CUDA_NAMES | CPU_NAMES
    return {
        name: backend[name] if backends.find(op, backend[name], options.device) else None
        for name in our_names(op, options)
    }


def our_providers(
    op: str,
    options: Options,
    run: Callable[[Any], Any],
    check: Callable[[Any, int], float],
    note: str = "",
    before: Callable[[], Any] = lambda: None,
) -> tuple[list[Provider], list[tuple[str, str]]]:
    """A provider for every backend of an op that is there, and the name of every one that isn't, with the reason.

    Args:
        op: whose backends.
        options: of the run.
        run: does the job with whatever backend is in use.
        check: as every provider has one.
        note: for the rows.
        before: done before every call, outside the clock.
    """

    @contextmanager
    def using(backend: str) -> Iterator[None]:
        with preceded_by(before)(), backends.use(backend):
            yield

    found = ours(op, options)
    providers = [
        Provider(name, run, check, note, context=partial(using, backend))
        for name, backend in found.items()
        if backend is not None
    ]
    return providers, [(name, "not built here") for name, backend in found.items() if backend is None]


def preceded_by(before: Callable[[], Any]) -> Callable[[], AbstractContextManager[None]]:
    """A provider's context in which nothing is different, but something was done before."""

    @contextmanager
    def context() -> Iterator[None]:
        before()
        yield

    return context


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

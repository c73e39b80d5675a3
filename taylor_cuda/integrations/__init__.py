"""Adapters for other people's libraries, one module each, imported when it is asked for, and its library with it."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

__all__ = ["torch_pruning"]


def __getattr__(name: str) -> ModuleType:
    """``taylor_cuda.integrations.NAME`` without an import of its own."""
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")

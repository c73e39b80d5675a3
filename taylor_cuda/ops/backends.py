"""The only place that chooses which implementation of an op runs.

Three backends, one signature: ``native`` (C++ and CUDA C++ in ``taylor_cuda/_C*.so``), ``triton``
(``taylor_cuda.kernels``) and ``reference`` (plain PyTorch, always there). A backend that was asked for and is missing
raises; a preferred one that is missing is skipped, and ``python -m taylor_cuda.info`` shows it. Triton has the ops on
activations only: lists of tensors of any number are no arguments of its kernels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taylor_cuda.errors import InputError
from taylor_cuda.ops import checks, reference

Implementation = Callable[..., Any]

NAMES = ("native", "triton", "reference")
OPS = (
    "channel_importance",
    "channel_sums",
    "accumulate_channel_sums",
    "weight_importance",
    "accumulate_importance",
    "keep_mask",
    "score_relu_backward",
    "batch_norm_relu_forward",
    "batch_norm_relu_backward",
    "pack_channels",
    "unpack_channels",
    "gather_kept",
    "scatter_kept",
    "masked_conv2d_forward",
    "masked_conv2d_backward",
)

# Best first. The order for CUDA is a presumption until a GPU run shows otherwise, op by op; such a row goes into
# PREFERENCE_OF_OP.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("native", "reference"),
    "cuda": ("native", "triton", "reference"),
}
PREFERENCE_OF_OP: dict[tuple[str, str], tuple[str, ...]] = {}

_LIBRARIES = {"cpu": ("_C.so",), "cuda": ("_C.so", "_C_cuda.so")}
_asked: str | None = os.environ.get("TAYLOR_CUDA_BACKEND") or None


def _order(op: str, device: str) -> tuple[str, ...]:
    order = PREFERENCE_OF_OP.get((op, device), PREFERENCE.get(device, ("reference",)))
    interpreted = device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return (*order, "triton") if interpreted else order


@functools.cache
def load_native(device: str) -> bool:
    """Load the native libraries for a device type; False where they were not built."""
    names = _LIBRARIES.get(device, ())
    paths = [Path(__file__).parent.parent / name for name in names]
    if not names or not all(path.is_file() for path in paths):
        return False
    for path in paths:
        torch.ops.load_library(str(path))
    return True


def _find_native(op: str, device: str) -> Implementation | None:
    name, key = f"taylor_cuda_native::{op}", {"cpu": "CPU", "cuda": "CUDA"}.get(device, "")
    if not load_native(device) or not hasattr(torch.ops.taylor_cuda_native, op):
        return None
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, key):
        return None
    found: Implementation = getattr(torch.ops.taylor_cuda_native, op).default
    return found


def _with_pairs_checked(weight_importance: Implementation) -> Implementation:
    """The definition takes anything that multiplies; the native code looks at every pair, and so must this backend."""

    @functools.wraps(weight_importance)
    def run(weights: Sequence[Tensor], gradients: Sequence[Tensor], dims: Sequence[int], *reduction: str) -> Any:
        checks.check_weight_pairs(weights, gradients, dims)
        return weight_importance(weights, gradients, dims, *reduction)

    return run


def _with_units_checked(accumulate_importance: Implementation) -> Implementation:
    """Likewise: broadcasting would take what the native code refuses."""

    @functools.wraps(accumulate_importance)
    def run(*args: Any) -> None:
        checks.check_units(*args[:9])
        accumulate_importance(*args)

    return run


def _with_gathered_checked(gather_kept: Implementation) -> Implementation:
    """Likewise: an entry for a dimension without places would be taken as zeros."""

    @functools.wraps(gather_kept)
    def run(*args: Any) -> Any:
        checks.check_gathered(*args[:4])
        return gather_kept(*args)

    return run


def _with_scattered_checked(scatter_kept: Implementation) -> Implementation:
    """Likewise: values of one row or column would be broadcast."""

    @functools.wraps(scatter_kept)
    def run(*args: Any) -> None:
        checks.check_scattered(*args[:4])
        scatter_kept(*args)

    return run


_CHECKED = {
    "weight_importance": _with_pairs_checked,
    "accumulate_importance": _with_units_checked,
    "gather_kept": _with_gathered_checked,
    "scatter_kept": _with_scattered_checked,
}


def _find_triton(op: str, device: str) -> Implementation | None:
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    module = importlib.import_module("taylor_cuda.kernels").MODULE_OF_OP.get(op)
    if module is None:
        return None
    try:
        found: Implementation = getattr(importlib.import_module(module), op)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return None
    return found


@functools.cache
def find(op: str, backend: str, device: str) -> Implementation | None:
    """The implementation of an op in one backend for one device type (``"cpu"``, ``"cuda"``), None if there is none."""
    if op not in OPS:
        raise InputError(f"op: wanted one of {', '.join(OPS)}, got {op!r}")
    if backend == "native":
        return _find_native(op, device)
    if backend == "triton":
        return _find_triton(op, device)
    if backend == "reference":
        found: Implementation = getattr(reference, op)
        return _CHECKED[op](found) if op in _CHECKED else found
    raise InputError(f"backend: wanted one of {', '.join(NAMES)}, got {backend!r}")


def available(op: str, device: str) -> tuple[str, ...]:
    """The backends that have an op for a device type, best first."""
    return tuple(backend for backend in _order(op, device) if find(op, backend, device) is not None)


def asked() -> str | None:
    """The backend that ``use`` asks for, or the environment variable TAYLOR_CUDA_BACKEND did at the import, if any."""
    return _asked


def select(op: str, device: str) -> Implementation:
    """The implementation to run: the one asked for, or the best there is.

    Raises:
        InputError: the backend that was asked for does not have this op on this device.
    """
    return _select(op, device, _asked)


@functools.cache
def _select(op: str, device: str, wanted: str | None) -> Implementation:
    found = find(op, wanted or available(op, device)[0], device)
    if found is None:
        raise InputError(
            f"backend: {wanted!r} was asked for, but has no {op} for {device} tensors here; there is "
            f"{', '.join(available(op, device))}"
        )
    return found


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Run every op of the process with one backend while the context lasts (all threads: autograd's are among them).

    Args:
        name: ``"native"``, ``"triton"`` or ``"reference"``. An op that this backend lacks raises when it is called.

    Raises:
        InputError: no backend has that name.
    """
    global _asked
    if name not in NAMES:
        raise InputError(f"backend: wanted one of {', '.join(NAMES)}, got {name!r}")
    before, _asked = _asked, name
    try:
        yield
    finally:
        _asked = before

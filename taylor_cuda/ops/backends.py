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

# Ops of the backend "native" that are made of others instead of compiled.
MADE_OF_OTHERS = {
    "masked_conv2d_forward": "taylor_cuda.ops.packed_conv",
    "masked_conv2d_backward": "taylor_cuda.ops.packed_conv",
}

# Best first. On an H200, where both have an op, native takes 0.28 to 0.91 of Triton's time in every layout (run
# cb8fc4cc99be); what other rows decide otherwise, op by op, goes into PREFERENCE_OF_OP.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("native", "reference"),
    "cuda": ("native", "triton", "reference"),
}
PREFERENCE_OF_OP: dict[tuple[str, str], tuple[str, ...]] = {}

# The share of a convolution's products up to which, on a CPU, the compact one ("native") is faster than the whole one
# with masks ("reference"), by kind. What decided, with half, 0.8, 0.9 and all of the channels kept: reference ÷ native,
# in CPU time of one thread, fp32, NCHW and channels_last, on a processor with AVX-512:
#   1x1        16×256×14×14 → 256  forward 3.8 1.5 1.9 1.1, 3.1 1.8 1.4 1.1  backward 3.8 1.7 1.3 1.3, 4.2 1.6 1.6 1.1
#   3x3        16×128×28×28 → 128  forward 3.8 1.7 1.1 1.0, 3.6 1.4 1.1 1.1  backward 3.6 1.4 1.2 0.9, 4.2 1.4 1.2 1.0
#   8 groups   8×256×14×14 → 256   forward 1.5 1.2 1.1 1.1, 1.4 1.1 0.9 1.1  backward 1.7 1.2 1.1 1.1, 1.5 1.2 1.0 1.0
#   32 groups  8×128×28×28 → 128   forward 3.0 1.4 1.3 1.3, 2.0 1.0 0.9 1.4  backward 2.2 1.2 1.2 1.1, 2.3 1.1 1.0 1.2
#   depthwise  16×384×14×14        forward 2.2 1.7 1.6 1.6, 1.8 1.3 1.3 1.4  backward 2.3 1.1 1.2 1.7, 1.6 1.1 1.1 1.2
COMPACT_UP_TO = {"1x1": 1.0, "kxk": 1.0, "grouped": 0.8, "depthwise": 1.0}

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
    if op in MADE_OF_OTHERS:
        made: Implementation = getattr(importlib.import_module(MADE_OF_OTHERS[op]), op)
        return made
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


def select(op: str, device: str, call: Sequence[Any] = ()) -> Implementation:
    """The implementation to run: the one asked for, or the best there is, for a call where that depends on it.

    Raises:
        InputError: the backend that was asked for does not have this op on this device.
    """
    if call and _asked is None and op in MADE_OF_OTHERS:
        return _first(op, device, _order_of_masked_conv2d(op, device, call))
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


@functools.cache
def _first(op: str, device: str, order: tuple[str, ...]) -> Implementation:
    return next(found for found in (find(op, backend, device) for backend in order) if found is not None)


def _order_of_masked_conv2d(op: str, device: str, call: Sequence[Any]) -> tuple[str, ...]:
    weight = call[1] if op == "masked_conv2d_forward" else call[2]
    keeps, groups, packed = call[3:5], call[8], call[9]
    if device == "cuda":
        # H200, bf16 channels_last, batch 256, half kept, shapes of ResNet-50 (run 1a5b09a9ab84): cuDNN on what was
        # gathered takes 0.44 to 1.0 of the time of the dense convolution with masks, and that 0.06 to 0.74 of the
        # time of the implicit GEMM. But of a mask, cuDNN's sizes would have to be asked for, with a wait in every call.
        has_mask = any(keep is not None and keep.dtype == torch.bool for keep in keeps)
        return ("reference", "native", "triton") if has_mask else ("native", "reference", "triton")
    if device != "cpu" or packed:
        return ("native", "reference")
    kept = [
        1.0 if keep is None else (int(keep.sum()) if keep.dtype == torch.bool else keep.shape[0]) / max(channels, 1)
        for keep, channels in zip(keeps, (weight.shape[0], weight.shape[1] * groups), strict=True)
    ]
    if groups > 1:  # where outputs are dropped, their own inputs mostly are too
        kind, share = "depthwise" if weight.shape[1] == 1 else "grouped", min(kept)
    else:
        kind, share = "1x1" if weight.shape[2:].numel() == 1 else "kxk", kept[0] * kept[1]
    return ("native", "reference") if share <= COMPACT_UP_TO[kind] else ("reference", "native")


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

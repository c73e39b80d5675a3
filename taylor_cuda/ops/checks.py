"""What the ops accept. A call that breaks these rules raises InputError and says what was wanted and what was given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taylor_cuda.errors import InputError
from taylor_cuda.ops import reference

SUPPORTED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
HALVES = (torch.float16, torch.bfloat16)


def check_tensor(value: object, name: str) -> None:
    """Raise unless ``value`` is a dense tensor of a supported dtype."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name}: wanted a tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise InputError(f"{name}: wanted a dense tensor, got layout {value.layout}")
    if value.dtype not in SUPPORTED:
        raise InputError(f"{name}: wanted float32, float16, bfloat16 or float64, got {value.dtype}")
    if value.dtype == torch.float64 and value.device.type not in ("cpu", "meta"):
        raise InputError(f"{name}: float64 is taken on the CPU only, got it on {value.device}")


def check_same_place(left: Tensor, right: Tensor, left_name: str, right_name: str) -> None:
    """Raise unless two tensors have one shape and lie on one device."""
    if left.shape != right.shape:
        raise InputError(
            f"{right_name}: wanted the shape of {left_name}, {tuple(left.shape)}, got {tuple(right.shape)}"
        )
    if left.device != right.device:
        raise InputError(f"{right_name}: wanted it on {left.device}, where {left_name} is, got it on {right.device}")


def check_activation_pair(activation: Tensor, gradient: Tensor, name: str = "activation") -> None:
    """Raise unless both are ``[N, C, *spatial]`` of one shape, dtype and device."""
    check_tensor(activation, name)
    check_tensor(gradient, "gradient")
    if activation.dim() < 2:
        raise InputError(f"{name}: wanted [N, C, *spatial], got shape {tuple(activation.shape)}")
    check_same_place(activation, gradient, name, "gradient")
    if activation.dtype != gradient.dtype:
        raise InputError(f"gradient: wanted {activation.dtype}, the {name}'s dtype, got {gradient.dtype}")


def check_sums(activation: Tensor, sums: Tensor, name: str) -> None:
    """Raise unless ``sums`` can take the sums of ``activation``: ``[C]`` or ``[N, C]``, contiguous, right dtype."""
    check_tensor(sums, "sums")
    wanted = tuple(activation.shape[:2])
    if tuple(sums.shape) not in (wanted[1:], wanted):
        raise InputError(
            f"sums: wanted shape {wanted[1:]} or {wanted} for {name} {tuple(activation.shape)}, got {tuple(sums.shape)}"
        )
    dtype = reference.result_dtype(activation.dtype)
    if sums.dtype != dtype:
        raise InputError(f"sums: wanted {dtype} for {name} of {activation.dtype}, got {sums.dtype}")
    if sums.device != activation.device:
        raise InputError(f"sums: wanted it on {activation.device}, where {name} is, got it on {sums.device}")
    if sums.requires_grad:
        raise InputError("sums: wanted a tensor that does not require grad; the sums are added in place")
    if not sums.is_contiguous():
        raise InputError(f"sums: wanted a contiguous tensor, got strides {sums.stride()}")


def check_reduction(reduction: str, choices: Sequence[str]) -> None:
    """Raise unless the reduction is one of the choices."""
    if reduction not in choices:
        raise InputError(f"reduction: wanted one of {', '.join(map(repr, choices))}, got {reduction!r}")


def check_weight_lists(weights: Sequence[Tensor], gradients: Sequence[Tensor], dims: Sequence[int]) -> None:
    """Raise unless the arguments are three lists of one length."""
    for name, value in (("weights", weights), ("gradients", gradients), ("dims", dims)):
        if not isinstance(value, Sequence):
            raise InputError(f"{name}: wanted a list, got {type(value).__name__}")
    if not len(weights) == len(gradients) == len(dims):
        raise InputError(
            "weights, gradients, dims: wanted lists of one length, "
            f"got {len(weights)}, {len(gradients)} and {len(dims)} entries"
        )


def check_weight_pairs(weights: Sequence[Tensor], gradients: Sequence[Tensor], dims: Sequence[int]) -> None:
    """Raise unless every entry of the three lists fits: shapes, devices, dtypes, and a dimension that exists."""
    for i, (weight, gradient, dim) in enumerate(zip(weights, gradients, dims, strict=True)):
        _check_weight_pair(weight, gradient, dim, weights[0], i)


def _check_weight_pair(weight: Tensor, gradient: Tensor, dim: int, first: Tensor, i: int) -> None:
    check_tensor(weight, f"weights[{i}]")
    check_tensor(gradient, f"gradients[{i}]")
    check_same_place(weight, gradient, f"weights[{i}]", f"gradients[{i}]")
    if weight.device != first.device:
        raise InputError(f"weights[{i}]: wanted it on {first.device}, where weights[0] is, got it on {weight.device}")
    half_gradient = weight.dtype == torch.float32 and gradient.dtype in HALVES
    if weight.dtype != gradient.dtype and not half_gradient:
        raise InputError(
            f"gradients[{i}]: wanted {weight.dtype}, its weight's dtype (or 16 bits for a float32 weight), "
            f"got {gradient.dtype}"
        )
    if not -weight.dim() <= dim < weight.dim():
        raise InputError(f"dims[{i}]: wanted a dimension of shape {tuple(weight.shape)}, got {dim}")


def check_units(
    sums: Sequence[Tensor],
    entries: Tensor,
    offsets: Tensor,
    window: Tensor,
    counts: Tensor | None,
    reduction: str = "batch",
    scale: Tensor | None = None,
    added: Tensor | None = None,
    finite: Tensor | None = None,
) -> None:
    """Raise unless all arguments of accumulate_importance fit ``window``: its device, its dtype, its units."""
    check_tensor(window, "window")
    dtype, units = window.dtype, window.numel()
    if window.dim() != 1 or dtype in HALVES or not window.is_contiguous() or window.requires_grad:
        raise InputError(
            "window: wanted a contiguous float32 or float64 vector that does not require grad, "
            f"got {dtype} {tuple(window.shape)}"
        )
    _check_beside(window, entries, "entries", torch.int64, (entries.numel(),))
    _check_beside(window, offsets, "offsets", torch.int64, (units + 1,))
    if counts is not None:
        _check_beside(window, counts, "counts", torch.int64, (2,))
    for i, each in enumerate(sums):
        check_tensor(each, f"sums[{i}]")
        rows = sums[0].shape[:-1]
        wanted = (*rows, each.shape[-1]) if each.dim() in (1, 2) else ("N", "C")
        _check_beside(window, each, f"sums[{i}]", dtype, wanted)
    if scale is not None:
        _check_beside(window, scale, "scale", dtype, ())
    if added is not None:
        _check_beside(window, added, "added", dtype, (units,))
        if reduction not in ("batch", "sum"):
            raise InputError(f"added: wanted reduction 'batch' or 'sum' with it, got {reduction!r}")
    if finite is not None:
        _check_beside(window, finite, "finite", torch.bool, ())


def _check_beside(window: Tensor, value: object, name: str, dtype: torch.dtype, shape: tuple[object, ...]) -> None:
    if not isinstance(value, Tensor):
        raise InputError(f"{name}: wanted a tensor, got {type(value).__name__}")
    if value.device != window.device:
        raise InputError(f"{name}: wanted it on {window.device}, where window is, got it on {value.device}")
    if value.dtype != dtype or tuple(value.shape) != shape or not value.is_contiguous():
        raise InputError(
            f"{name}: wanted contiguous {dtype} of shape {shape}, got {value.dtype} {tuple(value.shape)} "
            f"with strides {value.stride()}"
        )


def check_scores(scores: object) -> None:
    """Raise unless ``scores`` is ``[n]``, float32 or float64."""
    check_tensor(scores, "scores")
    assert isinstance(scores, Tensor)
    if scores.dtype in HALVES:
        raise InputError(f"scores: wanted float32 (float64 on the CPU), got {scores.dtype}")
    if scores.dim() != 1:
        raise InputError(f"scores: wanted shape [n], got {tuple(scores.shape)}")


def check_keep(keep: object, scores: Tensor) -> None:
    """Raise unless ``keep`` is an int or a 0-d int64 tensor on the scores' device."""
    if isinstance(keep, Tensor):
        if keep.dtype != torch.int64 or keep.dim() != 0:
            raise InputError(f"keep: wanted an int or a 0-d int64 tensor, got {keep.dtype} {tuple(keep.shape)}")
        if keep.device != scores.device:
            raise InputError(f"keep: wanted it on {scores.device}, where scores is, got it on {keep.device}")
    elif not isinstance(keep, int) or isinstance(keep, bool):
        raise InputError(f"keep: wanted an int or a 0-d int64 tensor, got {type(keep).__name__}")


def check_skip(x: Tensor, sums: Tensor, skip: Tensor | None, skip_sums: Tensor | None, name: str) -> None:
    """Raise unless ``skip`` lies beside ``x`` and ``skip_sums`` beside ``sums``; without a skip there are no sums."""
    if skip is None:
        if skip_sums is not None:
            raise InputError("skip_sums: wanted None where skip is None, got sums")
        return
    check_tensor(skip, "skip")
    check_same_place(x, skip, name, "skip")
    if skip_sums is None:
        return
    check_tensor(skip_sums, "skip_sums")
    check_same_place(sums, skip_sums, "sums", "skip_sums")
    if skip_sums.dtype != sums.dtype:
        raise InputError(f"skip_sums: wanted {sums.dtype}, the dtype of sums, got {skip_sums.dtype}")
    if skip_sums is sums:
        raise InputError("skip_sums: wanted another tensor than sums")
    if skip_sums.requires_grad:
        raise InputError("skip_sums: wanted a tensor that does not require grad; the sums are added in place")
    if not skip_sums.is_contiguous():
        raise InputError(f"skip_sums: wanted a contiguous tensor, got strides {skip_sums.stride()}")


def check_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    residual: Tensor | None,
) -> None:
    """Raise unless x is ``[N, C, *spatial]``, residual like it, and the others ``[C]``; statistics come in pairs."""
    check_tensor(x, "x")
    if x.dim() < 2:
        raise InputError(f"x: wanted [N, C, *spatial], got shape {tuple(x.shape)}")
    statistics = {"running_mean": running_mean, "running_var": running_var}
    optional = training and running_mean is None and running_var is None
    for name, vector in {**statistics, "weight": weight, "bias": bias}.items():
        if vector is not None:
            _check_vector(vector, x, name)
    for name, vector in statistics.items():
        if vector is None and not optional:
            raise InputError(f"{name}: wanted a tensor (neither of the two only with training), got None")
        if vector is not None and training and vector.requires_grad:
            raise InputError(f"{name}: wanted a tensor that does not require grad; it is changed in place")
    if momentum is None:
        raise InputError("momentum: wanted a number, got None; a cumulative average is 1 / (number of batches so far)")
    if training and x.shape[0] * x.shape[2:].numel() == 1:
        raise InputError(f"x: wanted more than 1 value per channel when training, got shape {tuple(x.shape)}")
    if residual is not None:
        check_tensor(residual, "residual")
        check_same_place(x, residual, "x", "residual")
        if residual.dtype != x.dtype:
            raise InputError(f"residual: wanted {x.dtype}, the dtype of x, got {residual.dtype}")


def _check_vector(vector: Tensor, x: Tensor, name: str) -> None:
    check_tensor(vector, name)
    if tuple(vector.shape) != (x.shape[1],):
        raise InputError(f"{name}: wanted shape {(x.shape[1],)} for x {tuple(x.shape)}, got {tuple(vector.shape)}")
    wide = reference.result_dtype(x.dtype)
    if vector.dtype not in (wide, x.dtype):
        either = f"{wide}" if wide == x.dtype else f"{wide} or {x.dtype}"
        raise InputError(f"{name}: wanted {either} for x of {x.dtype}, got {vector.dtype}")
    if vector.device != x.device:
        raise InputError(f"{name}: wanted it on {x.device}, where x is, got it on {vector.device}")


def check_kept_lists(tensors: Sequence[Tensor], keep: Tensor, bounds: Sequence[int]) -> None:
    """Raise unless there are lists of rows and of columns for every tensor, each for a dimension that it has."""
    if keep.dtype != torch.int64 or keep.dim() != 1 or not keep.is_contiguous():
        raise InputError(f"keep: wanted a contiguous int64 vector, got {keep.dtype} {tuple(keep.shape)}")
    if len(bounds) != 2 * len(tensors) + 1 or list(bounds) != sorted(bounds) or bounds[0] != 0:
        raise InputError(f"bounds: wanted {2 * len(tensors) + 1} ascending numbers from 0, got {list(bounds)}")
    if bounds[-1] != keep.shape[0]:
        raise InputError(f"bounds: wanted them to end at {keep.shape[0]}, the length of keep, got {bounds[-1]}")
    for i, tensor in enumerate(tensors):
        check_tensor(tensor, f"tensors[{i}]")
        lists = sum(bounds[2 * i + part + 1] > bounds[2 * i + part] and part + 1 for part in (0, 1))
        if tensor.dim() < (2 if lists >= 2 else 1):
            raise InputError(f"tensors[{i}]: wanted the dimensions that lists are for, got {tuple(tensor.shape)}")
        if tensor.device != keep.device:
            raise InputError(f"tensors[{i}]: wanted it on {keep.device}, where keep is, got it on {tensor.device}")

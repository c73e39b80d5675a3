"""One safetensors file for a pruned model: weights and the recipe of its cuts. ``tc.save``, ``tc.load``."""

from __future__ import annotations

import ctypes
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from taylor_cuda.errors import CheckpointError, InputError
from taylor_cuda.files import replacing
from taylor_cuda.graph.checks import check_model
from taylor_cuda.graph.groups import named_tensors
from taylor_cuda.surgery.recipe import Recipe, keeps_for, recipe_of, sliced_shapes
from taylor_cuda.surgery.shrink import Shrinking

__all__ = ["load", "read_metadata", "save"]

_HEADER = "taylor_cuda"
_FORMAT = 1


def save(model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> None:
    """Write a model's parameters, persistent buffers and the recipe of its cuts to one safetensors file.

    The file is complete or not there: it is written under another name in the same folder and then renamed. Shared
    tensors are stored once. No pickle; any safetensors reader can read the weights.

    Args:
        model: the module itself, pruned or not.
        path: where to; an existing file is replaced.
        metadata: anything JSON can say, kept in the file's header; ``read_metadata`` returns it.

    Raises:
        InputError: the folder doesn't exist, or the model or ``metadata`` has something such a file can't hold.
    """
    check_model(model, "save")
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"path: wanted a file name in an existing folder, got {path}")
    tensors, aliases = _storable(model)
    header = {
        "format": _FORMAT,
        "recipe": recipe_of(model),
        "aliases": aliases,
        "crc32": _checksum(tensors),
        "metadata": dict(metadata or {}),
    }
    try:
        text = json.dumps(header, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"metadata: JSON can't hold it ({error})") from None
    with replacing(path) as part:
        try:
            save_file(tensors, part, metadata={"format": "pt", _HEADER: text})
        except SafetensorError as error:
            raise InputError(f"model: can't be written to {path}: {error}") from error


def load(model: nn.Module, path: str | os.PathLike[str], strict: bool = True) -> nn.Module:
    """Load a file of ``save`` into a fresh model: cut it by the file's recipe, without tracing, copy the weights.

    ::

        model = tc.load(torchvision.models.resnet18(), "small.safetensors")

    The model keeps its device, memory format, ``requires_grad`` and dtype. Values are converted to a dtype that holds
    them exactly (bf16 in the file to fp32 in the model) and never rounded: for fp32 to bf16 load first and convert
    after, or convert the model before it is saved. A safetensors file from elsewhere is read too, if names and shapes
    fit as they are.

    Args:
        model: ``make_model()`` as the saved one was made, at its original widths.
        path: the file.
        strict: whether tensors that only the file or only the model has are an error. Shapes must fit in any case.

    Returns:
        ``model``.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it belongs to another model. The model is as it was.
    """
    check_model(model, "load")
    values, header = _read(Path(path))
    recipe: Recipe = recipe_of(model) if header is None else header["recipe"]
    try:
        keeps = keeps_for(model, recipe)
        shrinking = Shrinking(model, keeps)
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error
    targets = model.state_dict(keep_vars=True)
    after = sliced_shapes(model, keeps)
    shapes = {id(tensor): after[name] for name, tensor in named_tensors(model).items()}
    problems = _misfits(targets, shapes, values, strict)
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(f"{path}: a checkpoint of another model: {'; '.join(problems[:4])}{more}")
    pairs = {id(target): (target, values[name]) for name, target in targets.items() if name in values}
    with torch.inference_mode(False), torch.no_grad(), shrinking.transaction() as transaction:
        for target, _ in pairs.values():
            if target.shape == shapes.get(id(target), target.shape):
                transaction.remember_values(target)
        shrinking.apply(recipe)
        for target, value in pairs.values():
            target.copy_(value)
    return model


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The ``metadata`` a file was saved with; empty for a safetensors file from elsewhere.

    Raises:
        CheckpointError: there is no such file, or it is damaged.
    """
    with _opened(Path(path)) as file:
        header = _parsed_header(Path(path), file.metadata())
    return {} if header is None else dict(header["metadata"])


def _storable(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Distinct tensors of the state dict on the CPU, and ``{further name: first name}`` of shared ones."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type == "meta":
            kind = (
                f"a {value.layout} tensor on {value.device}"
                if isinstance(value, Tensor)
                else f"a {type(value).__name__}"
            )
            raise InputError(f"model: {name} in its state_dict is {kind}, which a safetensors file can't hold")
        where = (
            value.device,
            value.untyped_storage().data_ptr(),
            value.storage_offset(),
            value.shape,
            value.stride(),
            value.dtype,
        )
        known = first.setdefault(where, name) if value.numel() else name
        if known != name:
            aliases[name] = known
        else:
            tensors[name] = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
    memory: set[int] = set()
    for name, value in tensors.items():
        if value.numel() and value.untyped_storage().data_ptr() in memory:
            tensors[name] = value.clone()
        memory.add(value.untyped_storage().data_ptr())
    return tensors, aliases


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    crc = 0
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        size = tensor.numel() * tensor.element_size()
        crc = zlib.crc32(name.encode(), crc)
        if size:
            crc = zlib.crc32((ctypes.c_char * size).from_address(tensor.data_ptr()), crc)
    return crc


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or damaged or cut off ({error})") from error


def _parsed_header(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any] | None:
    text = (metadata or {}).get(_HEADER)
    if text is None:
        return None
    try:
        header = json.loads(text)
        kinds = {"recipe": dict, "aliases": dict, "crc32": int, "metadata": dict}
        whole = all(isinstance(header[key], kind) for key, kind in kinds.items())
        version = header["format"]
    except (ValueError, TypeError, KeyError):
        raise CheckpointError(f"{path}: its header is damaged") from None
    if version != _FORMAT:
        raise CheckpointError(f"{path}: its format {version!r} is unknown to this version, which reads {_FORMAT}")
    if not whole:
        raise CheckpointError(f"{path}: its header is damaged")
    return dict(header)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """All tensors of a file by name, shared ones under each name, and its header (``None``: not one of ours)."""
    with _opened(path) as file:
        header = _parsed_header(path, file.metadata())
        try:
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: damaged ({error})") from error
    if header is None:
        return values, None
    if _checksum(values) != header["crc32"]:
        raise CheckpointError(f"{path}: damaged: its weights don't have the checksum they were written with")
    for name, first in header["aliases"].items():
        if first not in values:
            raise CheckpointError(f"{path}: its header is damaged")
        values[name] = values[first]
    return values, header


def _misfits(
    targets: Mapping[str, Any], shapes: Mapping[int, torch.Size], values: Mapping[str, Tensor], strict: bool
) -> list[str]:
    """What keeps ``values`` from being copied into ``targets`` once they have their new ``shapes``."""
    problems = []
    if strict:
        problems += [f"it has no {name}" for name in targets if name not in values]
        problems += [f"it has {name}, the model hasn't" for name in values if name not in targets]
    seen: dict[int, str] = {}
    for name, target in targets.items():
        value = values.get(name)
        if value is None:
            continue
        shape = shapes.get(id(target), target.shape) if isinstance(target, Tensor) else None
        if shape is None or target.is_meta:
            problems.append(f"{name} of the model is no tensor with memory")
        elif value.shape != shape:
            problems.append(f"{name} is {tuple(value.shape)} in it, {tuple(shape)} in the model once cut")
        elif not _holds(target.dtype, value.dtype):
            problems.append(f"{name} is {value.dtype} in it, which the model's {target.dtype} can't hold exactly")
        elif value is not (other := values[seen.setdefault(id(target), name)]) and not torch.equal(value, other):
            problems.append(f"{name} and {seen[id(target)]} differ in it and are one tensor in the model")
    return problems


def _holds(target: torch.dtype, source: torch.dtype) -> bool:
    if target == source:
        return True
    if not (target.is_floating_point and source.is_floating_point):
        return False
    wide, narrow = torch.finfo(target), torch.finfo(source)
    return bool(wide.eps <= narrow.eps and wide.max >= narrow.max and wide.tiny <= narrow.tiny)

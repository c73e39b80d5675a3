"""The recipe of a model's cuts: which original positions every tensor still has. Plain JSON, replayed without tracing.

::

    {"format": 1,
     "tensors": {"conv1.weight": {"0": {"length": 64, "kept": "0-11,13,20-63"}}},
     "groups": {"conv1": {"size": 64, "kept": "0-11,13,20-63"}}}

``length`` and ``size`` are those of the model as it was made, and ``kept`` counts in its positions and units, however
many cuts it took to get there. Positions are written as ranges, so that a copy of a model costs nothing and a file
can be read by eye.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from taylor_cuda.errors import InputError
from taylor_cuda.graph.checks import check_model
from taylor_cuda.graph.groups import HEAD_COUNTS, HEAD_WIDTHS, Groups, named_tensors
from taylor_cuda.graph.slicing import Keeps, numbers_after, shrink_groups
from taylor_cuda.surgery.shrink import RECIPE, Shrinking

__all__ = [
    "Recipe",
    "apply_recipe",
    "check_current",
    "compose",
    "keeps_for",
    "parse_positions",
    "recipe_of",
    "sliced_shapes",
    "write_positions",
]

Recipe = dict[str, Any]
FORMAT = 1


def write_positions(positions: Tensor) -> str:
    """Sorted positions as text: ``"0-11,13,20-63"``."""
    values = positions.cpu().numpy()
    starts = np.flatnonzero(np.diff(values, prepend=-2) != 1)
    ends = np.append(starts[1:], len(values)) - 1
    pairs = zip(values[starts].tolist(), values[ends].tolist(), strict=True)
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in pairs)


def parse_positions(text: str, length: int) -> Tensor:
    """The reverse of ``write_positions``: sorted int64 positions below ``length``.

    Raises:
        InputError: not such a text.
    """
    pairs = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            pairs.append((int(first), int(last or first)))
    except ValueError:
        pairs = []
    # checked before anything is allocated: the text may come from a damaged file
    ordered = all(first <= last for first, last in pairs) and all(a[1] < b[0] for a, b in itertools.pairwise(pairs))
    if not pairs or not ordered or pairs[0][0] < 0 or pairs[-1][1] >= length:
        raise InputError(f"recipe: {text[:60]!r} isn't a sorted list of positions below {length} like '0-11,13'")
    return torch.from_numpy(np.concatenate([np.arange(first, last + 1) for first, last in pairs]))


def recipe_of(model: nn.Module) -> Recipe:
    """The recipe of the cuts this model has been through; one without entries if there were none."""
    found = getattr(model, RECIPE, None)
    return found if isinstance(found, dict) else {"format": FORMAT, "tensors": {}, "groups": {}}


def compose(model: nn.Module, groups: Groups, keep: Mapping[str, Tensor], keeps: Keeps) -> Recipe:
    """What the model's recipe will be after one more cut, in a new dict. To be called before that cut.

    Args:
        model: as it is before the cut.
        groups: likewise.
        keep: ``{group name: int64 indices of the units that stay}``.
        keeps: ``tensor_keeps`` of the same plan.
    """
    recipe: Recipe = copy.deepcopy(recipe_of(model))
    tensors = named_tensors(model)
    for name, dims in keeps.items():
        entry = recipe["tensors"].setdefault(name, {})
        for dim, kept in dims.items():
            entry[str(dim)] = _composed(entry.get(str(dim)), "length", tensors[name].shape[dim], kept)
    for group in groups:
        units = keep.get(group.name)
        if units is not None and units.numel() < group.size:
            before = recipe["groups"].get(group.name)
            # without as many units as before they aren't the same ones: a later version may group a model otherwise
            if before is not None and parse_positions(before["kept"], before["size"]).numel() != group.size:
                before = None
            recipe["groups"][group.name] = _composed(before, "size", group.size, units)
    for module, numbers in numbers_after(groups, keep).items():
        recipe.setdefault("numbers", {}).setdefault(module, {}).update(numbers)
    return recipe


def _composed(before: Mapping[str, Any] | None, size: str, length: int, kept: Tensor) -> dict[str, Any]:
    original = torch.arange(length) if before is None else parse_positions(before["kept"], before[size])
    if original.numel() != length:
        raise InputError(
            f"model: taylor_cuda_recipe speaks of {original.numel()} positions where there are {length}; the model was "
            "changed by other means since it was cut"
        )
    return {size: length if before is None else before[size], "kept": write_positions(original[kept.cpu()])}


def check_current(model: nn.Module, groups: Groups) -> None:
    """Raise unless ``groups`` are those of ``model`` as it is now."""
    tensors, history = named_tensors(model), recipe_of(model)["groups"]
    for group in groups:
        for member in group.members:
            tensor = tensors.get(member.tensor)
            if tensor is None or member.dim >= tensor.dim():
                raise InputError(
                    f"groups: made for another model; this one has no {member.tensor} as group {group.name} needs it"
                )
            if int(member.index.max()) >= tensor.shape[member.dim]:
                raise InputError(
                    f"groups: {group.name} has position {int(member.index.max())} of {member.tensor}, dimension "
                    f"{member.dim}, which has {tensor.shape[member.dim]}; made for another model, or the model was cut "
                    "since: trace it anew"
                )
        entry = history.get(group.name)
        left = group.original_size if entry is None else parse_positions(entry["kept"], entry["size"]).numel()
        original = group.original_size if entry is None else entry["size"]
        if left != group.size and (group.original_size == original or group.size < group.original_size):
            raise InputError(
                f"groups: {group.name} has {group.size} units in them, the cuts of this model left {left}; they belong "
                "to another copy of the model, or the model was cut through other groups: trace it anew"
            )


def sliced_shapes(model: nn.Module, keeps: Keeps) -> dict[str, torch.Size]:
    """The shapes that the model's tensors will have after ``keeps``, without touching them."""
    shapes = {}
    for name, tensor in named_tensors(model).items():
        shape = list(tensor.shape)
        for dim, kept in keeps.get(name, {}).items():
            shape[dim] = kept.numel()
        shapes[name] = torch.Size(shape)
    return shapes


def keeps_for(model: nn.Module, recipe: Recipe) -> Keeps:
    """What still has to be sliced for the model to have been cut by ``recipe``.

    Args:
        model: at its original widths, or cut by a recipe that keeps at least as much.
        recipe: where it should arrive.

    Raises:
        InputError: the recipe is malformed, of another model, or the model has lost something that the recipe keeps.
    """
    _check_form(recipe)
    _check_numbers(model, recipe.get("numbers", {}))
    tensors, done = named_tensors(model), recipe_of(model)["tensors"]
    keeps: Keeps = {}
    for name in [*recipe["tensors"], *(name for name in done if name not in recipe["tensors"])]:
        if name not in tensors:
            raise InputError(f"recipe: made for another model; this one has no tensor named {name}")
        wanted, had = recipe["tensors"].get(name, {}), done.get(name, {})
        for dim in {**wanted, **had}:
            kept = _still_to_keep(f"{name}, dimension {dim}", tensors[name], int(dim), wanted.get(dim), had.get(dim))
            if kept is not None:
                keeps.setdefault(name, {})[int(dim)] = kept
    return keeps


def _still_to_keep(
    where: str, tensor: Tensor, dim: int, wanted: Mapping[str, Any] | None, had: Mapping[str, Any] | None
) -> Tensor | None:
    length = tensor.shape[dim] if dim < tensor.dim() else 0
    original = length if had is None else had["length"]
    current = torch.arange(length) if had is None else parse_positions(had["kept"], original)
    if wanted is None:
        raise InputError(
            f"recipe: {where} of this model was cut, in the recipe it wasn't; give the model as it was made"
        )
    if wanted["length"] != original or current.numel() != length:
        raise InputError(
            f"recipe: made for another model; {where} had {wanted['length']} positions there, here {original}"
        )
    kept = parse_positions(wanted["kept"], original)
    place = torch.searchsorted(current, kept).clamp_max(current.numel() - 1)
    if not torch.equal(current[place], kept):
        raise InputError(
            f"recipe: {where} of this model has lost positions that the recipe keeps; give it as it was made"
        )
    return place if place.numel() < current.numel() else None


def _check_form(recipe: Any) -> None:
    if (
        not isinstance(recipe, dict)
        or not isinstance(recipe.get("tensors"), dict)
        or not isinstance(recipe.get("groups"), dict)
    ):
        raise InputError("recipe: wanted a dict with 'format', 'tensors' and 'groups'")
    if recipe.get("format") != FORMAT:
        raise InputError(f"recipe: format {recipe.get('format')!r} is unknown to this version, which reads {FORMAT}")
    entries = [
        (entry, "length") for dims in recipe["tensors"].values() if isinstance(dims, dict) for entry in dims.values()
    ]
    entries += [(entry, "size") for entry in recipe["groups"].values()]
    whole = all(isinstance(dims, dict) and all(dim.isdecimal() for dim in dims) for dims in recipe["tensors"].values())
    if not whole or not all(
        isinstance(entry, dict) and isinstance(entry.get(size), int) and isinstance(entry.get("kept"), str)
        for entry, size in entries
    ):
        raise InputError("recipe: malformed; an entry is {'length': int, 'kept': '0-11,13'} by tensor and dimension")


def _check_numbers(model: nn.Module, numbers: Any) -> None:
    """Raise unless every entry is a count of heads that the model has: no other attribute is set from a file."""
    modules = dict(model.named_modules())
    if not isinstance(numbers, dict) or not all(isinstance(values, dict) for values in numbers.values()):
        raise InputError("recipe: malformed; 'numbers' is {module: {attribute: int}}")
    for path, values in numbers.items():
        for name, value in values.items():
            now = vars(modules[path]).get(name) if path in modules else None
            if name not in HEAD_COUNTS | HEAD_WIDTHS or type(value) is not int or type(now) is not int:
                raise InputError(f"recipe: made for another model; this one has no whole number {path}.{name}")
            if not 0 < value <= now:
                raise InputError(f"recipe: {path}.{name} is {now} in this model, the recipe says {value}")


def apply_recipe(
    model: nn.Module, recipe: Recipe, optimizer: Any = None, ema: Any = None, groups: Groups | None = None
) -> None:
    """Cut a model as another one of its kind was cut, without tracing it. All of it or none of it.

    Args:
        model: a fresh ``make_model()`` at its original widths, or one that was cut by a recipe that keeps at least as
            much.
        recipe: ``taylor_cuda_recipe`` of the other model.
        optimizer: see ``tc.cut``.
        ema: see ``tc.cut``.
        groups: groups of this model from ``tc.trace``, to be brought along.

    Raises:
        InputError: the recipe doesn't fit the model, its optimizer, EMA or groups. Nothing was touched.
    """
    check_model(model, "apply_recipe")
    keeps = keeps_for(model, recipe)
    shrinking = Shrinking(model, keeps, optimizer, ema)
    shrunk = None if groups is None else shrink_groups(groups, _units_for(groups, recipe), keeps)
    with torch.inference_mode(False), shrinking.transaction(groups):
        shrinking.apply(copy.deepcopy(recipe))
        if groups is not None and shrunk is not None:
            groups.groups = shrunk


def _units_for(groups: Groups, recipe: Recipe) -> dict[str, Tensor]:
    units = {}
    for name, entry in recipe["groups"].items():
        group = next((group for group in groups if group.name == name), None)
        if group is None or group.original_size != entry["size"]:
            raise InputError(
                f"groups: they have no {name} of {entry['size']} units, which the recipe cuts; trace the model anew"
            )
        kept = parse_positions(entry["kept"], entry["size"])
        if not bool(torch.isin(kept, group.kept).all()):
            raise InputError(f"groups: {name} has lost units that the recipe keeps")
        units[name] = torch.searchsorted(group.kept, kept)
    return units

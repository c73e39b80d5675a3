"""What ``taylor-cuda prune`` prints about recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from taylor_cuda.text import table
from taylor_cuda.train.config import RunConfig
from taylor_cuda.train.recipes import Published, Recipe, load, names

COMMAND_LINE, RECIPE, TRIAL, DEFAULT = "command line", "recipe", "trial run", "default"
"""Where a setting is from."""


def list_recipes() -> str:
    """The recipes that come with the package, a line each: name, title, published figures, status."""
    rows = []
    for recipe in map(load, names()):
        found = recipe.published
        figures = ("", "", "") if found is None else _figures(found)
        rows.append((recipe.name, *figures, recipe.status, recipe.title))
    return table(("recipe", "GFLOPs", "parameters", "top-1 error, %", "status", "title"), rows)


def show(config: RunConfig, origins: Mapping[str, str], recipe: Recipe | None) -> str:
    """Every setting of a run, a line each, under what is known of its recipe.

    Args:
        config: the run.
        origins: where a setting is from, by name; the others have their defaults.
        recipe: its recipe, if it has one.
    """
    lines = [] if recipe is None else [*_about(recipe), ""]
    names = [setting.name for setting in dataclasses.fields(config)]
    values = [_shown(getattr(config, name)) for name in names]
    wide, wider = max(map(len, names)), max(map(len, values))
    for name, value in zip(names, values, strict=True):
        lines.append(f"{name:{wide}}  {value:{wider}}  {origins.get(name, DEFAULT)}")
    return "\n".join(lines)


def _about(recipe: Recipe) -> list[str]:
    told = [("recipe", f"{recipe.name}: {recipe.title}"), ("source", recipe.source), ("status", recipe.status)]
    told.append(("note", recipe.note))
    if recipe.published is not None:
        gflops, params, error = _figures(recipe.published)
        told.append(("published", f"{gflops} GFLOPs, {params} parameters, top-1 error {error} %"))
    else:
        told.append(("published", "no figures"))
    return [f"{name:9}  {text}" for name, text in told if text]


def _figures(found: Published) -> tuple[str, str, str]:
    before = found.unpruned
    return (
        f"{found.gflops:.2f} of {before.gflops:.2f}",
        f"{found.params / 1e7:.2f}e7 of {before.params / 1e7:.2f}e7",
        f"{found.top1_error:.2f} (unpruned {before.top1_error:.2f})",
    )


def _shown(value: Any) -> str:
    """As the command line and recipes take it."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}={fraction}" for name, fraction in value.items())
    if isinstance(value, tuple):
        return " ".join(value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)

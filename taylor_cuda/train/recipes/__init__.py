"""Recipes: the settings of whole runs by name, in the ``.toml`` files of this folder or in a user's own.

A file has a table ``[settings]`` whose keys are the fields of ``RunConfig``, and may have ``[about]`` (title, source,
status, note) and ``[published]`` (gflops, params, top1_error, and the same of the unpruned network).
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taylor_cuda.errors import InputError
from taylor_cuda.planning import parse_budget
from taylor_cuda.train.config import RunConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Figures", "Published", "Recipe", "load", "names"]

FOLDER = Path(__file__).parent
SUFFIX = ".toml"
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True)
class Figures:
    """A network's figures as a table prints them.

    Attributes:
        gflops: 1e9 multiply-adds of one image.
        params: parameters.
        top1_error: on ImageNet's validation set, in percent.
    """

    gflops: float
    params: float
    top1_error: float


@dataclass(frozen=True)
class Published(Figures):
    """The figures that a recipe is said to end with, and those of the network that it begins with."""

    unpruned: Figures


@dataclass(frozen=True)
class Recipe:
    """The settings of a run, and where they are from.

    Attributes:
        name: of the file, without its suffix.
        settings: fields of ``RunConfig``; what isn't among them has its default.
        title: one line.
        source: paper and table.
        status: whether somebody has run it here.
        note: what else is to be known; may be empty.
        published: ``None`` where nobody has published figures.
    """

    name: str
    settings: Mapping[str, Any]
    title: str
    source: str = ""
    status: str = "not run here"
    note: str = ""
    published: Published | None = None

    def under(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that this recipe adds to those that somebody gives, which have precedence.

        With ``steps_limit`` among those it is a trial run of the recipe, see ``trial``.
        """
        limit = given.get("steps_limit")
        settings = {**self.settings, **({} if limit is None else self.trial(limit))}
        for one, other in (("finetune_epochs", "total_epochs"), ("total_epochs", "finetune_epochs")):
            if given.get(one) is not None:
                settings.pop(other, None)
        return {key: value for key, value in settings.items() if key not in given}

    def trial(self, minibatches: int) -> dict[str, Any]:
        """Settings of a trial run: pruning takes one epoch of so many minibatches, fine-tuning one more.

        Times are measured for a moment only.
        """
        default = RunConfig()
        steps = min(self.settings.get("steps", default.steps), minibatches)
        every = min(self.settings.get("every", default.every), minibatches // steps)
        short = {"epochs": 1, "finetune_epochs": 1, "total_epochs": 2}
        epochs = {key: min(most, self.settings[key]) for key, most in short.items() if key in self.settings}
        return {"steps": steps, "every": every, "measure_seconds": 0.1, **epochs}


def names() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    return sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}"))


def load(name: str) -> Recipe:
    """The recipe of that name, or of that file.

    Args:
        name: one of ``names()``, or the path of a ``.toml`` file.

    Raises:
        InputError: there is no such recipe, it isn't TOML, or something in it is unknown or can't be used; the file and
            the key are named.
    """
    known = names()
    path = FOLDER / f"{name}{SUFFIX}" if name in known else Path(name)
    if path.suffix != SUFFIX:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
        raise InputError(f"recipe: no recipe named {name!r}, nor is it a {SUFFIX} file; there are {', '.join(near)}")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"recipe: no file {path} can be read ({error.strerror})") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise InputError(f"recipe: {path} isn't TOML: {error}") from error
    try:
        return _recipe(path.stem, content)
    except InputError as error:
        raise InputError(f"recipe: {path}: {error}") from None


def _recipe(name: str, content: Mapping[str, Any]) -> Recipe:
    _only(content, ("about", "settings", "published"), "tables")
    about = _table(content.get("about", {}), ("title", "source", "status", "note"), str, "about")
    settings = _settings(content.get("settings"))
    published = _published(content["published"]) if "published" in content else None
    return Recipe(name, settings, about.pop("title", name), published=published, **about)


def _published(given: Any) -> Published:
    figures = [entry.name for entry in dataclasses.fields(Figures)]
    if not isinstance(given, Mapping):
        raise InputError(f"published: wanted a table, got {given!r}")
    before = _table(given.get("unpruned", {}), figures, float, "published.unpruned")
    after = _table({key: value for key, value in given.items() if key != "unpruned"}, figures, float, "published")
    for table, place in ((after, "published"), (before, "published.unpruned")):
        missing = [key for key in figures if key not in table]
        if missing:
            raise InputError(f"{place}: wanted {', '.join(missing)} too")
    return Published(**after, unpruned=Figures(**before))


def _settings(given: Any) -> dict[str, Any]:
    """Every value as ``RunConfig`` takes it."""
    if not isinstance(given, Mapping):
        raise InputError("settings: wanted a table [settings] with fields of RunConfig, got none")
    hints = typing.get_type_hints(RunConfig)
    _only(given, hints, "settings")
    found = {key: _value(key, value, hints[key]) for key, value in given.items()}
    RunConfig(**found)
    return found


def _value(key: str, value: Any, hint: Any) -> Any:
    if key == "budget":
        return parse_budget(value)
    if key == "ignore":
        if not isinstance(value, list) or not all(isinstance(glob, str) for glob in value):
            raise InputError(f"ignore: wanted a list of texts, got {value!r}")
        return tuple(value)
    kinds = [str if kind is Path else kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in kinds:  # not isinstance: a bool is an int
        raise InputError(f"{key}: wanted {' or '.join(KINDS[kind] for kind in kinds)}, got {value!r}")
    return Path(value) if hint is Path else value


def _table(table: Any, keys: Iterable[str], kind: type, place: str) -> dict[str, Any]:
    if not isinstance(table, Mapping):
        raise InputError(f"{place}: wanted a table, got {table!r}")
    _only(table, keys, place)
    return {key: _value(f"{place}.{key}", value, kind) for key, value in table.items()}


def _only(table: Mapping[str, Any], keys: Iterable[str], place: str) -> None:
    wanted = list(keys)
    for key in table:
        if key not in wanted:
            near = difflib.get_close_matches(key, wanted, n=3, cutoff=0.5)
            hint = f"the nearest are {', '.join(near)}" if near else f"there are {', '.join(wanted)}"
            raise InputError(f"{place}: unknown {key!r}; {hint}")

"""Functions that a user names: ``package.module:function`` or ``path/to/file.py:function``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from taylor_cuda.errors import InputError
from taylor_cuda.train.messages import first_line_and_place


def split_spec(argument: str, spec: str, forms: str) -> tuple[str, str]:
    """What stands before and after the last colon.

    Args:
        argument: ``"model"`` or ``"data"``: what errors are about.
        spec: what a user gave.
        forms: what it may be, for the error.

    Raises:
        InputError: one of the two is empty.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise InputError(f"{argument}: wanted {forms}, got {spec!r}")
    return source, name


def find_factory(argument: str, source: str, name: str, forms: str) -> Callable[..., Any]:
    """The function that a user named.

    Args:
        argument: ``"model"`` or ``"data"``: what it makes, and what errors are about.
        source: the dotted name of a module (also found from the current folder), or a ``.py`` file.
        name: of the function in it.
        forms: what else the user could have named, for the error.

    Raises:
        InputError: there is no such module, file or function, or importing it fails.
    """
    module = _module_of(argument, source, forms)
    factory = getattr(module, name, None)
    if factory is None:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown_name(argument, source, name, public)
    if not callable(factory):
        raise InputError(f"{argument}: {source}:{name} is a {type(factory).__name__}, wanted a function to call")
    return factory  # type: ignore[no-any-return]


def call_factory(argument: str, spec: str, factory: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What a factory gives; its failure is the user's to know, not a traceback of ours.

    Raises:
        InputError: it failed.
    """
    try:
        return factory(**arguments)
    except Exception as error:
        raise InputError(f"{argument}: {spec} failed: {first_line_and_place(error)}") from error


def unknown_name(argument: str, library: str, name: str, names: Sequence[str]) -> InputError:
    """The error for a name that a library or module doesn't have, with the nearest that it has."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"; the nearest are {', '.join(near)}" if near else ""
    return InputError(f"{argument}: {library} has no {argument} named {name!r}{hint}")


def _module_of(argument: str, source: str, forms: str) -> ModuleType:
    """The Python module at a dotted name (the current folder counts) or in a ``.py`` file."""
    try:
        if source.endswith(".py"):
            return _module_of_file(argument, Path(source))
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name and (source == error.name or source.startswith(error.name + ".")):
            raise InputError(f"{argument}: no module named {error.name!r}; wanted {forms}") from error
        raise InputError(f"{argument}: importing {source} failed: {first_line_and_place(error)}") from error
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{argument}: importing {source} failed: {first_line_and_place(error)}") from error


def _module_of_file(argument: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"{argument}: no file {path}")
    path = path.resolve()
    known = sys.modules.get(path.stem)
    if known is not None and known.__dict__.get("__file__") == str(path):
        return known  # one file may make both model and data, and its classes are to be the same ones
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Classes defined in the file look their module up here (dataclasses, pickling in loader workers).
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module

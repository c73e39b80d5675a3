"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; what still has it at the block's end vanishes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to: it becomes ``path`` if the block ends well, else it vanishes."""
    with temporary_beside(path) as temporary:
        yield temporary
        rename(temporary, path)


def rename(written: Path, path: Path) -> None:
    """Give a file its name, in the same folder, once the disk holds what was written."""
    flush(written)
    os.replace(written, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Return when the disk holds what was written to a file, or the names in a folder."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_remains(folder: Path) -> None:
    """Remove what processes that were killed have left half-written in a folder."""
    for remains in folder.glob(".*.tmp"):
        remains.unlink(missing_ok=True)

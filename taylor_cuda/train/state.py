"""Where a run stands, and the checkpoints from which it goes on."""

from __future__ import annotations

import hashlib
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taylor_cuda.errors import CheckpointError, InputError
from taylor_cuda.files import remove_remains, rename, temporary_beside
from taylor_cuda.train.messages import first_line

FORMAT = 4
_NAME = re.compile(r"(\d{8,})-([0-9a-f]{16})\.pt")


@dataclass
class Position:
    """Where a run stands: a stage, epochs finished in it, minibatches finished in the epoch under way."""

    stage: str
    epoch: int = 0
    batch: int = 0


class Checkpoints:
    """The last few states of a run, each a file in a folder.

    A file's name holds the number of the minibatch and the beginning of the SHA-256 of its content, so that one rename
    makes file and checksum appear together. One file a state: weights and optimizer always belong together. What is in
    it is tensors and plain values, which load without running code.

    Args:
        folder: made when the first one is saved.
        keep: how many stay.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder, self._keep = folder, keep

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write everything a run needs to go on from minibatch ``step``.

        The oldest ones go, and those of ``step`` or later: they are older, or damaged and were passed over.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with temporary_beside(self.folder / "state.pt") as temporary:
            torch.save({"format": FORMAT, **state}, temporary)
            path = self.folder / f"{step:08d}-{_digest(temporary)}.pt"
            rename(temporary, path)
        others = [other for other in self._paths() if other != path]
        before = [other for other in others if _step(other) < step][: self._keep - 1]
        for other in others:
            if other not in before:
                other.unlink()
        return path

    def newest(self) -> Path | None:
        """The newest one that is whole, or ``None``. Half-written files of a process that was killed are removed."""
        remove_remains(self.folder)
        for path in self._paths():
            if _NAME.fullmatch(path.name)[2] == _digest(path):  # type: ignore[index]
                return path
            warnings.warn(f"resume: {path} is damaged (its checksum differs); trying the one before", stacklevel=2)
        return None

    def clear(self) -> None:
        """Remove all of them."""
        for path in self._paths():
            path.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _paths(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted((path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)), key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.partition("-")[0])


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as content:
        while part := content.read(1 << 22):
            found.update(part)
    return found.hexdigest()[:16]


def load_state(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a file of ``Checkpoints``.

    Raises:
        InputError: there is no such file.
        CheckpointError: it isn't one of ours, or is damaged.
    """
    if not path.is_file():
        raise InputError(f"resume: no file {path}; --out must be a folder that all processes of the run can read")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load has no type of its own for a file it can't read
        raise CheckpointError(f"resume: {path} is damaged: {first_line(error)}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"resume: {path} was not written by this version of taylor-cuda")
    return state


def generator_states() -> dict[str, Tensor]:
    """Where the global random generators of this process stand."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: dict[str, Tensor]) -> None:
    """Put them back to where they stood."""
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())

"""The changes measured so far, in memory and on disk: what an interrupted oracle goes on from."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taylor_cuda.errors import CheckpointError, InputError
from taylor_cuda.files import replacing
from taylor_cuda.graph.groups import Groups, named_tensors
from taylor_cuda.study.batches import Batch, hash_tensor

__all__ = ["Tally", "study_key"]

_EVERY = 30.0
_FORMAT = 1


def study_key(model: nn.Module, groups: Groups, *options: object) -> str:
    """A hash of every weight of a model, of its groups and of ``options``."""
    found = hashlib.sha256(repr((_FORMAT, *options)).encode())
    for name, tensor in named_tensors(model).items():
        found.update(name.encode())
        hash_tensor(found, tensor)
    for group in groups:
        found.update(group.name.encode())
        for member in group.members:
            found.update(f"{member.tensor} {member.dim} {member.role}".encode())
            hash_tensor(found, member.index)
    return found.hexdigest()


@dataclass(frozen=True)
class _State:
    """Sums over ``batches``, by their digests; ``changes`` on the batch ``current`` that isn't among them yet."""

    sums: dict[str, Tensor]
    examples: int = 0
    batches: tuple[str, ...] = ()
    current: str = ""
    changes: dict[str, Tensor] = field(default_factory=dict)


class Tally:
    """Sums of changes over batches.

    Args:
        sizes: ``{group name: units}``.
        device: of the sums.
        path: the file; ``None``: memory only.
        key: what the file belongs to.

    Raises:
        InputError: the file belongs to another model, other groups, weights or options.
        CheckpointError: it can't be read.
    """

    def __init__(self, sizes: Mapping[str, int], device: torch.device, path: Path | None, key: str) -> None:
        self._path, self._key, self._device = path, key, device
        # replaced whole, so that Ctrl-C finds a batch either open or finished
        self._state = _State(
            {name: torch.zeros(size, dtype=torch.float64, device=device) for name, size in sizes.items()}
        )
        self._position = 0
        self._written = time.monotonic()
        if path is not None and path.exists():
            self._state = self._load(path)

    def _load(self, path: Path) -> _State:
        try:
            found: dict[str, Any] = torch.load(path, map_location=self._device, weights_only=True)
            key = found.pop("key")
            state = _State(**found)
        except Exception as error:
            raise CheckpointError(f"oracle: resume: {path} can't be read: {error}") from error
        if key != self._key:
            raise InputError(
                f"oracle: resume: {path} was written for other weights, groups or options; give another or delete it"
            )
        return state

    @property
    def examples(self) -> int:
        """In the batches that were finished."""
        return self._state.examples

    def save(self) -> None:
        """Write everything, whole or not at all; nothing without a file."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._path) as temporary:
            torch.save({"key": self._key, **vars(self._state)}, temporary)
        self._written = time.monotonic()

    def start(self, batch: Batch, digest: str) -> list[str]:
        """The groups of which this batch has no changes yet; none where it was finished before.

        Raises:
            InputError: at this place there was another batch.
        """
        state, at = self._state, self._position
        self._position += 1
        known = (*state.batches, state.current)[at] if at <= len(state.batches) else ""
        if known not in ("", digest):
            raise InputError(
                f"oracle: resume: batch {at} isn't the one that was measured; wanted the same batches in the same order"
            )
        if at < len(state.batches):
            return []
        self._state = replace(state, current=digest)
        return [name for name in state.sums if name not in state.changes]

    def add(self, name: str, changes: Tensor) -> None:
        """Take the changes of one group on the batch that was started."""
        self._state = replace(self._state, changes={**self._state.changes, name: changes})
        if self._path is not None and time.monotonic() - self._written > _EVERY:
            self.save()

    def finish(self, batch: Batch) -> None:
        """Add what was taken to the sums, weighed by examples."""
        state = self._state
        self._state = _State(
            {name: sums + batch.examples * state.changes[name] for name, sums in state.sums.items()},
            state.examples + batch.examples,
            (*state.batches, state.current),
        )

    def batches(self) -> str:
        """A hash of all batches that were finished."""
        return hashlib.sha256(" ".join(self._state.batches).encode()).hexdigest()

    def means(self) -> dict[str, Tensor]:
        """The sums over the examples."""
        return {name: sums / self.examples for name, sums in self._state.sums.items()}

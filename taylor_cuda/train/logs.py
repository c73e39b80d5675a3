"""The log of a run: a JSON line an event, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from taylor_cuda.errors import InputError
from taylor_cuda.files import flush


class RunLog:
    """Appends records to a file; a run that goes on goes on with it, from where its checkpoint was made.

    Args:
        path: of the file; TensorBoard's lie in the folder ``tensorboard`` beside it.
        tensorboard: write them too.

    Raises:
        InputError: TensorBoard is asked for and isn't installed.
    """

    def __init__(self, path: Path, tensorboard: bool = False) -> None:
        self._path, self._board, self._writer = path, path.with_name("tensorboard"), None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise InputError(
                    f"tensorboard: it is not installed ({error}); pip install tensorboard, or leave --tensorboard out"
                ) from error
            self._writer = SummaryWriter
        self._open: Any = None

    def begin(self) -> None:
        """An empty file, and no events for TensorBoard."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        for events in self._board.glob("events.out.tfevents.*"):  # of an earlier run, as the log was
            events.unlink()

    def size(self) -> int:
        """Bytes written so far."""
        return self._path.stat().st_size if self._path.is_file() else 0

    def flushed_size(self) -> int:
        """The same, once the disk holds them: a checkpoint must not outlive the lines it counts on."""
        if self._path.is_file():
            flush(self._path)
        return self.size()

    def go_on(self, size: int, step: int) -> None:
        """Forget what was written after a checkpoint, in which the log had ``size`` bytes, at minibatch ``step``."""
        if self.size() > size:
            os.truncate(self._path, size)
        if self._writer is not None:
            self._open = self._writer(str(self._board), purge_step=step + 1)

    def write(self, record: dict[str, Any], step: int) -> None:
        """Append one event, as of minibatch ``step``."""
        with open(self._path, "a", encoding="utf-8") as lines:
            lines.write(json.dumps({**record, "step": step}) + "\n")
        if self._writer is None:
            return
        if self._open is None:
            self._open = self._writer(str(self._board))
        for key, value in record.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._open.add_scalar(f"{record.get('stage', record['event'])}/{key}", value, step)
        self._open.flush()

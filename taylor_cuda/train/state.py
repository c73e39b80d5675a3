"""Stopping a run between two steps and going on from there."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from taylor_cuda.errors import CheckpointError, InputError, TaylorError
from taylor_cuda.files import replacing
from taylor_cuda.train.messages import first_line

FORMAT = 1


@dataclass
class Position:
    """Where a run stands: a stage, epochs finished in it, minibatches finished in the epoch under way."""

    stage: str
    epoch: int = 0
    batch: int = 0


class RunInterruptedError(TaylorError):
    """A run was stopped with Ctrl-C; the message says where its state is."""


class StopRequest:
    """Remembers a Ctrl-C until the run is between two steps."""

    def __init__(self) -> None:
        self.asked = False

    def check(self) -> None:
        """Raise ``KeyboardInterrupt`` if there was one."""
        if self.asked:
            self.asked = False
            raise KeyboardInterrupt


@contextmanager
def stop_between_steps() -> Iterator[StopRequest]:
    """While active, Ctrl-C only sets a flag, so that no step or cut is left half done; a second one is final."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def on_interrupt(_signal: int, _frame: FrameType | None) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.asked = True

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, before)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write everything a run needs to go on into one file: tensors and plain values, loadable without running code.

    One file, because two can't be renamed at once: weights and optimizer state always belong together.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        rng["cuda"] = torch.cuda.get_rng_state()
    with replacing(path) as temporary:
        torch.save({"format": FORMAT, "rng": rng, **state}, temporary)


def load_state(path: Path, device: torch.device) -> dict[str, Any]:
    """Read what ``save_state`` wrote.

    Raises:
        InputError: there is no such file.
        CheckpointError: it isn't one of ours, or is damaged.
    """
    if not path.is_file():
        raise InputError(f"resume: no file {path}; there is nothing to go on from (start without --resume)")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load has no type of its own for a file it can't read
        raise CheckpointError(f"resume: {path} is damaged: {first_line(error)}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"resume: {path} was not written by this version of taylor-cuda")
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Put the global random generators back to where they were when ``state`` was saved."""
    torch.set_rng_state(state["rng"]["cpu"].cpu())
    if "cuda" in state["rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["rng"]["cuda"].cpu())

"""Stopping a run between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from taylor_cuda.errors import TaylorError


class RunInterruptedError(TaylorError):
    """A run was stopped with Ctrl-C; the message says where its state is."""


class StopRequest:
    """Remembers a Ctrl-C, or a SIGTERM, until the run is between two steps.

    Attributes:
        asked: there was one.
        at_once: there was a second one, which did not wait: whatever was being done is half done.
    """

    def __init__(self) -> None:
        self.asked = self.at_once = False

    def check(self) -> None:
        """Raise ``KeyboardInterrupt`` if there was one."""
        if self.asked:
            self.asked = False
            raise KeyboardInterrupt


@contextmanager
def stop_between_steps(alone: bool = True) -> Iterator[StopRequest]:
    """While active, Ctrl-C and SIGTERM only set a flag, so that no step or cut is left half done.

    A second Ctrl-C is final in a run of one process. ``torchrun`` sends its own after that of the terminal, and ends
    by itself those that don't stop.

    Args:
        alone: the run has one process.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def on_signal(_signal: int, _frame: FrameType | None) -> None:
        if request.asked and alone:
            request.at_once = True
            raise KeyboardInterrupt
        request.asked = True

    before = {kind: signal.signal(kind, on_signal) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)

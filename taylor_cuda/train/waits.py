"""How long a loop waits for its data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class Waits:
    """Host time spent in waiting for the next item.

    Attributes:
        seconds: so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same items; the time until each is there, or until the end is known, is counted."""
        started = time.perf_counter()
        iterator = iter(items)
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - started
            yield item
            started = time.perf_counter()

    def share(self, seconds: float) -> float:
        """Of the ``seconds`` that something took: the part, 0 to 1, spent waiting; 0 where it took no time."""
        return self.seconds / seconds if seconds > 0 else 0.0

"""Labels: every index of every dimension of every parameter and buffer is a node; equal nodes make the units.

A dimension of a tensor carries ``None`` (no labels: batch, space, tokens) or an int64 array with the node of each
index, ``FREE`` where an index has none. Rules only append whole arrays; everything is solved at once, at the end,
without a loop over channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]
Dims = list["Array | None"]
"""One entry a dimension: the node of each index, or None."""

FREE = -1
NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Reason:
    """Why channels stay: what happened, in which module, at which line of the user's code."""

    text: str
    module: str = ""
    line: str = ""

    def __str__(self) -> str:
        place = ", ".join(part for part in (self.module, self.line) if part)
        return f"{self.text} ({place})" if place else self.text


@dataclass(frozen=True)
class Classes:
    """Solved labels.

    Attributes:
        root: int64 ``[nodes]``, the smallest node equal to each node.
        event: int64 ``[nodes]``, for roots the first event that froze the class, ``NEVER`` if none did.
        reasons: the reason of each event.
    """

    root: Array
    event: Array
    reasons: tuple[Reason, ...]


def connected(count: int, a: Array, b: Array) -> Array:
    """The smallest node of each node's connected component.

    Repeats until nothing changes: hook the larger root of every edge under the smaller one, then halve all paths
    (Shiloach and Vishkin 1982, without the processors).

    Args:
        count: number of nodes.
        a: int64 ``[edges]``.
        b: int64 ``[edges]``.

    Returns:
        int64 ``[count]``.
    """
    root = np.arange(count, dtype=np.int64)
    while a.size:
        low, high = np.minimum(root[a], root[b]), np.maximum(root[a], root[b])
        open_edges = low != high
        if not open_edges.any():
            break
        a, b, low, high = a[open_edges], b[open_edges], low[open_edges], high[open_edges]
        # of a root's edges to the smallest, not to any: a star would take as many rounds as it has rays
        np.minimum.at(root, high, low)
        while True:
            above = root[root]
            if np.array_equal(above, root):
                break
            root = above
    return root


class Labels:
    """Collects nodes, equalities and frozen nodes in the order of the forward pass."""

    def __init__(self) -> None:
        self.count = 0
        self._equal: list[tuple[Array, Array, int]] = []
        self._frozen: list[tuple[Array, int]] = []
        self._reasons: list[Reason] = []

    def new(self, size: int) -> Array:
        """``size`` new nodes."""
        self.count += size
        return np.arange(self.count - size, self.count, dtype=np.int64)

    def equal(self, a: Array | None, b: Array | None, reason: Reason) -> None:
        """Index by index, ``a`` and ``b`` are the same channel; one that meets no label is frozen for ``reason``."""
        if a is b:
            return
        if a is None or b is None:
            self.freeze(b if a is None else a, reason)
            return
        if a.shape != b.shape:
            raise ValueError(f"labels of {a.shape} and {b.shape} indices can't be equal")
        self._equal.append((a, b, self._event(reason)))

    def freeze(self, a: Array | None, reason: Reason) -> None:
        """These nodes stay."""
        if a is not None:
            self._frozen.append((a, self._event(reason)))

    def _event(self, reason: Reason) -> int:
        self._reasons.append(reason)
        return len(self._reasons) - 1

    def solve(self) -> Classes:
        """Connected components, and the first event that froze each."""
        pairs = self._equal
        a = np.concatenate([np.zeros(0, np.int64), *(pair[0] for pair in pairs)])
        b = np.concatenate([np.zeros(0, np.int64), *(pair[1] for pair in pairs)])
        events = np.repeat(
            np.array([pair[2] for pair in pairs], dtype=np.int64),
            np.array([pair[0].size for pair in pairs], dtype=np.int64),
        )
        both = (a >= 0) & (b >= 0)
        root = connected(self.count, a[both], b[both])
        lone = (a >= 0) ^ (b >= 0)
        nodes = [np.maximum(a, b)[lone], *(ids.ravel() for ids, _ in self._frozen)]
        when = [events[lone], *(np.full(ids.size, event) for ids, event in self._frozen)]
        frozen, at = np.concatenate(nodes), np.concatenate(when)
        event = np.full(self.count, NEVER, dtype=np.int64)
        np.minimum.at(event, root[frozen[frozen >= 0]], at[frozen >= 0])
        return Classes(root, event, tuple(self._reasons))

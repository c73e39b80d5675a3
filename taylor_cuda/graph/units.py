"""From solved labels to groups: classes of nodes become units, units in the same places become groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from taylor_cuda.graph.flow import Flow, Place
from taylor_cuda.graph.groups import Call, ChannelGroup, Frozen, Member, Number, layer_of
from taylor_cuda.graph.labels import NEVER, Array, Bools, Classes

_LEFT = ("", "no layer reads them", "one unit in all")
Leftovers = np.ndarray[Any, np.dtype[np.int8]]
"""By root: why a class that nothing froze is no group, an index into ``_LEFT``."""


@dataclass(frozen=True)
class Runs:
    """Stretches of nodes with one class and one place, of candidate classes; classes ascending, then places.

    Attributes:
        nodes: the nodes of all candidate classes, sorted by class, then by node.
        root: int64 ``[runs]``.
        place: int64 ``[runs]``.
        count: int64 ``[runs]``, nodes in each.
        first_of_class: int64 ``[classes]``, the first run of each class.
    """

    nodes: Array
    root: Array
    place: Array
    count: Array
    first_of_class: Array


def _mix(values: Array) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """A 64-bit hash of each value (splitmix64)."""
    z = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray[tuple[int], np.dtype[np.uint64]] = z ^ (z >> np.uint64(31))
    return mixed


def find_runs(root: Array, place_of: Array, candidate: Bools) -> Runs:
    """Sort the nodes of candidate classes.

    Args:
        root: int64 ``[nodes]``.
        place_of: int64 ``[nodes]``.
        candidate: bool ``[nodes]``, by root.
    """
    chosen = np.flatnonzero(candidate[root])
    # nodes ascend with their places, so a stable sort by class leaves every class sorted by place and position
    nodes = chosen[np.argsort(root[chosen], kind="stable")]
    roots, places = root[nodes], place_of[nodes]
    starts = np.flatnonzero(np.r_[True, (roots[1:] != roots[:-1]) | (places[1:] != places[:-1])] if nodes.size else [])
    run_root = roots[starts]
    count = np.diff(np.r_[starts, nodes.size])
    first = np.flatnonzero(np.r_[True, run_root[1:] != run_root[:-1]] if starts.size else [])
    return Runs(nodes, run_root, places[starts], count, first)


class Units:
    """The classes of one model's nodes and what is known of each."""

    def __init__(self, flow: Flow, classes: Classes) -> None:
        self.flow = flow
        self.classes = classes
        self.places = flow.places
        sizes = np.array([place.size for place in self.places], dtype=np.int64)
        self.place_of = np.repeat(np.arange(len(self.places), dtype=np.int64), sizes)
        self.at = {(place.tensor, place.dim): at for at, place in enumerate(self.places)}

    def nodes(self, place: Place) -> Array:
        """The nodes of one dimension."""
        return np.arange(place.start, place.start + place.size, dtype=np.int64)

    def having(self, role: str) -> Bools:
        """Bool ``[nodes]``, by root: classes with a place of this role."""
        has = np.zeros(self.classes.root.size, dtype=bool)
        for place, given in self.flow.roles.items():
            if given == role:
                has[self.classes.root[self.nodes(self.places[self.at[place]])]] = True
        return has

    def groups(self) -> tuple[list[ChannelGroup], Leftovers]:
        """Groups in the model's order, and which classes that nothing froze are none (see :data:`_LEFT`)."""
        reads = self.having("read")
        candidate = (self.classes.event == NEVER) & self.having("write")
        runs = find_runs(self.classes.root, self.place_of, candidate & reads)
        left: Leftovers = (candidate & ~reads).astype(np.int8)
        result: list[tuple[int, tuple[Member, ...]]] = []
        if runs.first_of_class.size:
            signature = np.add.reduceat(_mix(runs.place * (1 << 32) + runs.count), runs.first_of_class)
            _, group_of, size_of = np.unique(signature, return_inverse=True, return_counts=True)
            order = np.argsort(group_of, kind="stable")
            begin = np.r_[0, np.cumsum(runs.count)]
            for units in np.split(order, np.cumsum(size_of)[:-1]):
                if units.size == 1:
                    left[runs.root[runs.first_of_class[units[0]]]] = 2
                else:
                    result.append(self._members(runs, units, begin))
        result.sort(key=lambda item: item[0])
        return self._named([members for _, members in result]), left

    def _members(self, runs: Runs, units: Array, begin: Array) -> tuple[int, tuple[Member, ...]]:
        """The members of one group, and its first node. ``units``: classes by number, ascending."""
        first_runs = runs.first_of_class[units]
        after = np.searchsorted(runs.first_of_class, first_runs[0], side="right")
        end = runs.first_of_class[after] if after < runs.first_of_class.size else runs.root.size
        one = slice(first_runs[0], end)
        count = runs.count[one]
        table = runs.nodes[begin[first_runs][:, None] + np.arange(count.sum())]
        members = []
        for place_index, nodes in zip(runs.place[one], np.split(table, np.cumsum(count)[:-1], axis=1), strict=True):
            place = self.places[place_index]
            index = torch.from_numpy(np.ascontiguousarray(nodes - place.start))
            role = self.flow.roles.get((place.tensor, place.dim), "other")
            members.append(Member(place.tensor, place.dim, index, role))
        return int(table[0, 0]), tuple(members)

    def along(self, groups: Sequence[ChannelGroup], call: Call, labels: Array | None) -> Call:
        """``call`` with the place that shrinks as its cost does, where ``labels`` are all units of one group."""
        if labels is None or (labels < 0).any():
            return call
        units, counts = np.unique(self.classes.root[labels], return_counts=True)
        if np.unique(counts).size > 1:
            return call
        for group in groups:
            if not np.array_equal(units, self._classes_of(group)):
                continue
            for member in (*group.role("read"), *group.members):
                length = self.places[self.at[member.tensor, member.dim]].size
                if member.index.numel() == length and call.macs_per_weight % length == 0:
                    macs = call.macs_per_weight // length
                    return replace(call, macs_per_weight=macs, along=(member.tensor, member.dim))
        return call

    def with_numbers(self, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
        """The groups with the attributes that count their units; one that several groups claim follows none."""
        claims: dict[tuple[str, str], dict[str, Number]] = {}
        for counted in self.flow.counted:
            units = np.unique(self.classes.root[counted.labels])
            for group in groups:
                if np.array_equal(units, self._classes_of(group)):
                    claims.setdefault((counted.number.module, counted.number.name), {})[group.name] = counted.number
        sole = [next(iter(claim.items())) for claim in claims.values() if len(claim) == 1]
        return [
            replace(group, numbers=tuple(number for name, number in sole if name == group.name)) for group in groups
        ]

    def _classes_of(self, group: ChannelGroup) -> Array:
        """The classes of a group's units, sorted."""
        first = group.members[0]
        own = self.places[self.at[first.tensor, first.dim]].start + first.index[:, 0].numpy()
        classes: Array = np.sort(self.classes.root[own])
        return classes

    def _named(self, groups: list[tuple[Member, ...]]) -> list[ChannelGroup]:
        seen: dict[str, int] = {}
        named = []
        for members in groups:
            writer = next(member.tensor for member in members if member.role == "write")
            name = layer_of(writer)
            seen[name] = seen.get(name, 0) + 1
            full = name if seen[name] == 1 else f"{name}#{seen[name]}"
            size = members[0].index.shape[0]
            named.append(ChannelGroup(full, members, torch.arange(size), size))
        return named

    def frozen(self, left: Leftovers) -> list[Frozen]:
        """Written channels that stay, counted by the module that writes them first and by reason."""
        root, event = self.classes.root, self.classes.event
        seen = np.zeros(root.size, dtype=bool)
        sizes: dict[tuple[str, str], int] = {}
        for place in self.places:
            if self.flow.roles.get((place.tensor, place.dim)) != "write":
                continue
            mine = root[self.nodes(place)]
            fresh = mine[~seen[mine]]
            seen[mine] = True
            name = layer_of(place.tensor)
            stuck = fresh[event[fresh] != NEVER]
            reasons = [(str(self.classes.reasons[at]), size) for at, size in _counts(event[stuck])]
            reasons += [(_LEFT[at], size) for at, size in _counts(left[fresh]) if at]
            for text, size in reasons:
                sizes[name, text] = sizes.get((name, text), 0) + size
        for layer in self.flow.outside:
            key = (layer.module, str(layer.reason))
            sizes[key] = max(sizes.get(key, 0), layer.size)
        return [Frozen(name, size, reason) for (name, reason), size in sizes.items()]


def _counts(values: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """Each value and how often it is there."""
    found, counts = np.unique(values, return_counts=True)
    return list(zip(found.tolist(), counts.tolist(), strict=True))


def freeze_unreached(flow: Flow) -> None:
    """Freeze what is read by a parameter that no reader function of ``sites.py`` was called with."""
    for read in flow.reads:
        if read.place[0] not in flow.reached:
            flow.labels.freeze(read.labels, read.reason)

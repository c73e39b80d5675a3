"""What comes after a group's units, again and for many removals at once; everything before them is taken as it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from taylor_cuda.graph.groups import ChannelGroup
from taylor_cuda.study.batched import run_node
from taylor_cuda.study.norms import normalised
from taylor_cuda.study.readers import subtract_channels, subtracts
from taylor_cuda.study.recording import Mark, Node, Recording, Ref

__all__ = ["Part", "part_after"]

Values = dict[int, Tensor]


@dataclass(frozen=True)
class _Removed:
    """What is off in each of K copies.

    Attributes:
        channels: ``{weight of a reader or a normalisation: int64 [K, width]}``.
        kept: the same as masks, bool ``[K, channels]``.
    """

    channels: dict[str, Tensor]
    kept: dict[str, Tensor]

    def kept_along(self, name: str, dims: int, dim: int) -> Tensor:
        """Bool ``[K, 1, …, channels, …, 1]``, for a tensor of ``dims`` dimensions with copies in front."""
        mask = self.kept[name]
        shape = [1] * dims
        shape[dim] = mask.shape[1]
        return mask.view(mask.shape[0], *shape)


class _Step:
    """Something that is run again.

    Attributes:
        inputs: values it reads: their copies where there are any, otherwise what was recorded.
        recorded: values it reads as they were recorded.
        outputs: values it makes copies of.
        macs: products of one copy.
        room: elements it needs while it runs, as a multiple of its outputs.
    """

    inputs: frozenset[int] = frozenset()
    recorded: frozenset[int] = frozenset()
    outputs: tuple[int, ...]
    macs = 0
    room = 1

    def run(self, recording: Recording, copies: Values, removed: _Removed) -> Values:
        """The copies of its outputs."""
        raise NotImplementedError


class _Op(_Step):
    """An op."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.inputs, self.outputs, self.macs = node.inputs, node.outputs, node.macs

    def run(self, recording: Recording, copies: Values, removed: _Removed) -> Values:
        return run_node(self._node, copies, recording.values.__getitem__)


class _Same(_Step):
    """A mark at which nothing of this group is off."""

    def __init__(self, mark: Mark) -> None:
        self.inputs, self.outputs = mark.inputs, mark.outputs

    def run(self, recording: Recording, copies: Values, removed: _Removed) -> Values:
        return {self.outputs[0]: copies[next(iter(self.inputs))]}


class _Zero(_Step):
    """The input of a reader, zero where units are off."""

    def __init__(self, mark: Mark) -> None:
        self._mark = mark
        self.inputs, self.outputs = mark.inputs, mark.outputs

    def run(self, recording: Recording, copies: Values, removed: _Removed) -> Values:
        x, span = _source(self._mark, recording, copies), self._mark.span
        kept = removed.kept_along(span.name, self._mark.dims, span.dim)
        return {self.outputs[0]: torch.where(kept, x, x.new_zeros(()))}


class _Normalise(_Step):
    """A normalisation with the statistics of what is kept."""

    room = 4

    def __init__(self, enter: Mark, leave: Mark) -> None:
        self._mark = enter
        self.inputs, self.outputs = enter.inputs, leave.outputs

    def run(self, recording: Recording, copies: Values, removed: _Removed) -> Values:
        x, span = _source(self._mark, recording, copies), self._mark.span
        kept = removed.kept_along(span.name, self._mark.dims, span.dim)
        kept = kept if span.base is None else kept & span.base
        vectors, eps = span.args
        return {self.outputs[0]: normalised(span.func, x, vectors, eps, kept)}


class _Subtract(_Step):
    """The output of a reader whose input is the same in all copies, without what the channels add to it."""

    def __init__(self, enter: Mark, leave: Mark, macs: int) -> None:
        self._enter, self._leave = enter, leave
        self.recorded = frozenset([enter.output, leave.output])
        self.outputs, self.macs = leave.outputs, macs

    def run(self, recording: Recording, copies: Values, removed: _Removed) -> Values:
        x, y = recording.values[self._enter.output], recording.values[self._leave.output]
        channels = removed.channels[self._enter.span.name]
        return {self._leave.output: subtract_channels(self._enter.span, x, y, channels)}


def _source(mark: Mark, recording: Recording, copies: Values) -> Tensor:
    if not isinstance(mark.source, Ref):
        return mark.source
    value = mark.source.value
    return copies[value] if value in copies else recording.values[value]


@dataclass(frozen=True)
class Part:
    """The part of a pass that comes after the units of one group.

    Attributes:
        group: the group.
        steps: what is run again.
        frees: for each step, the values that no later one reads.
        recorded: the values of the recording that it reads.
        macs: products of one copy.
        bytes: what the values of one copy take at once, at most.
        sizes: channels of the readers and normalisations that it meets.
    """

    group: ChannelGroup
    steps: tuple[_Step, ...]
    frees: tuple[tuple[int, ...], ...]
    recorded: frozenset[int]
    macs: int
    bytes: int
    sizes: dict[str, int]

    def losses(self, recording: Recording, units: Tensor) -> Tensor:
        """The loss without the units of each row.

        Args:
            recording: of the pass this part was made from.
            units: int64 ``[K, count]`` on the CPU.

        Returns:
            float64 ``[K]``.
        """
        if recording.loss is None or not self.steps:
            return recording.base.double().expand(units.shape[0])
        removed = self._removed(units, recording.base.device)
        copies: Values = {}
        for step, done in zip(self.steps, self.frees, strict=True):
            copies.update(step.run(recording, copies, removed))
            for value in done:
                copies.pop(value, None)
        return copies[recording.loss].double()

    def _removed(self, units: Tensor, device: torch.device) -> _Removed:
        channels: dict[str, Tensor] = {}
        for member in (*self.group.role("read"), *self.group.role("norm")):
            if member.tensor in self.sizes:
                channels[member.tensor] = member.index[units].flatten(1)
        kept = {
            name: torch.ones(len(units), self.sizes[name], dtype=torch.bool).scatter_(1, at, False)
            for name, at in channels.items()
        }
        there = [{name: x.to(device, non_blocking=True) for name, x in of.items()} for of in (channels, kept)]
        return _Removed(*there)


def part_after(recording: Recording, group: ChannelGroup, count: int) -> Part:
    """What has to be run again when ``count`` units of ``group`` are removed."""
    sizes: dict[str, int] = {}
    steps = list(_forward(recording, group, count, sizes))
    made = {value for step in steps for value in step.outputs}
    needed = {recording.loss}
    used: list[_Step] = []
    frees: list[tuple[int, ...]] = []
    recorded: set[int] = set()
    for step in reversed(steps):
        if needed.isdisjoint(step.outputs):
            continue
        frees.append(tuple(value for value in {*step.inputs, *step.outputs} if value not in needed))
        used.append(step)
        needed |= step.inputs
        recorded |= step.recorded | (step.inputs - made)
    used.reverse()
    frees.reverse()
    return Part(
        group,
        tuple(used),
        tuple(frees),
        frozenset(recorded),
        sum(step.macs for step in used),
        _most_bytes(recording, used, frees),
        sizes,
    )


def _forward(recording: Recording, group: ChannelGroup, count: int, sizes: dict[str, int]) -> Iterator[_Step]:
    """Everything that the group's units reach, in order; ``sizes`` is filled."""
    widths = {member.tensor: count * member.width for member in (*group.role("read"), *group.role("norm"))}
    nodes, reached = recording.nodes, set[int]()
    index = 0
    while index < len(nodes):
        node = nodes[index]
        step: _Step | None = None
        if isinstance(node, Node):
            step = None if reached.isdisjoint(node.inputs) else _Op(node)
        elif index == node.span.first and node.span.name in widths:
            span, leave = node.span, nodes[node.span.last]
            assert isinstance(leave, Mark)
            sizes[span.name] = recording.values[node.output].shape[span.dim]
            if span.kind == "norm":
                step = _Normalise(node, leave)
            elif reached.isdisjoint(node.inputs) and subtracts(span, recording.values[node.output], widths[span.name]):
                whole = sum(inner.macs for inner in nodes[span.first : span.last] if isinstance(inner, Node))
                step = _Subtract(node, leave, whole * widths[span.name] // sizes[span.name])
            else:
                step = _Zero(node)
            index = index if isinstance(step, _Zero) else span.last
        elif not reached.isdisjoint(node.inputs):
            step = _Same(node)
        if step is not None:
            reached.update(step.outputs)
            yield step
        index += 1


def _most_bytes(recording: Recording, steps: list[_Step], frees: list[tuple[int, ...]]) -> int:
    """What the values of one copy take at once, at most."""
    there, most = 0, 1
    alive: dict[int, int] = {}
    for step, done in zip(steps, frees, strict=True):
        for value in step.outputs:
            tensor = recording.values[value]
            alive[value] = tensor.numel() * tensor.element_size()
            there += alive[value]
            most = max(most, there + (step.room - 1) * alive[value])
        for value in done:
            there -= alive.pop(value, 0)
    return most

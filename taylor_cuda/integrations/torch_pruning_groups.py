"""Which parameters of a Torch-Pruning group hold the gate of its channels, and which channels are removed together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch_pruning.ops import OPTYPE
from torch_pruning.pruner import function

from taylor_cuda.errors import InputError

__all__ = ["Member", "Place", "Term", "terms_of", "units_of"]

WRITERS = (
    function.prune_conv_out_channels,
    function.prune_linear_out_channels,
    function.prune_depthwise_conv_out_channels,
)
NORMS = (OPTYPE.BN, OPTYPE.LN, OPTYPE.GN, OPTYPE.IN)
REARRANGING = (OPTYPE.SPLIT, OPTYPE.SLICE, OPTYPE.UNBIND, OPTYPE.RESHAPE, OPTYPE.EXPAND, OPTYPE.CONCAT)


class Place(NamedTuple):
    """Positions along one dimension of a parameter; of a convolution with groups, along dimension 1 in all of them."""

    parameter: Tensor
    dim: int
    groups: int = 1

    @property
    def key(self) -> tuple[int, int]:
        """Of a dictionary, for as long as the parameter lives."""
        return id(self.parameter), self.dim

    def by_position(self, values: Tensor) -> tuple[Tensor, int]:
        """The parameter's values or gradient, and the dimension that has the positions."""
        if self.groups == 1 or self.dim != 1:
            return values, self.dim
        return values.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1), 0


class Term(NamedTuple):
    """Positions of a place in a layer, and the channel of the group's root that each belongs to."""

    layer: str
    place: Place
    idxs: list[int]
    roots: list[int]

    def check(self, length: int, position: Mapping[int, int]) -> None:
        """Torch-Pruning maps some splits wrongly and some repeated heads not at all."""
        if max(self.idxs, default=-1) >= length or any(root not in position for root in self.roots):
            raise InputError(
                f"{self.layer}: Torch-Pruning's group doesn't say which of its channels go with which of the layer "
                "that is pruned first; put the layers of this group into the pruner's ignored_layers"
            )


class _Index(NamedTuple):
    """A channel of a layer and that of the root, under the names that Torch-Pruning's mappings ask for."""

    idx: int
    root_idx: int


class Member:
    """One layer of a group and what Torch-Pruning does to it.

    Args:
        item: of a ``tp.Group``.
    """

    def __init__(self, item: Any) -> None:
        self.node, self.handler = item.dep.target, item.dep.handler
        self.layer, self.kind, self.name = self.node.module, self.node.type, self.node.name
        self.idxs, self.roots = list(item.idxs), list(item.root_idxs)

    def _is_only(self, one: str, other: str) -> bool:
        pruner = self.handler.__self__
        return bool(self.handler == getattr(pruner, one) and self.handler != getattr(pruner, other))

    @property
    def consumes(self) -> bool:
        """Whether the channels end here: they are read, or leave the network."""
        ends = self.kind in (OPTYPE.OUTPUT, OPTYPE.MHA, OPTYPE.LSTM)
        return ends or self._is_only("prune_in_channels", "prune_out_channels")

    @property
    def writes(self) -> bool:
        """Whether the channels begin here."""
        return self._is_only("prune_out_channels", "prune_in_channels")

    def _terms(self, parameter: Tensor | None, dim: int, groups: int = 1) -> list[Term]:
        if parameter is None:
            return []
        return [Term(self.name, Place(parameter, dim % parameter.dim(), groups), self.idxs, self.roots)]

    def _weight_and_bias(self, layer: Any, dim: int) -> list[Term]:
        return self._terms(layer.weight, dim, getattr(layer, "groups", 1)) + self._terms(layer.bias, -1)

    def read(self) -> list[Term]:
        """The terms of a gate at the inputs of a layer that reads; none where they aren't known."""
        if self.handler == function.prune_conv_in_channels:
            return self._terms(self.layer.weight, 0 if self.layer.transposed else 1, self.layer.groups)
        if self.handler == function.prune_linear_in_channels:
            return self._terms(self.layer.weight, 1)
        if self.kind == OPTYPE.MHA and self.layer.in_proj_weight is not None:
            return self._terms(self.layer.in_proj_weight, 1) + self.inside()
        return []

    def inside(self) -> list[Term]:
        """Of attention: the terms of the gates of its inner dimensions, where values are read and at the queries."""
        if self.kind != OPTYPE.MHA:
            return []
        queries = self.layer.q_proj_weight if self.layer.in_proj_weight is None else self.layer.in_proj_weight
        bias = self._terms(self.layer.in_proj_bias, 0)
        return self._terms(self.layer.out_proj.weight, 1) + self._terms(queries, 0) + bias

    def written(self) -> list[Term]:
        """The terms of a gate behind a layer that writes channels or carries them on; none where it has none."""
        layer = self.layer
        if self.kind == OPTYPE.PARAMETER:
            scales = all("Mul" in node.grad_fn.name() for node in self.node.outputs)
            return [] if scales else self._terms(layer, self.node.pruning_dim)
        if self.kind == OPTYPE.EMBED:
            return self._terms(layer.weight, 1)
        if self.kind in NORMS:
            return [] if layer.weight is None else self._weight_and_bias(layer, -1)
        if self.kind == OPTYPE.MHA:
            return self._weight_and_bias(layer.out_proj, 0)
        transposed = int(getattr(layer, "transposed", False))
        return self._weight_and_bias(layer, transposed) if self.handler in WRITERS else []


# -- which layers count ----------------------------------------------------------


def terms_of(members: list[Member]) -> list[list[Term]]:
    """The terms of the gate of a group, layer by layer: at its readers, or behind the last layers before its ends.

    Raises:
        InputError: neither has trained parameters.
    """
    read = [member.read() for member in members if member.consumes]
    return read if read and all(map(_trained, read)) else _behind(members)


def _trained(terms: list[Term]) -> bool:
    return bool(terms) and all(term.place.parameter.requires_grad for term in terms)


def _behind(members: list[Member]) -> list[list[Term]]:
    """The terms of the last layers with trained parameters on every way to an end of the channels."""
    gates = {member.node: terms for member in members if _trained(terms := member.written())}
    at: dict[Any, list[Member]] = {}
    for member in members:
        at.setdefault(member.node, []).append(member)
    last = {}
    for member in members:
        if (member.node in gates or member.writes) and _leads_out(member.node, at, gates):
            if member.node not in gates:
                raise _unknown(member, "what it writes with isn't trained, and its readers aren't known or not trained")
            last[member.node] = gates[member.node]
    return [*last.values(), *(inside for member in members if (inside := member.inside()))]


def _leads_out(start: Any, at: Mapping[Any, list[Member]], gates: Mapping[Any, list[Term]]) -> bool:
    """Whether some way from a layer to an end of the channels meets no other gate."""
    seen, ahead, found = set(), list(start.outputs), not start.outputs
    while ahead:
        node = ahead.pop()
        if node in seen or node not in at:
            continue
        seen.add(node)
        if any(member.consumes for member in at[node]) or not node.outputs:
            found = True
        elif node not in gates:
            if at[node][0].kind in NORMS:
                raise _unknown(at[node][0], "it has no trained scale, and its readers aren't known or not trained")
            ahead.extend(node.outputs)
    return found


def _unknown(member: Member, why: str) -> InputError:
    return InputError(
        f"{member.name}: gradients of parameters don't give the first-order effect of its channels: {why}; put the "
        "layer that writes them into the pruner's ignored_layers, or train the parameters of their readers"
    )


# -- which channels go together ----------------------------------------------------


def units_of(members: list[Member], position: Mapping[int, int]) -> list[int]:
    """For each channel of the root, the first of those that are removed with it.

    Args:
        members: the layers of a group.
        position: of each channel of the root in the result.
    """
    length = len(position) // _runs(members)
    first = [i % length for i in range(len(position))]
    for pair in _meetings(members):
        if all(root in position for root in pair):
            one, other = sorted(_start(first, position[root]) for root in pair)
            first[other] = one
    return [_start(first, i) for i in range(len(first))]


def _start(first: list[int], i: int) -> int:
    while first[i] != i:
        i = first[i]
    return i


def _meetings(members: list[Member]) -> Iterator[tuple[int, int]]:
    """Pairs of the root's channels that meet at one channel of a layer, of which a group names only one."""
    if not any(member.kind in REARRANGING for member in members):
        return
    known = {(member.node, member.handler): member for member in members}
    for member in members:
        for edge in member.node.dependencies:
            other = known.get((edge.target, edge.handler))
            if other is None or not edge.is_triggered_by(member.handler):
                continue
            mappings = [mapping for mapping in edge.index_mapping if mapping is not None]
            if not mappings and (member.idxs, member.roots) == (other.idxs, other.roots):
                continue
            indices = [_Index(*pair) for pair in zip(member.idxs, member.roots, strict=True)]
            for mapping in mappings:
                indices = mapping(indices)
            roots = dict(zip(other.idxs, other.roots, strict=True))
            for index in indices:
                if roots.get(index.idx, index.root_idx) != index.root_idx:
                    yield roots[index.idx], index.root_idx


def _runs(members: list[Member]) -> int:
    """How many runs of channels a grouped convolution or a GroupNorm makes Torch-Pruning remove alike: 1 without."""
    counts = [1]
    for member in members:
        if member.kind == OPTYPE.CONV and len(member.idxs) in (member.layer.in_channels, member.layer.out_channels):
            counts.append(member.layer.groups)
        elif member.kind == OPTYPE.GN and len(member.idxs) == member.layer.num_channels:
            counts.append(member.layer.num_groups)
    return max(counts)

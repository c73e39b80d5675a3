"""What may be removed from a model, as plain data: units of channels, and where each one lies.

A **unit** is the smallest thing that can be removed on its own: one channel with everything coupled to it (its
filters, its normalisation, the inputs of whatever reads it), or a whole convolution group. Units that lie in the same
dimensions of the same tensors form a **group**: they are ranked together and share one count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from taylor_cuda.errors import InputError

Role = Literal["write", "read", "norm", "other"]


@dataclass(frozen=True)
class Member:
    """The places one group takes along one dimension of one parameter or buffer.

    Attributes:
        tensor: name as in ``named_parameters`` or ``named_buffers`` (the first name of a shared tensor).
        dim: the dimension that shrinks.
        index: int64 ``[size, width]``: the positions of each unit along ``dim``.
        role: ``"write"`` a weight whose output is the unit; ``"read"`` a weight that contracts the unit away (the
            unit ends there); ``"norm"`` an affine parameter or a statistic of a normalisation; ``"other"`` a bias, a
            scale, …
    """

    tensor: str
    dim: int
    index: Tensor
    role: Role

    @property
    def width(self) -> int:
        """Positions along ``dim`` that one unit takes."""
        return self.index.shape[1]


HEAD_COUNTS = frozenset({"num_heads", "n_heads", "heads", "n_head", "nhead", "num_attention_heads"})
HEAD_WIDTHS = frozenset({"attn_dim", "inner_dim", "all_head_size"})


@dataclass(frozen=True)
class Number:
    """An attribute of a module that code computes shapes with, and that is proportional to a group's units.

    Attributes:
        module: its name.
        name: of the attribute, one of ``HEAD_COUNTS`` and ``HEAD_WIDTHS``.
        per_unit: its value for one unit.
    """

    module: str
    name: str
    per_unit: int


@dataclass(frozen=True)
class ChannelGroup:
    """Units that lie in the same dimensions of the same tensors.

    Attributes:
        name: the module that writes the channels; the same for every copy of a model and in every process.
        members: every place the units take. Removing a unit removes all of its positions.
        kept: int64 ``[size]``, the original index of each unit that is still there.
        original_size: units before the first cut.
        affine: the (gamma, beta) members of the normalisations whose γ·dγ + β·dβ is exactly the gradient of the
            units' gate (DESIGN 3.2: only positively homogeneous maps between them and every reader); empty where that
            does not hold.
        numbers: attributes of modules that follow the number of units.
    """

    name: str
    members: tuple[Member, ...]
    kept: Tensor
    original_size: int
    affine: tuple[Member, ...] = ()
    numbers: tuple[Number, ...] = ()

    @property
    def size(self) -> int:
        """Units in the group now."""
        return self.kept.numel()

    def role(self, role: Role) -> tuple[Member, ...]:
        """The members with this role."""
        return tuple(member for member in self.members if member.role == role)


@dataclass(frozen=True)
class Frozen:
    """Channels that stay, and why."""

    name: str
    size: int
    reason: str


@dataclass(frozen=True)
class Call:
    """One use of a weight by a convolution, a linear layer or a product.

    It costs ``macs_per_weight · weight.numel()`` MACs; ``macs_per_weight`` counts the whole of ``example_inputs``:
    divide by ``Groups.batch_size`` for one example. A product of activations has no weight: it costs
    ``macs_per_weight`` times the length of ``along``, a ``(tensor, dimension)`` that shrinks with its heads, or just
    ``macs_per_weight`` where nothing of it can go.
    """

    weight: str
    module: str
    op: str
    macs_per_weight: int
    along: tuple[str, int] | None = None

    def elements(self, shape_of: Callable[[str], Sequence[int]]) -> int:
        """What ``macs_per_weight`` is multiplied with, given the shape of a tensor by name."""
        if self.along is not None:
            tensor, dim = self.along
            return shape_of(tensor)[dim]
        return prod(shape_of(self.weight)) if self.weight else 1


@dataclass
class Groups:
    """The prunable groups of one model: iterable, indexable by name, updated in place by ``tc.cut``.

    Attributes:
        groups: the prunable groups in the order of the model's parameters.
        frozen: what can't be pruned, with the reason.
        calls: uses of weights that cost MACs.
        example_inputs: positional and keyword arguments of the model, as ``(args, kwargs)``.
        batch_size: examples in ``example_inputs``.
        original_macs: MACs of the model as it was traced, for the whole of ``example_inputs``.
        original_params: parameters of the model as it was traced.
        notes: what a user should know about this trace.
        verified: greatest relative difference between cut and masked that the last ``tc.cut`` measured; ``None``
            if it didn't.
    """

    groups: tuple[ChannelGroup, ...]
    frozen: tuple[Frozen, ...]
    calls: tuple[Call, ...]
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]]
    batch_size: int
    original_macs: int
    original_params: int
    notes: list[str] = field(default_factory=list)
    verified: float | None = None

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> ChannelGroup:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no group named {name!r}; there are {[group.name for group in self.groups]}")

    def sizes(self) -> dict[str, int]:
        """Units in each group now."""
        return {group.name: group.size for group in self.groups}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; a shared one under its first name only."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors.update(model.named_buffers())
    return tensors


def layer_of(tensor: str) -> str:
    """The name of the module that owns a parameter, or of the one whose weight it is made for."""
    layer, parametrized, _ = tensor.partition(".parametrizations.")
    return layer if parametrized else layer.rpartition(".")[0] or tensor


def call_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``example_inputs`` as the ``(args, kwargs)`` of one call.

    A tensor is the only argument, a tuple or list the positional ones, a dict the keyword ones.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs), {}
    raise InputError(
        "example_inputs: wanted a tensor, a tuple of arguments or a dict of keyword arguments, "
        f"got {type(example_inputs).__name__}"
    )


def units_to_keep(groups: Groups, plan: Any) -> dict[str, Tensor]:
    """``{group name: sorted int64 unit indices}`` of a ``tc.Plan`` or of such a dict, checked against the groups.

    Raises:
        InputError: neither of the two, or a plan that was made for other groups, or for these before another cut.
    """
    keep = getattr(plan, "keep", plan)
    if not isinstance(keep, Mapping):
        raise InputError(f"plan: wanted a tc.Plan or a dict of kept indices by group name, got {type(plan).__name__}")
    made_for = getattr(plan, "sizes_before", None)
    if made_for and dict(made_for) != groups.sizes():
        raise InputError("plan: made for these groups before another cut, or for other groups; plan again")
    check_keep(groups, dict(keep))
    return {name: kept.cpu() for name, kept in keep.items()}


def check_keep(groups: Groups, keep: dict[str, Tensor]) -> None:
    """Raise unless ``keep`` names existing groups and holds sorted, distinct, valid unit indices, at least one each."""
    sizes = groups.sizes()
    for name, kept in keep.items():
        if name not in sizes:
            raise InputError(f"plan: no group named {name!r} in these groups (made for another model or before a cut?)")
        valid = (
            isinstance(kept, Tensor)
            and kept.dtype == torch.int64
            and kept.dim() == 1
            and 0 < kept.numel() <= sizes[name]
            and bool((kept.diff() > 0).all())
            and int(kept[0]) >= 0
            and int(kept[-1]) < sizes[name]
        )
        if not valid:
            raise InputError(
                f"plan: keep[{name!r}] must be sorted, distinct int64 indices below {sizes[name]} and not empty, "
                f"got {kept}"
            )

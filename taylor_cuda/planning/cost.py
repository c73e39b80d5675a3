"""What a model costs at any widths of its groups, exactly: coupled layers shrink on both sides at once.

The length of dimension d of tensor t, once every group g keeps k_g of its units, is linear in the kept counts:

    length(t, d) = shape[d] - Σ_g width_g · (size_g - k_g) = constant + Σ_g width_g · k_g

so a tensor's element count is a product of such factors, and both MACs (``macs_per_weight · numel`` summed over calls)
and parameters (``numel`` summed over parameters) are sums of ``coefficient · product of factors``. All of it is integer
arithmetic.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from taylor_cuda.errors import InputError
from taylor_cuda.graph.groups import Groups

__all__ = ["COSTS", "Cost", "CostTerms", "Factor", "Lengths", "compile_cost", "model_cost", "original_cost"]

COSTS = ("macs", "params", "channels")
"""What a budget can limit, in the order used everywhere."""


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        macs: multiply-accumulates for one example, as ``torch.utils.flop_counter`` counts (its FLOPs ÷ 2).
        params: elements of the parameters; a shared one counts once.
        channels: units that are kept, over all groups.
    """

    macs: int
    params: int
    channels: int


@dataclass(frozen=True)
class Factor:
    """The length of one dimension, ``constant + Σ width · kept`` over groups. More units never make it less."""

    constant: int
    widths: tuple[tuple[int, int], ...]

    def at(self, counts: Sequence[int]) -> int:
        """The length with ``counts[g]`` units kept in group g."""
        return self.constant + sum(width * counts[group] for group, width in self.widths)


@dataclass(frozen=True)
class CostTerms:
    """Costs as sums of ``coefficient · product of factors``; equal factors and equal products are merged.

    Attributes:
        names: the groups, by whose position in this tuple the factors refer to them.
        sizes: their units now.
        factors: distinct lengths that some group can change.
        products: indices into ``factors``, sorted, one tuple a term; the empty tuple is the constant term.
        coefficients: for every entry of ``COSTS``, one integer a term. MACs are those of the whole of
            ``example_inputs``.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    factors: tuple[Factor, ...]
    products: tuple[tuple[int, ...], ...]
    coefficients: tuple[tuple[int, ...], ...]

    def totals(self, counts: Sequence[int]) -> tuple[int, ...]:
        """Costs with ``counts[g]`` units kept in group g, in the order of ``COSTS``; MACs of all ``example_inputs``."""
        lengths = [factor.at(counts) for factor in self.factors]
        elements = [prod([lengths[factor] for factor in product]) for product in self.products]
        return tuple(sum(c * n for c, n in zip(row, elements, strict=True)) for row in self.coefficients)


class Lengths:
    """The dimensions of a model's tensors as linear functions of the kept counts.

    Attributes:
        parameters: the model's parameters by name; a shared one once.
        places: the length of every ``(tensor, dimension)`` that some group can change.

    Raises:
        InputError: the groups belong to another model, or to other widths of this one.
    """

    def __init__(self, model: nn.Module, groups: Groups) -> None:
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        self._tensors = {**self.parameters, **dict(model.named_buffers())}
        widths: dict[tuple[str, int], Counter[int]] = defaultdict(Counter)
        for number, group in enumerate(groups):
            for member in group.members:
                widths[member.tensor, member.dim][number] += member.width
        sizes = [group.size for group in groups]
        self.places = {place: self._length(place, taken, sizes) for place, taken in widths.items()}

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer of this name."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise InputError(
                f"groups: the model has no tensor {name!r}; "
                "pass the module that was traced, not a wrapped or another one"
            )
        return tensor

    def dimensions(self, name: str) -> list[Factor]:
        """The length of every dimension of a tensor."""
        shape = self.tensor(name).shape
        return [self.places.get((name, dim)) or Factor(length, ()) for dim, length in enumerate(shape)]

    def _length(self, place: tuple[str, int], taken: Mapping[int, int], sizes: Sequence[int]) -> Factor:
        name, dim = place
        shape = self.tensor(name).shape
        if not 0 <= dim < len(shape):
            raise InputError(f"groups: {name!r} has {len(shape)} dimensions, none numbered {dim}")
        rest = shape[dim] - sum(width * sizes[group] for group, width in taken.items())
        if rest < 0:
            raise InputError(
                f"groups: dimension {dim} of {name!r} is {shape[dim]} long, {-rest} less than its groups say; "
                "trace the model again, or cut it with tc.cut only"
            )
        return Factor(rest, tuple(sorted(taken.items())))


def compile_cost(lengths: Lengths, groups: Groups) -> CostTerms:
    """The costs of a model as terms in the kept counts of ``groups``.

    Raises:
        InputError: a call uses a weight that the model doesn't have.
    """
    factors: dict[Factor, int] = {}
    terms: dict[tuple[int, ...], list[int]] = {(): [0, 0, 0]}

    def add(cost: str, coefficient: int, dimensions: Sequence[Factor]) -> None:
        moving = [dimension for dimension in dimensions if dimension.widths]
        product = tuple(sorted(factors.setdefault(factor, len(factors)) for factor in moving))
        fixed = prod(dimension.constant for dimension in dimensions if not dimension.widths)
        terms.setdefault(product, [0, 0, 0])[COSTS.index(cost)] += coefficient * fixed

    macs_per_weight: Counter[str] = Counter()
    for call in groups.calls:
        if call.weight:
            macs_per_weight[call.weight] += call.macs_per_weight
        elif call.along:
            tensor, dim = call.along
            add("macs", call.macs_per_weight, [lengths.dimensions(tensor)[dim]])
        else:
            add("macs", call.macs_per_weight, ())
    for name in [*lengths.parameters, *(name for name in macs_per_weight if name not in lengths.parameters)]:
        dimensions = lengths.dimensions(name)
        if name in lengths.parameters:
            add("params", 1, dimensions)
        if name in macs_per_weight:
            add("macs", macs_per_weight[name], dimensions)
    for number in range(len(groups)):
        add("channels", 1, (Factor(0, ((number, 1),)),))
    return CostTerms(
        names=tuple(group.name for group in groups),
        sizes=tuple(group.size for group in groups),
        factors=tuple(factors),
        products=tuple(terms),
        coefficients=tuple(zip(*terms.values(), strict=True)),
    )


def model_cost(model: nn.Module, groups: Groups, sizes: Mapping[str, int] | None = None) -> Cost:
    """What ``model`` costs with ``sizes`` units kept in its groups: exactly what the cut model will cost.

    Args:
        model: the traced module.
        groups: from ``tc.trace`` of this model.
        sizes: kept units by group name, from 0 to the group's size. Groups that are left out stay as they are.

    Raises:
        InputError: an unknown group, a count out of range, or groups of another model.
    """
    terms = compile_cost(Lengths(model, groups), groups)
    return as_cost(groups, terms.totals(kept_counts(groups, sizes)))


def original_cost(groups: Groups) -> Cost:
    """What the model cost when it was traced: what every budget is a fraction of."""
    return as_cost(groups, original_totals(groups))


def original_totals(groups: Groups) -> tuple[int, ...]:
    """``original_cost`` in the order of ``COSTS``, with the MACs of the whole of ``example_inputs``."""
    return groups.original_macs, groups.original_params, sum(group.original_size for group in groups)


def as_cost(groups: Groups, totals: Sequence[int]) -> Cost:
    """Totals for the whole of ``example_inputs`` as the cost of one example, to the nearest MAC."""
    macs, params, channels = totals
    batch = max(groups.batch_size, 1)
    return Cost(macs=(2 * macs + batch) // (2 * batch), params=params, channels=channels)


def kept_counts(groups: Groups, sizes: Mapping[str, int] | None) -> list[int]:
    """``sizes`` in the order of the groups, checked."""
    now = groups.sizes()
    for name, kept in (sizes or {}).items():
        if name not in now:
            raise InputError(f"sizes: no group named {name!r}; there are {list(now)}")
        if not 0 <= kept <= now[name]:
            raise InputError(
                f"sizes: group {name!r} has {now[name]} units, so 0 to {now[name]} can be kept, got {kept}"
            )
    return [int((sizes or {}).get(name, size)) for name, size in now.items()]

"""Which numbers a criterion takes from where: for every group, members of parameters or inputs of readers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from taylor_cuda import ops
from taylor_cuda.errors import InputError
from taylor_cuda.graph.groups import ChannelGroup, Groups, Member, named_tensors
from taylor_cuda.importance.criteria import Criterion
from taylor_cuda.importance.members import affine_of, blocks_of, scales_of, trained_gate
from taylor_cuda.importance.units import UnitSums

__all__ = ["Layout"]


class Layout:
    """Where the sums of every group come from, and what parameters give of them.

    Args:
        model: the traced module.
        groups: its groups as they are now.
        criterion: decides what is taken.
        source: ``"parameters"``, ``"activations"`` or ``"auto"``.
        norm_term: normalisations are places too.

    Attributes:
        sizes: ``{group: units}``.
        units: the places of all units; first those in parameters, then those at readers and normalisations.
        readers: the names of the latter.
        site_groups: the groups that have any.
    """

    def __init__(self, model: nn.Module, groups: Groups, criterion: Criterion, source: str, norm_term: bool) -> None:
        self.criterion, self._source, self._norm_term = criterion, source, norm_term
        self.tensors = named_tensors(model)
        self.groups = list(groups)
        self.sizes = groups.sizes()
        self.site_groups = [group for group in self.groups if self._needs_activations(group)]
        self._at_sites = {group.name for group in self.site_groups}
        self.units = UnitSums(self.groups, (self._parameter_members, self._site_members), self._length)
        at_parameters, at_sites = self.units.places
        self.weights = [self.tensors[name] for name, _ in at_parameters]
        self._dims = [dim for _, dim in at_parameters]
        self.readers = [name for name, _ in at_sites]

    def reader_weights(self) -> set[str]:
        """Names of the weights before which something is summed."""
        return {member.tensor for group in self.site_groups for member in group.role("read")}

    def norm_weights(self) -> set[str]:
        """Names of the parameters of normalisations whose term is."""
        return {member.tensor for group in self.site_groups for member in self._norm_members(group)}

    def blocks(self) -> Tensor:
        """``[units]``: how many additions the stream of each unit has, 1 for none."""
        counts = torch.tensor([blocks_of(group, self.tensors) for group in self.groups])
        return counts[self.units.group_of.cpu()]

    def has_batch_norm(self, group: ChannelGroup) -> bool:
        """Whether statistics of a batch stand behind what writes the group."""
        return any(member.tensor.endswith("running_mean") for member in group.role("norm"))

    def _length(self, tensor: str, dim: int) -> int:
        return self.tensors[tensor].shape[dim]

    def _needs_activations(self, group: ChannelGroup) -> bool:
        if self.criterion.gates_inserted:
            return False
        if self.criterion.per_example or self._source == "activations":
            return self.criterion.gradient
        if not self.criterion.gate or trained_gate(group, self.tensors):
            return False
        if self._source == "auto":
            return True
        raise InputError(
            f"source='parameters': group {group.name!r} has frozen parameters at its readers; "
            "use source='auto' or 'activations', which needs no parameter gradient"
        )

    def _site_members(self, group: ChannelGroup) -> Sequence[Member]:
        return (*group.role("read"), *self._norm_members(group)) if group.name in self._at_sites else ()

    def _norm_members(self, group: ChannelGroup) -> Sequence[Member]:
        return group.role("norm") if self._norm_term else ()

    def _parameter_members(self, group: ChannelGroup) -> Sequence[Member]:
        name = self.criterion.name
        if group.name in self._at_sites or self.criterion.gates_inserted:
            return ()
        if self.criterion.gate:
            return trained_gate(group, self.tensors)
        if name in ("bn_scale", "bn_taylor_scale"):
            return self._of_norms(group, scales_of(group))
        if name == "bn_taylor":
            return self._of_norms(group, affine_of(group, self.tensors))
        return self._trained(group, group.role("write"))

    def _of_norms(self, group: ChannelGroup, members: tuple[Member, ...]) -> Sequence[Member]:
        if not members:
            raise InputError(
                f"criterion={self.criterion.name!r}: group {group.name!r} has no normalisation with a scale"
            )
        return self._trained(group, members)

    def _trained(self, group: ChannelGroup, members: Sequence[Member]) -> Sequence[Member]:
        frozen = [member.tensor for member in members if not self.tensors[member.tensor].requires_grad]
        if self.criterion.gradient and frozen:
            raise InputError(
                f"criterion={self.criterion.name!r}: group {group.name!r} is written by frozen parameters "
                f"({frozen[0]}), which have no gradient; use 'taylor_fo'"
            )
        return members

    # -- what parameters give ----------------------------------------------------

    def weight_times_gradient(self, reduction: str) -> list[Tensor]:
        """Σ w·g (or its squares) along every place of parameters, in one launch; zeros where there is no gradient."""
        gradients = [weight.grad for weight in self.weights]
        there = [i for i, gradient in enumerate(gradients) if gradient is not None]
        if len(there) < len(gradients):
            self._check_trained(gradients)
        if not there:
            raise InputError(
                f"no gradients yet on any parameter the importance is taken from ({self.units.places[0][0][0]}, …): "
                "call est.backward(loss), or loss.backward() and then est.update() before optimizer.zero_grad()"
            )
        present = [gradient for gradient in gradients if gradient is not None]
        if len(present) == len(gradients):
            return ops.weight_importance(self.weights, present, self._dims, reduction)
        found: list[Tensor | None] = [None] * len(gradients)
        weights, dims = [self.weights[i] for i in there], [self._dims[i] for i in there]
        for i, result in zip(there, ops.weight_importance(weights, present, dims, reduction), strict=True):
            found[i] = result
        return self.units.completed(0, found)

    def _check_trained(self, gradients: Sequence[Tensor | None]) -> None:
        """A parameter without a gradient took no part in this step, or it was frozen, and zeros would be wrong."""
        for (name, _), weight, gradient in zip(self.units.places[0], self.weights, gradients, strict=True):
            if gradient is None and not weight.requires_grad:
                raise InputError(f"{name} was frozen after this Importance was made from its gradient: make a new one")

    def from_weights_alone(self) -> Tensor:
        """The flat importance under a criterion that needs no gradient."""
        if self.criterion.name == "bn_scale":
            return self.units.values([weight.abs() for weight in self.weights], "sum") / self.units.offsets.diff()
        return self.units.values(ops.weight_importance(self.weights, self.weights, self._dims), "sum")

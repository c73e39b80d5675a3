"""``tc.Importance``: the importance of every unit, collected while a training loop runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taylor_cuda import ops
from taylor_cuda.distributed import mean, world_size
from taylor_cuda.errors import InputError
from taylor_cuda.graph.checks import check_model
from taylor_cuda.graph.groups import ChannelGroup, Groups, Member, named_tensors
from taylor_cuda.graph.program import record_programs
from taylor_cuda.importance.activations import ForwardPass, ReaderSums
from taylor_cuda.importance.criteria import Source, check_norm_term, check_source, find_criterion
from taylor_cuda.importance.examples import batch_sums, example_sums
from taylor_cuda.importance.members import scales_of, trained_gate
from taylor_cuda.importance.units import UnitSums, scalar_beside, split_by_group


class Importance:
    """Importance of every unit of ``groups``: how much the loss would change without it.

    Call ``backward(loss)`` in place of ``loss.backward()``, or ``update()`` after it, once per optimizer step: before
    clipping, weight decay or the optimizer change what stands in ``.grad``. Several backward passes before one
    ``update()``, or with ``accumulate=True`` before the last one (gradient accumulation), count as one batch.

    Args:
        model: the traced module itself, not a compiled or wrapped one.
        groups: from ``tc.trace`` of this model.
        criterion: see ``taylor_cuda.importance.criteria.CRITERIA``. ``"taylor_fo"`` is the paper's gate criterion.
            It squares the gradient of the batch, so its values change with the global batch size.
        source: ``"parameters"`` takes the gate's gradient from parameter gradients (no activation is touched),
            ``"activations"`` from fused activation × gradient sums at the inputs of the units' readers,
            ``"auto"`` from parameters where they suffice, group by group.
        momentum: weight of the past in the moving average over prune steps (0.9 in the paper).
        seed: of ``"random"``; a generator of its own, the global one is left alone.
        norm_term: add to ``"taylor_fo"`` what a cut changes through the statistics of every LayerNorm and RMSNorm
            inside a group, exactly to first order (``taylor_cuda.importance.norm_term``); from activations.
        process_group: ranks that train copies of the model and average their gradients, as
            ``DistributedDataParallel`` does. Parameter gradients are then those of all ranks already; what is summed
            from activations is averaged over them here.
        fuse: take what is summed from activations out of the backward passes of ReLUs where these run anyway
            (``tc.fuse_scoring``). Otherwise every reader has a gate with a pass of its own: equal but for rounding.

    The importance of coupled channels is the square of their **sum**. Within a window it is the mean over optimizer
    steps of the squares (Molchanov et al. 2019, section 3); ``fold()`` ends a window and averages over windows. Steps
    with a value that isn't finite are left out and counted in ``skipped``.

    Source: Molchanov, Mallya, Tyree, Frosio, Kautz: "Importance Estimation for Neural Network Pruning", CVPR 2019.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        criterion: str = "taylor_fo",
        source: Source = "auto",
        momentum: float = 0.9,
        seed: int = 0,
        norm_term: bool = False,
        process_group: Any = None,
        fuse: bool = True,
    ) -> None:
        check_model(model, "Importance")
        self.criterion = find_criterion(criterion)
        check_source(source, self.criterion)
        if norm_term:
            check_norm_term(source, self.criterion)
            source = "activations"
        if not 0 <= momentum < 1:
            raise InputError(f"momentum: wanted a number in [0, 1), got {momentum!r}")
        self._model, self._groups = model, groups
        self._source, self._momentum, self._ranks = source, momentum, process_group
        self._norm_term, self._fuse = norm_term, fuse
        self.accumulating = False
        """A backward pass with ``accumulate=True`` waits for the last one of its optimizer step."""
        self._generator = torch.Generator().manual_seed(seed)
        self._sites: ReaderSums | None = None
        self._average: Tensor | None = None
        self._drawn: Tensor | None = None
        self._window: Tensor | None = None
        self._counts: Tensor | None = None
        self._lay_out()

    # -- what is measured where ------------------------------------------------

    def _lay_out(self) -> None:
        """Decide for each group where its sums come from, and prepare the flat indices."""
        self._tensors = named_tensors(self._model)
        self._sizes = self._groups.sizes()
        groups = list(self._groups)
        from_sites = [group for group in groups if self._needs_activations(group)]
        self._site_groups = {group.name for group in from_sites}
        self._units = UnitSums(groups, (self._parameter_members, self._site_members), self._length)
        at_parameters, at_sites = self._units.places
        self._weights, self._dims = (
            [self._tensors[name] for name, _ in at_parameters],
            [dim for _, dim in at_parameters],
        )
        self._readers = [name for name, _ in at_sites]
        if from_sites and self._sites is None:
            weights = {member.tensor for group in from_sites for member in group.role("read")}
            norms = {member.tensor for group in from_sites for member in self._norm_members(group)}
            programs = record_programs(self._model, self._groups, weights) if self._fuse else None
            self._sites = ReaderSums(
                self._model, weights, per_example=self.criterion.per_example, norms=norms, programs=programs
            )

    def _length(self, tensor: str, dim: int) -> int:
        return self._tensors[tensor].shape[dim]

    def _needs_activations(self, group: ChannelGroup) -> bool:
        if self.criterion.per_example or self._source == "activations":
            return self.criterion.gradient
        if not self.criterion.gate or trained_gate(group, self._tensors):
            return False
        if self._source == "auto":
            return True
        raise InputError(
            f"source='parameters': group {group.name!r} has frozen parameters at its readers; "
            "use source='auto' or 'activations', which needs no parameter gradient"
        )

    def _site_members(self, group: ChannelGroup) -> Sequence[Member]:
        return (*group.role("read"), *self._norm_members(group)) if group.name in self._site_groups else ()

    def _norm_members(self, group: ChannelGroup) -> Sequence[Member]:
        return group.role("norm") if self._norm_term else ()

    def _parameter_members(self, group: ChannelGroup) -> Sequence[Member]:
        if group.name in self._site_groups:
            return ()
        if self.criterion.gate:
            return trained_gate(group, self._tensors)
        if self.criterion.name == "bn_scale":
            return scales_of(group)
        frozen = [m.tensor for m in group.role("write") if not self._tensors[m.tensor].requires_grad]
        if self.criterion.gradient and frozen:
            raise InputError(
                f"criterion={self.criterion.name!r}: group {group.name!r} is written by frozen parameters "
                f"({frozen[0]}), which have no gradient; use 'taylor_fo'"
            )
        return group.role("write")

    # -- one optimizer step ----------------------------------------------------

    def backward(self, loss: Tensor, outputs: Any = None, scaler: Any = None, accumulate: bool = False) -> None:
        """Run ``loss.backward()`` and take the scores of this step.

        Args:
            loss: the mini-batch mean loss; with gradient accumulation, that of a micro-batch over their number.
            outputs: what the model returned; first-order criteria don't need it.
            scaler: a ``torch.amp.GradScaler``; the loss is scaled by it, the scores are not. A step that it will skip
                because a gradient overflowed is left out.
            accumulate: more backward passes follow before the optimizer's step; ``False`` in the last one, in which
                the scores are taken from what all of them add up to.
        """
        del outputs
        (loss if scaler is None else scaler.scale(loss)).backward()
        self.accumulating = accumulate
        if accumulate:
            return
        # get_scale() would wait for the device; what it says is also what the scaler makes of a 1.
        self.update(1.0 if scaler is None else scaler.scale(torch.ones((), device=loss.device)))

    @torch.no_grad()
    def update(self, grad_scale: float | Tensor = 1.0, unscaled: bool = False) -> None:
        """Take the scores of one optimizer step from the gradients as they are now.

        With a ``GradScaler`` say where this stands: ``update(scaler.get_scale())`` before
        ``scaler.unscale_(optimizer)``, ``update(scaler.get_scale(), unscaled=True)`` after it, and before clipping
        in either case. The step is left out if any gradient of the model overflowed: the scaler will skip it.

        Args:
            grad_scale: factor that the loss was multiplied by: a number, or a scalar tensor, which is not read on the
                host (``scaler.scale(torch.ones((), device=…))`` is one, where ``get_scale()`` waits for the GPU).
            unscaled: parameter gradients don't carry it any more (what was summed from activations always does).
        """
        self.accumulating = False
        if not self.criterion.gradient:
            return
        by_scaler = unscaled or isinstance(grad_scale, Tensor) or grad_scale != 1.0
        finite = self._gradients_are_finite() if by_scaler else None
        if self.criterion.gate:
            self._add_gates(grad_scale, unscaled, finite)
        elif self.criterion.per_example:
            self._add_examples(grad_scale, finite)
        else:
            # Squares carry the square of the factor.
            self._add(self._weight_times_gradient("square"), "sum", 1.0 if unscaled else grad_scale**2, finite)

    def _gradients_are_finite(self) -> Tensor | None:
        gradients = [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
        if not gradients:
            return None
        dense = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
        return torch.nn.utils.get_total_norm(dense, norm_type=float("inf")).isfinite()

    def _add_gates(self, grad_scale: float | Tensor, unscaled: bool, finite: Tensor | None) -> None:
        """(dE/dz)² of every unit: what parameters give beside what the sites give, both signed, then squared."""
        sums = self._weight_times_gradient("sum") if self._weights else []
        at_sites: list[Tensor] = []
        if self._readers:
            at_sites = batch_sums(self._finished_passes(), self._readers, self._units)
            if world_size(self._ranks) > 1:
                at_sites = [mean(torch.cat(at_sites), self._ranks)]
        if sums and unscaled:
            factor = scalar_beside(grad_scale, sums[0])
            at_sites = at_sites if factor is None or not at_sites else list(torch._foreach_div(at_sites, factor))
            grad_scale = 1.0
        self._add([*sums, *at_sites], "batch", grad_scale, finite)

    def _add_examples(self, grad_scale: float | Tensor, finite: Tensor | None) -> None:
        """Σ_n t², or mean_n |t / L| over its norm in the group."""
        squared, ranks = self.criterion.name == "taylor_fg", world_size(self._ranks)
        passes = self._finished_passes()
        sums = example_sums(self._groups, passes, self._readers, self._units, mean=not squared)
        if squared and ranks == 1:
            self._add(sums, "sample", grad_scale, finite)
            return
        values = self._units.values(sums, "sample", grad_scale) if squared else self._units.values(sums, "abs")
        # The loss of all ranks is the mean of theirs: an example's t is 1 / ranks of what its rank measured, which for
        # sums of squares leaves one such factor beside the mean, and for means of magnitudes gives one.
        values = mean(values, self._ranks) / ranks
        if not squared:
            norms = torch.stack(torch._foreach_norm(values.split(list(self._sizes.values()))))
            values = values / (norms + 1e-8)[self._units.group_of]
        self._add([], "sum", 1.0, finite, values)

    def _add(
        self,
        sums: Sequence[Tensor],
        reduction: str,
        scale: float | Tensor,
        finite: Tensor | None,
        added: Tensor | None = None,
    ) -> None:
        """Count this step in or leave it out. Decided on the device: a step costs no synchronisation."""
        if self._window is None or self._counts is None:
            self._window = self._units.new_window(sums if added is None else [added])
            self._counts = torch.zeros(2, dtype=torch.int64, device=self._window.device)
        self._units.accumulate(sums, self._window, self._counts, reduction, scale, added, finite)

    def _weight_times_gradient(self, reduction: str) -> list[Tensor]:
        """Σ w·g (or its squares) along every place of parameters, in one launch; zeros where there is no gradient."""
        gradients = [weight.grad for weight in self._weights]
        there = [i for i, gradient in enumerate(gradients) if gradient is not None]
        if len(there) < len(gradients):
            self._check_trained(gradients)
        if not there:
            raise InputError(
                f"no gradients yet on any parameter the importance is taken from ({self._units.places[0][0][0]}, …): "
                "call est.backward(loss), or loss.backward() and then est.update() before optimizer.zero_grad()"
            )
        present = [gradient for gradient in gradients if gradient is not None]
        if len(present) == len(gradients):
            return ops.weight_importance(self._weights, present, self._dims, reduction)
        found: list[Tensor | None] = [None] * len(gradients)
        weights, dims = [self._weights[i] for i in there], [self._dims[i] for i in there]
        for i, result in zip(there, ops.weight_importance(weights, present, dims, reduction), strict=True):
            found[i] = result
        return self._units.completed(0, found)

    def _check_trained(self, gradients: Sequence[Tensor | None]) -> None:
        """A parameter without a gradient took no part in this step, or it was frozen, and zeros would be wrong."""
        for (name, _), weight, gradient in zip(self._units.places[0], self._weights, gradients, strict=True):
            if gradient is None and not weight.requires_grad:
                raise InputError(f"{name} was frozen after this Importance was made from its gradient: make a new one")

    def _finished_passes(self) -> list[ForwardPass]:
        if self._sites is None:
            raise InputError(f"{self.criterion.name!r} from activations: close() has taken the gates out of the model")
        passes = [forward for forward in self._sites.take() if forward.sums]
        if not passes:
            raise InputError(
                f"no forward pass with gradients since the last update: {self.criterion.name!r} from activations needs "
                "the model to be called after the Importance was made"
            )
        return passes

    # -- reading ---------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Optimizer steps in the window."""
        return 0 if self._counts is None else int(self._counts[0])

    @property
    def skipped(self) -> int:
        """Optimizer steps left out of the window because a value was not finite."""
        return 0 if self._counts is None else int(self._counts[1])

    def scores(self) -> dict[str, Tensor]:
        """``{group: fp32 [size]}`` on the model's device, higher = keep. Reads only: nothing is reset or averaged."""
        return {name: flat.float() for name, flat in split_by_group(self._current(), self._sizes).items()}

    @torch.no_grad()
    def _current(self) -> Tensor:
        if not self.criterion.gradient:
            return self._from_weights_alone()
        if self.steps == 0:
            if self._average is None:
                why = f"; {self.skipped} steps were skipped for values that are not finite" if self.skipped else ""
                raise InputError(
                    "no scores yet: run a forward and backward pass first (est.backward(loss), or loss.backward() and "
                    f"est.update()){why}"
                )
            return self._average
        assert self._window is not None
        contribution = self._window / self.steps
        if self._average is None:
            return contribution
        return self._momentum * self._average + (1 - self._momentum) * contribution

    def _from_weights_alone(self) -> Tensor:
        if self.criterion.name == "random":
            if self._drawn is None:
                device = next(iter(self._tensors.values())).device
                self._drawn = torch.rand(sum(self._sizes.values()), generator=self._generator).to(device)
            return self._drawn
        if self.criterion.name == "bn_scale":
            for group in self._groups:
                if not scales_of(group):
                    raise InputError(f"criterion='bn_scale': group {group.name!r} has no normalisation with a scale")
            return self._units.values([weight.abs() for weight in self._weights], "sum") / self._units.offsets.diff()
        return self._units.values(ops.weight_importance(self._weights, self._weights, self._dims), "sum")

    # -- windows, cuts, state --------------------------------------------------

    def fold(self) -> None:
        """End the window at a prune step: its mean goes into the moving average with weight ``1 - momentum``."""
        if self.criterion.gradient:
            self._average = self._current().clone()
        self._drawn = None
        self._window, self._counts = None, None

    def reset(self) -> None:
        """Forget everything that was collected."""
        self._average = self._drawn = self._window = self._counts = None
        if self._sites is not None:
            self._sites.take()
        self.accumulating = False

    def keep(self, keep: dict[str, Tensor]) -> None:
        """Follow a cut of the model: drop what was collected for units that are gone.

        Args:
            keep: ``{group: int64 indices}`` among the units before the cut, as in a plan; ``groups`` has already
                shrunk.
        """
        start, parts = 0, []
        for name, size in self._sizes.items():
            parts.append(start + keep.get(name, torch.arange(size)).cpu())
            start += size
        index = torch.cat(parts)
        for field in ("_average", "_window", "_drawn"):
            flat: Tensor | None = getattr(self, field)
            if flat is not None:
                setattr(self, field, flat[index.to(flat.device)])
        self._lay_out()

    def state_dict(self) -> dict[str, Any]:
        """Everything ``scores()`` depends on; tensors and plain values only."""
        return {
            "criterion": self.criterion.name,
            "sizes": dict(self._sizes),
            **{name: _copy(getattr(self, f"_{name}")) for name in ("average", "window", "counts", "drawn")},
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a ``state_dict`` of the same criterion and the same groups."""
        for key, mine in (("criterion", self.criterion.name), ("sizes", dict(self._sizes))):
            if state[key] != mine:
                raise InputError(f"state_dict: {key} is {state[key]!r} there and {mine!r} here")
        device = next(iter(self._tensors.values())).device
        for field in ("average", "window", "counts", "drawn"):
            value = _copy(state[field])  # what is collected from now on isn't the caller's
            setattr(self, f"_{field}", None if value is None else value.to(device))
        self._generator.set_state(state["generator"].cpu())

    def close(self) -> None:
        """Take the scoring gates, if there are any, out of the model. ``scores()`` still answers."""
        if self._sites is not None:
            self._sites.close()
            self._sites = None
            self._site_groups = set()


def _copy(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.clone()

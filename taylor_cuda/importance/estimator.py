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
from taylor_cuda.importance.examples import mean_magnitude, sum_of_squares
from taylor_cuda.importance.units import Place, UnitSums, split_by_group


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
        self._from_parameters = UnitSums(groups, self._parameter_members, self._length)
        self._from_sites = UnitSums(groups, self._site_members, self._length)
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
        if not self.criterion.gate or _trained_gate(group, self._tensors):
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
            return _trained_gate(group, self._tensors)
        if self.criterion.name == "bn_scale":
            return _scales(group)
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
        if scaler is None:
            self.update()
            return
        scale = scaler.get_scale()
        self.update(scale, unscaled=scale == 1.0)

    @torch.no_grad()
    def update(self, grad_scale: float = 1.0, unscaled: bool = False) -> None:
        """Take the scores of one optimizer step from the gradients as they are now.

        With a ``GradScaler`` say where this stands: ``update(scaler.get_scale())`` before
        ``scaler.unscale_(optimizer)``, ``update(scaler.get_scale(), unscaled=True)`` after it, and before clipping
        in either case. The step is left out if any gradient of the model overflowed: the scaler will skip it.

        Args:
            grad_scale: factor that the loss was multiplied by.
            unscaled: parameter gradients don't carry it any more (what was summed from activations always does).
        """
        self.accumulating = False
        if not self.criterion.gradient:
            return
        measure = self._gate_values if self.criterion.gate else self._other_values
        values = measure(1.0 if unscaled else grad_scale, grad_scale)
        finite = values.isfinite().all()
        if unscaled or grad_scale != 1.0:
            finite = finite & self._gradients_are_finite()
        if self._window is None or self._counts is None:
            self._window = torch.zeros_like(values)
            self._counts = torch.zeros(2, dtype=torch.int64, device=values.device)
        # Decided on the device: a step that is skipped costs no synchronisation either.
        self._window += torch.where(finite, values, values.new_zeros(()))
        self._counts += torch.stack((finite, ~finite))

    def _gradients_are_finite(self) -> Tensor:
        gradients = [_gradient(parameter) for parameter in self._model.parameters() if parameter.grad is not None]
        dense = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
        return torch.nn.utils.get_total_norm(dense, norm_type=float("inf")).isfinite()

    def _gate_values(self, at_parameters: float, at_sites: float) -> Tensor:
        """(dE/dz)² of every unit: what parameters give plus what the sites give, both signed, then squared.

        Args:
            at_parameters: factor that parameter gradients carry.
            at_sites: factor that the gradients of activations carried.
        """
        total: Tensor | None = None
        if len(self._site_groups) < len(self._sizes):
            total = self._from_parameters(self._weight_times_gradient("sum")) / at_parameters
        if self._sites is not None:
            vectors: dict[Place, Tensor] = {}
            for forward in self._finished_passes():
                for name, sums in forward.sums.items():
                    place = self._read_place[name]
                    vectors[place] = vectors[place] + sums if place in vectors else sums
            from_sites = mean(self._from_sites(vectors), self._ranks) / at_sites
            total = from_sites if total is None else total + from_sites.to(total)
        assert total is not None
        return total.square()

    def _other_values(self, at_parameters: float, at_sites: float) -> Tensor:
        if not self.criterion.per_example:
            return self._from_parameters(self._weight_times_gradient("square")) / at_parameters**2
        passes = self._finished_passes()
        squared = self.criterion.name == "taylor_fg"
        measure = sum_of_squares if squared else mean_magnitude
        values = mean(torch.cat([measure(group, passes) for group in self._groups]), self._ranks)
        # The loss of all ranks is the mean of theirs: an example's t is 1 / ranks of what its rank measured, which for
        # sums of squares leaves one such factor beside the mean, and for means of magnitudes gives one.
        values = values / world_size(self._ranks)
        if squared:
            return values / at_sites**2
        by_group = split_by_group(values, self._sizes)
        return torch.cat([value / (value.norm() + 1e-8) for value in by_group.values()])

    def _weight_times_gradient(self, reduction: str) -> dict[Place, Tensor]:
        """Σ w·g (or its squares) along every place that has a gradient, in one launch."""
        places = [place for place in self._from_parameters.places if self._tensors[place[0]].grad is not None]
        if not places:
            raise InputError(
                "no gradients yet on any parameter the importance is taken from: call est.backward(loss), or "
                "loss.backward() and then est.update() before optimizer.zero_grad()"
            )
        weights = [self._tensors[name].detach() for name, _ in places]
        gradients = [_gradient(self._tensors[name]) for name, _ in places]
        results = ops.weight_importance(weights, gradients, [dim for _, dim in places], reduction)
        return dict(zip(places, results, strict=True))

    @property
    def _read_place(self) -> dict[str, Place]:
        return {name: (name, dim) for name, dim in self._from_sites.places}

    def _finished_passes(self) -> list[ForwardPass]:
        assert self._sites is not None
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
                if not _scales(group):
                    raise InputError(f"criterion='bn_scale': group {group.name!r} has no normalisation with a scale")
            scales = {place: self._tensors[place[0]].detach().abs() for place in self._from_parameters.places}
            counts = {place: torch.ones_like(scale) for place, scale in scales.items()}
            return self._from_parameters(scales) / self._from_parameters(counts)
        places = self._from_parameters.places
        weights = [self._tensors[name].detach() for name, _ in places]
        norms = ops.weight_importance(weights, weights, [dim for _, dim in places], "sum")
        return self._from_parameters(dict(zip(places, norms, strict=True)))

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


def _trained_gate(group: ChannelGroup, tensors: dict[str, Tensor]) -> tuple[Member, ...]:
    """The members whose Σ w·dw is the gate's gradient (DESIGN 3.2 or 3.3), or none where one of them is frozen.

    The affine form is preferred: it reads 2 numbers a channel, and normalisations accumulate in fp32 under autocast.
    """
    for members in (group.affine, group.role("read")):
        if members and all(tensors[member.tensor].requires_grad for member in members):
            return members
    return ()


def _scales(group: ChannelGroup) -> tuple[Member, ...]:
    """The γ members of a group's normalisations."""
    return tuple(member for member in group.role("norm") if member.tensor.rpartition(".")[2] == "weight")


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.detach()

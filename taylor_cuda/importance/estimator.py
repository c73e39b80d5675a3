"""``tc.Importance``: the importance of every unit, collected while a training loop runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taylor_cuda.distributed import mean, world_size
from taylor_cuda.errors import InputError
from taylor_cuda.graph.checks import check_model
from taylor_cuda.graph.groups import Groups
from taylor_cuda.graph.program import record_programs
from taylor_cuda.importance.activations import ForwardPass, ReaderSums
from taylor_cuda.importance.criteria import Source, check_norm_term, check_shared_norm, check_source, find_criterion
from taylor_cuda.importance.examples import batch_sums, example_sums
from taylor_cuda.importance.layout import Layout
from taylor_cuda.importance.second_order import SecondOrder, value_of
from taylor_cuda.importance.units import scalar_beside, split_by_group


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
            from activations is averaged over them here. Scores are those of the mean of the ranks' losses, as the
            gradients are: of the whole batch where all ranks have equal parts of it.
        fuse: take what is summed from activations out of the backward passes of ReLUs where these run anyway
            (``tc.fuse_scoring``). Otherwise every reader has a gate with a pass of its own: equal but for rounding.

        loss: of which kind the loss is that ``backward`` is called with, for ``"taylor_so"``: ``"cross_entropy"`` (of
            the outputs, with weights, smoothing, ignored positions or soft targets), ``"bce"`` and ``"mse"`` (any sum
            over single outputs), ``"any"`` (two passes instead of one), or a function or module of torch. The loss
            itself is asked for its curvature, and the first step checks that it is of that kind.
        probes: backward passes for the curvature of each batch under ``"taylor_so"``, their mean counts; the signs
            they begin with follow from ``seed`` and the number of the step, the same on all ranks and in all backward
            passes that count as one batch. ``torch.compile`` has to leave backward passes that can be repeated:
            ``torch._functorch.config.donated_buffer = False``.
        shared_norm: ``"blocks"`` divides ``"taylor_fo"`` of channels that run through several blocks by the number of
            these, as the paper's own code does; ``"none"`` is the first-order effect of removing them.

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
        loss: str | Callable[..., Any] = "cross_entropy",
        probes: int = 1,
        shared_norm: str = "none",
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
        self._shared_norm = check_shared_norm(shared_norm, self.criterion)
        self._second: SecondOrder | None = None
        if self.criterion.curvature:
            self._second = SecondOrder(model, self.criterion, loss, probes, seed, process_group)
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
        """Decide for each group where its sums come from."""
        self._layout = layout = Layout(self._model, self._groups, self.criterion, self._source, self._norm_term)
        self._units, self._sizes = layout.units, layout.sizes
        self._blocks = layout.blocks() if self._shared_norm == "blocks" else None
        if layout.site_groups and self._sites is None:
            weights = layout.reader_weights()
            self._sites = ReaderSums(
                self._model,
                weights,
                per_example=self.criterion.per_example,
                norms=layout.norm_weights(),
                programs=record_programs(self._model, self._groups, weights) if self._fuse else None,
                probes=self.criterion.curvature == "probe",
            )
        if self._second is not None:
            self._second.lay_out(layout)

    # -- one optimizer step ----------------------------------------------------

    def backward(self, loss: Tensor, outputs: Any = None, scaler: Any = None, accumulate: bool = False) -> None:
        """Run ``loss.backward()`` and take the scores of this step.

        Args:
            loss: the mini-batch mean loss; with gradient accumulation, that of a micro-batch over their number.
            outputs: what the model returned and the loss was computed from: a tensor, or a structure of them with
                examples along dimension 0. Only criteria with ``outputs`` need it (``taylor_so``, Hessians).
            scaler: a ``torch.amp.GradScaler``; the loss is scaled by it, the scores are not. A step that it will skip
                because a gradient overflowed is left out.
            accumulate: more backward passes follow before the optimizer's step; ``False`` in the last one, in which
                the scores are taken from what all of them add up to.
        """
        # get_scale() would wait for the device; what it says is also what the scaler makes of a 1.
        scale = None if scaler is None else scaler.scale(torch.ones((), device=loss.device))
        scaled = loss if scaler is None else scaler.scale(loss)
        if self._second is not None and self.criterion.outputs:
            self._second.before_backward(scaled, outputs, self._sites, scale)
        scaled.backward()
        if self._second is not None:
            self._second.after_backward(self._sites)
        self.accumulating = accumulate
        if not accumulate:
            self.update(1.0 if scale is None else scale)

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
        if self._second is not None:
            self._add_slope_and_curve(self._second.take(self._sites, grad_scale), finite)
        elif self.criterion.gate:
            self._add_gates(grad_scale, unscaled, finite)
        elif self.criterion.per_example:
            self._add_examples(grad_scale, finite)
        elif self.criterion.name == "taylor_weight":
            # Squares carry the square of the factor.
            self._add(self._layout.weight_times_gradient("square"), "sum", 1.0 if unscaled else grad_scale**2, finite)
        else:
            self._warn_of_zeros()
            self._add(self._layout.weight_times_gradient("sum"), "batch", 1.0 if unscaled else grad_scale, finite)

    def _warn_of_zeros(self) -> None:
        first = self._window is None and self._average is None
        if self.criterion.name != "taylor_filter" or not first or not self._model.training:
            return
        normed = next((group.name for group in self._groups if self._layout.has_batch_norm(group)), None)
        if normed is not None:
            warnings.warn(
                f"criterion='taylor_filter': what writes {normed!r} feeds a BatchNorm in train mode, which makes Σ w·g "
                "of a filter 0 whatever it is worth; call model.eval(), or use 'taylor_fo'",
                stacklevel=4,
            )

    def _gradients_are_finite(self) -> Tensor | None:
        gradients = [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
        if not gradients:
            return None
        dense = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
        return torch.nn.utils.get_total_norm(dense, norm_type=float("inf")).isfinite()

    def _add_gates(self, grad_scale: float | Tensor, unscaled: bool, finite: Tensor | None) -> None:
        """(dE/dz)² of every unit: what parameters give beside what the sites give, both signed, then squared."""
        sums = self._layout.weight_times_gradient("sum") if self._layout.weights else []
        at_sites: list[Tensor] = []
        if self._layout.readers:
            at_sites = batch_sums(self._finished_passes(), self._layout.readers, self._units)
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
        sums = example_sums(self._groups, passes, self._layout.readers, self._units, mean=not squared)
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

    def _add_slope_and_curve(self, both: Tensor, finite: Tensor | None) -> None:
        """E' and curvature of this step, each summed on its own: they are averaged before they are squared."""
        if self._window is None or self._counts is None:
            self._window = torch.zeros_like(both)
            self._counts = torch.zeros(2, dtype=torch.int64, device=both.device)
        good = both.isfinite().all()
        good = good if finite is None else good & finite
        self._window.add_(torch.where(good, both, 0.0))
        self._counts.add_(torch.stack((good, ~good)))

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
        if self._second is not None:
            contribution = value_of(self.criterion, *contribution.chunk(2))
        elif self._blocks is not None:
            contribution = contribution / self._blocks.to(contribution.device)
        if self._average is None:
            return contribution
        return self._momentum * self._average + (1 - self._momentum) * contribution

    def _from_weights_alone(self) -> Tensor:
        if self.criterion.name == "random":
            if self._drawn is None:
                device = next(iter(self._layout.tensors.values())).device
                self._drawn = torch.rand(sum(self._sizes.values()), generator=self._generator).to(device)
            return self._drawn
        return self._layout.from_weights_alone()

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
        if self._second is not None:
            self._second.reset()
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
                there = index.to(flat.device)
                twice = field == "_window" and self._second is not None
                setattr(self, field, flat[torch.cat([there, there + start]) if twice else there])
        self._lay_out()

    def state_dict(self) -> dict[str, Any]:
        """Everything ``scores()`` depends on; tensors and plain values only."""
        return {
            "criterion": self.criterion.name,
            "sizes": dict(self._sizes),
            **{name: _copy(getattr(self, f"_{name}")) for name in ("average", "window", "counts", "drawn")},
            "generator": self._generator.get_state(),
            "probed": 0 if self._second is None else self._second.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a ``state_dict`` of the same criterion and the same groups."""
        for key, mine in (("criterion", self.criterion.name), ("sizes", dict(self._sizes))):
            if state[key] != mine:
                raise InputError(f"state_dict: {key} is {state[key]!r} there and {mine!r} here")
        device = next(iter(self._layout.tensors.values())).device
        for field in ("average", "window", "counts", "drawn"):
            value = _copy(state[field])  # what is collected from now on isn't the caller's
            setattr(self, f"_{field}", None if value is None else value.to(device))
        self._generator.set_state(state["generator"].cpu())
        if self._second is not None:
            self._second.steps = state["probed"]

    def close(self) -> None:
        """Take the scoring gates, if there are any, out of the model. ``scores()`` still answers."""
        if self._sites is not None:
            self._sites.close()
            self._sites = None
        if self._second is not None:
            self._second.close()


def _copy(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.clone()

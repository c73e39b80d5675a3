"""Slope and curvature of the loss along every gate, window by window: the second-order criteria."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from taylor_cuda.distributed import mean, unreduced
from taylor_cuda.errors import InputError
from taylor_cuda.importance.activations import ForwardPass, ReaderSums
from taylor_cuda.importance.criteria import Criterion
from taylor_cuda.importance.examples import by_example, example_sums, rows_of_outputs
from taylor_cuda.importance.layout import Layout
from taylor_cuda.importance.output_curvature import OutputCurvature, Probe, read_by
from taylor_cuda.importance.unit_gates import UnitGates
from taylor_cuda.importance.units import scalar_beside

__all__ = ["SecondOrder", "value_of"]

_MIXED = 0x9E3779B97F4A7C15  # odd, so that no two steps share a seed


def value_of(criterion: Criterion, slope: Tensor, curve: Tensor) -> Tensor:
    """The importance of every unit from E' and the curvature, both averaged over the window."""
    if criterion.name == "obd":
        return (0.5 * curve.clamp_min(0)).square()
    if criterion.name == "fisher":
        return (0.5 * curve).square()
    return (0.5 * curve - slope).square()


class SecondOrder:
    """What an optimizer step's backward passes tell of slope and curvature.

    Args:
        model: the traced module.
        criterion: one with a ``curvature``.
        loss: see ``output_curvature``.
        probes: backward passes for the curvature of each batch.
        seed: of the probes; the generator is their own.
        ranks: the process group, or ``None``.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        loss: str | Callable[..., Any],
        probes: int,
        seed: int,
        ranks: Any,
    ) -> None:
        if not isinstance(probes, int) or isinstance(probes, bool) or probes < 1:
            raise InputError(f"probes: wanted a whole number of at least 1, got {probes!r}")
        self._model, self._criterion, self._ranks = model, criterion, ranks
        self._outputs, self._probes, self._seed = OutputCurvature(loss), probes, seed
        self.steps = 0
        """Optimizer steps so far: with the seed, what the probes of the next one follow from."""
        self._gates: UnitGates | None = None
        self.reset()

    def lay_out(self, layout: Layout) -> None:
        """Take over the places of all units."""
        self._layout = layout
        if self._criterion.gates_inserted:
            if self._gates is None:
                self._gates = UnitGates(self._model, layout.groups)
            self._gates.lay_out(layout.groups)

    def reset(self) -> None:
        """Forget the backward passes of a step that has not ended."""
        self._curve: Tensor | None = None
        self._slope: Tensor | None = None
        self._passes: list[ForwardPass] = []
        self._examples: list[int] = []

    def close(self) -> None:
        """Take the gates out of the model."""
        if self._gates is not None:
            self._gates.close()
            self._gates = None

    # -- one backward pass -------------------------------------------------------

    def before_backward(self, loss: Tensor, outputs: Any, sites: ReaderSums | None, scale: Tensor | None) -> None:
        """Take the curvature while the graph is there.

        Args:
            loss: of this batch, times ``scale``.
            outputs: see ``OutputCurvature.at``.
            sites: the gates before the readers.
            scale: of a ``GradScaler``, a scalar tensor.
        """
        if outputs is None:
            raise InputError(
                f"outputs: criterion={self._criterion.name!r} needs what the model returned: backward(loss, outputs)"
            )
        with unreduced(loss, self._ranks):
            if self._gates is not None:
                slope, curve = self._gates.slope_and_curve(loss)
                self._slope = slope if self._slope is None else self._slope + slope
            else:
                curve = self._probed(loss, outputs, sites, scale)
        if scale is not None:
            curve = curve / scale
        self._curve = curve if self._curve is None else self._curve + curve

    def after_backward(self, sites: ReaderSums | None) -> None:
        """Put aside what the loss's own pass left at the readers, or the next batch's probes would run into it."""
        if sites is not None:
            self._passes += [by_example(forward, self._examples) for forward in sites.take_those_that_ran()]
        if self._gates is not None:
            self._gates.clear()

    def _probed(self, loss: Tensor, outputs: Any, sites: ReaderSums | None, scale: Tensor | None) -> Tensor:
        """Σ_n q², the mean over the probes."""
        if sites is None:
            raise InputError(f"{self._criterion.name!r}: close() has taken the gates out of the model")
        if not any(forward.sums or forward.riding for forward in sites.passes):
            raise InputError("no forward pass with gradients since the last step; call the model, then backward")
        # the same signs for all batches that add up to one step, as for all examples of one and on all ranks
        mixed = (self._seed * 1_000_003 + self.steps * 4_099) * _MIXED
        generator = torch.Generator(loss.device).manual_seed(mixed % 2**63)
        tensors = read_by(loss, outputs)
        rows = rows_of_outputs(tensors, sites.passes)
        self._examples = sorted({len(x) // count for x, count in zip(tensors, rows, strict=True)})
        draw = self._outputs.at(loss, tensors, generator, rows)
        total: Tensor | None = None
        try:
            for _ in range(self._probes):
                curve = self._of_probe(draw(), sites, scale)
                total = curve if total is None else total + curve
        except BaseException:  # half a pass would count for the next step
            self.reset()
            sites.take()
            raise
        assert total is not None
        return total / self._probes

    @torch.no_grad()
    def _of_probe(self, probe: Probe, sites: ReaderSums, scale: Tensor | None) -> Tensor:
        # With a scaler, a probe gets the size of the gradients that its factor is made for.
        factor = None if scale is None or probe.other is not None else (scale / len(probe.outputs[0])).sqrt()
        sent = probe.sent if factor is None else [(x.float() * factor).to(x.dtype) for x in probe.sent]
        here = self._sums(probe.outputs, sent, sites)
        units = self._layout.units
        if probe.other is None:
            return units.values(here, "sample", 1.0 if factor is None else factor)
        there = self._sums(probe.outputs, probe.other, sites)
        added, less = torch._foreach_add(here, there), torch._foreach_sub(here, there)
        return (units.values(list(added), "sample") - units.values(list(less), "sample")) / 4

    def _sums(self, outputs: list[Tensor], sent: list[Tensor], sites: ReaderSums) -> list[Tensor]:
        """Q of every example at all readers."""
        passes = [by_example(forward, self._examples) for forward in sites.probed(outputs, sent)]
        if not passes:
            raise InputError("outputs: wanted those of a forward pass since the last step, which this loss is not of")
        layout = self._layout
        return example_sums(layout.site_groups, passes, layout.readers, layout.units, mean=False)

    # -- one optimizer step ------------------------------------------------------

    @torch.no_grad()
    def take(self, sites: ReaderSums | None, grad_scale: float | Tensor) -> Tensor:
        """E' and the curvature of the step, one after the other, flat ``[2 · units]``; averaged over the ranks."""
        self.after_backward(sites)
        if self._criterion.outputs and self._curve is None:
            raise InputError(
                f"update: criterion={self._criterion.name!r} needs backward(loss, outputs) in place of "
                "loss.backward(), for its second pass comes before the graph is freed"
            )
        if self._slope is not None:
            assert self._curve is not None
            divisor = scalar_beside(grad_scale, self._slope)
            slope, curve = self._slope if divisor is None else self._slope / divisor, self._curve
        else:
            slope, curve = self._from_examples(grad_scale)
        if sites is not None:
            sites.take()  # passes that nobody went back through
        self.steps += 1
        self.reset()
        return mean(torch.cat([slope, curve]), self._ranks)

    def _from_examples(self, grad_scale: float | Tensor) -> tuple[Tensor, Tensor]:
        if not self._passes:
            raise InputError(
                f"no forward pass with gradients since the last update: {self._criterion.name!r} needs the model to be "
                "called after the Importance was made"
            )
        layout, units = self._layout, self._layout.units
        sums = example_sums(layout.site_groups, self._passes, layout.readers, units, mean=False)
        slope = units.values(sums, "sum", grad_scale)
        if self._curve is not None:
            return slope, self._curve
        # d = N·t for the mean over N examples, so that mean_n d² = N·Σ_n t².
        examples = sum(max(forward.examples()) for forward in self._passes)
        return slope, units.values(sums, "sample", grad_scale) * examples

"""Sums at the inputs of readers and at normalisations, collected while the user's own backward pass runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from taylor_cuda import ops
from taylor_cuda.errors import InputError
from taylor_cuda.graph.program import Program
from taylor_cuda.graph.sites import active_in_forward
from taylor_cuda.importance.ride import Riding, RidingInputs
from taylor_cuda.ops.reference import result_dtype


@dataclass
class ForwardPass:
    """What one forward pass left: sums by weight, and per reader the positions of space (or tokens) they run over.

    Readers whose sums ride on one ReLU have them together, under the name of the first; the others have zeros.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    """In a model that runs compact: the dense position of each channel of a reader's sums, and their number."""
    length: dict[str, int] = field(default_factory=dict)
    riding: list[Riding] = field(default_factory=list)
    _cleared: int = 0

    def settle(self) -> None:
        """Complete the sums once the backward pass is over: those that rode on ReLUs, zeros of what did not run."""
        for name, (positions, size) in self.kept.items():
            chosen = (positions >= 0).nonzero().flatten()
            sums, device = self.sums[name], self.sums[name].device
            dense = sums.new_zeros((*sums.shape[:-1], size))
            dense.index_copy_(-1, positions[chosen].to(device), sums.index_select(-1, chosen.to(device)))
            self.sums[name] = dense
        self.kept = {}
        riding, self.riding = self.riding, []
        for one in riding:
            name, sums = one.reader, one.spread()
            there = self.sums.get(name)
            if there is not None:
                _check_batch(name, there.shape, sums.shape)
            self.sums[name] = sums if there is None else there + sums
            for other in one.others:
                self.sums.setdefault(other, torch.zeros_like(sums))
            for name in (one.reader, *one.others):
                self.length.setdefault(name, one.length)

    def copied(self) -> ForwardPass:
        """The same with sums of its own, which the next backward pass doesn't change."""
        riding = [replace(one, sums=one.sums.clone()) for one in self.riding]
        sums = {name: sums.clone() for name, sums in self.sums.items()}
        return ForwardPass(sums, dict(self.kept), dict(self.length), riding)

    def clear(self) -> None:
        """Set the sums to 0."""
        sums = self._all_sums()
        if sums:
            torch._foreach_zero_(sums)
        self._cleared = self._changes()

    def ran(self) -> bool:
        """Whether a backward pass has changed the sums since they were 0; the device isn't asked."""
        return self._changes() != self._cleared

    def examples(self) -> set[int]:
        """The numbers of rows that sums of examples have."""
        return {len(sums) for sums in self._all_sums()}

    def _all_sums(self) -> list[Tensor]:
        return [*self.sums.values(), *(one.sums for one in self.riding)]

    def _changes(self) -> int:
        return sum(sums._version for sums in self._all_sums())


class _Anchored(torch.autograd.Function):
    """Identity that also depends on the anchor, and tells it nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _check_batch(name: str, there: torch.Size | tuple[int, ...], shape: torch.Size | tuple[int, ...]) -> None:
    if there != shape:
        raise InputError(
            f"{name} reads batches of {there[0]} and of {shape[0]} examples in one forward pass: "
            "per-example criteria need one batch size; use criterion='taylor_fo'"
        )


class ReaderSums:
    """Puts a scoring gate before every use of ``weights``; the sums of a weight used several times add up.

    Args:
        model: the traced module.
        weights: names of the readers' weights.
        per_example: keep Σ_l a·g for each example, ``[N, C]``, instead of the sum over the batch, ``[C]``.
        norms: names of parameters of normalisations whose norm term (``norm_term``) is summed beside them, ``[C]``.
        programs: ``{training: Program}`` of this model: which readers need no gate, for a ReLU gives them a ride.
        probes: ``probed`` will be asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Iterable[str],
        *,
        per_example: bool,
        norms: Iterable[str] = (),
        programs: Mapping[bool, Program] | None = None,
        probes: bool = False,
    ) -> None:
        self.passes: list[ForwardPass] = []
        self._per_example = per_example
        self._anchor = torch.zeros((), requires_grad=True) if probes else None
        # Compilers of the backward pass can't change a tensor there that the forward pass made: the graph breaks here.
        gate, term_for = torch.compiler.disable(self._gate), torch.compiler.disable(self._term_for)
        self._sites = RidingInputs(model, weights, gate, norms, term_for, programs or {}, per_example, self._anchor)
        self._handles = [model.register_forward_pre_hook(self._begin), *active_in_forward(model, self._sites)]
        if programs:
            self._handles.append(model.register_forward_hook(self._end, always_call=True))

    def _begin(self, module: nn.Module, _args: Any) -> None:
        if torch.is_grad_enabled():
            self.passes.append(ForwardPass())
            if not torch.compiler.is_compiling():
                self._sites.begin(module.training, self.passes[-1].riding)

    def _end(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if not torch.compiler.is_compiling():
            if sys.exc_info()[0] is None:  # an exception on its way holds everything
                self._sites.check_held()
            self._sites.end()

    def _gate(self, name: str, x: Tensor, dim: int) -> Tensor:
        if not self._recording():
            return x
        riding = self._sites.board(name, x, dim)
        if riding is not None:
            return riding
        if not x.requires_grad:
            # Everything before this reader is frozen: the graph has to begin here, or the gate gets no gradient.
            x = x.detach().requires_grad_()
        if dim == 0:
            return self._gate(name, x.unsqueeze(0), 1).squeeze(0)
        channels_second = x.movedim(dim, 1)
        if self._anchor is not None:
            channels_second = _Anchored.apply(channels_second, self._anchor)
        return ops.score_gate(channels_second, self._sums_for(name, channels_second)).movedim(1, dim)

    def _sums_for(self, name: str, x: Tensor) -> Tensor:
        current = self.passes[-1]
        shape = (x.shape[0], x.shape[1]) if self._per_example else (x.shape[1],)
        sums = current.sums.get(name)
        if sums is not None:
            _check_batch(name, sums.shape, shape)
        if sums is None:
            sums = current.sums[name] = torch.zeros(shape, dtype=result_dtype(x.dtype), device=x.device)
            if name in self._sites.kept:
                current.kept[name] = self._sites.kept[name]
            current.length[name] = x[0, 0].numel()
        return sums

    def _recording(self) -> bool:
        # Where a part of the model was called on its own, before any pass of the whole, there is no pass to add to.
        return torch.is_grad_enabled() and bool(self.passes)

    def _term_for(self, name: str, y: Tensor) -> Tensor | None:
        if not self._recording():
            return None
        current = self.passes[-1]
        if name not in current.sums:
            current.sums[name] = torch.zeros(y.shape[-1], dtype=result_dtype(y.dtype), device=y.device)
        return current.sums[name]

    @torch.no_grad()
    def probed(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[ForwardPass]:
        """What a backward pass from ``outputs`` leaves, and nothing else does it leave: the graph stays for the next.

        The gates are all that leads to the anchor, so no gradient of a parameter is computed, and none of an activation
        is kept.
        """
        assert self._anchor is not None
        try:
            torch.autograd.grad(outputs, [self._anchor], gradients, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "donated" not in str(error):
                raise
            raise InputError(
                "model: probes go back through the graph before the loss does, and torch.compile made a backward pass "
                "that runs once only; set torch._functorch.config.donated_buffer = False before the first forward pass"
            ) from error
        ran = [forward for forward in self.passes if forward.ran()]
        found = [forward.copied() for forward in ran]
        for there, copy in zip(ran, found, strict=True):
            there.clear()
            copy.settle()
        return found

    def take_those_that_ran(self) -> list[ForwardPass]:
        """The passes through which the last backward passes went; others are left for theirs."""
        waiting = [forward for forward in self.passes if not forward.ran()]
        self.passes = [forward for forward in self.passes if forward.ran()]
        found, self.passes = self.take(), waiting
        return found

    def take(self) -> list[ForwardPass]:
        """Everything since the last call, one entry a forward pass."""
        passes, self.passes = self.passes, []
        for forward in passes:
            forward.settle()
        return passes

    def close(self) -> None:
        """Take the gates out of the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.passes = []
        self._sites.end()

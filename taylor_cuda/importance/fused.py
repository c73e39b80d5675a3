"""``tc.fuse_scoring``: per-example sums of every unit that cost no pass of their own where a ReLU stands before."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn

from taylor_cuda.errors import InputError
from taylor_cuda.graph.checks import check_model, check_not_compacted
from taylor_cuda.graph.groups import ChannelGroup, Groups
from taylor_cuda.graph.observe import reader_weights
from taylor_cuda.graph.program import Program, record_programs
from taylor_cuda.importance.activations import ForwardPass, ReaderSums

__all__ = ["FusedScoring", "fuse_scoring"]


class FusedScoring:
    """Scoring gates in a model, those of them that can riding on ReLUs. ``tc.fuse_scoring`` makes it."""

    def __init__(self, model: nn.Module, groups: Groups, per_example: bool) -> None:
        check_model(model, "fuse_scoring")
        check_not_compacted(model, "fuse_scoring")
        self._model, self._groups, self._per_example = model, groups, per_example
        weights = reader_weights(groups)
        self._programs = record_programs(model, groups, weights)
        self._sums = ReaderSums(model, weights, per_example=per_example, programs=self._programs)

    @property
    def fused(self) -> dict[str, int]:
        """``{weight of a reader: elements of its inputs}`` that no pass of its own reads, in the model's mode.

        Elements are those of ``example_inputs``; a pass would read as many of the gradient besides.
        """
        return dict(self._program.fused)

    @property
    def gated(self) -> dict[str, int]:
        """The same of readers with a gate that reads its activation and gradient once more."""
        return dict(self._program.gated)

    @property
    def _program(self) -> Program:
        return self._programs.get(self._model.training, Program())

    @torch.no_grad()
    def take(self) -> dict[str, Tensor]:
        """What all backward passes since the last call left.

        Returns:
            ``{group: [N, size]}``, Σ_l a·g of each example at the inputs of the units' readers, added up over these;
            the examples of several forward passes one below the other. Without ``per_example`` ``[size]``, added up
            over those too. float32, float64 for float64 activations, on the model's device.

        Raises:
            InputError: no forward pass with gradients since the last call, or one without a group's readers.
        """
        passes = [forward for forward in self._sums.take() if forward.sums]
        if not passes:
            raise InputError("take: no forward pass with gradients since the last call; run the model, then backward()")
        put_together = torch.cat if self._per_example else lambda parts: torch.stack(parts).sum(0)
        return {group.name: put_together([unit_sums(group, one) for one in passes]) for group in self._groups}

    def close(self) -> None:
        """Leave the model as it was before."""
        self._sums.close()

    def __enter__(self) -> FusedScoring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def unit_sums(group: ChannelGroup, forward: ForwardPass) -> Tensor:
    """``[N, size]`` or ``[size]``: the sums of one forward pass, added up over the readers of each unit."""
    total: Tensor | None = None
    for member in group.role("read"):
        sums = forward.sums.get(member.tensor)
        if sums is None:
            continue
        part = sums[..., member.index.to(sums.device)].sum(-1)
        if total is not None and total.shape != part.shape:
            raise InputError(
                f"group {group.name!r}: its readers see {total.shape[0]} and {part.shape[0]} examples in one forward "
                "pass; sums of examples need one batch size, take fuse_scoring(per_example=False)"
            )
        total = part if total is None else total + part
    if total is None:
        raise InputError(f"group {group.name!r}: none of its readers ran in the last forward pass")
    return total


def fuse_scoring(model: nn.Module, groups: Groups, per_example: bool = True) -> FusedScoring:
    """Collect the gate sums of every unit while the model trains, at no cost where a ReLU's backward pass runs anyway.

    Σ_l a·g at the input of a unit's readers is the gradient of a gate on the unit. A gate reads activation and gradient
    once more. Where the input is the output of a ReLU, or was pooled, averaged or flattened from it, the backward pass
    of that ReLU reads both in any case and leaves the sums as it goes; so it does where the output also goes past a
    block and into the next ReLU. Which ReLUs can is found by running a copy of the model on ``groups.example_inputs``;
    before other readers stand gates. Outputs, gradients and buffers are those of the plain model, bit for bit.

        with tc.fuse_scoring(model, groups) as sums:
            loss_fn(model(x), target).backward()
            t = sums.take()  # {group: [N, size]}

    A pass that goes another way than the recorded one has the right sums as well, at the cost of gates. Parts under
    activation checkpointing, or compiled by ``torch.compile``, have gates. ``tc.Importance`` does all this by itself.

    Args:
        model: the traced module itself, not a compiled or wrapped one.
        groups: from ``tc.trace`` of this model.
        per_example: keep the sums of each example; otherwise they are added up over the batch.

    Returns:
        A handle, and a context manager that ends with ``close()``.

    Raises:
        InputError: ``model`` is compiled, wrapped or sharded.
    """
    return FusedScoring(model, groups, per_example)

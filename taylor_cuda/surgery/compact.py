"""``tc.compact``: the cut network, run with parameters gathered from dense ones that stay as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from taylor_cuda.errors import CutError, InputError
from taylor_cuda.graph.around import Around
from taylor_cuda.graph.checks import COMPACTED, check_model, check_not_compacted
from taylor_cuda.graph.groups import ChannelGroup, Groups, layer_of, named_tensors, units_to_keep
from taylor_cuda.graph.mask import MaskedForward
from taylor_cuda.graph.recorder import copy_model
from taylor_cuda.surgery.recipe import check_current
from taylor_cuda.surgery.swap import Swap
from taylor_cuda.surgery.verify import device_of, floating_leaves, relative_difference, run_example, tolerance_of

__all__ = ["Compacted", "compact"]


class Compacted(Around):
    """A model that runs compact, made by ``tc.compact``. As a context manager it closes itself.

    Attributes:
        model: the module.
        groups: its groups, those of the dense model.
        verified: greatest relative difference of an output from the masked model's that was last measured, or None.
        forwards: forward passes of the whole model with the plan that it has now.
    """

    def __init__(
        self, model: nn.Module, groups: Groups, plan: Any, round_to: int | str = "auto", cast: bool = True
    ) -> None:
        check_model(model, "compact")
        check_not_compacted(model, "compact")
        super().__init__(model)
        self.groups = groups
        self.verified: float | None = None
        self._multiple = _multiple(model, round_to)
        self._cast = {call.weight for call in groups.calls} if cast else set()
        self._handles: list[Any] = []
        self._keep: dict[str, Tensor]
        self._swap: Swap
        self._arrange(plan)
        self._start()

    @property
    def keep(self) -> dict[str, Tensor]:
        """``{group name: sorted int64 indices of its units that run}``, of every group."""
        return dict(self._keep)

    # -- plans -----------------------------------------------------------------

    def update(self, plan: Any, verify: bool = False) -> None:
        """Run another plan from now on. Units that come back have the weights that they went with.

        Args:
            plan: a ``tc.Plan``, or ``{group name: sorted int64 indices}`` among the units of the dense model; groups
                that aren't named are whole.
            verify: compare with the masked model, as ``tc.compact`` does.

        Raises:
            InputError: the plan doesn't fit; the plan of before stays.
            CutError: the compact model doesn't compute what the masked one does; likewise.
        """
        self._check_open()
        before = self._keep, self._swap
        self._stop()
        try:
            self._arrange(plan)
            self._start()
            if verify:
                self.verify()
        except BaseException:
            if self._is_open():
                self._stop()
            self._keep, self._swap = before
            self._start()
            raise
        self.forwards = 0

    def _arrange(self, plan: Any) -> None:
        check_current(self.model, self.groups)
        chosen = units_to_keep(self.groups, plan)
        keep = {group.name: chosen.get(group.name, torch.arange(group.size)) for group in self.groups}
        held = {group.name: self._filled_up(group, keep[group.name]) for group in self.groups}
        self._keep, self._swap = keep, Swap(self.model, self.groups, keep, held, self._cast)

    def _filled_up(self, group: ChannelGroup, kept: Tensor) -> Tensor:
        """The kept units, and as many others, to run with zeros, as fill up the device's multiple."""
        step = math.lcm(1, *(self._multiple // math.gcd(self._multiple, member.width) for member in group.members))
        more = min(-kept.numel() % step, group.size - kept.numel())
        if not more or not _zeros_add_nothing(self.model, group):
            return kept
        dropped = np.setdiff1d(np.arange(group.size), kept.numpy(), assume_unique=True)
        return torch.cat([kept, torch.from_numpy(dropped[:more])]).sort().values

    def verify(self) -> float:
        """Compare with the masked model on the groups' example inputs; returns the greatest relative difference.

        Raises:
            CutError: it is more than rounding.
        """
        self._check_open()
        found = self._difference()
        tensors = [tensor for tensor in named_tensors(self.model).values() if tensor.is_floating_point()]
        allowed = max((tolerance_of(tensor.dtype, tensor.device) for tensor in tensors), default=0.0)
        if not found <= allowed:
            # a LayerNorm that is left with two channels of nearly equal values magnifies rounding a thousand times
            twin: Compacted = vars(copy_model(self.model).double().cpu())[COMPACTED]
            found, allowed = twin._difference(), tolerance_of(torch.float64, torch.device("cpu"))
        if not found <= allowed:
            raise CutError(
                f"compact and masked model differ by {found:.2g} at an output (relative to the largest value there; "
                f"{allowed:.1g} allowed)"
            )
        self.verified = found
        return found

    def _difference(self) -> float:
        inputs = self.groups.example_inputs
        with self.suspended():
            masks = MaskedForward(self.model, self.groups, self._keep)
            expected = floating_leaves(run_example(self.model, inputs, masks))
        forwards = self.forwards
        actual = floating_leaves(run_example(self.model, inputs))
        self.forwards = forwards
        pairs = [(x, y) for (_, x), (_, y) in zip(expected, actual, strict=True)]
        return max((relative_difference(x, y) for x, y in pairs), default=0.0)

    # -- the end ---------------------------------------------------------------

    def close(self) -> None:
        """Give the dense model back: every parameter as it is now, dropped or not. Closing twice does nothing."""
        if self._is_open():
            self._stop()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The model is dense for a while."""
        self._check_open()
        self._stop()
        try:
            yield
        finally:
            self._start()

    def __enter__(self) -> Compacted:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _is_open(self) -> bool:
        return vars(self.model).get(COMPACTED) is self

    def _check_open(self) -> None:
        if not self._is_open():
            raise InputError("compact: this compaction was closed, or the model was cut; call tc.compact anew")

    # -- running ---------------------------------------------------------------

    def _start(self) -> None:
        super()._start()
        vars(self.model)[COMPACTED] = self
        for owner in self._swap.owners():
            if owner is not self.model:
                self._handles.append(owner.register_forward_pre_hook(self._enter_part))
                self._handles.append(owner.register_forward_hook(self._leave_part, always_call=True))

    def _stop(self) -> None:
        self._swap.leave()
        while self._handles:
            self._handles.pop().remove()
        vars(self.model).pop(COMPACTED, None)
        super()._stop()

    def _enter(self) -> None:
        self._swap.leave()  # what an interrupted pass of a part of the model left behind
        self._swap.enter(None)

    def _leave(self) -> None:
        self._swap.leave()

    def _enter_part(self, module: nn.Module, _args: Any) -> None:
        """A layer that is called without the model: by hand, or because activation checkpointing runs it once more."""
        if not self._depth:
            self._swap.leave()
            self._swap.enter(module)

    def _leave_part(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if not self._depth:
            self._swap.leave()


def compact(
    model: nn.Module,
    groups: Groups,
    plan: Any,
    round_to: int | str = "auto",
    cast: bool = True,
    verify: bool = True,
) -> Compacted:
    """Let a model run as if it were cut, with all of its parameters kept: as fast as the cut one, and reversible.

    ::

        compacted = tc.compact(model, groups, plan)
        for inputs, targets in loader:
            loss_fn(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            compacted.update(another_plan)  # whenever you like: channels go and come back
        tc.cut(model, groups, plan)  # for good; or compacted.close()

    At each forward pass the kept rows and columns of all parameters are gathered in one launch, and sizes of layers
    follow, so that every layer computes kept channels only; the backward pass scatters the gradients in another one.
    Outside of forward passes the model is the dense one: its ``parameters()``, ``state_dict()``, optimizer, EMA and
    ``DistributedDataParallel`` need know nothing. Gradients of what is dropped are 0, and nothing else touches its
    weights but the optimizer's weight decay and momentum. Running statistics of dropped channels stand still.

    Under autocast, weights of convolutions and linear layers are gathered in its dtype, which takes the place of its
    own cast. ``torch.compile``: compile the original module, before or after; the graph breaks once, at the gathering,
    and is compiled anew where widths have changed. Activation checkpointing works; so does a layer called by hand, as a
    module. A copy of the model, ``copy.deepcopy`` included, is compact by itself with the plan of that moment. Not for
    ``torch.jit`` and ``torch.export``: cut before.

    Args:
        model: the traced module itself, not a compiled or wrapped one.
        groups: from ``tc.trace`` of this model. They stay those of the dense model.
        plan: a ``tc.Plan``, or ``{group name: sorted int64 indices of the units to keep}``; groups that aren't named
            stay whole.
        round_to: counts are filled up to a multiple of it with channels of zeros, which change nothing; ``"auto"`` is
            16 on CUDA, whose convolutions copy operands of other counts first, and 1 elsewhere. Groups with a
            LayerNorm or RMSNorm inside, whose statistics zeros would change, are never filled up.
        cast: see above; False leaves all casts to autocast, as parts of a model need that switch it off.
        verify: compare with the masked model on the groups' example inputs.

    Returns:
        What updates, verifies and closes it; a context manager.

    Raises:
        InputError: an argument doesn't fit, or the model is compact already; raised before anything is touched.
        CutError: the compact model doesn't compute what the masked one does; the model is dense again.
    """
    compacted = Compacted(model, groups, plan, round_to, cast)
    if verify:
        try:
            compacted.verify()
        except BaseException:
            compacted.close()
            raise
    return compacted


def _multiple(model: nn.Module, round_to: int | str) -> int:
    if round_to == "auto":
        return 16 if device_of(model).type == "cuda" else 1
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise InputError(f"round_to: wanted 'auto' or a whole number of at least 1, got {round_to!r}")
    return round_to


def _zeros_add_nothing(model: nn.Module, group: ChannelGroup) -> bool:
    """Whether channels of zeros leave the others as they are: no normalisation takes statistics across channels."""
    owners = [model.get_submodule(layer_of(member.tensor)) for member in group.role("norm")]
    return all(isinstance(owner, (_NormBase, nn.GroupNorm)) for owner in owners)

"""Sums of readers that ride on the backward pass of the ReLU behind which they stand.

The ReLU's output z comes out of its node of the graph twice: once for whoever asks, once for readers. So the node gets
two gradients, and what Σ_l z·g is taken of is what came from readers, whoever else used z and in whatever way. Both
together are the gradient that PyTorch would have added up itself.

Where z also goes past a block, into an addition and the next ReLU, one pass over the whole gradient gives the sum of
both ways, and the part of the addition, Σ_l z·g of that ReLU's own result, is told by its backward pass.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from taylor_cuda.errors import InputError
from taylor_cuda.graph.program import ADDITIONS, GRADIENT_ASKED, KEEPERS, RELUS, Program, Ride, in_place, sum_kept
from taylor_cuda.graph.sites import Transform
from taylor_cuda.importance.norm_term import ReaderAndNormInputs, SumsOf
from taylor_cuda.ops import checks, library, reference

__all__ = ["Riding", "RidingInputs"]


@dataclass(eq=False)
class Riding:
    """Σ_l a·g of all readers behind one call of a ReLU, added up; it counts as the sum of the first of them.

    Attributes:
        at: which call of a ReLU it is.
        sums: ``[N, C]`` or ``[C]`` over the channels of the ReLU.
        reader: name of the weight of the first reader; empty before it is called.
        others: those of the others.
        length: L at the inputs of the readers.
        width: how many of their channels, side by side, one channel of the ReLU became.
    """

    at: int
    sums: Tensor
    reader: str = ""
    length: int = 0
    width: int = 1
    others: list[str] = field(default_factory=list)

    def spread(self) -> Tensor:
        """The sums as a gate at the reader would have them, but for where in a ReLU's channel they stand."""
        if self.width == 1:
            return self.sums
        return torch.nn.functional.pad(self.sums.unsqueeze(-1), (0, self.width - 1)).flatten(-2)


@dataclass(eq=False)
class _Stop:
    """One tensor on the way, as the graph knows it. It holds no tensor of the graph but while that goes backward."""

    riding: Riding
    dim: int
    width: int = 1
    told: tuple[Tensor, Tensor] | None = None
    """The gradient that went from the next ReLU into an addition, and Σ_l of it and this tensor."""

    def channels_second(self, x: Tensor) -> Tensor:
        return x if self.dim == 1 else x.movedim(self.dim, 1)

    def share(self, gradient: Tensor) -> Tensor | None:
        """What was told, if exactly this gradient was meant."""
        told, self.told = self.told, None
        return told[1] if told is not None and told[0] is gradient else None


@dataclass(eq=False)
class _Tracked:
    """A tensor that the running forward pass may call a reader with."""

    tensor: weakref.ref[Tensor]
    version: int
    alias: Tensor
    stop: _Stop
    ride: Ride
    calls: int = 0

    def is_still(self, x: Tensor) -> bool:
        return self.tensor() is x and x._version == self.version


class _RidingReLU(torch.autograd.Function):
    """A ReLU, as ``call`` does it, with its output twice: the second is for readers."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        call: Callable[[Tensor], Tensor],
        stop: _Stop,
        skip: Tensor | None,
        past: _Stop | None,
        anchor: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        output = call(x)
        if output is x:
            ctx.mark_dirty(x)
        ctx.save_for_backward(output, skip)
        ctx.set_materialize_grads(False)
        ctx.stop, ctx.past = stop, past
        return output, output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None, None, None, None]:
        rest, read = gradients
        output, skip = (None if saved is None else saved.detach() for saved in ctx.saved_tensors)
        stop, sums = ctx.stop, ctx.stop.riding.sums
        total = _added(rest, read)
        if total is None:
            return None, None, None, None, None, None
        share = None if rest is None else stop.share(rest)
        if read is None or (rest is not None and share is None) or torch.is_grad_enabled():
            if read is not None:
                library.accumulate_channel_sums(stop.channels_second(output), stop.channels_second(read.detach()), sums)
            return torch.ops.aten.threshold_backward(total, output, 0), None, None, None, None, None
        told = None if skip is None else torch.zeros_like(ctx.past.riding.sums)
        flowing = None if skip is None else stop.channels_second(skip)
        gx = library.score_relu_backward(stop.channels_second(output), stop.channels_second(total), sums, flowing, told)
        gx = gx if stop.dim == 1 else gx.movedim(1, stop.dim)
        if share is not None:
            sums.sub_(share)
        if told is not None:
            ctx.past.told = gx, told
        return gx, None, None, None, None, None


class _Fork(torch.autograd.Function):
    """Identity with the result twice; what doesn't come from readers is taken off the sums of the ReLU before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stop: _Stop) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        ctx.stop = stop
        return x.detach(), x.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        rest, read = gradients
        stop = ctx.stop
        sums = stop.riding.sums
        if rest is not None and stop.riding.reader:
            share = stop.share(rest)
            share = _share_of_rest(ctx, rest) if share is None else share
            sums.sub_(share if sums.dim() == share.dim() else share.sum(0))
        return _added(rest, read), None


def _share_of_rest(ctx: Any, rest: Tensor) -> Tensor:
    """``[N, C]``: Σ_l of what a fork was given and a gradient of it, in a pass of its own."""
    stop = ctx.stop
    try:
        (x,) = ctx.saved_tensors
    except RuntimeError as error:
        raise InputError(
            f"an activation on its way to {stop.riding.reader} was changed in place after another layer had read it, "
            "which the model doesn't do with its example inputs; take Importance(fuse=False)"
        ) from error
    share = library.channel_sums(stop.channels_second(x.detach()), stop.channels_second(rest.detach()))
    by_channel: Tensor = share.unflatten(1, (-1, stop.width)).sum(2)
    return by_channel


def _added(rest: Tensor | None, read: Tensor | None) -> Tensor | None:
    if rest is None or read is None:
        return read if rest is None else rest
    return rest + read


def _is_hooked() -> bool:
    """Whether saved tensors go elsewhere, as in activation checkpointing, which runs parts again without this mode."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


class RidingInputs(ReaderAndNormInputs):
    """``ReaderAndNormInputs`` that also lets the ReLUs of ``programs`` give their readers a ride.

    Outputs and gradients stay as they are, bit for bit. A pass that isn't as it was recorded has the same sums: what
    doesn't fit is summed in a pass of its own. Compiled code takes gates.

    Args:
        model: the traced module.
        weights: names of the readers' weights.
        transform: see ``ReaderInputs``; it asks ``board`` first.
        norms: see ``ReaderAndNormInputs``.
        sums_of: likewise.
        programs: ``{training: Program}``.
        per_example: whether sums are ``[N, C]``.
        anchor: a leaf that the backward pass of every ReLU which gives a ride leads to, with no gradient for it.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Iterable[str],
        transform: Transform,
        norms: Iterable[str],
        sums_of: SumsOf,
        programs: Mapping[bool, Program],
        per_example: bool,
        anchor: Tensor | None = None,
    ) -> None:
        super().__init__(model, weights, transform, norms, sums_of)
        self._programs, self._anchor = programs, anchor
        self._per_example = per_example
        self._blocks = set[tuple[str, int]]().union(*(program.blocks for program in programs.values()))
        self._rides: list[Ride | None] = []
        self._riding: list[Riding] | None = None
        self._tracked: dict[int, _Tracked] = {}
        self._totals: dict[int, tuple[weakref.ref[Tensor], int, _Tracked]] = {}
        self._relus = 0

    def begin(self, training: bool, riding: list[Riding]) -> None:
        """A forward pass begins; whoever rides in it is added to ``riding``."""
        self.end()
        program = self._programs.get(training)
        self._rides = [] if program is None else program.rides
        self._riding = riding

    def check_held(self) -> None:
        """Warn of tensors of the forward pass that are still held, and give their readers gates from now on."""
        for tracked in self._tracked.values():
            riding = tracked.stop.riding
            if riding.reader and tracked.tensor() is not None and self._rides[riding.at] is not None:
                self._rides[riding.at] = None
                warnings.warn(
                    f"the activation before {riding.reader} is held after the forward pass: in this pass its own "
                    "gradient (retain_grad, autograd.grad) lacks what comes from layers that read it; from the next "
                    "pass on it has a scoring gate. Hold it from before scoring, or take Importance(fuse=False)",
                    stacklevel=2,
                )

    def end(self) -> None:
        """The forward pass is over: hold nothing of it."""
        self._tracked, self._totals, self._riding, self._relus = {}, {}, None, 0

    def board(self, name: str, x: Tensor, dim: int) -> Tensor | None:
        """What the reader ``name`` is to get instead of x for its sums to ride along; None: it needs a gate."""
        tracked = self._find(x)
        if tracked is None or tracked.ride.dim != dim or self._riding is None or _is_hooked():
            return None
        riding, length, width = tracked.stop.riding, x.numel() // (x.shape[0] * x.shape[dim]), tracked.stop.width
        if width > 1 and (name, width) not in self._blocks:
            return None
        if not riding.reader:
            riding.reader, riding.length, riding.width = name, length, width
            self._riding.append(riding)
        elif (riding.length, riding.width) != (length, width):
            return None
        else:
            riding.others.append(name)
        return tracked.alias

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """ReLUs and what is called with their outputs in a way of their own, everything else as it is."""
        if torch.compiler.is_compiling() or self._riding is None:
            return super().call(func, args, kwargs)
        if func in RELUS:
            return self._relu(func, args, kwargs)
        if not self._tracked:
            return super().call(func, args, kwargs)
        if func in KEEPERS:
            return self._keep(func, args, kwargs)
        if func in GRADIENT_ASKED and self._find(args[0]) is not None:
            raise InputError(
                f"{func.__name__}: the gradient of this activation is taken apart for the scores of the layers that "
                "read it; call it in a hook that is there before scoring begins, or take Importance(fuse=False)"
            )
        out = super().call(func, args, kwargs)
        if func in ADDITIONS and isinstance(out, Tensor):
            self._note_total(args, out)
        return out

    def _find(self, x: Any) -> _Tracked | None:
        tracked = self._tracked.get(id(x))
        return tracked if tracked is not None and tracked.is_still(x) else None

    def _track(self, x: Tensor, alias: Tensor, stop: _Stop, ride: Ride) -> None:
        self._tracked[id(x)] = _Tracked(weakref.ref(x), x._version, alias, stop, ride)

    def _relu(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        at, self._relus = self._relus, self._relus + 1
        ride = self._rides[at] if at < len(self._rides) else None
        x, args, kwargs = _first(args, kwargs)
        if ride is None or not self._can_ride(x, ride, in_place(func, (x, *args), kwargs)):
            return func(x, *args, **kwargs)
        shape = (x.shape[0], x.shape[ride.dim]) if self._per_example else (x.shape[ride.dim],)
        sums = torch.zeros(shape, dtype=reference.result_dtype(x.dtype), device=x.device)
        stop = _Stop(Riding(at, sums), ride.dim)
        skip, past = self._share_of(x, stop)
        output, alias = _RidingReLU.apply(x, lambda x: func(x, *args, **kwargs), stop, skip, past, self._anchor)
        self._track(output, alias, stop, ride)
        return output

    def _can_ride(self, x: Any, ride: Ride, changes: bool) -> bool:
        return (
            torch.is_grad_enabled()
            and type(x) is Tensor
            and x.requires_grad
            and x.dtype in checks.SUPPORTED
            and x.layout == torch.strided
            and x.dim() > ride.dim
            and x.numel() > 0
            and not (changes and x._is_view())
            and not _is_hooked()
        )

    def _share_of(self, x: Tensor, stop: _Stop) -> tuple[Tensor | None, _Stop | None]:
        """The tensor past a block that x is a sum with, and its stop, if its share can be told."""
        total, version, tracked = self._totals.get(id(x), (None, 0, None))
        if total is None or tracked is None or total() is not x or x._version != version:
            return None, None
        skip, past = tracked.alias.detach(), tracked.stop
        fits = (skip.shape, skip.dtype, skip.device, past.dim) == (x.shape, x.dtype, x.device, stop.dim)
        return (skip, past) if fits and past.width == 1 else (None, None)

    def _keep(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, args, kwargs = _first(args, kwargs)
        tracked = self._find(x)
        if tracked is None:
            return func(x, *args, **kwargs)
        at, tracked.calls = tracked.calls, tracked.calls + 1
        ride = tracked.ride.ways[at] if at < len(tracked.ride.ways) else None
        if ride is None or _is_hooked() or not torch.is_grad_enabled() or in_place(func, (x, *args), kwargs):
            return func(x, *args, **kwargs)
        out = func(tracked.alias, *args, **kwargs)
        if out is tracked.alias:
            return x
        kept = sum_kept(func, (x, *args), kwargs, x, out)
        if kept is None or not (kept[0] or ride.dim == 1):
            return func(x, *args, **kwargs)
        stop = _Stop(tracked.stop.riding, ride.dim, tracked.stop.width * kept[1])
        result, alias = _Fork.apply(out, stop)
        self._track(result, alias, stop, ride)
        return result

    def _note_total(self, args: tuple[Any, ...], out: Tensor) -> None:
        for addend in args[:2]:
            tracked = self._find(addend)
            if tracked is not None and tracked.ride.skips:
                self._totals[id(out)] = weakref.ref(out), out._version, tracked


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The first argument, by position or as ``input``, and the others."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("input"), (), rest

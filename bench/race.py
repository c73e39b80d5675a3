"""A race: one job, its inputs, and everybody who can do it. Nobody is timed before the result was checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALLOWED = {"float32": 8 * 2.0**-23, "float16": 2 * 2.0**-10, "bfloat16": 2 * 2.0**-7}
"""How far a sum may be off, as a share of the sum of the absolute values of its terms, by the dtype it was computed in.

float32: the package's own bound, whatever the dtype of the inputs, as a product of two 16-bit floats is exact there.
A peer that works in 16 bits rounds every product and two sums: three halves of its machine epsilon.
"""

PACKED = ":packed"
"""Ends the name of a provider of ours that takes and gives the kept channels only."""


class WrongResultError(RuntimeError):
    """A provider's result is not the reference's; it has no speed."""


@dataclass(frozen=True)
class Options:
    """What a run is asked for.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        quick: tiny shapes and networks, a fraction of a second each: to see that everything works, not to quote.
        seconds: time spent on the rounds of one race.
    """

    device: str = "cpu"
    quick: bool = False
    seconds: float = 3.0

    @property
    def cuda(self) -> bool:
        """Whether this run is on a GPU."""
        return self.device == "cuda"


@dataclass(frozen=True)
class Provider:
    """One way to do the job.

    Attributes:
        name: ``"ours:native"``, ``"torch"``, ``"torch.compile"``, …
        run: one input set -> the result.
        check: (result, index of the input set) -> the worst error as a share of what is allowed; NaN or above 1: wrong.
        note: what a reader of the row has to know.
        context: entered around every call, outside the clock.
        bytes: the least it has to move, where that is not the race's figure.
        built_bytes: memory of a GPU that making it took and that it keeps.
        split: microseconds of one call by what they are spent on; taken after everybody was timed.
        macs_ratio: multiply-accumulates of its network, as a share of those of the whole one.
    """

    name: str
    run: Callable[[Any], Any]
    check: Callable[[Any, int], float]
    note: str = ""
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    bytes: int | None = None
    built_bytes: int = 0
    split: Callable[[], dict[str, float]] | None = None
    macs_ratio: float | None = None

    @property
    def ours(self) -> bool:
        """Whether this is this package's own."""
        return self.name.startswith("ours")


@dataclass(frozen=True)
class Key:
    """Which race it is.

    Attributes:
        suite: the file its rows go to.
        op: what is computed.
        case: shape or network.
        dtype: of the inputs.
        layout: ``"nchw"``, ``"channels_last"``, ``"tokens"``, ``"rows"``, ``"scores"``, or ``"parameters"``.
    """

    suite: str
    op: str
    case: str
    dtype: str = "float32"
    layout: str = "parameters"

    def __str__(self) -> str:
        return "/".join((self.suite, self.op, self.case, self.dtype, self.layout))


@dataclass(frozen=True)
class Race:
    """One job with its inputs in memory.

    Attributes:
        key: which one.
        providers: ours and the peers.
        inputs: equal in shape and different in values, used in turn so that no call finds its data in a cache.
        bytes: the least the job has to move: every input once, every output once. 0 where that says nothing.
        flops: of the formula. 0 where that says nothing.
        peer: whose median is in our rows' ``ratio``; all of them are in ``ratios``.
        skipped: (name, reason) of those that can't take part.
        timers: on a GPU, ``"eager"`` (what a caller waits for) and ``"graph"`` (what keeps the device busy).
        rounds: at most.
        least: rounds at least, whatever time they take; on a quick run as few as elsewhere.
        seconds: for all rounds together, where that is not the run's figure.
        calls: in one sample at least, with nobody waiting for the device between them, as in a loop.
        images: that go through a network in one call. 0 where that says nothing.
    """

    key: Key
    providers: Sequence[Provider]
    inputs: Sequence[Any] = (None,)
    bytes: int = 0
    flops: int = 0
    peer: str | None = None
    skipped: Sequence[tuple[str, str]] = ()
    timers: tuple[str, ...] = ("eager",)
    rounds: int = 50
    least: int = 0
    seconds: float | None = None
    calls: int = 1
    images: int = 0


@dataclass(frozen=True)
class Entry:
    """A race that isn't built yet: its inputs take no memory until its turn.

    Attributes:
        key: which one.
        build: makes the race.
        providers: names of all who are invited, whether they can come or not.
        priority: lower runs first; when a time limit cuts a run short, the rest is left out.
        seconds: what it is expected to take, so that none is begun which the time limit would cut.
    """

    key: Key
    build: Callable[[Key], Race]
    providers: Sequence[str]
    priority: int
    seconds: float = 5.0


def worst_share(actual: Tensor, expected: Tensor, allowed: Tensor) -> float:
    """The largest ``|actual - expected| / allowed``; NaN and a wrong shape come out as NaN.

    Args:
        actual: a result of any dtype, on any device.
        expected: float64, the same shape.
        allowed: float64, the same shape, not negative.
    """
    if actual.shape != expected.shape:
        return float("nan")
    difference = (actual.detach().to(expected) - expected).abs()
    # 16-bit inputs may have products below the smallest normal number, which hardware may flush.
    share = difference / (allowed + torch.finfo(torch.float32).tiny)
    return float(share.max()) if share.numel() else 0.0


def worst_of(shares: Iterable[float]) -> float:
    """The largest; NaN if any is NaN, which ``max`` would pass over."""
    found = list(shares)
    return float("nan") if any(share != share for share in found) else max(found)


def of_square(expected: Tensor, allowed: Tensor) -> Tensor:
    """How far the float32 square of a sum may be off when the sum itself may be off by ``allowed``."""
    return (2 * expected.abs() + allowed) * allowed + 2.0**-23 * expected.square()

"""Learning rates: what the rate is at a step of a stage."""

from __future__ import annotations

import math
from dataclasses import dataclass


def cosine(step: float, total: float) -> float:
    """From 1 at step 0 to 0 at ``total``, half a cosine. Source: Loshchilov and Hutter, "SGDR", ICLR 2017."""
    if total <= 0:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(step, total) / total))


@dataclass(frozen=True)
class Schedule:
    """A learning rate as a function of the step.

    Attributes:
        peak: the greatest rate.
        total: steps until it is 0, of ``"cosine"``.
        kind: ``"cosine"``, ``"step"`` or ``"constant"``.
        warmup: steps of a linear rise from ``peak / warmup`` to ``peak``, within ``total``.
        drop_every: steps between the drops of ``"step"``.
        drop: what each of them multiplies the rate by.
    """

    peak: float
    total: int = 0
    kind: str = "constant"
    warmup: int = 0
    drop_every: int = 0
    drop: float = 0.1

    def __call__(self, step: int) -> float:
        """The rate at a step, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.kind == "cosine":
            return self.peak * cosine(step - self.warmup, self.total - self.warmup)
        if self.kind == "step":
            return float(self.peak * self.drop ** (step // self.drop_every))
        return self.peak

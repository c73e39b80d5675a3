"""The figures this package promises on a CPU, and whether a run kept them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from taylor_cuda.bench.race import Entry, Key
from taylor_cuda.bench.rows import Row

WITHIN = 1 / 1.3
"""A ratio of at least this is "within 1.3 times the peer's time"."""

OURS = ("ours", "ours:native")
KEY_NAMES = [field.name for field in fields(Key)]


@dataclass(frozen=True)
class Threshold:
    """One promise: the ratio to a peer is at least ``least``, or, without a peer, the median is at most ``most_ms``."""

    key: Key
    peer: str | None = None
    least: float = 0.0
    most_ms: float = float("inf")

    def verdict(self, rows: Sequence[Row]) -> tuple[bool, str]:
        """Whether it was kept by the rows of a run, and a sentence about it."""
        wanted = f"at most {self.most_ms:g} ms" if self.peer is None else f"at least {self.least:.3g} x {self.peer}"
        mine = [row for row in rows if Key(*(row[name] for name in KEY_NAMES)) == self.key and row["provider"] in OURS]
        if not mine:
            return False, f"{self.key}: not measured, wanted {wanted}"
        best = min(mine, key=lambda row: row["median_us"])
        if self.peer is None:
            median = best["median_us"] * 1e-3
            return median <= self.most_ms, f"{self.key}: {median:.3g} ms, wanted {wanted}"
        if self.peer not in best["ratios"]:
            return False, f"{self.key}: {self.peer} was not measured, wanted {wanted}"
        ratio = best["ratios"][self.peer]
        return ratio >= self.least, f"{self.key}: {ratio:.3g} x {self.peer}, wanted {wanted}"


def _activation(layout: str) -> list[Threshold]:
    key = Key("scoring", "channel_importance", "64x256x28x28", "float32", layout)
    return [Threshold(key, "torch", 3.5), Threshold(key, "torch.dot", WITHIN)]


def _parameters(side: str) -> list[Threshold]:
    key = Key("scoring", "weight_importance", f"resnet50:{side}")
    return [Threshold(key, "torch.dot", WITHIN), Threshold(key, "torch", 1.3)]


THRESHOLDS = (
    *_activation("nchw"),
    *_activation("channels_last"),
    *_parameters("readers"),
    *_parameters("writers"),
    Threshold(Key("network", "taylor_fo", "resnet50"), "torch-pruning", 15.0),
    Threshold(Key("planner", "plan", "resnet101"), most_ms=50.0),
    Threshold(Key("graph", "trace", "resnet50"), most_ms=1000.0),
    Threshold(Key("graph", "trace", "densenet201"), most_ms=3000.0),
)


def needed(entries: Sequence[Entry]) -> list[Entry]:
    """The races that the thresholds are about."""
    wanted = {threshold.key for threshold in THRESHOLDS}
    return [entry for entry in entries if entry.key in wanted]


def judge(rows: Sequence[Row], thresholds: Sequence[Threshold] = THRESHOLDS) -> list[tuple[bool, str]]:
    """Every threshold's verdict on the rows of one run."""
    return [threshold.verdict(rows) for threshold in thresholds]

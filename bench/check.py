"""The figures this package promises, and whether the rows of a run kept them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from taylor_cuda.bench.predictions import beside
from taylor_cuda.bench.race import PACKED, Entry, Key
from taylor_cuda.bench.rows import Row

KEY_NAMES = [field.name for field in fields(Key)]


@dataclass(frozen=True)
class Promise(ABC):
    """Something about our rows of one race.

    Attributes:
        key: of the race.
        provider: of ours; without one the fastest that is an op's backend, with ``PACKED`` the fastest of those that
            take and give packed tensors.
        timer: of the rows; without one whichever there is.
    """

    key: Key
    provider: str | None = None
    timer: str | None = None

    @property
    def keys(self) -> tuple[Key, ...]:
        """The races that have to run."""
        return (self.key,)

    @abstractmethod
    def wanted(self) -> str:
        """The promise in words."""

    @abstractmethod
    def judged(self, row: Row, rows: Sequence[Row]) -> tuple[bool, str]:
        """Whether our ``row`` keeps it, and what it says; ``rows`` are all of the race."""

    def verdict(self, rows: Sequence[Row]) -> tuple[bool, str] | None:
        """Whether the rows of a run keep it, and a sentence about it; ``None`` where it was not measured."""
        of_race = [row for row in rows if self._is_about(row)]
        mine = [row for row in of_race if self._is_ours(row["provider"])]
        if not mine:
            return None
        row = min(mine, key=lambda row: float(row["median_us"]))
        good, found = self.judged(row, of_race)
        who = "" if row["provider"] == "ours" else f" {row['provider']}"
        return good, f"{self.key}{who}: {found}, wanted {self.wanted()}{beside(row)}"

    def _is_about(self, row: Row) -> bool:
        return _key(row) == self.key and self.timer in (None, row.get("timer"))

    def _is_ours(self, provider: str) -> bool:
        if self.provider in (None, PACKED):
            return provider.removesuffix(self.provider or "") in BACKENDS and provider.endswith(self.provider or "")
        return provider == self.provider


BACKENDS = ("ours", "ours:native", "ours:cuda", "ours:triton")


@dataclass(frozen=True)
class Faster(Promise):
    """A peer takes at least ``least`` times as long."""

    peer: str = ""
    least: float = 1.0

    def wanted(self) -> str:
        """The promise in words."""
        return f"at least {self.least:.3g} x {self.peer}"

    def judged(self, row: Row, rows: Sequence[Row]) -> tuple[bool, str]:
        """By the ratio that stands in the row."""
        if self.peer not in row["ratios"]:
            return False, f"{self.peer} was not measured"
        ratio = row["ratios"][self.peer]
        return ratio >= self.least, f"{ratio:.3g} x {self.peer}"


@dataclass(frozen=True)
class Within(Promise):
    """Ours takes at most ``most`` times as long as a peer."""

    peer: str = ""
    most: float = 1.0

    def wanted(self) -> str:
        """The promise in words."""
        return f"at most {self.most:g} of the time of {self.peer}"

    def judged(self, row: Row, rows: Sequence[Row]) -> tuple[bool, str]:
        """By the medians; with the 95 % interval, which is that of the peer's time over ours."""
        if self.peer not in row["ratios"]:
            return False, f"{self.peer} was not measured"
        factor = 1 / row["ratios"][self.peer]
        low, high = (1 / bound for bound in reversed(row["intervals"][self.peer]))
        return factor <= self.most, f"{factor:.4f} [{low:.4f}, {high:.4f}] over {row['rounds']} rounds"


@dataclass(frozen=True)
class WithinOurs(Promise):
    """Ours takes at most ``most`` times as long as another of ours, and what the long way round would take is said.

    Attributes:
        peer: the other.
        most: the factor.
        rows: providers that took a few equal parts of the long way; how many of how many stands first in their notes.
    """

    peer: str = ""
    most: float = 1.0
    rows: tuple[str, str] = ("", "")

    def wanted(self) -> str:
        """The promise in words."""
        return f"at most {self.most:g} of the time of {self.peer}"

    def judged(self, row: Row, rows: Sequence[Row]) -> tuple[bool, str]:
        """By the medians."""
        medians = {other["provider"]: float(other["median_us"]) for other in rows}
        if self.peer not in medians:
            return False, f"{self.peer} was not measured"
        factor = row["median_us"] / medians[self.peer]
        found = f"{factor:.3f} over {row['rounds']} rounds"
        parts = [other for name in self.rows for other in rows if other["provider"] == name]
        if len(parts) == 2:
            (few, whole), (more, _) = ((int(word) for word in one["note"].split()[0:3:2]) for one in parts)
            first, second = (float(one["median_us"]) for one in parts)
            total = first + (whole - few) * (second - first) / (more - few)
            found += (
                f"; all {whole} rows exactly: {total / medians[self.peer]:,.0f} (extrapolated from {few} and {more})"
            )
        return factor <= self.most, found


@dataclass(frozen=True)
class FasterInSum(Faster):
    """A peer takes at least ``least`` times as long over several races, each counted as often as a network has it.

    One kernel of ours has to do it in all of them.

    Attributes:
        counts: (race, how often); ``key`` only names them together.
    """

    counts: tuple[tuple[Key, int], ...] = ()

    @property
    def keys(self) -> tuple[Key, ...]:
        """The races that have to run."""
        return tuple(key for key, _ in self.counts)

    def verdict(self, rows: Sequence[Row]) -> tuple[bool, str] | None:
        """By the sums of the medians; of races that ran only, the promise is missed with what they say."""
        medians: dict[str, dict[Key, float]] = {}
        for row in rows:
            if self.timer in (None, row.get("timer")):
                medians.setdefault(row["provider"], {})[_key(row)] = float(row["median_us"])
        theirs = medians.get(self.peer, {})
        sums = []
        for provider, mine in medians.items():
            both = [key for key in self.keys if key in mine and key in theirs]
            if self._is_ours(provider) and both:
                sums.append((-len(both), _total(self.counts, mine, both), _total(self.counts, theirs, both), provider))
        if not sums:
            return None
        short, own, peer, provider = min(sums)
        good = -short == len(self.counts) and peer / own >= self.least
        ran = "" if -short == len(self.counts) else f" in {-short} of {len(self.counts)} races"
        found = f"{peer / own:.3g} x {self.peer}{ran}, {_time(own)} against {_time(peer)}"
        total = {**asdict(self.key), "device": rows[0]["device"], "provider": provider, "median_us": own, "bytes": 0}
        return good, f"{self.key} {provider}: {found}, wanted {self.wanted()}{beside(total)}"


def _key(row: Row) -> Key:
    return Key(*(row[name] for name in KEY_NAMES))


def _total(counts: Sequence[tuple[Key, int]], medians: Mapping[Key, float], among: Sequence[Key]) -> float:
    return sum(count * medians[key] for key, count in counts if key in among)


@dataclass(frozen=True)
class Takes(Promise):
    """A median of at most ``most_us`` microseconds."""

    most_us: float = 0.0

    def wanted(self) -> str:
        """The promise in words."""
        return f"at most {_time(self.most_us)}"

    def judged(self, row: Row, rows: Sequence[Row]) -> tuple[bool, str]:
        """By the median."""
        return row["median_us"] <= self.most_us, _time(row["median_us"])


@dataclass(frozen=True)
class Bandwidth(Promise):
    """At least ``least`` of the copy rate that the same run measured."""

    least: float = 0.0

    def wanted(self) -> str:
        """The promise in words."""
        return f"at least {self.least:.0%} of the copy rate"

    def judged(self, row: Row, rows: Sequence[Row]) -> tuple[bool, str]:
        """By the least bytes there are to move."""
        share = (row["gb_per_s"] or 0.0) / row["ceiling_gb_per_s"]
        return share >= self.least, f"{share:.1%} of the copy rate"


@dataclass(frozen=True)
class Memory(Promise):
    """At most ``most_bytes`` more than a peer, of what a call takes and of what is kept between calls together."""

    peer: str = ""
    most_bytes: int = 0

    def wanted(self) -> str:
        """The promise in words."""
        return f"at most {self.most_bytes:,} bytes more than {self.peer}"

    def judged(self, row: Row, rows: Sequence[Row]) -> tuple[bool, str]:
        """By ``peak_bytes`` and ``held_bytes`` of both."""
        peers = [other for other in rows if other["provider"] == self.peer]
        used = [_bytes(one) for one in (row, *peers[:1])]
        if len(used) < 2 or used[0] is None or used[1] is None:
            return False, "memory was not measured"
        extra = used[0] - used[1]
        return extra <= self.most_bytes, f"{extra:,} bytes more"


def _bytes(row: Row) -> int | None:
    peak, held = row.get("peak_bytes"), row.get("held_bytes")
    return None if peak is None or held is None else int(peak + held)


def _time(microseconds: float) -> str:
    return f"{microseconds:.3g} us" if microseconds < 1000 else f"{microseconds * 1e-3:.3g} ms"


def needed(entries: Sequence[Entry], promises: Sequence[Promise]) -> list[Entry]:
    """The races that promises are about."""
    wanted = {key for promise in promises for key in promise.keys}
    return [entry for entry in entries if entry.key in wanted]


def judge(rows: Sequence[Row], promises: Sequence[Promise], *, only_measured: bool = False) -> list[tuple[bool, str]]:
    """The verdicts on the rows of one run.

    Args:
        rows: of the run.
        promises: about this kind of device.
        only_measured: leave out promises about races that are not in ``rows``, instead of calling them missed.
    """
    found = []
    for promise in promises:
        verdict = promise.verdict(rows)
        if verdict is not None:
            found.append(verdict)
        elif not only_measured:
            found.append((False, f"{promise.key}: not measured, wanted {promise.wanted()}"))
    return found

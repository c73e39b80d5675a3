"""Check, then time: rounds in which everybody gets one turn, so that a machine whose speed drifts slows all alike."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from taylor_cuda.bench.race import Options, Provider, Race, WrongResultError
from taylor_cuda.bench.rows import Row

MIN_SAMPLE_S = {"cpu": 2e-3, "cuda": 1e-3}
"""A sample is at least this long, made of several calls where one is shorter."""

MAX_CALLS = 512

LONG_S = 5.0
"""A call this long is timed once: the one after the check is the sample."""


@dataclass(frozen=True)
class Ceilings:
    """What the machine did in this very run: a large copy (bytes read and written) and a large matrix product."""

    gb_per_s: float
    tflops: float


@dataclass(frozen=True)
class Checked:
    """A provider whose results were right.

    Attributes:
        provider: may be timed.
        error: worst error as a share of what is allowed.
        seconds: one call after the check, so that nothing is compiled or allocated for the first time in it.
        peak_bytes: memory above what there was before the call; ``None`` on a CPU.
        held_bytes: memory that its making took and that its first calls left behind; ``None`` on a CPU.
    """

    provider: Provider
    error: float
    seconds: float
    peak_bytes: int | None
    held_bytes: int | None = None


@dataclass(frozen=True)
class Timing:
    """Microseconds per call, one number a round."""

    checked: Checked
    timer: str
    samples: list[float]

    @property
    def median(self) -> float:
        """The middle sample."""
        return percentile(self.samples, 0.5)


@dataclass(frozen=True)
class Raced:
    """What came out of a race.

    Attributes:
        rows: of those who were right.
        left_out: a sentence for each peer that took no part.
        broken: a sentence for each of ours that was wrong, raised, or can't be timed in a way that it should.
    """

    rows: list[Row]
    left_out: list[str]
    broken: list[str]


def run_race(race: Race, options: Options, ceilings: Ceilings, record: dict[str, Any]) -> Raced:
    """Check everybody, time those who were right.

    A kernel of ours that fails costs the other one of the same op no row, but the run is no good one.

    Raises:
        WrongResultError: all of ours were wrong; nothing is timed then. Or what the first of them raised.
    """
    left_out = [f"{name}: {reason}" for name, reason in race.skipped]
    broken: list[str] = []
    checked, errors = [], []
    for provider in race.providers:
        try:
            checked.append(check(race, provider, options))
        except Exception as error:
            if provider.ours:
                errors.append(error)
            (broken if provider.ours else left_out).append(f"{provider.name}: {_short(error)}")
    if errors and not any(one.provider.ours for one in checked):
        raise errors[0]
    rows: list[Row] = []
    for timer in race.timers if options.cuda else ("wall",):
        timings, failed = time_all(race, checked, timer, options)
        for one, sentence in failed:
            (broken if one.provider.ours else left_out).append(sentence)
        rows += [make_row(race, timing, timings, options, ceilings, record) for timing in timings]
    for provider in (one.provider for one in checked):
        if provider.split is not None:
            with provider.context():
                split = {name: _digits(spent) for name, spent in provider.split().items()}
            for row in rows:
                if row["provider"] == provider.name:
                    row["split"] = split
    return Raced(rows, left_out, broken)


def check(race: Race, provider: Provider, options: Options) -> Checked:
    """Run ``provider`` on every input set and compare with the reference.

    Raises:
        WrongResultError: it is further off than allowed anywhere, or not a number.
    """
    worst = 0.0
    start = torch.cuda.memory_allocated() if options.cuda else 0
    for index, inputs in enumerate(race.inputs):
        with provider.context():
            result = provider.run(inputs)
        error = provider.check(result, index)
        if not error <= 1.0:
            raise WrongResultError(f"{provider.name} on {race.key}: the error is {error:.3g} times what is allowed")
        worst = max(worst, error)
        del result
    if options.cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with provider.context():
        seconds = _one_call(provider, race.inputs[0], options)
    if not options.cuda:
        return Checked(provider, worst, seconds, None)
    held = provider.built_bytes + before - start
    return Checked(provider, worst, seconds, torch.cuda.max_memory_allocated() - before, held)


def time_all(
    race: Race, checked: Sequence[Checked], timer: str, options: Options
) -> tuple[list[Timing], list[tuple[Checked, str]]]:
    """Sample everybody in turns.

    Args:
        race: gives the inputs and the number of rounds.
        checked: who takes part.
        timer: ``"wall"`` the host's clock; ``"eager"`` CUDA events around calls; ``"graph"`` CUDA events around a
            replay of captured calls.
        options: gives the time there is.

    Returns:
        A timing for each, and whoever can't be timed in this way, with a sentence about it.
    """
    samplers: list[tuple[Checked, Callable[[], float]]] = []
    failed = []
    for one in checked:
        try:
            samplers.append((one, _sampler(race, one, timer, options)))
        except Exception as error:
            failed.append((one, f"{one.provider.name} ({timer}): {_short(error)}"))
    samples = [[one.seconds * 1e6] if one.seconds >= LONG_S else [] for one, _ in samplers]
    counts = [_rounds(race, one, len(samplers), options) for one, _ in samplers]
    most = max(counts, default=0)
    with _no_garbage_collection(options):
        for turn in range(most):
            # Every other round backwards, so that nobody always comes after the same one.
            for index, (one, sample) in list(enumerate(samplers))[:: -1 if turn % 2 else 1]:
                # Those with fewer turns take them spread over all rounds.
                if turn * counts[index] // most == (turn - 1) * counts[index] // most:
                    continue
                with one.provider.context():
                    samples[index].append(sample())
    return [Timing(one, timer, taken) for (one, _), taken in zip(samplers, samples, strict=True)], failed


def _rounds(race: Race, one: Checked, providers: int, options: Options) -> int:
    """Turns of one provider in its share of the time; five or the race's least, three where a call takes seconds."""
    if one.seconds >= LONG_S:
        return 0
    sample = max(race.calls * one.seconds, MIN_SAMPLE_S[options.device])
    least = 5 if sample < 1.0 else 3
    least = min(least, 3) if options.quick else max(least, race.least)
    seconds = options.seconds if race.seconds is None else race.seconds
    return min(race.rounds, max(least, int(seconds / providers / sample)))


def _sampler(race: Race, one: Checked, timer: str, options: Options) -> Callable[[], float]:
    """A function that takes one sample: microseconds per call."""
    run, inputs = one.provider.run, race.inputs
    calls = max(race.calls, min(MAX_CALLS, math.ceil(MIN_SAMPLE_S[options.device] / one.seconds)))
    if timer == "wall":
        turn = _turns(inputs)

        def wall() -> float:
            batch = [next(turn) for _ in range(calls)]
            start = time.perf_counter_ns()
            for chosen in batch:
                run(chosen)
            return (time.perf_counter_ns() - start) / calls * 1e-3

        return wall
    if timer == "graph":
        calls = -(-calls // len(inputs)) * len(inputs)
        with one.provider.context():
            graph = _captured(run, inputs, calls)
        return lambda: _between_events(graph.replay, 1) / calls
    turn = _turns(inputs)
    return lambda: _between_events(lambda: run(next(turn)), calls) / calls


def _turns(inputs: Sequence[Any]) -> Iterator[Any]:
    while True:
        yield from inputs


def _captured(run: Callable[[Any], Any], inputs: Sequence[Any], calls: int) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(inputs[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(calls):
            run(inputs[call % len(inputs)])
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _between_events(run: Callable[[], Any], calls: int) -> float:
    """Microseconds of ``calls`` calls between two events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def _one_call(provider: Provider, inputs: Any, options: Options) -> float:
    if options.cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    provider.run(inputs)
    if options.cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def _no_garbage_collection(options: Options) -> Iterator[None]:
    if not options.quick:
        gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def measure_ceilings(options: Options) -> Ceilings:
    """The copy and the matrix product of this run, on random data."""
    size, dtype = (8192, torch.bfloat16) if options.cuda else (2048, torch.float32)
    copied = 1 << (31 if options.cuda else 28)
    if options.quick:
        size, copied = size // 4, copied // 16
    # Bytes that fit no pattern: some memory compresses what is equal.
    source = torch.randint(1 << 62, (copied // 8,), dtype=torch.int64, device=options.device)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=options.device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    copy = _median_seconds(lambda: target.copy_(source), options)
    matmul = _median_seconds(lambda: torch.mm(left, right, out=product), options)
    return Ceilings(2 * source.nbytes / copy * 1e-9, 2 * size**3 / matmul * 1e-12)


def _median_seconds(run: Callable[[], Any], options: Options, repeats: int = 9) -> float:
    for _ in range(2):
        run()
    taken = []
    for _ in range(repeats):
        if options.cuda:
            taken.append(_between_events(run, 1) * 1e-6)
        else:
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return percentile(taken, 0.5)


def percentile(samples: Sequence[float], share: float) -> float:
    """The sample below which ``share`` of all samples lie, interpolated."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def interval(ours: Sequence[float], peer: Sequence[float], draws: int = 1000) -> list[float]:
    """The 95 % bootstrap interval of ``median(peer) / median(ours)``; rounds are drawn, so pairs stay pairs."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.tensor(ours, dtype=torch.float64), torch.tensor(peer, dtype=torch.float64)
    first = torch.randint(len(a), (draws, len(a)), generator=generator)
    second = first if len(a) == len(b) else torch.randint(len(b), (draws, len(b)), generator=generator)
    ratios = b[second].quantile(0.5, dim=1) / a[first].quantile(0.5, dim=1)
    return [_digits(float(ratios.quantile(share))) for share in (0.025, 0.975)]


def make_row(
    race: Race, timing: Timing, timings: Sequence[Timing], options: Options, ceilings: Ceilings, record: dict[str, Any]
) -> Row:
    """The row of one timing; ours gets its ratio to every peer of ``timings``."""
    # Ratios are those of the medians as they are written: whoever divides two rows finds the ratio beside them.
    provider, median = timing.checked.provider, _digits(timing.median)
    moved = race.bytes if provider.bytes is None else provider.bytes
    peers = [other for other in timings if provider.ours and not other.checked.provider.ours]
    ratios = {other.checked.provider.name: _digits(_digits(other.median) / median) for other in peers}
    return {
        **asdict(race.key),
        "provider": provider.name,
        "median_us": median,
        "p20_us": _digits(percentile(timing.samples, 0.2)),
        "p80_us": _digits(percentile(timing.samples, 0.8)),
        "bytes": moved,
        "flops": race.flops,
        "gb_per_s": _digits(moved / median * 1e-3) if moved else None,
        "ceiling_gb_per_s": _digits(ceilings.gb_per_s),
        "ceiling_tflops": _digits(ceilings.tflops),
        "ratio": ratios.get(race.peer or ""),
        "peer": race.peer if race.peer in ratios else None,
        "ratios": ratios,
        "intervals": {other.checked.provider.name: interval(timing.samples, other.samples) for other in peers},
        "timer": timing.timer,
        "rounds": len(timing.samples),
        "error": _digits(timing.checked.error),
        "peak_bytes": timing.checked.peak_bytes,
        "held_bytes": timing.checked.held_bytes,
        "split": None,
        "images_per_s": _digits(race.images / median * 1e6) if race.images else None,
        "macs_ratio": provider.macs_ratio,
        "note": provider.note,
        "quick": options.quick,
        **record,
    }


def _digits(value: float) -> float:
    """Six of them: more than any clock has."""
    return float(f"{value:.6g}")


def _short(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"

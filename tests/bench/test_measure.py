from __future__ import annotations

import itertools
import math
import statistics
import time

import pytest
import torch

from taylor_cuda.bench.environment import cache_bytes, environment
from taylor_cuda.bench.measure import LONG_S, Ceilings, Checked, check, interval, percentile, run_race, time_all
from taylor_cuda.bench.race import Key, Options, Provider, Race, WrongResultError, of_square, worst_of, worst_share
from taylor_cuda.bench.rows import check_row
from taylor_cuda.bench.suites.scoring import exact

QUICK = Options(quick=True, seconds=0.01)
CEILINGS = Ceilings(10.0, 0.5)


class Counting:
    """A provider's work, remembering how often and in which order it was called."""

    def __init__(self, result, log=None, name=""):
        self.result, self.calls, self.log, self.name = result, 0, log, name

    def __call__(self, _inputs):
        self.calls += 1
        if self.log is not None:
            self.log.append(self.name)
        return self.result


def share(result, _index):
    return abs(result - 1.0) / 0.5


def make_race(*providers, inputs=(0, 1), rounds=4):
    return Race(Key("scoring", "op", "case"), providers, inputs, bytes=1000, peer="peer", rounds=rounds)


def test_our_wrong_result_is_refused_before_anything_is_timed():
    ours, peer = Counting(2.0), Counting(1.0)
    race = make_race(Provider("peer", peer, share), Provider("ours", ours, share))
    with pytest.raises(WrongResultError, match=r"ours on scoring/op/case.*2 times"):
        run_race(race, QUICK, CEILINGS, environment("cpu"))
    assert ours.calls == 1
    assert peer.calls == 3  # one for each input set, one to see how long it takes; no rounds


def test_a_result_wrong_on_the_second_input_set_only_is_refused():
    provider = Provider("ours", Counting(1.0), lambda _result, index: float(index) * 1.01)
    with pytest.raises(WrongResultError):
        check(make_race(provider), provider, QUICK)


def test_of_several_shares_nan_is_the_worst():
    assert worst_of([0.1, 0.7, 0.3]) == 0.7
    assert math.isnan(worst_of([0.1, math.nan, 0.3]))


@pytest.mark.parametrize("error", [math.nan, math.inf, 1.001])
def test_nan_and_more_than_allowed_are_refused(error):
    provider = Provider("ours", Counting(1.0), lambda _result, _index: error)
    with pytest.raises(WrongResultError):
        check(make_race(provider), provider, QUICK)


def test_a_peer_that_is_wrong_or_raises_is_left_out_with_the_reason():
    def broken(_inputs):
        raise RuntimeError("no such kernel\nand a stack")

    race = make_race(
        Provider("ours", Counting(1.0), share),
        Provider("peer", Counting(9.0), share),
        Provider("other", broken, share),
        Provider("third", Counting(1.2), share),
    )
    raced = run_race(race, QUICK, CEILINGS, environment("cpu"))
    rows, left_out = raced.rows, raced.left_out
    assert raced.broken == []
    assert [row["provider"] for row in rows] == ["ours", "third"]
    assert rows[0]["ratio"] is None
    assert rows[0]["peer"] is None
    assert set(rows[0]["ratios"]) == {"third"}
    assert [reason.partition(":")[0] for reason in left_out] == ["peer", "other"]
    assert left_out[1] == "other: RuntimeError: no such kernel"


def test_our_own_exception_is_not_swallowed():
    def broken(_inputs):
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        run_race(make_race(Provider("ours", broken, share)), QUICK, CEILINGS, environment("cpu"))


def test_a_broken_kernel_of_two_costs_the_other_no_row():
    def broken(_inputs):
        raise RuntimeError("no such kernel")

    for bad in (Provider("ours:triton", broken, share), Provider("ours:triton", Counting(9.0), share)):
        race = make_race(Provider("ours:cuda", Counting(1.0), share), bad, Provider("peer", Counting(1.2), share))
        raced = run_race(race, QUICK, CEILINGS, environment("cpu"))
        assert [row["provider"] for row in raced.rows] == ["ours:cuda", "peer"]
        assert [sentence.partition(": ")[0] for sentence in raced.broken] == ["ours:triton"]
        assert raced.left_out == []


def test_rows_hold_medians_of_the_rounds_and_the_ratio_is_peer_over_ours():
    slow = torch.randn(400, 400)
    race = make_race(
        Provider("ours", Counting(1.0), share),
        Provider("peer", lambda _inputs: float((slow @ slow).sum() * 0 + 1), share, bytes=0),
    )
    rows = run_race(race, QUICK, CEILINGS, environment("cpu")).rows
    for row in rows:
        check_row(row)
        assert row["p20_us"] <= row["median_us"] <= row["p80_us"]
    ours, peer = rows
    assert ours["ratio"] > 1
    assert ours["ratio"] == pytest.approx(peer["median_us"] / ours["median_us"], rel=1e-5)
    assert ours["ratios"] == {"peer": ours["ratio"]}
    assert ours["gb_per_s"] == pytest.approx(1000 / ours["median_us"] / 1e3, rel=1e-5)
    assert peer["gb_per_s"] is None
    assert (peer["ratio"], peer["peer"], peer["ratios"]) == (None, None, {})


def checked(provider, seconds):
    return Checked(provider, 0.0, seconds, None)


def test_rounds_take_turns_and_inputs_rotate():
    log, seen = [], []

    def ours(inputs):
        log.append("ours")
        seen.append(inputs)

    providers = [Provider("ours", ours, share), Provider("peer", Counting(1.0, log, "peer"), share)]
    race = make_race(*providers, inputs=(0, 1, 2), rounds=6)
    options = Options(seconds=10.0)
    timings, failed = time_all(race, [checked(provider, 1.0) for provider in providers], "wall", options)
    assert not failed
    # Forwards and backwards in turns, so that nobody always comes after the same one.
    assert log == ["ours", "peer", "peer", "ours"] * 2 + ["ours", "peer"]
    assert seen == [0, 1, 2, 0, 1]
    assert [len(timing.samples) for timing in timings] == [5, 5]


def test_a_slower_one_takes_fewer_turns_spread_over_the_rounds():
    log = []
    providers = [Provider(name, Counting(1.0, log, name), share) for name in ("ours", "slow", "hours")]
    race = make_race(*providers, rounds=30)
    times = [checked(provider, seconds) for provider, seconds in zip(providers, (0.5, 1.5, LONG_S), strict=True)]
    timings, _ = time_all(race, times, "wall", Options(seconds=13.5))
    assert log.count("ours") == 9
    places = [place for place, name in enumerate(log) if name == "slow"]
    assert len(places) == 3
    assert places[-1] - places[0] >= 6
    # What takes this long is not called again: the call after its check is the sample.
    assert "hours" not in log
    assert timings[2].samples == [LONG_S * 1e6]


def test_short_calls_are_put_together_and_the_time_is_of_one(monkeypatch):
    clock = itertools.count(0, 5_000_000)
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(clock))
    work = Counting(1.0)
    provider = Provider("ours", work, share)
    timings, _ = time_all(make_race(provider, rounds=1), [checked(provider, 2e-5)], "wall", QUICK)
    assert work.calls == 100
    assert timings[0].samples == [50.0]  # 5 ms between two looks at the clock, 100 calls


def test_percentiles():
    samples = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert percentile(samples, 0.5) == statistics.median(samples)
    assert percentile(samples, 0.2) == pytest.approx(1.8)
    assert percentile(samples, 0.8) == pytest.approx(4.2)
    assert percentile([7.0], 0.8) == 7.0


def test_the_interval_keeps_pairs_together():
    ours = [1.0, 2.0, 4.0, 8.0, 16.0] * 4
    assert interval(ours, [3 * sample for sample in ours]) == [3.0, 3.0]
    low, high = interval(ours, [3 * sample for sample in reversed(ours)])
    assert low < 3.0 < high


def test_worst_share():
    expected, allowed = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.1, 0.2]).double()
    assert worst_share(torch.tensor([1.05, 2.0]), expected, allowed) == pytest.approx(0.5, rel=1e-5)
    assert math.isnan(worst_share(torch.tensor([math.nan, 2.0]), expected, allowed))
    assert math.isnan(worst_share(torch.tensor([1.0, 2.0, 3.0]), expected, allowed))
    assert worst_share(torch.empty(0), expected[:0], allowed[:0]) == 0.0


def test_the_bound_of_a_square():
    expected, allowed = torch.tensor([3.0]).double(), torch.tensor([0.01]).double()
    limit = of_square(expected, allowed)
    assert (3.01**2 - 9) <= limit <= (3.01**2 - 9) + 2e-6


@pytest.mark.parametrize(
    "op", ["channel_sums", "channel_importance", "channel_importance:sample", "channel_importance:abs"]
)
def test_the_bound_sees_a_lost_column_and_16_bit_products(op):
    """Faults that looser bounds let pass: the last column dropped, and products rounded to the inputs' dtype."""
    generator = torch.Generator().manual_seed(0)
    a, g = (torch.randn(4, 8, 14, 14, generator=generator).bfloat16() for _ in range(2))
    truth = exact((a, g))

    def result(a, g):
        return exact((a, g)).of(op, "float32")[0]

    right, allowed = truth.of(op, "float32")
    assert worst_share(result(a.float(), g.float()).float(), right, allowed) < 1
    assert worst_share(result(a[..., :-1], g[..., :-1]), right, allowed) > 1
    rounded = a * g
    assert worst_share(result(rounded, torch.ones_like(rounded)), right, allowed) > 1
    # A peer that works in 16 bits is judged by 16 bits, and still may not lose the half of its data.
    right, allowed = truth.of(op, "bfloat16")
    assert worst_share(result(rounded, torch.ones_like(rounded)), right, allowed) < 1
    assert worst_share(result(a[..., :3], g[..., :3]), right, allowed) > 1


def test_the_environment_is_a_row_part():
    record = environment("cpu")
    assert record["device_name"]
    assert record["threads"] == torch.get_num_threads()
    assert record["run_id"] != environment("cpu")["run_id"]
    assert cache_bytes("cpu") >= 1 << 18

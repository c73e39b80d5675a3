"""Images per second: what is trained, cut and compared; the largest batch that fits."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from taylor_cuda.bench.environment import environment
from taylor_cuda.bench.largest import MULTIPLE, SHARES, largest_batch, most_elements
from taylor_cuda.bench.measure import Ceilings, run_race
from taylor_cuda.bench.predictions import predicted_us
from taylor_cuda.bench.promises import promises
from taylor_cuda.bench.race import Options
from taylor_cuda.bench.report import markdown, text
from taylor_cuda.bench.rows import check_row
from taylor_cuda.bench.suites import networks, throughput
from tests.bench.pretended import Pretended, install
from tests.bench.test_rows import make_row

QUICK = Options(quick=True, seconds=0.01)


def build(op, options=QUICK):
    entry = next(entry for entry in throughput.entries(options) if entry.key.op == op)
    return entry.build(entry.key)


def flops(model, size=64):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(networks.images(1, size))
    return counter.get_total_flops()


def test_the_cut_is_a_real_one_to_half_of_the_macs_by_the_scores_of_a_step():
    found = throughput.halved("tiny", 64, QUICK)
    assert found.macs_ratio == pytest.approx(flops(found.cut) / flops(found.whole))
    assert 0.4 < found.macs_ratio <= 0.5
    kept, whole = sum(keep.numel() for keep in found.keep.values()), sum(found.groups.sizes().values())
    assert 0 < kept < whole
    fresh = networks.make("tiny")
    moved = [not torch.equal(a, b) for a, b in zip(found.whole.parameters(), fresh.parameters(), strict=True)]
    assert any(moved)  # by the step whose scores decided


@pytest.mark.parametrize("op", [throughput.TRAINING, throughput.INFERENCE])
def test_rows_have_images_per_second_and_macs_beside_the_ratio_of_the_same_run(op):
    race = build(op)
    raced = run_race(race, QUICK, Ceilings(10.0, 0.5), environment("cpu"))
    assert raced.broken == raced.left_out == []
    rows = {row["provider"]: row for row in raced.rows}
    assert list(rows) == [provider.name for provider in race.providers]
    for name, row in rows.items():
        check_row(row)
        assert row["images_per_s"] == pytest.approx(2e6 / row["median_us"], rel=1e-5)
        if name != throughput.CUT:
            assert row["macs_ratio"] == 1.0
        if name != throughput.WHOLE:
            assert row["ratio"] == pytest.approx(row["images_per_s"] / rows["torch"]["images_per_s"], rel=1e-4)
    assert rows[throughput.CUT]["macs_ratio"] <= 0.5
    assert "of the MACs after one cut" in rows[throughput.CUT]["note"]


def test_every_first_step_is_compared_with_one_written_by_hand():
    for provider in build(throughput.TRAINING).providers:
        assert provider.check(provider.run(None), 0) <= 1
        assert provider.check(provider.run(None), 0) > 1  # the second step moves them on


def test_steps_of_the_cut_network_take_its_share_of_the_macs():
    whole, scored, cut = (counted(provider) for provider in build(throughput.TRAINING).providers)
    assert whole == scored
    assert cut / whole == pytest.approx(throughput.halved("tiny", 64, QUICK).macs_ratio, abs=0.05)


def counted(provider):
    with FlopCounterMode(display=False) as counter:
        provider.run(None)
    return counter.get_total_flops()


def test_scores_are_taken_at_each_step_and_nothing_is_cut(monkeypatch):
    throughput.halved("tiny", 64, QUICK)  # whose own pruner is not meant
    made, make = [], throughput.pruner_of
    monkeypatch.setattr(throughput, "pruner_of", lambda *args: made.append(make(*args)) or made[-1])
    provider = build(throughput.TRAINING).providers[1]
    (pruner,) = made
    sizes = pruner.groups.sizes()
    for _ in range(3):
        provider.run(None)
    assert (pruner.batches, pruner.importance.steps) == (3, 3)
    assert pruner.groups.sizes() == sizes
    assert provider.name == throughput.SCORED


def test_a_loop_without_scores_is_no_pruning_loop(monkeypatch):
    class Nothing:
        backward = staticmethod(lambda loss, *_, **__: loss.backward())
        step = staticmethod(lambda: None)
        importance = SimpleNamespace(scores=lambda: {"group": torch.zeros(3)})

    throughput.halved("tiny", 64, QUICK)

    def pretend(step, *_):
        step.backward = Nothing()
        return step.backward

    monkeypatch.setattr(throughput, "pruner_of", pretend)
    provider = build(throughput.TRAINING).providers[1]
    assert math.isnan(provider.check(provider.run(None), 0))


def test_inference_of_another_network_is_refused():
    whole, cut = build(throughput.INFERENCE).providers
    for mine, other in ((whole, cut), (cut, whole)):
        assert mine.check(mine.run(None), 0) <= 1
        assert mine.check(other.run(None), 0) > 1


class Card:
    """Memory that a batch takes ``used(batch)`` of, and no more than there is."""

    def __init__(self, memory, total, used):
        self.memory, self.total, self.used, self.tried = memory, total, used, []
        memory.free = total

    def __call__(self, batch):
        self.tried.append(batch)
        if self.used(batch) > self.total:
            raise torch.OutOfMemoryError("no more")
        self.memory.pass_through(self.used(batch))


@pytest.mark.parametrize(
    ("used", "expected"),
    [
        (lambda batch: 1000 + 10 * batch, SHARES[0]),
        (lambda batch: 1000 + 10 * batch + (900 if batch > 128 else 0), SHARES[1]),
        (lambda batch: 1000 + 10 * batch + (1100 if batch > 128 else 0), SHARES[2]),
    ],
    ids=["first", "second", "third"],
)
def test_the_largest_batch_in_few_tries(used, expected, monkeypatch):
    card = Card(install(monkeypatch), 10_000, used)
    batch = largest_batch(card, most=5000)
    assert batch == int((expected * 10_000 - 1000) / 10) // MULTIPLE * MULTIPLE
    assert card.tried[:4] == [64, 64, 128, 128]
    assert len(card.tried) == 5 + SHARES.index(expected)
    assert used(batch) <= 10_000


def test_where_every_try_fails_what_was_measured_is_left(monkeypatch):
    card = Card(install(monkeypatch), 10_000, lambda batch: 1000 + 10 * batch + (9000 if batch > 128 else 0))
    assert largest_batch(card, most=5000) == 128
    assert len(card.tried) == 4 + len(SHARES)


@pytest.mark.parametrize(("most", "expected"), [(700, 700), (100, 100), (1, 1), (5000, 832)])
def test_never_more_than_the_most(most, expected, monkeypatch):
    card = Card(install(monkeypatch), 10_000, lambda batch: 1000 + 10 * batch)
    assert largest_batch(card, most=most) == expected
    assert max(card.tried) <= max(expected, 2)


def test_what_others_hold_is_not_there_for_a_batch(monkeypatch):
    memory = install(monkeypatch)
    memory.held = 4000
    card = Card(memory, 6000, lambda batch: 10 * batch)
    assert largest_batch(card, most=5000) == int((0.95 * 10_000 - 4000) / 10) // MULTIPLE * MULTIPLE


def test_too_little_memory_for_two_small_batches_is_an_error(monkeypatch):
    card = Card(install(monkeypatch), 500, lambda batch: 10 * batch)
    with pytest.raises(torch.OutOfMemoryError):
        largest_batch(card, most=5000)


def test_other_errors_are_not_taken_for_too_little_memory(monkeypatch):
    card = Card(install(monkeypatch), 10_000, lambda batch: 1000 + 10 * batch)

    def run(batch):
        card(batch)
        if batch > 128:
            raise RuntimeError("misaligned address")

    with pytest.raises(RuntimeError, match="misaligned"):
        largest_batch(run, most=5000)


def test_elements_of_the_largest_activation():
    model = networks.make("tiny")
    assert most_elements(model, networks.images(1, 64)) == 8 * 32 * 32
    assert all(not module._forward_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_the_largest_batch_is_trained(monkeypatch):
    memory = install(monkeypatch)
    options = Pretended(quick=True, seconds=0.01)
    (entry,) = [entry for entry in throughput.entries(options) if throughput.LARGEST in entry.key.case]
    start, batches = throughput.RepeatedStep.__call__, []

    def watched(self, *arguments):
        batches.append(len(self.x))
        memory.pass_through(100 * len(self.x))
        return start(self, *arguments)

    throughput.halved("tiny", 64, options)
    monkeypatch.setattr(throughput.RepeatedStep, "__call__", watched)
    memory.free = 10_000
    race = entry.build(entry.key)
    assert batches == [2, 2, 4, 4]
    assert race.images == 4
    assert all("batch 4 (a larger one has more elements" in provider.note for provider in race.providers)
    monkeypatch.setattr(throughput, "largest_batch", lambda run, most: run(3) or 3)
    batches.clear()
    race = entry.build(entry.key)
    assert (race.images, batches) == (3, [3])
    assert all("batch 3, " in provider.note for provider in race.providers)
    race.providers[0].run(None)
    assert batches == [3, 3]


def test_networks_and_batches_of_a_gpu_within_their_time():
    found = throughput.entries(Options("cuda"))
    for network in ("resnet50", "resnet101"):
        cases = [(entry.key.op, entry.key.case) for entry in found if entry.key.case.startswith(f"{network} ")]
        assert cases == [
            ("training", f"{network} batch 256 at 224"),
            *(("inference", f"{network} batch {batch} at 224") for batch in (256, 64, 1)),
            ("training", f"{network} largest batch at 224"),
        ]
    assert found[0].priority == min(entry.priority for entry in found)
    assert sum(entry.seconds for entry in found) <= 125
    assert throughput.ON_A_GPU in {entry.key.case for entry in found}
    assert throughput.ON_A_CPU in {entry.key.case for entry in throughput.entries(Options())}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_pruning_loop_is_promised_on_both_devices(device):
    (promise,) = [promise for promise in promises(device) if promise.key.suite == "throughput"]
    key = promise.key
    assert key in {entry.key for entry in throughput.entries(Options(device))}
    row = make_row(
        suite="throughput",
        op=key.op,
        case=key.case,
        dtype=key.dtype,
        layout=key.layout,
        device=device,
        provider="ours:taylor_fo",
        bytes=0,
        ratios={"torch": promise.least},
    )
    assert promise.verdict([row])[0]
    assert not promise.verdict([row | {"ratios": {"torch": promise.least - 0.01}}])[0]
    assert promise.verdict([row | {"provider": "ours:cut"}]) is None


def test_what_is_predicted_for_an_h200():
    row = make_row(device="cuda", op="training", case="resnet50 batch 256 at 224", provider="ours:taylor_fo")
    assert predicted_us(row) == pytest.approx(55_460)
    assert predicted_us(row | {"provider": "ours:cut"}) == pytest.approx(42_658)
    deeper = row | {"case": "resnet101 batch 256 at 224"}
    assert predicted_us(deeper) == pytest.approx(87_038)
    assert predicted_us(row | {"case": "resnet50 largest batch at 224"}) is None
    forward = row | {"op": "inference", "provider": "ours:cut", "timer": "graph"}
    times = [
        predicted_us(forward | {"case": f"resnet50 batch {batch} at 224", "timer": timer})
        for batch, timer in ((256, "graph"), (64, "eager"), (1, "graph"), (1, "eager"))
    ]
    assert times == pytest.approx([12_012, 3_003, 525, 1_750])
    assert predicted_us(forward | {"provider": "torch"}) is None


def test_tables_say_images_per_second_macs_and_memory():
    extra = {"ratios": {}, "timer": "eager", "peak_bytes": 11_000_000_000, "held_bytes": 500_000_000, "gb_per_s": None}
    plain = make_row(suite="throughput", provider="torch", images_per_s=4620.6, macs_ratio=1.0, **extra)
    cut = plain | {"provider": "ours:cut", "images_per_s": 6001.2, "macs_ratio": 0.4996, "ratios": {"torch": 1.2988}}
    for told in (text([plain, cut]), markdown([plain, cut])):
        lines = told.splitlines()
        (header,) = [line for line in lines if "images/s" in line]
        assert "of the MACs" in header
        assert "peak GB" in header
        assert any("4,621" in line and "1.000" in line and "11.50" in line for line in lines)
        assert any("6,001" in line and "0.500" in line and "1.299×" in line for line in lines)
    assert "images/s" not in text([make_row(**extra)])

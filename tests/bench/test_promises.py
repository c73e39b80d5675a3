"""What is promised, whether rows keep it, what was predicted, which kernel an op should run, and the picture of it."""

from __future__ import annotations

import ast
import math

import pytest
import torch

from taylor_cuda.bench import predictions
from taylor_cuda.bench.cases import ActivationCase
from taylor_cuda.bench.check import Bandwidth, Faster, Memory, Takes, Within, judge, needed
from taylor_cuda.bench.dispatch import recommendation
from taylor_cuda.bench.plot import drawn, style_of, write_roofline
from taylor_cuda.bench.promises import least_share, promises
from taylor_cuda.bench.race import PACKED, Key, Options
from taylor_cuda.bench.rows import Row
from taylor_cuda.bench.suites import entries, relu, step
from taylor_cuda.errors import InputError
from tests.bench.test_command import row

KEY = Key("scoring", "channel_importance", "2x3x4x4", "float32", "nchw")


def on_gpu(**changes) -> Row:
    gpu = {"device": "cuda", "device_name": "NVIDIA H200", "provider": "ours:cuda", "timer": "graph"}
    return row(**(gpu | {"ceiling_gb_per_s": 4000.0} | changes))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_promise_is_about_a_race_and_a_peer_that_exist(device):
    found = {entry.key: entry for entry in entries(Options(device))}
    made = promises(device)
    assert len(set(made)) == len(made)
    for promise in made:
        assert promise.keys
        for key in promise.keys:
            assert key in found
            providers = found[key].providers
            peer = getattr(promise, "peer", None)
            assert peer is None or peer in providers
            if promise.provider == PACKED:
                assert any(name.startswith("ours") and name.endswith(PACKED) for name in providers)
            else:
                assert promise.provider is None or promise.provider in providers
    wanted = {key for promise in made for key in promise.keys}
    assert {entry.key for entry in needed(list(found.values()), made)} == wanted


def test_the_figures_promised_on_a_cpu():
    """The first issue's numbers, written out again."""
    made = promises("cpu")
    ratios = {
        (one.key.op, one.key.case, one.key.layout, one.peer): one.least for one in made if isinstance(one, Faster)
    }
    times = {(one.key.op, one.key.case): one.most_us for one in made if isinstance(one, Takes)}
    shape, within = "64x256x28x28", pytest.approx(1 / 1.3)
    for layout in ("nchw", "channels_last"):
        assert ratios["channel_importance", shape, layout, "torch"] == 3.5
        assert ratios["channel_importance", shape, layout, "torch.dot"] == within
    for side in ("readers", "writers"):
        assert ratios["weight_importance", f"resnet50:{side}", "parameters", "torch.dot"] == within
        assert ratios["weight_importance", f"resnet50:{side}", "parameters", "torch"] == 1.3
    assert ratios["taylor_fo", "resnet50", "parameters", "torch-pruning"] == 15
    assert times == {("plan", "resnet101"): 50e3, ("trace", "resnet50"): 1e6, ("trace", "densenet201"): 3e6}


def test_the_figures_promised_on_a_gpu():
    """The fourth issue's numbers, written out again."""
    made = promises("cuda")
    shares = {(one.key.case, one.key.dtype, one.key.layout): one.least for one in made if isinstance(one, Bandwidth)}
    assert shares["256x256x56x56", "bfloat16", "channels_last"] == 0.95  # 822 MB
    assert shares["256x64x56x56", "float16", "nchw"] == 0.95  # 206 MB
    assert shares["256x128x28x28", "bfloat16", "nchw"] == 0.85  # 103 MB
    assert shares["256x256x14x14", "float16", "channels_last"] == 0.85  # 51 MB
    assert shares["256x768x197", "bfloat16", "tokens"] == 0.95  # 155 MB
    assert shares["16384x4096", "bfloat16", "rows"] == 0.95
    assert not [case for case, _, _ in shares if case == "256x512x7x7"]  # 26 MB
    assert {(one.key.suite, one.peer): one.least for one in made if isinstance(one, Faster)} == {
        ("scoring", "torch.compile"): 1.0,
        ("scoring", "nvlabs-style"): 5.5,
        ("scoring", "torch"): 20.0,
        ("throughput", "torch"): 0.98,
        ("conv", "torch"): 1.7,
        ("conv", "torch-pruning:aligned"): 1 / 1.05,
        ("conv", "torch-pruning"): 1.3,
        ("modes", "torch"): 1.6,
    }
    assert {one.key.case: one.most_us for one in made if isinstance(one, Takes)} == {
        "resnet50:readers": 60.0,
        "resnet50:writers": 60.0,
        "resnet101:readers": 105.0,
        "resnet101:writers": 105.0,
    }
    within = {(one.key.op, one.provider, one.peer): one.most for one in made if isinstance(one, Within)}
    assert within == {
        ("training_step", "ours:taylor_fo", "torch"): 1.005,
        ("training_step", "ours:taylor_fg", "torch"): 1.02,
        (relu.OP, None, relu.ALONE): 1.02,
    }
    (memory,) = (one for one in made if isinstance(one, Memory))
    assert (memory.provider, memory.most_bytes) == ("ours:taylor_fo", 1_000_000)


def test_shares_by_size():
    def share(*shape):
        return least_share(ActivationCase(shape, torch.bfloat16, "rows"))

    assert share(32_000_000, 1) == 0.95  # 128 MB
    assert share(31_999_999, 1) == 0.85
    assert share(12_000_000, 1) == 0.85  # 48 MB
    assert share(11_999_999, 1) is None


@pytest.mark.parametrize(
    ("promise", "kept"),
    [
        (Faster(KEY, peer="torch", least=3.5), True),
        (Faster(KEY, peer="torch", least=4.5), False),
        (Faster(KEY, peer="torch.dot", least=0.1), False),  # a peer that wasn't there proves nothing
        (Within(KEY, peer="torch", most=0.26), True),
        (Within(KEY, peer="torch", most=0.24), False),
        (Within(KEY, peer="torch.dot", most=9.0), False),
        (Takes(KEY, most_us=2.0), True),
        (Takes(KEY, most_us=1.9), False),
        (Bandwidth(KEY, least=0.019), True),  # 0.384 of 20 GB/s
        (Bandwidth(KEY, least=0.02), False),
        (Takes(KEY, timer="graph", most_us=9.0), None),
        (Takes(KEY, "ours:taylor_fo", most_us=9.0), None),
        (Takes(Key("graph", "trace", "resnet50"), most_us=9.0), None),
    ],
)
def test_verdicts(promise, kept):
    rows = [row(), row(provider="torch", median_us=8.0, ratios={}), row(provider="ours:activations", median_us=0.1)]
    verdict = promise.verdict(rows)
    assert kept is (verdict and verdict[0])
    assert judge(rows, [promise])[0][0] is bool(kept)
    assert len(judge(rows, [promise], only_measured=True)) == (kept is not None)


def test_the_fastest_of_two_kernels_keeps_a_promise():
    slow, fast = on_gpu(median_us=70.0), on_gpu(provider="ours:triton", median_us=50.0)
    good, sentence = Takes(KEY, timer="graph", most_us=60.0).verdict([slow, fast])
    assert good
    assert "ours:triton: 50 us, wanted at most 60 us" in sentence
    assert not Takes(KEY, timer="graph", most_us=60.0).verdict([slow])[0]
    assert not Takes(KEY, timer="graph", most_us=60.0).verdict([slow, fast | {"timer": "eager"}])[0]


def test_a_ratio_comes_with_its_interval():
    scored = row(provider="ours:taylor_fo", ratios={"torch": 0.996}, intervals={"torch": [0.995, 0.998]}, rounds=200)
    good, sentence = Within(KEY, "ours:taylor_fo", peer="torch", most=1.005).verdict([scored])
    assert good
    assert "1.0040 [1.0020, 1.0050] over 200 rounds, wanted at most 1.005 of the time of torch" in sentence


def test_extra_memory_is_what_is_taken_and_what_is_kept():
    plain = on_gpu(provider="torch", peak_bytes=1000, held_bytes=500)
    promise = Memory(KEY, "ours:taylor_fo", peer="torch", most_bytes=100)
    for peak, held, kept in ((1050, 550, True), (1050, 551, False), (900, 701, False), (None, 500, False)):
        scored = on_gpu(provider="ours:taylor_fo", peak_bytes=peak, held_bytes=held)
        assert promise.verdict([plain, scored])[0] is kept
    assert not promise.verdict([scored])[0]


def test_nothing_measured_keeps_nothing():
    for device in ("cpu", "cuda"):
        assert len(judge([], promises(device))) == len(promises(device))
        assert not any(kept for kept, _ in judge([], promises(device)))
        assert judge([], promises(device), only_measured=True) == []


def test_a_prediction_for_every_promised_time_on_a_gpu():
    found = {entry.key: entry for entry in entries(Options("cuda"))}
    for promise in promises("cuda"):
        key = promise.key
        if key.layout == "rows":
            continue
        provider = "ours:cuda:packed" if promise.provider == PACKED else promise.provider or "ours:cuda"
        assert all(provider in found[one].providers for one in promise.keys)
        expected = predictions.predicted_us(
            on_gpu(op=key.op, case=key.case, dtype=key.dtype, layout=key.layout, provider=provider)
        )
        assert expected is not None, key
        if isinstance(promise, Takes):
            assert expected <= promise.most_us


@pytest.mark.parametrize(("table", "passes", "share"), [("GATES", 2, 0.95), ("TOKENS", 2, 0.95), ("RELU", 3, 0.92)])
def test_predictions_are_those_of_the_byte_model(table, passes, share):
    """Bytes at 4,300 GB/s, over the share that is promised for their size."""
    for case, expected in getattr(predictions, table).items():
        size = math.prod(map(int, case.split("x"))) * 2
        floor = passes * size / 4300e3
        if table != "RELU":
            share = 0.95 if 2 * size >= 128e6 else 0.85
        least = floor + 4 if 2 * size < 48e6 and table != "RELU" else floor / share
        assert expected == pytest.approx(least, rel=0.03), case


def test_prediction_and_floor_stand_beside_a_measurement():
    measured = on_gpu(
        case="256x64x56x56",
        dtype="bfloat16",
        layout="channels_last",
        bytes=205_586_432,
        median_us=49.05,
        gb_per_s=4191.4,
    )
    key = Key("scoring", "channel_importance", "256x64x56x56", "bfloat16", "channels_last")
    _, sentence = Bandwidth(key, least=0.95).verdict([measured])
    assert sentence.endswith(" (floor of this run 51.4 us, predicted 50 us, measured 49.05 us)")
    assert predictions.beside(row()) == ""


def pair(case, cuda, triton, **changes):
    found = [on_gpu(case=case, median_us=cuda, run_id="r1", **changes)]
    return [*found, on_gpu(case=case, median_us=triton, provider="ours:triton", run_id="r1", **changes)]


def test_the_faster_kernel_is_recommended_with_the_row_that_decided():
    rows = [
        *pair("1x1", 100.0, 90.0, layout="nchw"),
        *pair("2x2", 50.0, 10.0, layout="nchw", op="channel_importance:sample"),
        *pair("3x3", 10.0, 11.0, layout="nchw"),
        *pair("1x1", 80.0, 85.0, layout="channels_last"),
        *pair("9x9", 1.0, 500.0, layout="channels_last", timer="eager"),  # not the kernel's time
        *pair("1x1", 5.0, 7.0, op="channel_sums", layout="rows"),
        on_gpu(op="weight_importance", median_us=1.0),  # nobody to race with
        *pair("1x1", 5.0, 7.0, op="training_step"),  # no op
    ]
    lines = recommendation(rows).splitlines()
    layouts = [line for line in lines if line.startswith("# nchw")]
    assert len(layouts) == 1
    assert "triton takes 0.694 of the time of native over 3 races" in layouts[0]
    assert "most in channel_importance:sample 2x2 float32: 10.0 us against 50.0 us (run r1)" in layouts[0]
    assert [line for line in lines if line.startswith("# channels_last: native takes 0.941")]
    entries_of = dict(
        ast.literal_eval(f"({line.partition('#')[0].replace(': (', ', (').strip().rstrip(',')})")
        for line in lines
        if line.startswith("(")
    )
    assert entries_of == {
        ("channel_importance", "cuda"): ("triton", "native", "reference"),
        ("channel_sums", "cuda"): ("native", "triton", "reference"),
    }
    disagreeing = [line for line in lines if "disagree" in line]
    assert len(disagreeing) == 1
    assert disagreeing[0].startswith('("channel_importance"')
    assert "no race" in recommendation([])


def test_what_is_drawn():
    rows = [
        row(timer="graph", provider="ours:cuda"),
        row(timer="eager", provider="ours:cuda"),
        row(timer="graph", provider="torch"),
        row(case="other", timer="eager"),
        row(case="bytes unknown", gb_per_s=None),
    ]
    assert [(one["case"], one["timer"], one["provider"]) for one in drawn(rows)] == [
        ("2x3x4x4", "graph", "ours:cuda"),
        ("2x3x4x4", "graph", "torch"),
        ("other", "eager", "ours:native"),
    ]
    assert style_of("ours:cuda") != style_of("ours:triton") != style_of("somebody")


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "folder" / "roofline.png"
    write_roofline([row(), row(provider="torch"), row(provider="somebody", flops=0)], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [entry.name for entry in path.parent.iterdir()] == ["roofline.png"]
    with pytest.raises(InputError, match="no row moves a known number of bytes"):
        write_roofline([row(gb_per_s=None)], path)


def test_the_step_that_promises_are_about_is_the_one_that_runs():
    cases = {entry.key.case for entry in step.entries(Options("cuda"))}
    assert cases == {step.ON_A_GPU}

"""The suites about kept channels: their shapes, what they have to move, what they refuse, what is promised of them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from taylor_cuda.bench import predicted_conv, predictions
from taylor_cuda.bench.check import Faster, FasterInSum, judge, needed
from taylor_cuda.bench.convolutions import DEPTHWISE, ConvCase, Convolution, filled, kept_channels, resnet_convolutions
from taylor_cuda.bench.dispatch import races, recommendation
from taylor_cuda.bench.promises import promises
from taylor_cuda.bench.race import PACKED, Entry, Key, Options
from taylor_cuda.bench.suites import conv, gather, modes, peers
from taylor_cuda.graph import trace
from tests.bench.test_command import row

QUICK = Options(quick=True, seconds=0.01)
SMALL = ConvCase(Convolution(20, 24, 3, 2, 7), 2, 50, torch.float32, "nchw")
ONE_BY_ONE = ConvCase(Convolution(20, 24, 1, 2, 7), 2, 50, torch.float32, "channels_last")
EACH = ConvCase(Convolution(20, 20, 3, 1, 7, 20), 2, 50, torch.bfloat16, "channels_last")


def convolutions_of(network):
    """What a forward pass of torchvision's network really computes."""
    models = pytest.importorskip("torchvision.models")
    found = Counter()

    def note(module, args, _output):
        shape = module.in_channels, module.out_channels, module.kernel_size[0], module.stride[0], args[0].shape[2]
        assert module.padding[0] == module.kernel_size[0] // 2
        found[Convolution(*shape, module.groups)] += 1

    with torch.device("meta"):
        model = getattr(models, network)(weights=None)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        model(torch.empty(2, 3, 224, 224))
    return found


@pytest.mark.parametrize(("network", "count"), [("resnet50", 53), ("resnet101", 104)])
def test_convolutions_are_torchvisions(network, count):
    found = resnet_convolutions(network)
    assert found == convolutions_of(network)
    assert (len(found), found.total()) == (23, count)
    assert set(found) == set(resnet_convolutions("resnet50"))


def test_depthwise_convolutions_are_mobilenets():
    assert set(DEPTHWISE) <= set(convolutions_of("mobilenet_v2"))
    assert all(one.kind == "depthwise" for one in DEPTHWISE)


def test_as_many_channels_are_kept_as_fall():
    for channels in (64, 96, 256, 2048):
        for percent in (25, 50, 75):
            kept = kept_channels(channels, percent, seed=channels)
            assert len(kept) in (channels * percent // 100 - 1, channels * percent // 100 - 3)
            assert len(kept) % 8
            assert (kept.diff() > 0).all()
            assert 0 <= kept[0] <= kept[-1] < channels
            assert torch.equal(kept, kept_channels(channels, percent, seed=channels))
            assert not torch.equal(kept, kept_channels(channels, percent, seed=channels + 1))
    assert len(kept_channels(128, 50, 0, exactly=True)) == 64
    for channels, percent in ((3, 25), (64, 100)):
        assert torch.equal(kept_channels(channels, percent, 0), torch.arange(channels))


def test_lists_are_filled_up_to_a_multiple():
    assert filled(torch.arange(13)).tolist() == [*range(13), -1, -1, -1]
    assert filled(torch.arange(32)).tolist() == list(range(32))
    assert filled(torch.arange(3)).tolist() == [0, 1, 2]
    case = ConvCase(Convolution(128, 256, 3, 1, 28), 4, 50, torch.float32, "nchw")
    assert case.counts(aligned=True) == (64, 128)
    assert case.counts() in [(one, two) for one in (61, 63) for two in (125, 127)]


@pytest.mark.parametrize("case", [SMALL, ONE_BY_ONE, EACH], ids=lambda case: case.convolution.kind)
def test_bytes_and_flops_are_those_of_the_tensors(case):
    given = conv.inputs_of(case, "cpu", 0)
    for operands, counts in (
        (given.whole, case.whole),
        (given.pruned, case.counts()),
        (given.aligned, case.counts(aligned=True)),
    ):
        (y,) = conv.convolved(case.convolution, operands)
        assert operands.gradient.shape == y.shape
        # A 1 x 1 convolution with a stride of 2 reads every other pixel of every other row.
        read = operands.x[:, :, ::2, ::2] if case.convolution.kind == "1x1" else operands.x
        moved = (read.numel() + y.numel() + operands.weight.numel()) * y.itemsize
        assert case.bytes(counts) == moved
        assert case.bytes(counts, backward=True) == 2 * moved
        assert case.flops(counts) == 2 * y.numel() * operands.weight[0].numel()
        assert case.flops(counts, backward=True) == 2 * case.flops(counts)
        channels_last = case.layout == "channels_last"
        assert operands.x.is_contiguous(memory_format=torch.channels_last) == channels_last
        assert operands.x.dtype == operands.weight.dtype == case.dtype


def test_rows_say_how_much_each_form_moves():
    entry = next(entry for entry in conv.entries(QUICK) if "50%" in entry.key.case)
    race = entry.build(entry.key)
    moved = {provider.name: provider.bytes for provider in race.providers}
    assert moved[conv.DENSE] == moved[conv.MASK] > race.bytes > 0
    assert moved[conv.PRUNED] is moved[conv.FILLED] is None


@pytest.fixture
def with_ours(monkeypatch):
    """Our own forms run the definition: what they ask of the op is at stake, not who answers."""
    monkeypatch.setitem(peers.CPU_NAMES, "ours:native", "reference")


@pytest.mark.usefixtures("with_ours")
@pytest.mark.parametrize("entry", conv.entries(QUICK), ids=lambda entry: f"{entry.key.op}-{entry.key.layout}")
def test_a_convolution_with_a_wrong_or_missing_channel_is_refused(entry: Entry):
    race = entry.build(entry.key)
    names = [provider.name for provider in race.providers]
    assert names[:2] == ["ours:native", "ours:native:packed"]
    assert len(names) == (3 if "100%" in entry.key.case else 6)
    for provider in race.providers:
        with provider.context():
            result = provider.run(race.inputs[0])
        assert provider.check(result, 0) <= 1, provider.name
        for number, tensor in enumerate(result):
            place = [int(index) for index in (tensor != 0).nonzero()[-1]]
            for wrong in (
                tensor.roll(1, 1),
                tensor[:, :, :1],
                tensor.clone().index_put_(_at(place), tensor.new_zeros(())),
            ):
                changed = [*result[:number], wrong, *result[number + 1 :]]
                if not (wrong.shape == tensor.shape and torch.equal(wrong, tensor)):
                    assert not provider.check(changed, 0) <= 1, provider.name


def _at(place):
    return tuple(torch.tensor(index) for index in place)


def test_what_should_be_zero_has_to_be():
    expected = torch.ones(2, 3, 4, 4).double()
    expected[:, 1] = 0
    assert conv.distance(expected.float(), expected, 1, 1e-5) == 0
    wrong = expected.float()
    wrong[1, 1, 0, 0] = 1e-30
    assert conv.distance(wrong, expected, 1, 1e-5) == float("inf")
    wrong[1, 1, 0, 0] = float("nan")
    assert not conv.distance(wrong, expected, 1, 1e-5) <= 1
    wrong[1, 1, 0, 0], wrong[0, 2, 0, 0] = 0, 1 + 2e-5
    assert conv.distance(wrong, expected, 1, 1e-5) == pytest.approx(2, rel=0.02)


@pytest.mark.usefixtures("with_ours")
@pytest.mark.parametrize("entry", gather.entries(QUICK), ids=lambda entry: f"{entry.key.op}-{entry.key.layout}")
def test_a_parameter_in_the_wrong_place_is_refused(entry):
    race = entry.build(entry.key)
    given = race.inputs[0]
    assert all(target.all() for target in given.targets)  # or a target that isn't cleared would pass
    assert race.bytes == given.kept_bytes + (
        sum(one.nbytes for one in given.dense) if entry.key.op == gather.SCATTER else given.kept_bytes
    )
    assert [provider.name for provider in race.providers] == ["ours:native", "torch"]
    for provider in race.providers:
        for target in given.targets:
            target.fill_(7.0)
        with provider.context():
            result = provider.run(given)
        assert provider.check(result, 0) == 0
        for number in range(len(result)):
            wrong = [*result[:number], result[number].flip(0), *result[number + 1 :]]
            assert provider.check(wrong, 0) == float("inf")
        assert provider.check(result[:-1], 0) == float("inf")
        assert provider.check([one.double() for one in result], 0) == float("inf")


def test_the_cast_of_a_dense_step_is_raced_on_a_gpu():
    found = [entry for entry in gather.entries(Options("cuda")) if gather.CAST in entry.providers]
    assert {entry.key.op for entry in found} == {gather.GATHER}
    (tensor, *_), cast = [torch.randn(4, 3), torch.randn(5)], [True, False]
    given = gather.Inputs([tensor, torch.randn(5)], [], torch.empty(0), [], cast, torch.bfloat16, [], [])
    (result,) = gather.cast_as_autocast(given)
    assert torch.equal(result, tensor.bfloat16())


def race_of_modes():
    (entry,) = modes.entries(QUICK)
    return entry.build(entry.key)


def test_every_mode_moves_what_is_kept_and_nothing_else():
    race = race_of_modes()
    assert [provider.name for provider in race.providers][:3] == ["torch", "ours:mask", "ours:cut"]
    for provider in race.providers:
        with provider.context():
            loss = provider.run(None)
            assert provider.check(loss, 0) <= 1, provider.name
            assert provider.check(provider.run(None), 0) > 1, provider.name  # the second step moves them on


def test_a_mode_without_its_mask_is_refused():
    provider = next(one for one in race_of_modes().providers if one.name == "ours:mask")
    assert provider.check(provider.run(None), 0) > 1


def test_no_random_numbers_in_a_step(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    modes.keep_all(model)
    assert torch.equal(model(torch.eye(4)), model[0](torch.eye(4)))
    seen = []
    monkeypatch.setattr(modes, "keep_all", seen.append)
    race_of_modes()
    assert len(seen) >= 3


def test_half_of_every_group_is_kept():
    groups = trace(modes.make("tiny"), modes.images(1, 64))
    keep = modes.half_of(groups)
    assert {name: len(kept) for name, kept in keep.items()} == {
        name: size // 2 for name, size in groups.sizes().items()
    }
    assert not all(torch.equal(kept, torch.arange(len(kept))) for kept in keep.values())


CONV = {"suite": "conv", "op": conv.FORWARD, "device": "cuda", "dtype": "bfloat16", "layout": "channels_last"}
KEYS = [Key("conv", conv.FORWARD, case, "bfloat16", "channels_last") for case in ("1x1 a", "3x3 b")]
SUM = FasterInSum(
    Key("conv", conv.FORWARD, "both"), PACKED, "graph", peer="torch", least=2.0, counts=((KEYS[0], 3), (KEYS[1], 1))
)


def rows_of(provider, *medians, timer="graph"):
    return [
        row(**CONV, case=key.case, provider=provider, median_us=median, timer=timer)
        for key, median in zip(KEYS, medians, strict=False)
    ]


@pytest.mark.parametrize(
    ("rows", "kept", "said"),
    [
        # 3 * 10 + 30 = 60 against 3 * 4 + 18 = 30
        (rows_of("torch", 10.0, 30.0) + rows_of("ours:cuda:packed", 4.0, 18.0), True, "2 x torch, 30 us against 60 us"),
        (rows_of("torch", 10.0, 30.0) + rows_of("ours:cuda:packed", 4.1, 18.0), False, "1.98 x torch"),
        # the other form, and another clock
        (rows_of("torch", 10.0, 30.0) + rows_of("ours:cuda", 1.0, 1.0), None, ""),
        (rows_of("torch", 10.0, 30.0) + rows_of("ours:cuda:packed", 4.0, 18.0, timer="eager"), None, ""),
        # one that ran in both counts for more than one that was fast in one
        (
            rows_of("torch", 10.0, 30.0) + rows_of("ours:triton:packed", 1.0) + rows_of("ours:cuda:packed", 4.0, 18.0),
            True,
            "ours:cuda:packed: 2 x torch",
        ),
        # each is the faster one in one race, and neither in both
        (
            rows_of("torch", 10.0, 30.0)
            + rows_of("ours:triton:packed", 1.0, 40.0)
            + rows_of("ours:cuda:packed", 20.0, 1.0),
            False,
            "ours:triton:packed: 1.4 x torch",
        ),
        (rows_of("torch", 10.0, 30.0) + rows_of("ours:cuda:packed", 1.0), False, "10 x torch in 1 of 2 races"),
        (rows_of("ours:cuda:packed", 1.0, 1.0), None, ""),
    ],
)
def test_sums_over_a_network(rows, kept, said):
    verdict = SUM.verdict(rows)
    assert kept is (verdict and verdict[0])
    assert verdict is None or said in verdict[1]
    assert [good for good, _ in judge(rows, [SUM])] == [bool(kept)]
    assert len(judge(rows, [SUM], only_measured=True)) == (kept is not None)
    chosen = [Entry(key, lambda key: key, (), 0) for key in (*KEYS, SUM.key)]
    assert [entry.key for entry in needed(chosen, [SUM])] == KEYS


def test_the_packed_form_keeps_no_promise_of_the_other():
    key, rows = KEYS[0], rows_of("torch", 9.0) + rows_of("ours:cuda:packed", 1.0) + rows_of("ours:cuda", 5.0)
    rows = [one | {"ratios": {"torch": 9.0 / one["median_us"]}} for one in rows]
    assert Faster(key, peer="torch", least=1.8).verdict(rows)[0]
    assert not Faster(key, peer="torch", least=1.9).verdict(rows)[0]
    assert Faster(key, PACKED, peer="torch", least=9.0).verdict(rows)[0]
    assert not Faster(key, PACKED, peer="torch", least=9.1).verdict(rows)[0]


def test_the_figures_promised_of_kept_channels():
    """The fifth issue's numbers, written out again."""
    case = "16x128x28x28 to 128 3x3 stride 1 keep exactly 50%"
    found = {
        (one.key.case, one.key.layout, one.provider, one.peer): one.least
        for one in promises("cpu")
        if one.key.suite == "conv"
    }
    for layout in ("nchw", "channels_last"):
        assert found.pop((case, layout, None, "torch:mask")) == 2.0
        assert found.pop((case, layout, PACKED, "torch:mask")) == 3.0
        assert found.pop((case, layout, PACKED, "torch-pruning")) == 1 / 1.1
    assert not found
    sums = [one for one in promises("cuda") if isinstance(one, FasterInSum)]
    assert {one.peer: one.least for one in sums} == {
        "torch": 1.7,
        "torch-pruning:aligned": 1 / 1.05,
        "torch-pruning": 1.3,
    }
    for one in sums:
        assert (one.provider, one.timer, len(one.counts)) == (PACKED, "graph", 23)
        assert sum(count for _, count in one.counts) == 53
    assert len(conv.DONE_WHEN.kept()[0]) == len(conv.DONE_WHEN.kept()[1]) == 64


@pytest.mark.parametrize(("network", "dense", "ratio"), [("resnet50", 3515.0, 2.54), ("resnet101", 5921.0, 2.68)])
def test_floors_add_up_to_those_of_the_model(network, dense, ratio):
    """Sums that were computed apart from this code."""
    table = predicted_conv.floors(network).values()
    whole, half = (sum(one[0] * one[which] for one in table) for which in (1, 2))
    assert whole == pytest.approx(dense, rel=1e-3)
    assert whole / half == pytest.approx(ratio, rel=3e-3)


def test_a_floor_by_hand():
    """256 images of 56 x 56, 64 to 256 channels by 1 x 1: by bytes; and 512 to 512 by 3 x 3 at 7 x 7: by FLOPs."""
    table = predicted_conv.floors("resnet50")
    count, dense, half = table["256x64x56x56 to 256 1x1 stride 1 keep 50%"]
    assert count == 4
    assert dense == pytest.approx((256 * 56 * 56 * (64 + 256) + 64 * 256) * 2 / 4300e3)
    assert half == pytest.approx((256 * 56 * 56 * (32 + 128) + 32 * 128) * 2 / 4300e3)
    count, dense, half = table["256x512x7x7 to 512 3x3 stride 1 keep 50%"]
    assert count == 2
    assert dense == pytest.approx(2 * 256 * 7 * 7 * 512 * 512 * 9 / 790e6)
    assert half == pytest.approx(dense / 4)


def test_what_packing_costs_by_hand():
    """512 to 2048 channels by 1 x 1, of which half are kept: 256 x 1024 weights of 2 bytes are read and written."""
    (case,) = [one for one in predicted_conv.cases_of("resnet50") if one.name.startswith("256x512x7x7 to 2048")]
    gathered = 2 * 256 * 1024 * 2 / (0.8 * 4300e3) + 2
    assert predicted_conv.packed_us(case) - predicted_conv.aligned_us(case) == pytest.approx(gathered)
    # images of 7 x 7, whole ones and packed ones, once each
    moved = 256 * 49 * (512 + 2048 + 256 + 1024) * 2 / (0.85 * 4300e3) + 4
    assert predicted_conv.unpacked_us(case) - predicted_conv.packed_us(case) == pytest.approx(moved)


def test_predictions_are_ordered_as_the_model_says():
    for case in predicted_conv.cases_of("resnet50"):
        floor = predicted_conv.conv_us(case, case.counts(aligned=True))
        aligned, own = predicted_conv.aligned_us(case), predicted_conv.packed_us(case)
        assert floor < aligned < own < predicted_conv.unpacked_us(case)
        assert aligned < predicted_conv.unaligned_us(case)
    cases = predicted_conv.cases_of("resnet50")
    dense = sum(count * predicted_conv.dense_us(case) for case, count in cases.items())
    assert dense / predicted_conv.sum_us("resnet50") > 1.7
    gathered, scattered = predicted_conv.gather_us("resnet50")
    assert predicted_conv.dense_cast_us("resnet50") == pytest.approx(36, abs=0.5)
    # 47 MB of convolutions' rows, 8 MB of the classifier, 14 MB that are kept; 14 MB and 102 MB; at 3,440 GB/s
    assert gathered - 2 == pytest.approx(69 / 3.44, rel=0.01)
    assert scattered - 2 == pytest.approx(116 / 3.44, rel=0.01)
    assert gathered + scattered < 100
    assert predictions.CUT_US < predictions.MODES_US["ours:compact"] < predictions.STEP_US / 1.6


def test_predictions_stand_beside_sums_and_steps():
    def expected(**changes):
        return predictions.predicted_us(row(**(CONV | {"provider": "ours:cuda:packed"} | changes)))

    assert expected(case=predictions.AT_HALF) == pytest.approx(predicted_conv.sum_us("resnet50"))
    assert expected(case=predictions.AT_HALF, provider="ours:cuda") == predicted_conv.sum_us("resnet50", packed=False)
    assert expected(case=predictions.AT_HALF, dtype="float32") is None
    assert expected(case=predictions.AT_HALF, device="cpu") is None
    assert expected(op=gather.GATHER, case=predictions.AT_HALF) == predicted_conv.gather_us("resnet50")[0]
    step = {"suite": "modes", "op": modes.OP, "case": modes.ON_A_GPU}
    assert expected(**step, provider="ours:compact") == predictions.MODES_US["ours:compact"]
    assert expected(**step, provider="ours:mask") is None
    assert expected(**step | {"case": "mobilenet_v2 batch 256 at 224"}, provider="ours:compact") is None
    cases = {entry.key.case for entry in gather.entries(Options("cuda"))}
    assert cases == {predictions.AT_HALF}
    assert modes.ON_A_GPU in {entry.key.case for entry in modes.entries(Options("cuda"))}


def test_a_choice_for_each_kind_of_convolution():
    rows = []
    for kind, form, native, triton in (
        ("1x1", "", 9.0, 3.0),
        ("1x1", PACKED, 5.0, 2.0),
        ("3x3", "", 1.0, 20.0),
        ("depthwise", "", 4.0, 5.0),
    ):
        case = f"256x64x56x56 to 64 {kind} stride 1 keep 50%"
        for provider, median in (("ours:cuda", native), ("ours:triton", triton)):
            rows.append(row(**CONV, case=case, provider=provider + form, median_us=median, timer="graph"))
    assert set(races(rows)) == {
        (conv.FORWARD, f"channels_last {one}") for one in ("1x1", "1x1 packed", "3x3", "depthwise")
    }
    lines = recommendation(rows).splitlines()
    said = {line.partition(":")[0]: line for line in lines}
    assert "triton takes 0.333 of the time of native" in said["# channels_last 1x1"]
    assert "triton takes 0.400 of the time of native" in said["# channels_last 1x1 packed"]
    assert "native takes 0.050 of the time of triton" in said["# channels_last 3x3"]
    assert "native takes 0.800 of the time of triton" in said["# channels_last depthwise"]
    assert lines[-1].startswith(f'("{conv.FORWARD}", "cuda"): ("native", "triton", "reference"),')
    assert "disagree" in lines[-1]

"""The CUDA kernels against float64, thread by thread on the CPU (see emulator.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.gpu import cases
from tests.gpu.cases import Ops

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "fp64"])
@pytest.mark.parametrize("layout", cases.PAIRS)
def test_channel_ops_match_float64(emulated: Ops, layout: str, dtype: str) -> None:
    assert cases.check_channel_ops(emulated, *cases.make_pair(layout, cases.DTYPES[dtype])) == []


@pytest.mark.parametrize("types", cases.WEIGHT_DTYPES)
def test_weight_importance_matches_float64(emulated: Ops, types: str) -> None:
    assert cases.check_weight_importance(emulated, *cases.make_weights(list(cases.WEIGHTS), types)) == []


def test_a_list_of_mixed_types_is_scored_in_order(emulated: Ops) -> None:
    lists = [cases.make_weights(["filters", "vector", "two layouts"], types) for types in cases.WEIGHT_DTYPES]
    weights, gradients, dims = ([item for one in lists for item in one[i]] for i in range(3))
    assert cases.check_weight_importance(emulated, weights, gradients, dims) == []


def test_more_tensors_than_a_table_holds(emulated: Ops) -> None:
    names = ["depthwise", "vector", "linear, input side", "one number", "filters"] * 129 + ["cut"] * 201
    assert cases.check_weight_importance(emulated, *cases.make_weights(names, "fp32"), reductions=("sum",)) == []


@pytest.mark.parametrize(
    "layout", ["nchw 7x7", "nhwc 7x7", "long rows", "nhwc 40x40", "[N, C]", "nhwc cropped", "5d cropped"]
)
def test_the_order_of_threads_between_barriers_changes_no_bit(
    emulated: Ops, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    activation, gradient = cases.make_pair(layout, torch.bfloat16)
    weights = cases.make_weights(list(cases.WEIGHTS), "fp32")

    def everything() -> list[Tensor]:
        reductions = (*cases.REDUCTIONS, "all")
        importance = [emulated.channel_importance(activation, gradient, reduction) for reduction in reductions]
        return [emulated.channel_sums(activation, gradient), *importance, *emulated.weight_importance(*weights, "sum")]

    forward = everything()
    monkeypatch.setenv("EMULATED_ORDER", "1")
    assert all(torch.equal(a, b) for a, b in zip(forward, everything(), strict=True))


@pytest.mark.parametrize("layout", ["nchw 8x8", "nchw 24x24", "nhwc 7x7", "nhwc cropped", "[N, C]"])
def test_whole_numbers_are_summed_exactly(emulated: Ops, layout: str) -> None:
    activation, gradient = (x.mul_(3).round_() for x in cases.make_pair(layout, torch.float16))
    terms = cases.terms_of(activation, gradient)
    assert torch.equal(emulated.channel_sums(activation, gradient).double(), terms.sum(2))
    for reduction in ("batch", "sample", "element"):
        expected, _ = cases.importance_of(terms, reduction, 0.0)
        assert torch.equal(emulated.channel_importance(activation, gradient, reduction).double(), expected)


@pytest.mark.parametrize("layout", cases.FAR_APART)
def test_offsets_past_32_bits(emulated: Ops, layout: str) -> None:
    assert cases.check_channel_ops(emulated, *cases.make_far_pair(layout), twice=False) == []


@pytest.mark.parametrize("layout", cases.PAIRS)
def test_all_reductions_at_once_are_the_same_bits(emulated: Ops, layout: str) -> None:
    """Where samples are apart anyway and no sum is split. Folded samples are added in another order, but for [N, C]."""
    activation, gradient = cases.make_pair(layout, torch.float32, seed=5)
    rows = emulated.channel_importance(activation, gradient, "all")
    single = [emulated.channel_importance(activation, gradient, reduction) for reduction in cases.REDUCTIONS]
    same = [torch.equal(row, one) for row, one in zip(rows, single, strict=True)]
    if layout in cases.CUT_ALIKE:
        assert all(same)
    elif "turned" not in layout:
        assert all(same[1:3])


@pytest.mark.parametrize("layout", ["nchw 7x7", "nchw 33x31", "nhwc 7x7", "nhwc 13 channels", "[N, C] odd"])
@pytest.mark.parametrize("reduction", [*cases.REDUCTIONS, "all"])
def test_nan_stays_in_its_channel(emulated: Ops, layout: str, reduction: str) -> None:
    activation, gradient = cases.make_pair(layout, torch.float32)
    clean = emulated.channel_importance(activation, gradient, reduction)
    gradient[-1, 2].view(-1)[-1] = float("nan")
    result = emulated.channel_importance(activation, gradient, reduction)
    assert result.isnan()[..., 2].all()
    others = torch.arange(result.shape[-1]) != 2
    assert torch.equal(result[..., others], clean[..., others])


@pytest.mark.parametrize("n", [0, 1, 31, 33, 700, 1025, 9000])
def test_keep_mask_keeps_what_a_sorted_list_does(emulated: Ops, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for kinds, keep in ((1, n // 2), (5, n // 3), (40, n - 1), (10**5, 0), (10**5, n // 7), (10**5, n + 1)):
        scores = cases.make_scores(n, kinds, seed=kinds)
        assert cases.check_keep_mask(emulated.keep_mask, scores, keep) == []
    monkeypatch.setenv("EMULATED_ORDER", "1")
    assert cases.check_keep_mask(emulated.keep_mask, scores[::2], n // 3) == []


@given(
    st.lists(st.one_of(st.sampled_from(cases.SPECIAL_SCORES), st.floats(width=32)), max_size=50), st.integers(-1, 51)
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_keep_mask_of_any_numbers(emulated: Ops, scores: list[float], keep: int) -> None:
    assert cases.check_keep_mask(emulated.keep_mask, torch.tensor(scores, dtype=torch.float32), keep) == []


BAD: dict[str, tuple[Callable[[Ops], object], str]] = {
    "shapes": (lambda ops: ops.channel_sums(torch.ones(2, 3, 4), torch.ones(2, 3, 5)), "differ in dimension 2"),
    "types": (lambda ops: ops.channel_sums(torch.ones(2, 3), torch.ones(2, 3).half()), "two tensors of one of"),
    "whole numbers": (
        lambda ops: ops.channel_sums(*[torch.ones(2, 3, dtype=torch.int32)] * 2),
        "two tensors of one of",
    ),
    "reduction": (lambda ops: ops.channel_importance(*[torch.ones(2, 3)] * 2, "mean"), "unknown reduction mean"),
    "sums": (
        lambda ops: ops.accumulate_channel_sums(*[torch.ones(2, 3)] * 2, torch.ones(2)),
        r"must be \[C\] or \[N, C\]",
    ),
    "weights": (
        lambda ops: ops.weight_importance([torch.ones(2).half()], [torch.ones(2)], [0], "sum"),
        "weight's type",
    ),
    "dims": (lambda ops: ops.weight_importance([torch.ones(2)], [torch.ones(2)], [1], "sum"), "no dimension 1"),
    "scores": (lambda ops: ops.keep_mask(torch.ones(2, 2), torch.tensor(1)), r"scores must be \[n\]"),
    "float64 scores": (lambda ops: ops.keep_mask(torch.ones(2).double(), torch.tensor(1)), "on the CPU only"),
    "keep": (lambda ops: ops.keep_mask(torch.ones(2), torch.ones(1).long()), "keep must be 0-d"),
    "lengths": (lambda ops: ops.weight_importance([torch.ones(2)], [torch.ones(2)], [], "sum"), "differ in length"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(emulated: Ops, name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(RuntimeError, match=message):
        call(emulated)


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("case", cases.UNITS)
def test_accumulate_importance_matches_float64(emulated: Ops, case: str, dtype: str) -> None:
    assert cases.check_accumulate_importance(emulated, case, cases.DTYPES[dtype]) == []


@pytest.mark.parametrize("count", [250, 251, 2000, 2001, 4500])
@pytest.mark.parametrize("rows", [1, 3])
def test_units_of_more_tensors_than_a_table_holds(emulated: Ops, rows: int, count: int) -> None:
    sums = [torch.full((rows, 1), float(i), dtype=torch.float64) for i in range(count)]
    entries, offsets = torch.tensor([0, count - 1, 5, 249, 200]), torch.tensor([0, 2, 5])
    window, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    emulated.accumulate_importance(sums, entries, offsets, window, counts, "sample")
    assert window.tolist() == [rows * (count - 1) ** 2, rows * 454**2]
    assert counts.tolist() == [1, 0]


@pytest.mark.parametrize("rows", [1, 2, 20])
@pytest.mark.parametrize("at", [0, 31, 32, 299])
def test_one_value_that_is_not_finite_skips_the_step(emulated: Ops, at: int, rows: int) -> None:
    window, counts = torch.rand(300), torch.zeros(2, dtype=torch.int64)
    sums, before = torch.ones(rows, 300), window.clone()
    sums[-1, at] = float("inf")
    entries, offsets = torch.arange(300), torch.arange(301)
    emulated.accumulate_importance([sums], entries, offsets, window, counts, "sample")
    assert torch.equal(window, before)
    assert counts.tolist() == [0, 1]
    emulated.accumulate_importance([sums], entries, offsets, window, None, "sample")
    assert window.isfinite().logical_not().nonzero().flatten().tolist() == [at]
    window.copy_(before)
    arguments = ("sum", None, None, torch.tensor(False))
    emulated.accumulate_importance([torch.ones(rows, 300)], entries, offsets, window, counts, *arguments)
    assert torch.equal(window, before)
    assert counts.tolist() == [0, 2]


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("position", [-1, 5, 2**40])
def test_a_position_that_does_not_exist_is_nan_in_its_unit(emulated: Ops, position: int, rows: int) -> None:
    sums = [torch.ones(rows, 2), torch.ones(rows, 3)]
    entries, offsets, window = torch.tensor([0, position, 4, 3]), torch.tensor([0, 1, 3, 4]), torch.zeros(3)
    emulated.accumulate_importance(sums, entries, offsets, window, None, "sum")
    assert window.isnan().tolist() == [False, True, False]


def test_the_order_of_threads_changes_no_bit_of_the_units(emulated: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    def everything() -> list[Tensor]:
        found = []
        for case in cases.UNITS:
            sums, entries, offsets, window = cases.make_units(case, torch.float32)
            counts = torch.zeros(2, dtype=torch.int64)
            emulated.accumulate_importance(sums, entries, offsets, window, counts, "sample")
            found += [window, counts]
        return found

    forward = everything()
    monkeypatch.setenv("EMULATED_ORDER", "1")
    assert all(torch.equal(a, b) for a, b in zip(forward, everything(), strict=True))


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("layout", cases.PAIRS)
def test_relu_matches_pytorch_and_float64(emulated: Ops, layout: str, dtype: str) -> None:
    assert cases.check_score_relu_backward(emulated, *cases.make_relu(layout, cases.DTYPES[dtype])) == []


@pytest.mark.parametrize("layout", ["nchw 7x7", "nchw 24x24", "nhwc 7x7", "nhwc 40x40", "[N, C]"])
def test_relu_is_the_same_in_another_order_of_threads(
    emulated: Ops, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, gradient, skip = cases.make_relu(layout, torch.bfloat16)
    runs = []
    for order in ("0", "1"):
        monkeypatch.setenv("EMULATED_ORDER", order)
        sums = torch.zeros(2, *output.shape[:2])
        runs.append([emulated.score_relu_backward(output, gradient, sums[0], skip, sums[1]), sums])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("layout", ["nchw 7x7", "nchw 24x24", "nhwc 7x7", "nhwc 13 channels", "[N, C] odd"])
def test_nan_stays_in_its_channel_of_the_relu(emulated: Ops, layout: str) -> None:
    output, gradient, skip = cases.make_relu(layout, torch.float32)
    output[-1, 2].view(-1)[-1] = gradient[0, 1].view(-1)[0] = skip[0, 3].view(-1)[0] = float("nan")
    output[0, 1].view(-1)[0] = 0
    sums = torch.zeros(2, output.shape[1])
    gx = emulated.score_relu_backward(output, gradient, sums[0], skip, sums[1])
    assert torch.equal(gx, torch.ops.aten.threshold_backward(gradient, output, 0))
    assert [row.isnan().nonzero().flatten().tolist() for row in sums] == [[1, 2], [3]]


def test_bad_arguments_of_the_relu_are_refused(emulated: Ops) -> None:
    x, sums = torch.ones(2, 3), torch.zeros(3)
    for arguments, message in (
        ((x, x.half(), sums), "two tensors of one of"),
        ((x, x, torch.zeros(2)), r"score_relu_backward: sums must be \[C\] or \[N, C\]"),
        ((x, x, sums, x), "wanted skip and skip_sums, or neither"),
        ((x, x, sums, x, torch.zeros(2, 3)), "sums and skip_sums must have one shape"),
        ((x, x, sums, x, sums), "sums and skip_sums must be two tensors"),
    ):
        with pytest.raises(RuntimeError, match=message):
            emulated.score_relu_backward(*arguments)

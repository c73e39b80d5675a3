"""``accumulate_importance`` by hand, against float64 in every case, and what it does with a step that overflowed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import taylor_cuda as tc
from taylor_cuda.ops import accumulate_importance, backends
from tests.gpu.cases import UNITS, check_accumulate_importance, make_units
from tests.ops.checks import BACKENDS, each_backend, ops_of

# Positions 0 1 2 | 3 4 of two tensors; units {0, 3}, {}, {1, 4, 4}.
SUMS = [torch.tensor([[1.0, 2.0, 3.0], [-2.0, 0.0, 1.0]]), torch.tensor([[5.0, -1.0], [1.0, 4.0]])]
ENTRIES, OFFSETS = torch.tensor([0, 3, 1, 4, 4]), torch.tensor([0, 2, 2, 5])
# Their sums, example by example: 6 0 0 and -1 0 8.
BY_HAND = {"batch": [25.0, 0.0, 64.0], "sample": [37.0, 0.0, 64.0], "abs": [7.0, 0.0, 8.0], "sum": [5.0, 0.0, 8.0]}


def fresh(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.tensor([1.0, 2.0, 3.0], dtype=dtype), torch.zeros(2, dtype=torch.int64)


@each_backend
@pytest.mark.parametrize("reduction", BY_HAND)
def test_by_hand(backend: str, reduction: str) -> None:
    window, counts = fresh()
    op, scale, expected = ops_of(backend).accumulate_importance, torch.tensor(2.0), torch.tensor(BY_HAND[reduction])
    op(SUMS, ENTRIES, OFFSETS, window, counts, reduction)
    assert torch.equal(window, torch.tensor([1.0, 2.0, 3.0]) + expected)
    divisor = 4 if reduction in ("batch", "sample") else 2
    op(SUMS, ENTRIES, OFFSETS, window, counts, reduction, scale, None, torch.tensor(True), 0.0, 8.0)
    assert torch.equal(window, 8 * expected / divisor)
    assert counts.tolist() == [2, 0]


@each_backend
def test_what_is_added_joins_the_sum_and_is_not_divided(backend: str) -> None:
    window, counts = fresh()
    op, scale, added = ops_of(backend).accumulate_importance, torch.tensor(2.0), torch.tensor([0.5, -3.0, 1.0])
    op(SUMS, ENTRIES, OFFSETS, window, counts, "batch", scale, added)
    assert window.tolist() == [1 + 9.0, 2 + 9.0, 3 + 25.0]
    op([], ENTRIES, OFFSETS, window, counts, "sum", scale, added)
    assert window.tolist() == [10.5, 8.0, 29.0]


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", UNITS)
def test_within_the_bound_of_float64(backend: str, case: str, dtype: torch.dtype) -> None:
    assert check_accumulate_importance(ops_of(backend), case, dtype) == []


@each_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30], ids=["nan", "inf", "its square overflows"])
def test_a_step_with_a_value_that_is_not_finite_is_skipped(backend: str, bad: float) -> None:
    window, counts = fresh()
    before, first = window.clone(), SUMS[0].clone()
    first[1, 0] = bad
    op = ops_of(backend).accumulate_importance
    op([first, SUMS[1]], ENTRIES, OFFSETS, window, counts, "batch", None, None, None, 0.5)
    assert torch.equal(window, before)
    assert counts.tolist() == [0, 1]
    op(SUMS, ENTRIES, OFFSETS, window, counts, "batch", None, None, torch.tensor(False), 0.5)
    assert torch.equal(window, before)
    assert counts.tolist() == [0, 2]
    first[1, 0], first[1, 2] = 0.0, bad  # a position of no unit
    op([first, SUMS[1]], ENTRIES, OFFSETS, window, counts)
    assert counts.tolist() == [1, 2]


@each_backend
def test_without_counts_nan_stays_in_its_unit(backend: str) -> None:
    window, _ = fresh()
    second = SUMS[1].clone()
    second[0, 0] = float("nan")
    ops_of(backend).accumulate_importance([SUMS[0], second], ENTRIES, OFFSETS, window, None)
    assert window.isnan().tolist() == [True, False, False]
    assert window[1:].tolist() == [2.0, 67.0]


@pytest.mark.skipif("native" not in BACKENDS, reason="the C++ parts were not built")
def test_threads_change_no_bit() -> None:
    sums, entries, offsets, window = make_units("many rows", torch.float32)
    runs, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        runs.append(window.clone())
        ops_of("native").accumulate_importance(sums, entries, offsets, runs[-1], None, "sample")
    torch.set_num_threads(threads)
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_stale_saved_tensors_are_noticed() -> None:
    for changed in range(2):
        window, counts = fresh()
        inputs = (window, counts.double())
        saved = torch.ones(inputs[changed].shape, dtype=inputs[changed].dtype, requires_grad=True) * inputs[changed]
        if changed == 0:
            accumulate_importance(SUMS, ENTRIES, OFFSETS, window, counts)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                saved.sum().backward()
        else:
            version = counts._version
            accumulate_importance(SUMS, ENTRIES, OFFSETS, window, counts)
            assert counts._version > version


def test_compiles_as_one_graph() -> None:
    def step(window: Tensor, counts: Tensor) -> Tensor:
        accumulate_importance(SUMS, ENTRIES, OFFSETS, window, counts, "sample", weight=0.5)
        return window * 2

    eager, compiled = fresh(), fresh()
    expected = step(*eager)
    result = torch.compile(step, backend="aot_eager", fullgraph=True)(*compiled)
    assert torch.equal(result, expected)
    assert torch.equal(compiled[0], eager[0])
    assert compiled[1].tolist() == [1, 0]


def test_with_a_gradient_that_is_tracked_and_in_inference_mode() -> None:
    window, counts = fresh()
    accumulate_importance([each.clone().requires_grad_() for each in SUMS], ENTRIES, OFFSETS, window, counts)
    assert not window.requires_grad
    with torch.inference_mode():
        inside, more = fresh()
        accumulate_importance(SUMS, ENTRIES, OFFSETS, inside, more)
    assert torch.equal(inside, window)


def test_the_window_says_on_which_device_the_op_runs() -> None:
    """A list that may be empty can't."""
    layout, window = (ENTRIES.to("meta"), OFFSETS.to("meta")), torch.zeros(3, device="meta")
    accumulate_importance([], *layout, window, torch.zeros(2, dtype=torch.int64, device="meta"))
    assert window.device.type == "meta"


GOOD = {"sums": SUMS, "entries": ENTRIES, "offsets": OFFSETS, "window": fresh()[0], "counts": fresh()[1]}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"reduction": "mean"}, "reduction: wanted one of 'batch'"),
        ({"window": None}, "window: wanted a tensor, got NoneType"),
        ({"window": torch.zeros(3).half()}, "window: wanted a contiguous float32 or float64 vector"),
        ({"window": torch.zeros(6)[::2]}, "window: wanted a contiguous"),
        ({"window": torch.zeros(4)}, r"offsets: wanted contiguous torch.int64 of shape \(5,\)"),
        ({"entries": ENTRIES.int()}, "entries: wanted contiguous torch.int64"),
        ({"counts": torch.zeros(2)}, "counts: wanted contiguous torch.int64"),
        ({"sums": [SUMS[0], SUMS[1].double()]}, r"sums\[1\]: wanted contiguous torch.float32"),
        ({"sums": [SUMS[0], SUMS[1][:1]]}, r"sums\[1\]: wanted contiguous torch.float32 of shape \(2, 2\)"),
        ({"sums": [SUMS[0], SUMS[1][0]]}, r"sums\[1\]: wanted contiguous torch.float32 of shape \(2, 2\)"),
        ({"sums": [SUMS[0].mT]}, r"sums\[0\]: .* strides \(1, 3\)"),
        ({"sums": [SUMS[0], None]}, r"sums\[1\]: wanted a tensor, got NoneType"),
        ({"sums": [SUMS[0].to("meta"), SUMS[1]]}, r"sums\[0\]: wanted it on cpu"),
        ({"scale": torch.ones(2)}, r"scale: wanted contiguous torch.float32 of shape \(\)"),
        ({"scale": torch.tensor(1.0).double()}, "scale: wanted contiguous torch.float32"),
        ({"added": torch.zeros(2)}, r"added: wanted contiguous torch.float32 of shape \(3,\)"),
        ({"added": torch.zeros(3), "reduction": "sample"}, "added: wanted reduction 'batch' or 'sum' with it"),
        ({"finite": torch.tensor(1)}, "finite: wanted contiguous torch.bool"),
    ],
)
@each_backend
def test_bad_input_is_named_and_changes_nothing(wrong: dict[str, object], message: str, backend: str) -> None:
    given = {**GOOD, **wrong}
    with backends.use(backend), pytest.raises(tc.InputError, match=message):
        accumulate_importance(**given)
    assert torch.equal(GOOD["window"], fresh()[0])
    assert torch.equal(GOOD["counts"], fresh()[1])


@pytest.mark.skipif("native" not in BACKENDS, reason="the C++ parts were not built")
@pytest.mark.parametrize(
    ("entries", "offsets", "message"),
    [
        ([0, 3, 1, 4, 5], [0, 2, 2, 5], "1 of entries are no positions"),
        ([0, -1, 1, 4, 4], [0, 2, 2, 5], "1 of entries are no positions"),
        ([0, 3, 1, 4, 4], [0, 2, 1, 5], "offsets must not fall"),
        ([0, 3, 1, 4, 4], [0, 2, 2, 4], "offsets must not fall, from 0 to the number of entries"),
    ],
)
def test_positions_that_do_not_exist_are_refused_on_the_cpu(
    entries: list[int], offsets: list[int], message: str
) -> None:
    window, counts = fresh()
    with pytest.raises(RuntimeError, match=message):
        ops_of("native").accumulate_importance(SUMS, torch.tensor(entries), torch.tensor(offsets), window, counts)

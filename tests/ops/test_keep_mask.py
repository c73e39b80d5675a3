"""``keep_mask`` by hand, against a sorted Python list, compiled, and with input it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import taylor_cuda as tc
from tests.gpu.cases import SPECIAL_SCORES, check_keep_mask, expected_mask, make_scores
from tests.ops.checks import BACKENDS, each_backend, ops_of

INF, NAN = math.inf, math.nan
BY_HAND = [
    ([3.0, 1.0, 2.0, 5.0], 2, [0, 3], 3.0),
    ([1.0, 2.0, 2.0, 2.0, 0.5], 2, [1, 2], 2.0),  # of equal ones the first
    ([-0.0, 0.0, -1.0, 0.0], 2, [0, 1], 0.0),  # -0.0 is no smaller than 0.0
    ([0.0, -0.0, -1.0, 1e-45], 2, [0, 3], 0.0),  # but the smallest denormal is larger
    ([1.0, NAN, INF, -INF], 1, [1], NAN),  # NaN stays first, and shows
    ([1.0, NAN, INF, -INF], 2, [1, 2], NAN),
    ([-3.0, -INF, -2.0], 2, [0, 2], -3.0),
    ([2.0, 1.0], 0, [], INF),
    ([2.0, 1.0], -5, [], INF),
    ([2.0, NAN], 0, [], NAN),
    ([2.0, 1.0], 9, [0, 1], 1.0),
    ([], 3, [], INF),
]


def same(threshold: Tensor, wanted: float) -> bool:
    return threshold.dim() == 0 and (threshold.isnan().item() if wanted != wanted else threshold.item() == wanted)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("scores", "keep", "stay", "least"), BY_HAND, ids=str)
def test_by_hand(
    backend: str, scores: list[float], keep: int, stay: list[int], least: float, dtype: torch.dtype
) -> None:
    given = torch.tensor(scores, dtype=dtype)
    mask, threshold = ops_of(backend).keep_mask(given, torch.tensor(keep))
    assert mask.dtype == torch.bool
    assert mask.shape == given.shape
    assert mask.nonzero().flatten().tolist() == stay
    assert threshold.dtype == dtype
    assert same(threshold, least)
    assert not (least == 0 and threshold.signbit().item())


NUMBERS = st.one_of(st.sampled_from(SPECIAL_SCORES), st.integers(-3, 3).map(float), st.floats(width=32))


@each_backend
@settings(max_examples=150)
@given(st.lists(NUMBERS, max_size=60), st.integers(-2, 70), st.booleans())
def test_a_sorted_list_keeps_the_same(backend: str, scores: list[float], keep: int, wide: bool) -> None:
    dtype = torch.float64 if wide else torch.float32
    assert check_keep_mask(ops_of(backend).keep_mask, torch.tensor(scores, dtype=dtype), keep) == []


@each_backend
@pytest.mark.parametrize(("n", "kinds"), [(1, 1), (1000, 3), (1025, 40), (4096, 5000), (65_536, 9)])
def test_long_lists_keep_the_same(backend: str, n: int, kinds: int) -> None:
    scores = make_scores(n, kinds, seed=n)
    for keep in (0, n // 3, n - 1) if n > 5000 else (0, 1, n // 3, n // 2, n - 1, n, n + 1):
        assert check_keep_mask(ops_of(backend).keep_mask, scores, keep) == []


@each_backend
def test_any_stride(backend: str) -> None:
    """Masks of columns and of expanded scores, without a copy by the caller."""
    table = torch.randn(50, 7)
    for scores in (table[:, 3], table.flatten()[::2], torch.ones(1).expand(20)):
        assert check_keep_mask(ops_of(backend).keep_mask, scores, 6) == []


def test_backends_are_bit_equal() -> None:
    for scores in (make_scores(3000, 400, seed=3), torch.rand(3000)):
        results = [ops_of(name).keep_mask(scores, torch.tensor(1234)) for name in BACKENDS]
        for mask, threshold in results:
            assert torch.equal(mask, results[0][0])
            assert torch.equal(threshold.view(torch.int32), results[0][1].view(torch.int32))


def test_the_public_function_takes_numbers_and_tensors() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0], requires_grad=True)
    for keep in (2, torch.tensor(2)):
        mask, threshold = tc.keep_mask(scores, keep)
        assert mask.tolist() == [True, False, True]
        assert threshold.item() == 2.0
        assert not threshold.requires_grad
    assert tc.keep_mask(scores, 10**30)[0].all()
    assert not tc.keep_mask(scores, -(10**30))[0].any()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    def soft_mask(scores: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        mask, threshold = tc.keep_mask(scores.square(), keep)
        fixed, _ = tc.keep_mask(scores, 5)
        return scores * mask * fixed, threshold + 1

    compiled = torch.compile(soft_mask, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n in (20, 31):
        arguments = torch.randn(n), torch.tensor(7)
        assert all(torch.equal(a, b) for a, b in zip(compiled(*arguments), soft_mask(*arguments), strict=True))


def test_the_fake_has_the_right_shapes_and_dtypes() -> None:
    with torch._subclasses.FakeTensorMode() as mode:
        mask, threshold = tc.keep_mask(mode.from_tensor(torch.empty(7, dtype=torch.float64)), 2)
        assert (mask.shape, mask.dtype) == ((7,), torch.bool)
        assert (threshold.shape, threshold.dtype) == ((), torch.float64)


@pytest.mark.parametrize(
    ("scores", "keep", "message"),
    [
        ([1.0], 1, "scores: wanted a tensor, got list"),
        (torch.ones(2, 2), 1, r"scores: wanted shape \[n\], got \(2, 2\)"),
        (torch.ones(2).half(), 1, r"scores: wanted float32 \(float64 on the CPU\), got torch.float16"),
        (torch.ones(2).int(), 1, "scores: wanted float32"),
        (torch.ones(2), 1.0, "keep: wanted an int or a 0-d int64 tensor, got float"),
        (torch.ones(2), True, "keep: wanted an int or a 0-d int64 tensor, got bool"),
        (torch.ones(2), torch.ones(1).long(), r"keep: wanted an int or a 0-d int64 tensor, got torch.int64 \(1,\)"),
        (torch.ones(2), torch.tensor(1.0), r"keep: wanted an int or a 0-d int64 tensor, got torch.float32 \(\)"),
        (torch.ones(2), torch.tensor(1, device="meta"), "keep: wanted it on cpu, where scores is, got it on meta"),
    ],
)
def test_bad_input_is_named(scores: object, keep: object, message: str) -> None:
    with pytest.raises(tc.InputError, match=message):
        tc.keep_mask(scores, keep)


def test_the_list_that_is_sorted_says_what_is_meant() -> None:
    """The oracle of these tests, on a case written down by hand."""
    assert expected_mask([1.0, NAN, -0.0, 0.0, 1.0], 4) == [True, True, True, False, True]

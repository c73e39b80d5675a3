"""``gather_kept`` by hand, bit by bit against its definition in every layout and type, and with input it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import taylor_cuda as tc
from taylor_cuda.ops import backends, gather_kept
from tests.ops import kept_cases as cases
from tests.ops.checks import BACKENDS, Backend, each_backend

W = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
V = torch.tensor([7.0, 8.0, 9.0])


@each_backend
def test_by_hand(backend: str) -> None:
    keep = torch.tensor([1, 0, 2, 0, -1, 0, 2, -1])
    with backends.use(backend):
        both, rows, columns, vector, whole = gather_kept(
            [W, W, W, V, W], keep, [0, 1, 3, 5, 5, 5, 6, 8, 8, 8, 8], [False] * 5, torch.float64
        )
    assert both.tolist() == [[4.0, 6.0]]
    assert rows.tolist() == [[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]
    assert columns.tolist() == [[1.0], [4.0]]
    assert vector.tolist() == [9.0, 0.0]
    assert whole.tolist() == W.tolist()


@each_backend
def test_casts_round_to_nearest_even(backend: str) -> None:
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-9), 3.4e38, 2**-140, float("inf")])
    with backends.use(backend):
        cast, plain = gather_kept([x, x], torch.tensor([], dtype=torch.int64), [0] * 5, [True, False], torch.bfloat16)
    assert cast.tolist() == [1.0, 1.015625, -1.0, float("inf"), 0.0, float("inf")]
    assert cast.dtype == torch.bfloat16
    assert plain.dtype == torch.float32
    assert torch.equal(plain, x)


@each_backend
def test_a_nan_stays_one(backend: str) -> None:
    x = torch.tensor([[float("nan"), 1.0]])
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        (result,) = Backend(backend).gather_kept([x], torch.tensor([0, 1]), [0, 0, 2], [True], dtype)
        assert result.isnan().tolist() == [[True, False]]


@each_backend
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("kinds", cases.KINDS, ids=str)
def test_every_layout(backend: str, kinds: tuple[str | None, str | None], dtype: str) -> None:
    """All weights in one list, as one network has them."""
    make = cases.maker(cases.DTYPES[dtype])
    tensors = [weight(make) for weight in cases.WEIGHTS.values()]
    keep, bounds = cases.lists_for(tensors, [kinds] * len(tensors))
    for cast, to in ((False, torch.float16), (True, torch.float16), (True, torch.bfloat16), (True, torch.float32)):
        assert cases.check_gather(Backend(backend), tensors, keep, bounds, [cast] * len(tensors), to) == []


@each_backend
def test_types_of_all_kinds_in_one_list(backend: str) -> None:
    tensors = [cases.maker(dtype)(6, 5, 3) for dtype in cases.DTYPES.values()] * 2
    keep, bounds = cases.lists_for(tensors, cases.KINDS)
    for dtype in cases.DTYPES.values():
        assert cases.check_gather(Backend(backend), tensors, keep, bounds, [True] * 4 + [False] * 4, dtype) == []


@each_backend
def test_large_layers(backend: str) -> None:
    """Large enough that each is divided: along rows, along columns, within a row."""
    make = cases.maker(torch.float32)
    tensors = [make(3, 200_000), make(90_000), make(200_000, 2), make(2, 3, 50_000), make(60, 70, 3, 3)]
    keep, bounds = cases.lists_for(tensors, [(None, "half"), ("half and none", None), *cases.KINDS[:3]])
    assert cases.check_gather(Backend(backend), tensors, keep, bounds, [True] * 5, torch.bfloat16) == []
    assert cases.check_gather(Backend(backend), tensors, keep, bounds, [False] * 5, torch.bfloat16) == []


def test_lists_that_are_long_or_empty() -> None:
    none = torch.tensor([], dtype=torch.int64)
    assert gather_kept([], none, [0], [], torch.float32) == []
    vectors = [torch.full((2,), float(i)) for i in range(1000)]
    results = gather_kept(
        vectors,
        torch.ones(1000).long(),
        [n for i in range(1000) for n in (i, i + 1)] + [1000],
        [False] * 1000,
        torch.float32,
    )
    assert [result.tolist() for result in results] == [[float(i)] for i in range(1000)]


def test_no_gradient() -> None:
    x = W.clone().requires_grad_()
    (result,) = gather_kept([x], torch.tensor([1]), [0, 1, 1], [False], torch.float32)
    assert not result.requires_grad


NONE = torch.tensor([], dtype=torch.int64)
ONE = torch.tensor([0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((W, ONE, [0, 1, 1], [False], torch.float32), "tensors: wanted a list, got Tensor"),
        (([W], [0], [0, 1, 1], [False], torch.float32), "keep: wanted a tensor, got list"),
        (
            ([W], ONE.int(), [0, 1, 1], [False], torch.float32),
            "keep: wanted a contiguous int64 vector, got torch.int32",
        ),
        (([W], torch.tensor(0), [0, 1, 1], [False], torch.float32), "keep: wanted a contiguous int64 vector"),
        (([W], torch.zeros(4).long()[::2], [0, 1, 2], [False], torch.float32), "keep: wanted a contiguous int64"),
        (([W], ONE, [0, 1], [False], torch.float32), "bounds: wanted 3 ascending numbers from 0"),
        (([W], ONE, [0, 1, 0], [False], torch.float32), "bounds: wanted 3 ascending numbers from 0"),
        (([W], ONE, [1, 1, 1], [False], torch.float32), "bounds: wanted 3 ascending numbers from 0"),
        (([W], ONE, [0, 1, 2], [False], torch.float32), "bounds: wanted them to end at 1"),
        (([], ONE, [0], [], torch.float32), "bounds: wanted them to end at 1"),
        (([W], ONE, [0, 1, 1], [], torch.float32), "cast: wanted 1 bools"),
        (([W], ONE, [0, 1, 1], [False], torch.int32), "dtype: wanted float32, .* got torch.int32"),
        (([V], ONE, [0, 0, 1], [False], torch.float32), r"tensors\[0\]: wanted the dimensions that bounds has lists"),
        (([torch.tensor(1.0)], ONE, [0, 1, 1], [False], torch.float32), r"tensors\[0\]: wanted the dimensions"),
        (
            ([V, W.int()], NONE, [0] * 5, [False] * 2, torch.float32),
            r"tensors\[1\]: wanted float32, .* got torch.int32",
        ),
        (([None], ONE, [0, 1, 1], [False], torch.float32), r"tensors\[0\]: wanted a tensor, got NoneType"),
        (([W.to_sparse()], ONE, [0, 1, 1], [False], torch.float32), r"tensors\[0\]: wanted a dense tensor"),
        (([W, W.to("meta")], NONE, [0] * 5, [False] * 2, torch.float32), r"tensors\[1\]: wanted it on cpu"),
        (([W], torch.tensor([0, 2]), [0, 2, 2], [False], torch.float32), r"keep: wanted entries below 2 .*, got 2"),
        (
            ([V, W], torch.tensor([0, 7]), [0, 0, 0, 1, 2], [False] * 2, torch.float32),
            r"keep: wanted entries below 3 for dimension 1 of tensors\[1\], got 7",
        ),
        (([W[:, :0]], ONE, [0, 0, 1], [False], torch.float32), "keep: wanted entries below 0"),
        (([W], torch.tensor([2**40]), [0, 1, 1], [False], torch.float32), "keep: wanted entries below 2"),
    ],
)
@each_backend
def test_bad_input_is_named(arguments: Any, message: str, backend: str) -> None:
    with backends.use(backend), pytest.raises(tc.InputError, match=message):
        gather_kept(*arguments)


@pytest.mark.skipif("native" not in BACKENDS, reason="the C++ parts were not built")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([W], ONE.int(), [0, 1, 1], [False], torch.float32), "keep must be a contiguous vector of int64"),
        (([W], ONE, [0, 1], [False], torch.float32), "bounds must be 3 ascending numbers"),
        (([W], ONE, [0, 1, 1], [], torch.float32), "tensors and cast differ in length"),
        (([W], ONE, [0, 1, 1], [True], torch.int32), "wanted float32, float16, bfloat16 or float64"),
        (([V], ONE, [0, 0, 1], [False], torch.float32), "a tensor lacks a dimension"),
        (([W.int()], ONE, [0, 1, 1], [False], torch.float32), "wanted float32, float16, bfloat16 or float64"),
        (
            ([W], torch.tensor([2]), [0, 1, 1], [False], torch.float32),
            "keep has an entry 2 for a dimension of length 2",
        ),
    ],
)
def test_the_native_op_refuses_it_too(arguments: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.taylor_cuda_native.gather_kept(*arguments)


def test_fakes_lie_as_results_do() -> None:
    tensors: list[Tensor] = [weight(cases.maker(torch.float32)) for weight in cases.WEIGHTS.values()]
    keep, bounds = cases.lists_for(tensors, [("half", "half and none")] * len(tensors))
    cast = [i % 2 == 0 for i in range(len(tensors))]
    real = gather_kept(tensors, keep, bounds, cast, torch.bfloat16)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = gather_kept([mode.from_tensor(x) for x in tensors], mode.from_tensor(keep), bounds, cast, torch.bfloat16)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)

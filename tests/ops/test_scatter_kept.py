"""``scatter_kept`` by hand, bit by bit against its definition in every layout and type, and with input it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import taylor_cuda as tc
from taylor_cuda.ops import backends, gather_kept, reference, scatter_kept
from tests.ops import kept_cases as cases
from tests.ops.checks import BACKENDS, Backend, each_backend


@each_backend
@pytest.mark.parametrize("clear", [True, False])
def test_by_hand(backend: str, clear: bool) -> None:
    both, rows, columns, vector = torch.ones(2, 3), torch.ones(2, 2), torch.ones(2, 3), torch.ones(4)
    values = [torch.tensor([[5.0, 6.0]]), torch.tensor([[2.0, 3.0], [9.0, 9.0]]), torch.full((2, 1), 7.0)]
    values.append(torch.tensor([3.0, 4.0], dtype=torch.float64))
    keep = torch.tensor([1, 0, 2, 1, -1, 1, 0, 3])
    with backends.use(backend):
        scatter_kept(values, [both, rows, columns, vector], keep, [0, 1, 3, 5, 5, 5, 6, 8, 8], clear)
    o = 0.0 if clear else 1.0
    assert both.tolist() == [[o, o, o], [5.0, o, 6.0]]
    assert rows.tolist() == [[o, o], [2.0, 3.0]]
    assert columns.tolist() == [[o, 7.0, o], [o, 7.0, o]]
    assert vector.tolist() == [3.0, o, o, 4.0]


@each_backend
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("kinds", cases.KINDS, ids=str)
def test_every_layout(backend: str, kinds: tuple[str | None, str | None], dtype: str) -> None:
    """Values as ``gather_kept`` leaves them, and in every other order of dimensions."""
    targets = [weight(cases.maker(torch.float32, seed=1)) for weight in cases.WEIGHTS.values()]
    sources = [weight(cases.maker(cases.DTYPES[dtype])) for weight in cases.WEIGHTS.values()]
    keep, bounds = cases.lists_for(targets, [kinds] * len(targets))
    values = reference.gather_kept(sources, keep, bounds, [False] * len(targets), torch.float32)
    assert cases.check_scatter(Backend(backend), values, targets, keep, bounds) == []
    turned = [value.clone(memory_format=torch.contiguous_format) for value in values]
    turned = [value.t().contiguous().t() if value.dim() == 2 else value for value in turned]
    assert cases.check_scatter(Backend(backend), turned, targets, keep, bounds) == []


@each_backend
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_targets_of_every_type(backend: str, dtype: str) -> None:
    names = ["3x3", "3x3, nhwc", "linear", "vector", "cut"]
    targets = [cases.WEIGHTS[name](cases.maker(cases.DTYPES[dtype], seed=1)) for name in names]
    for other in cases.DTYPES.values():
        sources = [cases.WEIGHTS[name](cases.maker(other)) for name in names]
        keep, bounds = cases.lists_for(targets, cases.KINDS[: len(names)])
        values = reference.gather_kept(sources, keep, bounds, [False] * len(names), torch.float32)
        assert cases.check_scatter(Backend(backend), values, targets, keep, bounds) == []


@each_backend
def test_large_layers(backend: str) -> None:
    """Large enough that each is divided: along rows, along columns, within a row."""
    make = cases.maker(torch.float32)
    targets = [make(3, 200_000), make(90_000), make(200_000, 2), make(2, 3, 50_000), make(60, 70, 3, 3)]
    keep, bounds = cases.lists_for(targets, [(None, "half"), ("half and none", None), *cases.KINDS[:3]])
    values = reference.gather_kept(targets, keep, bounds, [True] * 5, torch.bfloat16)
    assert cases.check_scatter(Backend(backend), values, targets, keep, bounds) == []


@each_backend
def test_gathering_takes_what_scattering_left(backend: str) -> None:
    targets = [weight(cases.maker(torch.float32, seed=1)) for weight in cases.WEIGHTS.values()]
    keep, bounds = cases.lists_for(targets, [("half", "half")] * len(targets))
    values = gather_kept([x * 2 for x in targets], keep, bounds, [False] * len(targets), torch.float32)
    with backends.use(backend):
        scatter_kept(values, targets, keep, bounds, False)
        again = gather_kept(targets, keep, bounds, [False] * len(targets), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(values, again, strict=True))


def test_nothing_to_do() -> None:
    scatter_kept([], [], torch.tensor([], dtype=torch.int64), [0], True)


def test_autograd_hears_of_it() -> None:
    target, keep = torch.ones(3, requires_grad=False), torch.tensor([1])
    x = torch.ones(3, requires_grad=True)
    loss = (x * target).sum()
    scatter_kept([torch.zeros(1)], [target], keep, [0, 1, 1], False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


W, V, ONE = torch.ones(2, 3), torch.ones(3), torch.tensor([0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([W[:1]], W, ONE, [0, 1, 1], True), "targets: wanted a list, got Tensor"),
        ((W[:1], [W], ONE, [0, 1, 1], True), "values: wanted 1 tensors"),
        (([], [W], ONE, [0, 1, 1], True), "values: wanted 1 tensors"),
        (([W], [], ONE[:0], [0], True), "values: wanted 0 tensors"),
        (([W], [W], ONE, [0, 1, 1], True), r"values\[0\]: wanted shape \(1, 3\), the kept part of its target, got \(2"),
        (([W[:, :1]], [W], torch.tensor([0, 1]), [0, 0, 2], True), r"values\[0\]: wanted shape \(2, 2\)"),
        (([W[:1].int()], [W], ONE, [0, 1, 1], True), r"values\[0\]: wanted float32, .* got torch.int32"),
        (([W[:1]], [W.int()], ONE, [0, 1, 1], True), r"targets\[0\]: wanted float32, .* got torch.int32"),
        (([None], [W], ONE, [0, 1, 1], True), r"values\[0\]: wanted a tensor, got NoneType"),
        (([W[:1]], [None], ONE, [0, 1, 1], True), r"targets\[0\]: wanted a tensor, got NoneType"),
        (([V[:1]], [V], ONE, [0, 0, 1], True), r"targets\[0\]: wanted the dimensions that bounds has lists for"),
        (
            ([W[:1]], [V[:1].expand(2, 3)], ONE, [0, 1, 1], True),
            r"targets\[0\]: wanted a tensor whose elements share no",
        ),
        (([W[:1]], [W], ONE + 2, [0, 1, 1], True), "keep: wanted entries below 2 for dimension 0 of .*, got 2"),
        (([W[:, :1]], [W], ONE + 3, [0, 0, 1], False), "keep: wanted entries below 3 for dimension 1 of .*, got 3"),
        (([W[:1].to("meta")], [W], ONE, [0, 1, 1], True), r"values\[0\]: wanted it on cpu"),
        (([W[:1]], [W.to("meta")], ONE, [0, 1, 1], True), r"targets\[0\]: wanted it on cpu"),
    ],
)
@each_backend
def test_bad_input_is_named(arguments: Any, message: str, backend: str) -> None:
    with backends.use(backend), pytest.raises(tc.InputError, match=message):
        scatter_kept(*arguments)


@pytest.mark.skipif("native" not in BACKENDS, reason="the C++ parts were not built")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([W[:1]], [W], ONE.int(), [0, 1, 1], True), "keep must be a contiguous vector of int64"),
        (([W[:1]], [W], ONE, [0, 1], True), "bounds must be 3 ascending numbers"),
        (([], [W], ONE, [0, 1, 1], True), "values and targets differ in length"),
        (([W], [W], ONE, [0, 1, 1], True), "a value has not the shape of the kept part"),
        (([W[:1]], [W.int()], ONE, [0, 1, 1], True), "wanted float32, float16, bfloat16 or float64"),
        (([W[:1].int()], [W], ONE, [0, 1, 1], True), "wanted float32, float16, bfloat16 or float64"),
        (([W[:1]], [V[:1].expand(2, 3)], ONE, [0, 1, 1], True), "elements that share memory"),
        (([W[:1]], [W], ONE + 2, [0, 1, 1], False), "keep has an entry 2 for a dimension of length 2"),
    ],
)
def test_the_native_op_refuses_it_too(arguments: Any, message: str) -> None:
    before = W.clone()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.taylor_cuda_native.scatter_kept(*arguments)
    assert torch.equal(W, before)

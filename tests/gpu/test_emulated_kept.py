"""The CUDA kernels on kept channels bit by bit against their definitions, thread by thread on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from taylor_cuda.ops import reference
from tests.gpu.cases import Ops
from tests.ops import kept_cases as cases

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("layout", cases.ACTIVATIONS)
def test_packing_is_exact(emulated: Ops, layout: str, dtype: str) -> None:
    x = cases.ACTIVATIONS[layout](cases.maker(cases.DTYPES[dtype]))
    for kind in cases.LISTS:
        assert cases.check_pack(emulated, x, cases.kept_of(x.shape[1], kind)) == [], kind
    assert cases.check_pack(emulated, x, []) == []


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("kinds", cases.KINDS, ids=str)
def test_gathering_is_exact(emulated: Ops, kinds: tuple[str | None, str | None], dtype: str) -> None:
    make = cases.maker(cases.DTYPES[dtype])
    tensors = [weight(make) for weight in cases.WEIGHTS.values()]
    keep, bounds = cases.lists_for(tensors, [kinds] * len(tensors))
    for cast, to in ((False, torch.float16), (True, torch.bfloat16), (True, torch.float32), (True, torch.float64)):
        assert cases.check_gather(emulated, tensors, keep, bounds, [cast] * len(tensors), to) == []


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("kinds", cases.KINDS, ids=str)
def test_scattering_is_exact(emulated: Ops, kinds: tuple[str | None, str | None], dtype: str) -> None:
    targets = [weight(cases.maker(torch.float32, seed=1)) for weight in cases.WEIGHTS.values()]
    sources = [weight(cases.maker(cases.DTYPES[dtype])) for weight in cases.WEIGHTS.values()]
    keep, bounds = cases.lists_for(targets, [kinds] * len(targets))
    values = reference.gather_kept(sources, keep, bounds, [False] * len(targets), torch.float32)
    assert cases.check_scatter(emulated, values, targets, keep, bounds) == []
    turned = [value.t().contiguous().t() if value.dim() == 2 else value.contiguous() for value in values]
    assert cases.check_scatter(emulated, turned, targets, keep, bounds) == []


def test_types_of_all_kinds_in_one_list(emulated: Ops) -> None:
    """Each pair of types, with runs that are copied 16 bytes at a time and element by element."""
    tensors = [cases.maker(dtype)(6, 5, last) for dtype in cases.DTYPES.values() for last in (3, 16)]
    keep, bounds = cases.lists_for(tensors, cases.KINDS)
    for dtype in cases.DTYPES.values():
        assert cases.check_gather(emulated, tensors, keep, bounds, [True] * 8, dtype) == []
        values = reference.gather_kept(tensors, keep, bounds, [True] * 8, dtype)
        assert cases.check_scatter(emulated, values, tensors, keep, bounds) == []


def test_layers_of_many_tiles(emulated: Ops) -> None:
    make = cases.maker(torch.float32)
    tensors = [make(3, 20_000), make(9000), make(9000, 2), make(2, 3, 5000), make(60, 70, 3, 3), make(700, 300)]
    tensors.append(make(40_000, 4)[:, 1:])
    keep, bounds = cases.lists_for(tensors, [(None, "half"), ("half and none", None), *cases.KINDS[:4], (None, None)])
    for cast in (True, False):
        assert cases.check_gather(emulated, tensors, keep, bounds, [cast] * 7, torch.bfloat16) == []
        values = reference.gather_kept(tensors, keep, bounds, [cast] * 7, torch.bfloat16)
        assert cases.check_scatter(emulated, values, tensors, keep, bounds) == []


@pytest.mark.parametrize("count", [1, 400, 401, 900])
def test_more_tensors_than_a_table_holds(emulated: Ops, count: int) -> None:
    tensors = [torch.full((2, 1 + i % 3), float(i)) for i in range(count)]
    keep, bounds = cases.lists_for(
        tensors, [("first and last", None), ("half", "half")] * (count // 2) + [(None, None)] * (count % 2)
    )
    assert cases.check_gather(emulated, tensors, keep, bounds, [False] * count, torch.float16) == []
    values = reference.gather_kept(tensors, keep, bounds, [True] * count, torch.float16)
    assert cases.check_scatter(emulated, values, tensors, keep, bounds) == []


def test_no_tensors(emulated: Ops) -> None:
    none = torch.tensor([], dtype=torch.int64)
    assert emulated.gather_kept([], none, [0], [], torch.float32) == []
    emulated.scatter_kept([], [], none, [0], True)


def test_the_order_of_threads_between_barriers_changes_no_bit(emulated: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    x = cases.ACTIVATIONS["nhwc 28x28"](cases.maker(torch.float32))
    weights = [weight(cases.maker(torch.float32)) for weight in cases.WEIGHTS.values()]
    keep, bounds = cases.lists_for(weights, [("half", "half and none")] * len(weights))
    kept = torch.tensor(cases.kept_of(48, "half and none"))

    def everything() -> list[Tensor]:
        packed = emulated.pack_channels(x, kept)
        values = emulated.gather_kept(weights, keep, bounds, [True] * len(weights), torch.bfloat16)
        targets = [cases.like(weight) for weight in weights]
        emulated.scatter_kept(values, targets, keep, bounds, True)
        return [packed, emulated.unpack_channels(packed, kept, 48), *values, *targets]

    forward = everything()
    monkeypatch.setenv("EMULATED_ORDER", "1")
    assert all(torch.equal(a, b) for a, b in zip(forward, everything(), strict=True))


def test_numbers_keep_their_bits(emulated: Ops) -> None:
    patterns = torch.tensor([0x7FC00001, 0x7F800001, -1, -2147483648], dtype=torch.int32).view(torch.float32)
    x = patterns.view(1, 4, 1).expand(1, 4, 4).contiguous()
    keep = torch.tensor([0, 1, 2, 3])
    assert torch.equal(emulated.pack_channels(x, keep).view(torch.int32), x.view(torch.int32))
    assert torch.equal(emulated.unpack_channels(x, keep, 4).view(torch.int32), x.view(torch.int32))


def test_an_entry_beyond_the_channels_is_left_out_of_what_is_cleared(emulated: Ops) -> None:
    y = emulated.unpack_channels(torch.ones(1, 2, 3), torch.tensor([1, 2**40]), 3)
    assert y[0, :, 0].tolist() == [0.0, 1.0, 0.0]
    target = torch.full((3, 2), 5.0)
    emulated.scatter_kept([torch.ones(2, 2)], [target], torch.tensor([0, 3]), [0, 2, 2], True)
    assert target.tolist() == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]


X, W, V, ONE = torch.ones(1, 3, 2), torch.ones(2, 3), torch.ones(3), torch.tensor([0])


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("pack_channels", (X, ONE.int()), "keep must be a contiguous vector of int64"),
        ("pack_channels", (X.int(), ONE), "wanted float32, float16, bfloat16 or float64"),
        ("unpack_channels", (X, ONE, 3), "as many channels as keep has entries"),
        ("gather_kept", ([W], ONE, [0, 1], [False], torch.float32), "bounds must be 3 ascending numbers"),
        ("gather_kept", ([W], ONE, [0, 1, 1], [], torch.float32), "tensors and cast differ in length"),
        ("gather_kept", ([W], ONE, [0, 1, 1], [True], torch.int32), "wanted float32, float16, bfloat16 or float64"),
        ("gather_kept", ([V], ONE, [0, 0, 1], [False], torch.float32), "a tensor lacks a dimension"),
        ("gather_kept", ([W.int()], ONE, [0, 1, 1], [False], torch.float32), "wanted float32, float16, bfloat16"),
        ("scatter_kept", ([], [W], ONE, [0, 1, 1], True), "values and targets differ in length"),
        ("scatter_kept", ([W[:1]], [W], ONE, [0, 1], True), "bounds must be 3 ascending numbers"),
        ("scatter_kept", ([W], [W], ONE, [0, 1, 1], True), "a value has not the shape of the kept part"),
        ("scatter_kept", ([W[:1]], [V[:1].expand(2, 3)], ONE, [0, 1, 1], True), "elements that share memory"),
        ("scatter_kept", ([W[:1].int()], [W], ONE, [0, 1, 1], True), "wanted float32, float16, bfloat16 or float64"),
        ("scatter_kept", ([W[:1]], [W], ONE.int(), [0, 1, 1], True), "keep must be a contiguous vector of int64"),
    ],
)
def test_bad_arguments_are_refused(emulated: Ops, op: str, arguments: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        getattr(emulated, op)(*arguments)

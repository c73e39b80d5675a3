"""``weight_importance`` by hand, against float64 for every shape and pair of dtypes, and with input it refuses."""

from __future__ import annotations

import pytest
import torch

import taylor_cuda as tc
from taylor_cuda.ops import backends
from tests.gpu.cases import WEIGHT_DTYPES, WEIGHTS, check_weight_importance, make_weights
from tests.ops.checks import each_backend, ops_of

WEIGHT = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
GRADIENT = torch.tensor([[2.0, 1.0], [-1.0, 4.0]])  # products [[2, -2], [-3, 2]]
BY_HAND = {
    ("sum", 0): [0.0, -1.0],
    ("sum", 1): [-1.0, 0.0],
    ("square", 0): [8.0, 13.0],
    ("square", 1): [13.0, 8.0],
    ("abs", 0): [4.0, 5.0],
    ("abs", 1): [5.0, 4.0],
}


@each_backend
@pytest.mark.parametrize(("reduction", "dim"), BY_HAND)
def test_by_hand(backend: str, reduction: str, dim: int) -> None:
    vector = {"sum": [2.0, -2.0], "square": [4.0, 4.0], "abs": [2.0, 2.0]}[reduction]
    for dims in ([dim, 0], [dim - 2, -1]):
        both = ops_of(backend).weight_importance([WEIGHT, WEIGHT[0]], [GRADIENT, GRADIENT[0]], dims, reduction)
        assert torch.equal(both[0], torch.tensor(BY_HAND[reduction, dim]))
        assert torch.equal(both[1], torch.tensor(vector))


@each_backend
@pytest.mark.parametrize("types", WEIGHT_DTYPES)
def test_within_the_bound_of_float64(backend: str, types: str) -> None:
    """All shapes in one list, as one network has them."""
    problems = check_weight_importance(ops_of(backend), *make_weights(list(WEIGHTS), types, seed=2))
    assert not problems, "\n".join(problems)


def test_lists_that_are_long_or_empty() -> None:
    assert tc.weight_importance([], [], []) == []
    vectors = [torch.full((2,), float(i)) for i in range(1000)]
    results = tc.weight_importance(vectors, [torch.ones(2)] * 1000, [0] * 1000)
    assert [result[0].item() for result in results] == list(range(1000))


def test_threads_change_no_bit() -> None:
    weights, gradients, dims = make_weights(
        ["broad rows, input side", "tall, input side", "long filters", "7x7"], "fp32"
    )
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(tc.weight_importance(weights, gradients, dims))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_input_side_is_the_gradient_of_a_gate() -> None:
    """Σ W[:, c]·dW[:, c] = dE/dz_c for a gate z on the input of a layer (DESIGN 3.3)."""
    x, weight = (
        torch.randn(4, 5, 6, 6, dtype=torch.float64),
        torch.randn(7, 5, 3, 3, dtype=torch.float64, requires_grad=True),
    )
    gate = torch.ones(5, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.conv2d(x * gate.view(1, -1, 1, 1), weight).sin().sum().backward()
    (result,) = tc.weight_importance([weight], [weight.grad], [1])
    torch.testing.assert_close(result, gate.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("weights", "gradients", "dims", "message"),
    [
        ([WEIGHT], [GRADIENT, GRADIENT], [0], "one length"),
        ([WEIGHT], [GRADIENT[:1]], [0], r"gradients\[0\]: wanted the shape of weights\[0\]"),
        ([WEIGHT], [GRADIENT], [2], r"dims\[0\]"),
        ([WEIGHT.half()], [GRADIENT], [0], r"gradients\[0\]"),
        ([WEIGHT.double()], [GRADIENT], [0], r"gradients\[0\]"),
        ([torch.tensor(1.0)], [torch.tensor(1.0)], [0], r"dims\[0\]: wanted a dimension of shape \(\)"),
        (WEIGHT, [GRADIENT], [0], "weights: wanted a list, got Tensor"),
        ([WEIGHT], [None], [0], r"gradients\[0\]: wanted a tensor, got NoneType"),
        ([None], [GRADIENT], [0], r"weights\[0\]: wanted a tensor, got NoneType"),
        ([WEIGHT, WEIGHT], [GRADIENT, GRADIENT], [0, -3], r"dims\[1\]: wanted a dimension of shape"),
        (
            [WEIGHT, WEIGHT.int()],
            [GRADIENT, GRADIENT.int()],
            [0, 0],
            r"weights\[1\]: wanted float32, .* got torch.int32",
        ),
        ([WEIGHT, WEIGHT.to_sparse()], [GRADIENT, GRADIENT], [0, 0], r"weights\[1\]: wanted a dense tensor"),
        ([WEIGHT], [GRADIENT.to("meta")], [0], r"gradients\[0\]: wanted it on cpu"),
        ([WEIGHT, WEIGHT.to("meta")], [GRADIENT, GRADIENT.to("meta")], [0, 0], r"weights\[1\]: wanted it on cpu"),
    ],
)
@each_backend
def test_bad_input_is_named(weights: object, gradients: object, dims: list[int], message: str, backend: str) -> None:
    with backends.use(backend), pytest.raises(tc.InputError, match=message):
        tc.weight_importance(weights, gradients, dims)


def test_an_unknown_reduction_is_named() -> None:
    with pytest.raises(tc.InputError, match="reduction: wanted one of 'sum'"):
        tc.weight_importance([WEIGHT], [GRADIENT], [0], "mean")

"""``channel_importance`` by hand, against float64 in every layout and dtype, and with input it refuses."""

from __future__ import annotations

import pytest
import torch

import taylor_cuda as tc
from taylor_cuda.ops.reference import CHANNEL_REDUCTIONS
from tests.gpu.cases import DTYPES, PAIRS, check_channel_ops, make_pair
from tests.ops.checks import each_backend, ops_of

# t = [[1·1 + 2·(-1), 3·2 + 0·5], [0·1 + 1·4, (-1)·2 + 2·2]] = [[-1, 6], [4, 2]]
ACTIVATION = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[0.0, 1.0], [-1.0, 2.0]]])
GRADIENT = torch.tensor([[[1.0, -1.0], [2.0, 5.0]], [[1.0, 4.0], [2.0, 2.0]]])
BY_HAND = {
    "batch": [9.0, 64.0],  # (-1 + 4)², (6 + 2)²
    "sample": [17.0, 40.0],  # 1 + 16, 36 + 4
    "abs": [1.25, 2.0],  # (1/2 + 4/2) / 2, (6/2 + 2/2) / 2
    "element": [21.0, 56.0],  # 1 + 4 + 0 + 16, 36 + 0 + 4 + 16
}


@each_backend
@pytest.mark.parametrize("reduction", BY_HAND)
def test_by_hand(backend: str, reduction: str) -> None:
    result = ops_of(backend).channel_importance(ACTIVATION, GRADIENT, reduction)
    assert torch.equal(result, torch.tensor(BY_HAND[reduction]))


@each_backend
def test_all_of_them_by_hand(backend: str) -> None:
    """The rows are in the order in which the reductions are named; [N, C] has one position."""
    rows = ops_of(backend).channel_importance(ACTIVATION, GRADIENT, "all")
    assert torch.equal(rows, torch.tensor([BY_HAND[reduction] for reduction in CHANNEL_REDUCTIONS]))
    rows = ops_of(backend).channel_importance(ACTIVATION[:, :, 0], GRADIENT[:, :, 0], "all")  # [[1, 6], [0, -2]]
    assert torch.equal(rows, torch.tensor([[1.0, 16.0], [1.0, 40.0], [0.5, 4.0], [1.0, 40.0]]))


@each_backend
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("layout", PAIRS)
def test_all_of_them_at_once_are_the_same_numbers(backend: str, layout: str, dtype: str) -> None:
    """Bit by bit where the sums are cut alike. Where channels lie side by side, "batch" and "element" alone don't keep
    samples apart, so they add up in another order: the last bit of float32 may differ.
    """
    activation, gradient = make_pair(layout, DTYPES[dtype], seed=4)
    rows = ops_of(backend).channel_importance(activation, gradient, "all")
    single = [ops_of(backend).channel_importance(activation, gradient, each) for each in CHANNEL_REDUCTIONS]
    assert rows.shape == (4, activation.shape[1])
    assert torch.equal(rows[1:3], torch.stack(single[1:3]))
    if "nhwc" not in layout and "turned" not in layout and "[N, L, C]" not in layout:
        assert torch.equal(rows, torch.stack(single))
    for row, one in zip(rows, single, strict=True):
        torch.testing.assert_close(row, one, rtol=2 * torch.finfo(row.dtype).eps, atol=0)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", PAIRS)
def test_within_the_bound_of_float64(backend: str, layout: str, dtype: str) -> None:
    problems = check_channel_ops(ops_of(backend), *make_pair(layout, DTYPES[dtype], seed=1))
    assert not problems, "\n".join(problems)


@each_backend
@pytest.mark.parametrize("layout", ["nchw 14x14", "nhwc 24 channels", "every second", "[N, C]", "expanded pixels"])
def test_large_tensors_are_split_without_losing_any(backend: str, layout: str) -> None:
    """Whole numbers add up exactly, so every backend gives the same bits whatever the order of summation."""
    activation, gradient = (tensor.mul(2).round().clamp(-3, 3) for tensor in make_pair(layout, torch.float32))
    activation, gradient = (tensor.repeat(40, 3, *[2] * (tensor.dim() - 2)) for tensor in (activation, gradient))
    for memory in (activation, activation.transpose(0, 1).contiguous().transpose(0, 1)):
        sums = ops_of(backend).channel_sums(memory, gradient)
        expected = (
            (activation.double() * gradient.double()).flatten(2).sum(2)
            if activation.dim() > 2
            else activation * gradient
        )
        assert torch.equal(sums.double(), expected.double())


@each_backend
def test_threads_change_no_bit(backend: str) -> None:
    activation, gradient = torch.randn(16, 96, 28, 28), torch.randn(16, 96, 28, 28)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops_of(backend).channel_importance(activation, gradient, "batch"))
    if backend == "native":
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-3)


@each_backend
@pytest.mark.parametrize("reduction", [*BY_HAND, "all"])
def test_nan_stays_in_its_channel(backend: str, reduction: str) -> None:
    activation, gradient = torch.randn(3, 20, 6, 6), torch.randn(3, 20, 6, 6)
    clean = ops_of(backend).channel_importance(activation, gradient, reduction)
    activation[1, 7, 2, 3] = float("nan")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        pair = (tensor.contiguous(memory_format=memory_format) for tensor in (activation, gradient))
        result = ops_of(backend).channel_importance(*pair, reduction)
        assert result.isnan()[..., 7].all()
        others = torch.arange(20) != 7
        torch.testing.assert_close(result[..., others], clean[..., others], rtol=1e-5, atol=1e-5)


def test_an_empty_batch_is_zero() -> None:
    for reduction in BY_HAND:
        result = tc.channel_importance(torch.empty(0, 3, 4, 4), torch.empty(0, 3, 4, 4), reduction)
        assert torch.equal(result, torch.zeros(3))
    assert torch.equal(tc.channel_importance(torch.empty(0, 3), torch.empty(0, 3), "all"), torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("activation", "gradient", "reduction", "message"),
    [
        (
            torch.zeros(2, 3, 4),
            torch.zeros(2, 3, 5),
            "batch",
            r"gradient: wanted the shape of activation, \(2, 3, 4\), got \(2, 3, 5\)",
        ),
        (torch.zeros(2, 3), torch.zeros(2, 3).bfloat16(), "batch", "gradient: wanted torch.float32"),
        (torch.zeros(2, 3).int(), torch.zeros(2, 3).int(), "batch", "activation: wanted float32"),
        (torch.zeros(3), torch.zeros(3), "batch", r"activation: wanted \[N, C"),
        (torch.zeros(2, 3), torch.zeros(2, 3), "mean", "reduction: wanted one of 'batch', .*, 'all', got 'mean'"),
        (torch.zeros(2, 3), torch.zeros(2, 3, device="meta"), "batch", "gradient: wanted it on cpu"),
        ([1.0], torch.zeros(2, 3), "batch", "activation: wanted a tensor, got list"),
        (torch.zeros(2, 3).to_sparse(), torch.zeros(2, 3), "batch", "activation: wanted a dense tensor"),
    ],
)
def test_bad_input_is_named(activation: object, gradient: object, reduction: str, message: str) -> None:
    with pytest.raises(tc.InputError, match=message):
        tc.channel_importance(activation, gradient, reduction)

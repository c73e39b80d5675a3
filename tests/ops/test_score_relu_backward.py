"""``score_relu_backward``: the gradient of PyTorch's ReLU, bit by bit, and the gate sums beside it."""

from __future__ import annotations

import pytest
import torch

import taylor_cuda as tc
from taylor_cuda.ops import score_relu_backward
from tests.gpu import cases
from tests.ops.checks import BACKENDS, each_backend, ops_of

INF, NAN = float("inf"), float("nan")


@each_backend
def test_hand_computed(backend: str) -> None:
    output = torch.tensor([[[0.0, 2.0], [1.0, 3.0]], [[4.0, 0.0], [0.0, 0.0]]])
    gradient = torch.tensor([[[5.0, 7.0], [-1.0, 2.0]], [[0.5, 9.0], [9.0, 9.0]]])
    skip = torch.tensor([[[3.0, -1.0], [2.0, 1.0]], [[6.0, 8.0], [8.0, 8.0]]])
    sums, skip_sums = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 10.0], [0.0, 0.0]])
    gx = ops_of(backend).score_relu_backward(output, gradient, sums, skip, skip_sums)
    assert gx.tolist() == [[[0.0, 7.0], [-1.0, 2.0]], [[0.5, 0.0], [0.0, 0.0]]]
    assert sums.tolist() == [[15.0, 5.0], [2.0, 0.0]]
    assert skip_sums.tolist() == [[-7.0, 10.0], [3.0, 0.0]]
    by_channel = torch.tensor([100.0, 0.0])
    assert torch.equal(ops_of(backend).score_relu_backward(output, gradient, by_channel), gx)
    assert by_channel.tolist() == [116.0, 5.0]


@pytest.mark.parametrize("layout", cases.PAIRS)
@each_backend
def test_matches_pytorch_and_float64(backend: str, layout: str) -> None:
    for dtype in cases.DTYPES.values():
        assert cases.check_score_relu_backward(ops_of(backend), *cases.make_relu(layout, dtype)) == []


# Cut into several pieces: many rows, many positions, many samples, more channels than a block and rows of whole pages.
PIECES = {
    "rows": lambda m: (m(3, 5, 100, 101), m(3, 5, 100, 101)),
    "columns": lambda m: (m(2, 60, 70, 24).movedim(-1, 1), m(2, 60, 70, 24).movedim(-1, 1)),
    "wide columns": lambda m: (m(2, 107, 1100).mT, m(2, 107, 1100).mT),
    "[N, C]": lambda m: (m(210, 1029), m(210, 1029)),
}


@pytest.mark.skipif("native" not in BACKENDS, reason="the C++ parts were not built")
@pytest.mark.parametrize("name", PIECES)
def test_pieces_add_up_whatever_the_number_of_threads(name: str) -> None:
    output, gradient = PIECES[name](cases.source(torch.float32, 0))
    skip, threads = PIECES[name](cases.source(torch.float32, 1))[0], torch.get_num_threads()
    ops, found = ops_of("native"), []
    assert cases.check_score_relu_backward(ops, output.relu_(), gradient, skip) == []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            sums = torch.zeros(2, output.shape[1])
            found.append([sums, ops.score_relu_backward(output, gradient, sums[0], skip, sums[1])])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))


@each_backend
@pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(2, 24), (2, 24, 1), (1, 24, 19), (1, 8, 5003)], ids=str)
def test_special_numbers_pass_as_in_pytorch(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """NaN is not <= 0, so the gradient passes; what is masked is 0 whatever the gradient is; -0 is kept."""
    specials = torch.tensor([0.0, -0.0, NAN, INF, -INF, 1.0, -1.0, 1e-7], dtype=dtype)
    count = torch.Size(shape).numel()
    output = specials.repeat(count)[:count].view(shape)
    gradient = specials.repeat_interleave(8).repeat(count)[:count].view(shape)
    sums = torch.zeros(shape[1], dtype=torch.promote_types(dtype, torch.float32))
    gx = ops_of(backend).score_relu_backward(output, gradient, sums)
    expected = torch.ops.aten.threshold_backward(gradient, output, 0)
    torch.testing.assert_close(gx, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(gx.signbit() & ~gx.isnan(), expected.signbit() & ~gx.isnan())


@each_backend
@pytest.mark.parametrize("layout", ["nchw 7x7", "nchw 24x24", "nhwc 7x7", "nhwc 13 channels", "[N, C]", "[N, C] odd"])
def test_nan_stays_in_its_channel(backend: str, layout: str) -> None:
    output, gradient, skip = cases.make_relu(layout, torch.float32)
    skip[0, 1].view(-1)[0] = gradient[-1, 2].view(-1)[-1] = NAN
    output[0, 1].view(-1)[0] = output[-1, 2].view(-1)[-1] = 1
    sums, skip_sums = torch.zeros(2, output.shape[1])
    gx = ops_of(backend).score_relu_backward(output, gradient, sums, skip, skip_sums)
    assert sums.isnan().nonzero().flatten().tolist() == [2]
    assert skip_sums.isnan().nonzero().flatten().tolist() == [1, 2]
    assert gx.isnan().sum() == 1


def test_a_stale_saved_tensor_is_noticed() -> None:
    """The op changes its sums in place, and autograd must know."""
    for changed in (0, 1):
        sums = [torch.ones(3), torch.ones(3)]
        saved = (torch.ones(3, requires_grad=True) * sums[changed]).sum()
        score_relu_backward(*[torch.ones(2, 3)] * 2, sums[0], torch.ones(2, 3), sums[1])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.backward()


def test_bad_input_is_named() -> None:
    x, sums = torch.ones(2, 3, 4), torch.zeros(3)
    with pytest.raises(tc.InputError, match=r"gradient: wanted the shape of output, \(2, 3, 4\), got \(2, 3\)"):
        score_relu_backward(x, x[..., 0], sums)
    with pytest.raises(tc.InputError, match=r"output: wanted \[N, C"):
        score_relu_backward(torch.ones(3), torch.ones(3), sums)
    with pytest.raises(tc.InputError, match=r"skip: wanted it of torch\.float32, output's dtype, and with skip_sums"):
        score_relu_backward(x, x, sums, x)
    with pytest.raises(tc.InputError, match="skip_sums: wanted None where skip is None"):
        score_relu_backward(x, x, sums, None, torch.zeros(3))
    with pytest.raises(tc.InputError, match="skip_sums: wanted another tensor than sums"):
        score_relu_backward(x, x, sums, x, sums)
    with pytest.raises(tc.InputError, match=r"skip_sums: wanted the shape of sums, \(3,\), got \(2, 3\)"):
        score_relu_backward(x, x, sums, x, torch.zeros(2, 3))
    with pytest.raises(tc.InputError, match=r"skip: wanted the shape of output"):
        score_relu_backward(x, x, sums, x[:1], torch.zeros(3))

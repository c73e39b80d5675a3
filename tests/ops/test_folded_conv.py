"""Strided convolutions of few channels with pixels folded into channels: the same numbers as without."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import taylor_cuda as tc
from taylor_cuda.ops import folded_conv
from tests.ops.masked_conv_cases import running

# channels, filters, kernel, stride, padding, height and width
SHAPES = {
    "the first of a ResNet": (3, 8, (7, 7), (2, 2), (3, 3), (20, 20)),
    "odd sizes": (3, 4, (7, 7), (2, 2), (3, 3), (21, 19)),
    "patches": (3, 8, (4, 4), (4, 4), (0, 0), (16, 18)),
    "no padding": (1, 4, (3, 3), (2, 2), (0, 0), (9, 10)),
    "more padding than a stride": (2, 4, (5, 5), (2, 2), (4, 4), (6, 5)),
    "two strides, two kernels": (3, 4, (5, 3), (3, 2), (1, 2), (14, 13)),
    "four channels": (4, 4, (3, 3), (2, 2), (1, 1), (8, 8)),
    "pixels that no filter touches": (3, 4, (2, 2), (2, 2), (0, 0), (7, 9)),
    "one output": (3, 4, (7, 7), (2, 2), (1, 1), (5, 6)),
}


def tensors(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[object]]:
    channels, filters, kernel, stride, padding, size = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, channels, *size), (filters, channels, *kernel), (filters,))
    )
    return x, weight, bias, [stride, padding, (1, 1), 1]


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every tensor were one for tensor cores."""
    monkeypatch.setattr(folded_conv, "has_tensor_cores", lambda _x: True)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", SHAPES)
def test_it_is_the_convolution_and_its_gradients(name: str) -> None:
    x, weight, bias, geometry = tensors(name)
    expected = F.conv2d(x, weight, bias, *geometry)
    gradient = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (x, weight, bias), gradient)
    folding = folded_conv.folding_of(x, weight, *geometry)
    assert folding is not None
    with torch.no_grad():
        torch.testing.assert_close(folded_conv.convolve(x, weight, bias, folding), expected)
        found = folded_conv.convolve_backward(gradient, x, weight, folding, [True, True, True])
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_without_tensor_cores_nothing_folds() -> None:
    x, weight, _, geometry = tensors("four channels")
    assert folded_conv.folding_of(x, weight, *geometry) is None


@pytest.mark.usefixtures("everywhere")
def test_what_has_nothing_to_gain_is_left_alone() -> None:
    x, weight, _, (stride, padding, dilation, groups) = tensors("four channels")
    assert folded_conv.folding_of(x, weight, stride, padding, dilation, groups) is not None
    for change in ({"stride": (1, 2)}, {"dilation": (2, 1)}, {"groups": 2}, {"stride": (4, 2)}):
        arguments = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups} | change
        assert folded_conv.folding_of(x, weight, **arguments) is None
    wide = torch.zeros(1, 5, 8, 8)
    assert folded_conv.folding_of(wide, torch.zeros(2, 5, 3, 3), stride, padding, dilation, groups) is None


def test_the_faster_way_is_found_once_and_only_where_cudnn_looks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"folded": 1.0, "plain": 2.0}
    runs: list[str] = []

    def seconds(run: object) -> float:
        runs.append(run())  # type: ignore[operator]
        return times[runs[-1]]

    monkeypatch.setattr(folded_conv, "_faster", {})
    monkeypatch.setattr(folded_conv, "_seconds", seconds)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # asks a driver

    def choose(key: str) -> str:
        return folded_conv.choose(key, lambda: "folded", lambda: "plain")

    with torch.backends.cudnn.flags(benchmark=False):
        assert choose("a") == "plain"
    assert runs == []
    with torch.backends.cudnn.flags(benchmark=True):
        assert choose("a") == "folded"
        assert runs == ["folded", "plain"]
        times["folded"] = 3.0
        assert choose("a") == "folded"
        assert choose("b") == "plain"
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert choose("c") == "plain"
    assert len(runs) == 4
    assert choose("a") == "folded"


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("packed", [False, True])
def test_a_masked_convolution_takes_it(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    x, weight, bias, (stride, padding, *_) = tensors("the first of a ResNet")
    mask = torch.tensor([True, False, True, True, False, True, True, True])
    taken = []

    def choose(key: object, folded: object, plain: object) -> object:
        taken.append(key)
        return folded()  # type: ignore[operator]

    monkeypatch.setattr(folded_conv, "choose", choose)
    column = mask.view(-1, 1, 1).double()
    expected = F.conv2d(x, weight, bias, stride, padding) * column
    keep = mask.nonzero().flatten() if packed else mask
    with running("native"):
        y = tc.masked_conv2d(x, weight, bias, keep, stride=stride, padding=padding, packed=packed)
        wanted = expected[:, mask] if packed else expected
        torch.testing.assert_close(y, wanted)
        gradient = torch.randn_like(y)
        found = torch.autograd.grad(y, (x, weight, bias), gradient)
    for ours, theirs in zip(found, torch.autograd.grad(wanted, (x, weight, bias), gradient), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(taken) == 2

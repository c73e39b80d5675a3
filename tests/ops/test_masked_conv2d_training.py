"""``masked_conv2d`` in training: derivatives, the compiler, autocast, masks that change, what is saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_cuda as tc
from taylor_cuda.ops import backends, library, reference
from tests.ops.masked_conv_cases import each_engine, running, without

OUT, IN = torch.tensor([True, False, True, True]), torch.tensor([False, True, True, False])
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"groups": 1},
    "grouped": {"groups": 2},
    "depthwise": {"groups": 4},
    "strided": {"groups": 1, "stride": (2, 1), "dilation": (1, 2), "padding": 1},
    "packed": {"groups": 1, "packed": True},
    "epilogue": {"groups": 1, "scale": torch.tensor([2.0, 1.0, -0.5, 1.5], dtype=torch.float64), "relu": True},
    "same": {"groups": 1, "padding": "same"},
}


def leaves(groups: int = 1, dtype: torch.dtype = torch.float64, kernel: int = 2) -> list[Tensor]:
    shapes = ((2, 4, 4, 4), (4, 4 // groups, kernel, kernel), (4,))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@each_engine
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("listed", [False, True])
def test_gradcheck_twice(engine: str, kind: str, listed: bool) -> None:
    options = KINDS[kind]
    packed = "packed" in options
    kept: list[Tensor] = tc.keep_lists([OUT, IN], 3) if listed or packed else [OUT, IN]

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = tc.pack_channels(x, kept[1]) if packed else x
        return tc.masked_conv2d(x, weight, bias, kept[0], kept[1], **options).sin()

    given = leaves(options["groups"])
    given[0] = given[0].detach()[:1].requires_grad_()
    with running(engine):
        assert torch.autograd.gradcheck(function, given)
        assert torch.autograd.gradgradcheck(function, given)


@each_engine
@pytest.mark.parametrize("needed", range(3))
def test_one_gradient_alone(engine: str, needed: int) -> None:
    given = leaves()
    for i, each in enumerate(given):
        each.requires_grad_(i == needed)
    expected = torch.autograd.grad(
        without(F.conv2d(without(given[0], IN), *given[1:]), OUT).square().sum(), given[needed]
    )
    with running(engine):
        found = torch.autograd.grad(tc.masked_conv2d(*given, OUT, IN).square().sum(), given[needed])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@each_engine
def test_a_weight_that_two_calls_share(engine: str) -> None:
    """The masks of the calls differ; what is dropped in one is trained by the other."""
    x, weight, bias = leaves()
    masks = [(OUT, IN), (~OUT, ~IN)]
    expected = sum(without(F.conv2d(without(x, i), weight, bias), o).square().sum() for o, i in masks)
    with running(engine):
        found = sum(tc.masked_conv2d(x, weight, bias, o, i).square().sum() for o, i in masks)
        torch.testing.assert_close(
            torch.autograd.grad(found, (x, weight, bias)),
            torch.autograd.grad(expected, (x, weight, bias)),
            rtol=1e-12,
            atol=1e-12,
        )


@each_engine
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_of_any_stride(engine: str, layout: torch.memory_format) -> None:
    for expand in (False, True):
        x, weight, bias = (each.detach() for each in leaves())
        x = x.contiguous(memory_format=layout).requires_grad_()
        weight = weight[:, :, ::2, :].expand(4, 4, 2, 2) if expand else weight
        weight.requires_grad_()
        gradient = torch.randn(2, 4, 1, 1, dtype=torch.float64).expand(2, 4, 3, 3)
        with running(engine):
            y = tc.masked_conv2d(x, weight, bias, OUT, IN)
            found = torch.autograd.grad(y, (x, weight), gradient)
        assert y.is_contiguous(memory_format=layout)
        assert found[0].is_contiguous(memory_format=layout)
        expected = torch.autograd.grad(without(F.conv2d(without(x, IN), weight, bias), OUT), (x, weight), gradient)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@each_engine
@pytest.mark.parametrize("listed", [False, True])
def test_compiles_as_one_graph(engine: str, listed: bool) -> None:
    torch._dynamo.reset()

    def loss(x: Tensor, weight: Tensor, bias: Tensor, keep_out: Tensor, keep_in: Tensor) -> Tensor:
        y = tc.masked_conv2d(x.sin(), weight, bias, keep_out, keep_in, padding=1, relu=True)
        if listed:
            y = tc.masked_conv2d(tc.pack_channels(y, keep_in), weight, None, keep_out, keep_in, packed=True)
        return y.square().mean()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for masks in ((OUT, IN), (IN | OUT, torch.tensor([True, False, False, True]))):
        kept = tc.keep_lists(masks, 4) if listed else masks
        given = leaves(dtype=torch.float32, kernel=3)
        with running(engine):
            losses = [run(*given, *kept) for run in (loss, compiled)]
            torch.testing.assert_close(losses[1], losses[0])
            torch.testing.assert_close(*(torch.autograd.grad(each, given) for each in losses))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("listed", [False, True])
def test_one_mask_for_both_sides_compiles(groups: int, listed: bool) -> None:
    """And gradients have the dtypes of what they are of, where a bias is wider than the rest."""
    torch._dynamo.reset()
    (keep,) = tc.keep_lists([OUT]) if listed else [OUT]
    x, weight, _ = leaves(groups, torch.bfloat16)
    bias = torch.zeros(4, requires_grad=True)
    compiled = torch.compile(tc.masked_conv2d, backend="aot_eager", fullgraph=True)
    results = []
    for run in (tc.masked_conv2d, compiled):
        y = run(x, weight, bias, keep, keep, groups=groups)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), (x, weight, bias))])
        assert [each.dtype for each in results[-1]] == [*[torch.bfloat16] * 3, torch.float32]
    torch.testing.assert_close(*results)


def test_another_mask_compiles_nothing() -> None:
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward  # type: ignore[no-any-return]

    compiled = torch.compile(tc.masked_conv2d, backend=backend, fullgraph=True)
    x, weight, _ = (each.detach() for each in leaves())
    for shift in range(4):
        mask = torch.arange(4) % 4 <= shift
        compiled(x, weight, None, mask, ~mask)
    assert len(graphs) == 1


def test_fake_tensors() -> None:
    lists = tc.keep_lists([OUT, IN], 4)
    with torch._subclasses.FakeTensorMode() as mode:
        x, weight, bias, out, into, keep_out, keep_in = (
            mode.from_tensor(each) for each in (*leaves(dtype=torch.float32), OUT, IN, *lists)
        )
        assert tc.masked_conv2d(x, weight, bias, out, into, padding="valid").shape == (2, 4, 3, 3)
        y = tc.masked_conv2d(x[:, :4], weight, bias, keep_out, keep_in, packed=True, relu=True)
        assert y.shape == (2, 4, 3, 3)
        assert [each.shape for each in torch.autograd.grad(y.sum(), (x, weight))] == [x.shape, weight.shape]


@each_engine
def test_autocast_casts_as_a_convolution_does(engine: str) -> None:
    given = leaves(dtype=torch.float32)
    scale = torch.rand(4)
    with torch.autocast("cpu", torch.bfloat16), running(engine):
        y = tc.masked_conv2d(*given, OUT, IN, scale=scale)
        assert y.dtype == F.conv2d(*given).dtype == torch.bfloat16
        wide = [each.detach().double() for each in given]
        assert tc.masked_conv2d(*wide, OUT, IN).dtype == torch.float64
    found = torch.autograd.grad(y.float().square().sum(), given)
    assert [each.dtype for each in found] == [torch.float32] * 3
    x, weight, bias = given
    expected = without(F.conv2d(without(x, IN), weight) * scale.view(-1, 1, 1) + bias.view(-1, 1, 1), OUT)
    torch.testing.assert_close(y.float(), expected, rtol=0.03, atol=0.03)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert tc.masked_conv2d(*given, OUT, IN).dtype == torch.float32


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, stride=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor, form: str) -> Tensor:
        first, second = self.first, self.second
        if form == "dense":
            x = without(F.conv2d(x, first.weight, first.bias, padding=1).relu(), mask)
            x = F.conv2d(x, second.weight, second.bias, stride=2)
        else:
            packed = form == "packed"
            (keep,) = tc.keep_lists([mask], 4) if packed else [mask]
            x = tc.masked_conv2d(x, first.weight, first.bias, keep, None, padding=1, packed=packed, relu=True)
            x = tc.masked_conv2d(x, second.weight, second.bias, None, keep, stride=2, packed=packed)
        return self.head(x.relu().mean((2, 3)))  # type: ignore[no-any-return]


@each_engine
@pytest.mark.parametrize("form", ["masked", "packed"])
def test_masks_that_drop_and_grow_for_fifty_steps(engine: str, form: str, one_thread: None) -> None:
    torch.manual_seed(5)
    model = Net().double()
    start = copy.deepcopy(model.state_dict())
    batches = [(torch.randn(8, 2, 7, 7).double(), torch.randint(0, 3, (8,))) for _ in range(50)]
    scores = torch.rand(50, 8)
    results = []
    for which in ("dense", form):
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for step, (x, target) in enumerate(batches):
            kept = (8, 3, 6, 1, 0, 5, 8, 2, 4, 7)[step // 5]
            mask = scores[step // 2].argsort().argsort() < kept
            with running(engine):
                loss = F.cross_entropy(model(x, mask, which), target)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        results.append([torch.stack(losses), *(parameter.detach().clone() for parameter in model.parameters())])
    for dense, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-10, atol=1e-10)
    assert any((results[0][1] - start["first.weight"]).flatten(1).any(1))


def test_both_halves_run_where_their_arguments_send_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []
    first = backends._first

    def noted(op: str, device: str, order: tuple[str, ...]) -> Callable[..., Any]:
        seen.append((op.rpartition("_")[2], order[0]))
        return first(op, device, order)

    monkeypatch.setattr(backends, "_first", noted)
    for share, engine in ((9.0, "native"), (-1.0, "reference")):
        monkeypatch.setitem(backends.COMPACT_UP_TO, "kxk", share)
        x, weight, bias = leaves()
        tc.masked_conv2d(x, weight, bias, OUT, IN).sum().backward()
        assert seen == [("forward", engine), ("backward", engine)]
        seen.clear()


@each_engine
def test_what_was_saved_may_not_be_overwritten(engine: str) -> None:
    x, weight, bias = leaves()
    hidden = x.sin()
    with running(engine):
        y = tc.masked_conv2d(hidden, weight, bias, OUT, IN)
        hidden.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        y = tc.masked_conv2d(x, weight, bias, OUT, IN, relu=True)
        y.detach().mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed: bool) -> None:
    """Of the two halves, laid out in every way; tests/ops/test_library.py has their simplest calls."""
    keep_out, keep_in = tc.keep_lists([OUT, IN], 3)
    for layout in (torch.contiguous_format, torch.channels_last):
        x, weight, bias = (each.detach() for each in leaves(dtype=torch.float32))
        x = x.contiguous(memory_format=layout)
        x = x[:, :3] if packed else x
        gradient = torch.randn(2, 3 if packed else 4, 3, 3)
        tail = ([1, 1], [0, 0], [1, 1], 1, packed)
        for engine in ("native", "reference"):
            with running(engine):
                forward = (x, weight, bias, keep_out, keep_in, *tail, bias, True)
                torch.library.opcheck(torch.ops.taylor_cuda.masked_conv2d_forward.default, forward)
                backward = (gradient, x, weight, keep_out, keep_in, *tail, [True, False, True])
                torch.library.opcheck(torch.ops.taylor_cuda.masked_conv2d_backward.default, backward)


def test_the_public_op_is_its_definition() -> None:
    x, weight, bias = (each.detach() for each in leaves())
    tail = ([1, 1], [1, 1], [1, 1], 1, False, None, False)
    expected = reference.masked_conv2d_forward(x, weight, bias, OUT, IN, *tail)
    assert torch.equal(
        library.masked_conv2d_forward(x, weight, bias, OUT, IN, *tail),
        tc.masked_conv2d(x, weight, bias, OUT, IN, padding=1),
    )
    torch.testing.assert_close(tc.masked_conv2d(x, weight, bias, OUT, IN, padding=1), expected, rtol=1e-12, atol=1e-12)

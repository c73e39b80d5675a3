"""Running again only what comes after a unit, for many units at once: the same as one masked pass a unit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import taylor_cuda as tc
from taylor_cuda.graph.recorder import map_tensors
from taylor_cuda.study import oracle_cost
from taylor_cuda.study.batches import evaluating, mini_batches
from taylor_cuda.study.evaluate import Evaluator
from taylor_cuda.study.norms import normalised
from taylor_cuda.study.recording import Span, UnrecordableError, _mark, _Ops
from taylor_cuda.train.models import DigitsResNet
from tests.graph.base import Net, conv, image
from tests.graph.nets import NETS
from tests.study.naive import changes, loss_without, squares

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def no_whole_passes() -> Iterator[None]:
    """Nothing falls back to the naive way."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def traced(name: str) -> tuple[nn.Module, Any, tc.Groups]:
    make, inputs = NETS[name]
    model, x = make().double().eval(), inputs()
    x = map_tensors(x, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    for parameter in model.parameters():  # nothing that starts as zero or tiny stays so
        if parameter.abs().max() < 1e-3:
            nn.init.normal_(parameter, 0.5, 0.3)
    return model, x, tc.trace(model, x)


@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_network_in_float64(name: str):
    try:
        model, x, groups = traced(name)
    except tc.InputError:
        pytest.skip("nothing to prune")
    with no_whole_passes():
        found = tc.oracle(model, groups, squares, [(x, None)])
    for group, expected in changes(model, groups, squares, [(x, None)]).items():
        assert (found[group] - expected[0]).abs().max() < 1e-10
    assert max(float(change.abs().max()) for change in found.values()) > 1e-6


@pytest.mark.parametrize("name", ["residual", "concat", "layer_norm", "rms_norm", "shared", "flatten", "open_heads"])
def test_two_units_at_once_with_others_off(name: str):
    """What the greedy and the combinatorial oracle ask for; ``off`` includes units of the same and of other groups."""
    model, x, groups = traced(name)
    off = {group.name: torch.arange(group.size) % 3 == 1 for group in groups}
    (batch,) = mini_batches([(x, None)], torch.device("cpu"))
    with no_whole_passes(), evaluating(model):
        evaluator = Evaluator(model, groups, squares)
        names = [group.name for group in groups if group.size >= 4]
        evaluator.start(batch, names, 2, off)
        already = {group.name: off[group.name].nonzero().flatten().tolist() for group in groups}
        assert float(evaluator.base) == pytest.approx(loss_without(model, groups, squares, x, None, already), abs=1e-12)
        for group in names:
            units = torch.combinations((~off[group]).nonzero().flatten(), 2)
            found = evaluator.losses(group, units)
            for row, loss in zip(units.tolist(), found.tolist(), strict=True):
                gone = {**already, group: [*already[group], *row]}
                assert loss == pytest.approx(loss_without(model, groups, squares, x, None, gone), abs=1e-11)


@pytest.mark.parametrize("name", ["conv_bn", "residual", "layer_norm", "open_heads", "transposed"])
def test_in_float32(name: str):
    model, x, _ = traced(name)
    model, x = model.float(), map_tensors(x, Tensor.float)
    groups = tc.trace(model, x)
    with no_whole_passes():
        found = tc.oracle(model, groups, squares, [(x, None)])
    for group, expected in changes(model, groups, squares, [(x, None)]).items():
        assert (found[group] - expected[0]).abs().max() < 1e-5


def digits(size: int = 24) -> tuple[nn.Module, tc.Groups, list[Any]]:
    model = DigitsResNet(width=8).eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand(buffer.shape) + 0.5 if "var" in name else 0.1 * torch.randn(buffer.shape))
    x, target = torch.randn(size, 1, 8, 8), torch.randint(10, (size,))
    return model, tc.trace(model, x[:2]), [(x[:10], target[:10]), (x[10:], target[10:])]


def test_memory_says_how_many_units_at_once():
    model, groups, batches = digits()
    with no_whole_passes():
        one, many = (tc.oracle(model, groups, F.cross_entropy, batches, memory=memory) for memory in (1, 2**30))
    for name in one:
        assert (one[name] - many[name]).abs().max() < 1e-5


def test_channels_last_and_16_bits():
    model, groups, batches = digits()
    plain = tc.oracle(model, groups, F.cross_entropy, batches)
    model.to(memory_format=torch.channels_last)
    last = [(x.to(memory_format=torch.channels_last), target) for x, target in batches]
    with no_whole_passes():
        found = tc.oracle(model, groups, F.cross_entropy, last)
    assert all((plain[name] - found[name]).abs().max() < 1e-5 for name in plain)
    model.bfloat16()
    half = [(x.bfloat16(), target) for x, target in batches]
    with no_whole_passes():
        found = tc.oracle(model, groups, F.cross_entropy, half)
    exact = changes(model, groups, F.cross_entropy, half)
    for name, change in exact.items():
        assert (found[name] - (10 * change[0] + 14 * change[1]) / 24).abs().max() < 0.05


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "vit", "swin_t"])
def test_networks_of_torchvision(name: str):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(1)
    if name == "vit":
        model = models.VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=10)
        nn.init.normal_(model.heads.head.weight, 0, 0.1)
    else:
        model = getattr(models, name)(num_classes=10)
    model.eval()
    x, target = torch.randn(2, 3, 32, 32), torch.tensor([3, 7])
    groups = tc.trace(model, x, prove=False)
    (batch,) = mini_batches([(x, target)], torch.device("cpu"))
    names = list(groups.sizes())[:: max(1, len(groups) // 5)]
    with no_whole_passes(), evaluating(model):
        evaluator = Evaluator(model, groups, F.cross_entropy)
        evaluator.start(batch, names)
        for group in names:
            units = torch.tensor([[1], [groups[group].size - 1], [groups[group].size // 2]])
            found = evaluator.losses(group, units)
            expected = torch.stack([evaluator._whole_pass({group: row}) for row in units])
            assert (found - expected).abs().max() < 1e-5


class Strided(Net):
    """Readers that subtract a product: of every second pixel, of tokens; and one that pads what it multiplies."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(8, 6, 1, stride=2), c=nn.Conv2d(8, 6, 1, padding=1, stride=(2, 2)))
        self.t, self.u = nn.Conv2d(8, 6, 1, stride=(1, 2), bias=False), nn.Linear(8, 6)
        self.fc = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        parts = [self.b(x), self.c(x), self.t(x), self.u(x.movedim(1, -1)).movedim(-1, 1)]
        return self.fc(torch.cat([F.relu(part).mean((2, 3)) for part in parts], 1))


class MaskedAttention(Net):
    """Attention with a mask of each example's own."""

    def __init__(self) -> None:
        super().__init__(embed=nn.Linear(6, 8), qkv=nn.Linear(8, 24), proj=nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        mask = (x[:, None, :, :1] + x[:, None, None, :, 0]) > -1
        q, k, v = self.qkv(F.relu(self.embed(x))).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | torch.eye(x.shape[1], dtype=torch.bool))
        return self.proj(y.transpose(1, 2).flatten(2)).mean(1)


@pytest.mark.parametrize(("make", "inputs"), [(Strided, image), (MaskedAttention, lambda: torch.randn(4, 5, 6))])
def test_strides_and_masks(make: Callable[[], nn.Module], inputs: Callable[[], Tensor]):
    model, x = make().double().eval(), inputs().double()
    groups = tc.trace(model, x)
    with no_whole_passes():
        found = tc.oracle(model, groups, squares, [(x, None)])
    for group, expected in changes(model, groups, squares, [(x, None)]).items():
        assert (found[group] - expected[0]).abs().max() < 1e-10


def test_a_normalisation_over_what_is_kept():
    x, kept = torch.randn(4, 5, 7).double(), torch.tensor([0, 1, 1, 0, 1, 1, 1], dtype=torch.bool)
    weight, bias = torch.randn(2, 7).double()
    for func, vectors in ((F.layer_norm, (weight, bias)), (F.rms_norm, (weight,)), (F.layer_norm, (None, None))):
        some = [None if vector is None else vector[kept] for vector in vectors]
        expected = torch.zeros_like(x)
        expected[..., kept] = func(x[..., kept], [5], *some, eps=0.1)
        assert torch.allclose(normalised(func, x, vectors, 0.1, kept), expected, atol=1e-12)
    default = normalised(F.rms_norm, 1e-8 * x, (weight,), None, torch.ones(7, dtype=torch.bool))
    assert torch.allclose(default, F.rms_norm(1e-8 * x, [7], weight), atol=1e-12)


def test_what_was_noted_is_not_changed_in_place():
    """Ops inside another op, which ``functionalize`` doesn't meet."""
    with _Ops([]) as ops:
        y = 2 * _mark_first(ops, torch.tensor([1.0, 2.0]))
        total = y.sum()
        y.add_(1)
        z = y * total
    values = [tensor.tolist() for tensor in ops.recording.values.values()]
    assert z.tolist() == [18.0, 30.0]
    assert values == [[1.0, 2.0], [2.0, 4.0], 6.0, [3.0, 5.0], [18.0, 30.0]]
    with _Ops([]) as ops:
        y = 2 * _mark_first(ops, torch.tensor([1.0, 2.0]))
        view = y[:1]
        with pytest.raises(UnrecordableError, match="used elsewhere"):
            y.add_(1)
    assert view.tolist() == [2.0]
    weight = torch.ones(2)
    with _Ops([weight]), pytest.raises(UnrecordableError, match="used elsewhere"):
        weight.add_(1)


def _mark_first(ops: _Ops, x: Tensor) -> Tensor:
    ops.spans.append(Span("read", "weight", 0, F.linear))
    return _mark(x, 0)


# -- what can't be recorded ----------------------------------------------------


class ByValue(Net):
    """What it does depends on a value that depends on the units."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), b=conv(6, 4), fc=nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        if x.mean() > 0.12:
            x = 2 * x
        return self.fc(x.mean((2, 3)))


class Noisy(Net):
    """Draws numbers like a tensor that depends on the units."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), b=conv(6, 4), fc=nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.b(F.relu(self.a(x)))).mean((2, 3))
        return self.fc(y * torch.rand_like(y))


class Dropping(Net):
    """Dropout in eval mode as well: the same noise in every pass."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), b=conv(6, 4), fc=nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.dropout(F.relu(self.b(F.relu(self.a(x)))), 0.3, training=True).mean((2, 3)))


class Selecting(Net):
    """A result whose shape depends on values."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), b=conv(6, 4), fc=nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.relu(self.a(x))).mean((2, 3))
        return self.fc(y) + y[y > 0].sum()


def with_the_same_noise(model: nn.Module, groups: tc.Groups, batches: list[Any]) -> dict[str, Tensor]:
    handle = model.register_forward_pre_hook(lambda *_: (torch.manual_seed(0), None)[1])
    found = changes(model, groups, squares, batches)
    handle.remove()
    return found


def test_every_pass_has_the_same_noise():
    model, x = Dropping().eval(), image(4)
    groups = tc.trace(model, x, prove=False)
    with no_whole_passes():
        found = tc.oracle(model, groups, squares, [(x, None), (x + 1, None)])
    for name, change in with_the_same_noise(model, groups, [(x, None), (x + 1, None)]).items():
        assert (found[name] - change.mean(0)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("make", "op"), [(ByValue, "_local_scalar_dense"), (Noisy, "random numbers"), (Selecting, "depends on values")]
)
def test_what_cannot_be_recorded_takes_whole_passes_and_says_why(make: Callable[[], nn.Module], op: str):
    model, x = make().eval(), image(4)
    groups = tc.trace(model, x, prove=False)
    with pytest.warns(RuntimeWarning, match=op) as said:
        found = tc.oracle(model, groups, squares, [(x, None), (x + 1, None)])
    assert len(said) == 1
    for name, change in with_the_same_noise(model, groups, [(x, None), (x + 1, None)]).items():
        assert (found[name] - change.mean(0)).abs().max() < 1e-5


class Hidden(Net):
    """A constant of the example that a recording can't know isn't one: the next pass has another."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), b=conv(6, 4), fc=nn.Linear(4, 2))
        self.last = [torch.zeros(())]

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.relu(self.a(x))).mean((2, 3))
        scale = 2.0 if torch.overrides._get_current_function_mode_stack() and _masks_anything() else 1.0
        return self.fc(y * scale)


def _masks_anything() -> bool:
    return any(getattr(mode, "_read", {}) for mode in torch.overrides._get_current_function_mode_stack())


def test_a_replay_that_is_wrong_is_found_out():
    model, x = Hidden().eval(), image(4)
    groups = tc.trace(model, x, prove=False)
    with pytest.warns(RuntimeWarning, match="replayed the loss is"):
        found = tc.oracle(model, groups, squares, [(x, None)])
    for name, change in changes(model, groups, squares, [(x, None)]).items():
        assert (found[name] - change[0]).abs().max() < 1e-6


class Viewing(Net):
    """A view that tensors with channels last don't have."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), fc=nn.Linear(6 * 64, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.a(x)).view(len(x), -1))


def test_views_of_a_layout():
    model, x = Viewing().eval(), image(4)
    groups = tc.trace(model, x, prove=False)
    with no_whole_passes():
        found = tc.oracle(model, groups, squares, [(x, None)])
    for name, change in changes(model, groups, squares, [(x, None)]).items():
        assert (found[name] - change[0]).abs().max() < 1e-6


class Keeping(Net):
    """Keeps a tensor of the pass, as code that looks at attention maps does; changes its input and writes in place."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), b=conv(6, 4), fc=nn.Linear(4, 2))
        self.seen: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        y = F.relu_(self.a(x))
        y[:, :, ::2] += 1
        z = self.b(y)
        self.seen = z
        z.flatten(2).clamp_(min=0)
        return self.fc(z.mean((2, 3)))


def test_tensors_that_a_model_keeps_are_plain_ones():
    model, x = Keeping().eval(), image(4)
    groups = tc.trace(model, x, prove=False)
    before = x.clone()
    with no_whole_passes():
        found = tc.oracle(model, groups, squares, [(x, None)])
    assert torch.equal(x, before)
    assert not torch._is_functional_tensor(model.seen)
    model.seen.sum().item()
    for name, drop in found.items():
        for unit, change in enumerate(drop.tolist()):
            without, whole = (
                loss_without(model, groups, squares, before.clone(), None, off) for off in ({name: [unit]}, {})
            )
            assert change == pytest.approx(without - whole, abs=1e-5)


# -- what it costs -------------------------------------------------------------


def test_counted_products_are_those_that_run():
    model, groups, batches = digits()
    batches = batches[:1]
    with evaluating(model), FlopCounterMode(display=False) as counter:
        evaluator = Evaluator(model, groups, F.cross_entropy, memory=2**22)
        (batch,) = mini_batches(batches, torch.device("cpu"))
        evaluator.start(batch, list(groups.sizes()))
        for group in groups:
            evaluator.losses(group.name, torch.arange(group.size)[:, None])
    assert counter.get_total_flops() == 2 * evaluator.macs
    assert oracle_cost(model, groups, F.cross_entropy, batches).macs == evaluator.macs
    with FlopCounterMode(display=False) as counter:
        model(batches[0][0])
    naive = counter.get_total_flops() // 2 * sum(groups.sizes().values())
    assert oracle_cost(model, groups, F.cross_entropy, batches).naive == naive


def test_resnet50_takes_a_third_of_a_pass_a_unit():
    """256 images of 224×224 pixels, counted without computing them."""
    models = pytest.importorskip("torchvision.models")
    model = models.resnet50()
    groups = tc.trace(model, torch.zeros(1, 3, 64, 64), prove=False)
    x = torch.empty(256, 3, 224, 224, device="meta")
    cost = oracle_cost(model, groups, F.cross_entropy, [(x, torch.empty(256, dtype=torch.int64, device="meta"))])
    units = sum(groups.sizes().values())
    assert units > 10_000
    assert cost.naive == pytest.approx(units * 256 * 4.09e9, rel=0.01)
    assert cost.ratio >= 3

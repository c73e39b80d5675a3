"""Sums that ride on ReLUs: nothing else changes, and they are those of gates, however the model is run."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import taylor_cuda as tc
from taylor_cuda.graph.observe import reader_weights
from taylor_cuda.graph.program import Program, Ride, sum_kept
from tests.importance.riding import Passes, Step, close_to, gate_sums, made, same_bits, step
from tests.importance.riding_nets import NETS, Concatenated, Pooled, Residual, RidingNet, TwoLengths

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
def test_nothing_changes_and_the_sums_are_those_of_gates(net: type[RidingNet], training: bool, passes: Passes) -> None:
    model, x = made(net), torch.randn(net.shape, dtype=torch.float64)
    groups = tc.trace(model, x)
    model.train(training)
    plain, before = step(copy.deepcopy(model), x), copy.deepcopy(model)
    expected = gate_sums(copy.deepcopy(model), groups, x)
    passes.count = 0
    with tc.fuse_scoring(model, groups) as sums:
        same_bits(step(model, x), plain)
        taken = sums.take()
        assert len(sums.gated) == passes.count == net.gates
        assert sums.fused.keys() | sums.gated.keys() == set(reader_weights(groups))
    close_to(taken, expected)
    same_bits(step(before, x), plain)  # the copy was made of a model that nobody touched


def network(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    if name == "vgg11_bn":
        features = models.vgg11_bn(weights=None).features
        return nn.Sequential(features, nn.Flatten(), nn.Linear(512, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 4))
    model: nn.Module = getattr(models, name)(weights=None, num_classes=4)
    return model


@pytest.mark.parametrize(
    ("name", "dtype", "rides", "readers", "gates"),
    [
        ("resnet18", torch.float32, 17, 20, 0),
        ("resnet18", torch.bfloat16, 17, 20, 0),
        ("resnet50", torch.float64, 49, 53, 0),
        ("vgg11_bn", torch.float32, 9, 9, 0),
        ("regnet_y_400mf", torch.float32, 33, 37, 32),
    ],
)
def test_networks(name: str, dtype: torch.dtype, rides: int, readers: int, gates: int, passes: Passes) -> None:
    model, x = made(lambda: network(name), dtype), torch.randn(2, 3, 32, 32, dtype=dtype)
    groups = tc.trace(model, x, prove=False)
    plain, twin = step(copy.deepcopy(model), x), copy.deepcopy(model)
    with tc.fuse_scoring(model, groups) as sums:
        same_bits(step(model, x), plain)
        assert sum(ride is not None for ride in sums._program.rides) == rides
        assert (len(sums.fused), len(sums.gated), passes.count) == (readers, gates, gates)
        taken = sums.take()
    bound = {torch.float64: 1e-10, torch.float32: 3e-6, torch.bfloat16: 2e-2}[dtype]
    close_to(taken, gate_sums(twin, groups, x), bound)


@pytest.mark.parametrize("criterion", ["taylor_fg", "taylor_output", "taylor_fo"])
@pytest.mark.parametrize("net", [Residual, Pooled, Concatenated], ids=lambda net: net.__name__)
def test_scores_are_those_of_gates(net: type[RidingNet], criterion: str, passes: Passes) -> None:
    model, x = made(net), torch.randn(net.shape, dtype=torch.float64)
    groups = tc.trace(model, x)
    scores, counts = [], []
    for fuse in (False, True):
        passes.count = 0
        est = tc.Importance(model, groups, criterion, "activations", fuse=fuse)
        for _ in range(2):  # gradient accumulation: each backward pass counts
            torch.manual_seed(2)
            est.backward(model(x).square().mean(), accumulate=True)
        est.update()
        scores.append(est.scores())
        counts.append(passes.count)
        est.close()
    assert counts == [2 * len(reader_weights(groups)), 2 * net.gates]
    close_to(scores[1], scores[0], 1e-6)  # scores are fp32


@pytest.mark.parametrize(
    ("call", "kept"),
    [
        (lambda x: (F.max_pool2d, (x, 2), {}), (False, 1)),
        (lambda x: (F.adaptive_avg_pool2d, (x, 1), {}), (False, 1)),
        (lambda x: (F.max_pool2d, (x[0], 2), {}), None),
        (lambda x: (F.max_pool1d, (x[0], 2), {}), (False, 1)),
        (lambda x: (torch.mean, (x, (2, 3)), {}), (False, 1)),
        (lambda x: (Tensor.mean, (x,), {"dim": -1}), (False, 1)),
        (lambda x: (torch.mean, (x, 1), {}), None),
        (lambda x: (torch.mean, (x, (0, 2), True), {}), None),
        (lambda x: (torch.mean, (x,), {}), None),
        (lambda x: (torch.flatten, (x, 1), {}), (False, 16)),
        (lambda x: (torch.flatten, (x, 2), {}), (False, 1)),
        (lambda x: (torch.flatten, (x,), {}), None),
        (lambda x: (Tensor.view, (x, 8, 4, 2, 2), {}), None),
        (lambda x: (F.dropout, (x, 0.5), {}), (True, 1)),
        (lambda x: (F.alpha_dropout, (x, 0.5, True), {}), None),
        (lambda x: (torch.sigmoid, (x,), {}), None),
    ],
)
def test_which_functions_keep_the_sums(call: Callable[[Tensor], Any], kept: tuple[bool, int] | None) -> None:
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    func, args, kwargs = call(x)
    first = args[0]
    out = func(*args, **kwargs)
    assert sum_kept(func, args, kwargs, first, out) == kept
    if kept is None:
        return
    gradient = torch.randn_like(out)
    (before,) = torch.autograd.grad(out, first, gradient)
    after = (out * gradient).flatten(2).sum(2) if out.dim() > 2 else out * gradient
    torch.testing.assert_close((first * before).flatten(2).sum(2), after.unflatten(1, (-1, kept[1])).sum(2))


@pytest.mark.filterwarnings("ignore:the activation before")
def test_means_over_space_are_those_of_each_reader() -> None:
    """Two readers at two resolutions ask for a ride on one ReLU, as none that was recorded lets them."""
    model, x = made(TwoLengths), torch.randn(TwoLengths.shape, dtype=torch.float64)
    groups, scores = tc.trace(model, x), []
    for fuse in (False, True):
        est = tc.Importance(model, groups, "taylor_output", fuse=fuse)
        if fuse:
            assert est._sites is not None
            est._sites._sites._programs = {True: Program([Ride(1, False, (Ride(1, False, ()),)), None])}
        est.backward(model(x).square().mean())
        scores.append(est.scores())
        est.close()
    close_to(scores[1], scores[0], 1e-6)


def state(model: nn.Module) -> list[Any]:
    """Everything that a model holds besides the values of its tensors."""
    seen: list[Any] = []
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            inside = list(value) if isinstance(value, dict) else value
            seen.append((name, key, id(value), inside if not isinstance(inside, Tensor) else id(inside)))
    return [*seen, [(id(p), p._backward_hooks, vars(p)) for p in model.parameters()]]


def test_close_leaves_the_model_as_it_was(residual: tuple[nn.Module, Tensor, tc.Groups]) -> None:
    model, x, groups = residual
    before = state(model)
    with tc.fuse_scoring(model, groups):
        assert state(model) != before
        step(model, x)
    assert state(model) == before
    assert step(model, x)["loss"].isfinite()


def test_nothing_of_a_pass_is_held(residual: tuple[nn.Module, Tensor, tc.Groups]) -> None:
    model, x, groups = residual

    def activations() -> int:
        return sum(type(item) is Tensor and item.dim() == 4 for item in gc.get_objects())

    def run() -> None:
        model.zero_grad(set_to_none=False)
        model(x).sum().backward()

    with tc.fuse_scoring(model, groups):
        for _ in range(2):
            run()
        gc.collect()
        gc.disable()  # what only the collector could free is in a cycle of references
        try:
            before = activations()
            run()
            model(x)
            assert activations() == before
        finally:
            gc.enable()


def test_passes_add_up_as_examples(residual: tuple[nn.Module, Tensor, tc.Groups]) -> None:
    model, x, groups = residual
    model.eval()
    losses = [lambda: model(x[:1]).square().sum(), lambda: model(x[1:]).square().sum()]
    with tc.fuse_scoring(model, groups) as sums:
        with pytest.raises(tc.InputError, match="take: no forward pass with gradients"):
            sums.take()
        with torch.no_grad():
            model(x)
        parts = [loss() for loss in losses]
        for part in reversed(parts):
            part.backward()
        taken = sums.take()
        model(x).square().sum().backward()
        close_to(taken, sums.take())
    with tc.fuse_scoring(model, groups, per_example=False) as sums:
        for loss in losses:
            loss().backward()
        close_to(sums.take(), {name: value.sum(0) for name, value in taken.items()})


def test_two_backward_passes_through_one_graph_are_twice_the_sums(
    residual: tuple[nn.Module, Tensor, tc.Groups],
) -> None:
    model, x, groups = residual
    with tc.fuse_scoring(model, groups) as sums:
        step(model, x)
        once = sums.take()
        step(model, x, lambda loss: (loss.backward(retain_graph=True), loss.backward()))
        close_to(sums.take(), {name: 2 * value for name, value in once.items()})


def test_the_gradient_can_be_differentiated(residual: tuple[nn.Module, Tensor, tc.Groups]) -> None:
    """A penalty on the gradient in the input runs through every ReLU twice."""
    model, x, groups = residual
    x.requires_grad_()

    def penalty(loss: Tensor) -> None:
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + gradient.square().sum()).backward()

    plain = step(copy.deepcopy(model), x, penalty)
    expected = gate_sums(copy.deepcopy(model), groups, x, lambda model, x: step(model, x, penalty))
    with tc.fuse_scoring(model, groups) as sums:
        fused = step(model, x, penalty)
        close_to(sums.take(), expected)
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["a", "b", "c", "norm"])
def test_frozen_parts(frozen: str, residual: tuple[nn.Module, Tensor, tc.Groups]) -> None:
    model, x, groups = residual
    model.get_submodule(frozen).requires_grad_(False)
    plain, expected = step(copy.deepcopy(model), x), gate_sums(copy.deepcopy(model), groups, x)
    with tc.fuse_scoring(model, groups) as sums:
        same_bits(step(model, x), plain)
        close_to(sums.take(), expected)


def test_everything_frozen_but_the_head(residual: tuple[nn.Module, Tensor, tc.Groups]) -> None:
    model, x, groups = residual
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    plain, expected = step(copy.deepcopy(model), x), gate_sums(copy.deepcopy(model), groups, x)
    with tc.fuse_scoring(model, groups) as sums:
        same_bits(step(model, x), plain)
        close_to(sums.take(), expected)


class Checkpointed(Residual):
    """The block in the middle runs again in the backward pass, with a ReLU inside and one before it."""

    reentrant = False

    def block(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        x = F.relu(checkpoint(self.block, x, use_reentrant=self.reentrant))
        return self.head(F.relu(self.c(F.relu(self.b(x)))).mean((2, 3)))


class Reentrant(Checkpointed):
    reentrant = True


@pytest.mark.parametrize("net", [Checkpointed, Reentrant], ids=lambda net: net.__name__)
def test_checkpointed_parts_have_gates(net: type[RidingNet], passes: Passes) -> None:
    model, x = made(net), torch.randn(net.shape, dtype=torch.float64)
    groups = tc.trace(model, x)
    plain, expected = step(copy.deepcopy(model), x), gate_sums(copy.deepcopy(model), groups, x)
    passes.count = 0
    with tc.fuse_scoring(model, groups) as sums:
        same_bits(step(model, x), plain)
        close_to(sums.take(), expected)
    assert 0 < passes.count <= 3


def test_autocast(residual: tuple[nn.Module, Tensor, tc.Groups], passes: Passes) -> None:
    model, x, groups = residual[0].float(), residual[1].float(), residual[2]

    def under_autocast(model: nn.Module, x: Tensor) -> Step:
        with torch.autocast("cpu", torch.bfloat16):
            return step(model, x)

    plain, expected = (
        under_autocast(copy.deepcopy(model), x),
        gate_sums(copy.deepcopy(model), groups, x, under_autocast),
    )
    passes.count = 0
    with tc.fuse_scoring(model, groups) as sums:
        same_bits(under_autocast(model, x), plain)
        close_to(sums.take(), expected, 3e-2)
    assert passes.count == 0


def test_a_model_that_changed_its_dtype_since(residual: tuple[nn.Module, Tensor, tc.Groups], passes: Passes) -> None:
    model, x, groups = residual[0].bfloat16(), residual[1].bfloat16(), residual[2]
    with tc.fuse_scoring(model, groups) as sums:
        step(model, x)
        assert all(value.dtype == torch.float32 for value in sums.take().values())
    assert passes.count == 0


def test_it_follows_a_cut(residual: tuple[nn.Module, Tensor, tc.Groups], passes: Passes) -> None:
    model, x, groups = residual
    est = tc.Importance(model, groups, "taylor_fg")
    est.backward(model(x).square().mean())
    keep = {group.name: torch.arange(0, group.size, 2) for group in groups}
    tc.cut(model, groups, keep)
    est.reset()
    est.keep(keep)
    passes.count = 0
    torch.manual_seed(4)
    est.backward(model(x).square().mean())
    assert passes.count == 0
    fresh = tc.Importance(copy.deepcopy(model), groups, "taylor_fg", fuse=False)
    fresh.backward(fresh._model(x).square().mean())
    close_to(est.scores(), fresh.scores(), 1e-6)

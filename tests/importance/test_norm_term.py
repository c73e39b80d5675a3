"""The norm term against autograd through weighted statistics, against finite differences of real cuts, and off."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

import taylor_cuda as tc
from taylor_cuda.importance.norm_term import statistics_term
from tests.importance.weighted_nets import NETS, Functional, Mlp, RmsMlp, RmsStream, Stream, WeightedNet, make

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:Mismatch dtype")
by_name = pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)


def squares(
    model: nn.Module, x: Tensor, target: Tensor, groups: tc.Groups | None = None, norm_term: bool = True
) -> dict[str, Tensor]:
    """The scores of one step in the precision they are collected in."""
    groups = tc.trace(model, x) if groups is None else groups
    est = tc.Importance(model, groups, source="activations", norm_term=norm_term)
    model.zero_grad()
    est.backward(F.cross_entropy(model(x), target))
    est.close()
    window = est.state_dict()["window"]
    return dict(zip(groups.sizes(), window.split(list(groups.sizes().values())), strict=True))


def path(model: WeightedNet, x: Tensor, target: Tensor, sizes: dict[str, int]) -> dict[str, Tensor]:
    """dE/dw of every unit's weight where all are 1, by autograd through the weighted statistics."""
    model.weights = {name: torch.ones(size, dtype=x.dtype, requires_grad=True) for name, size in sizes.items()}
    try:
        # a model that recomputes parts can't be asked for single gradients
        F.cross_entropy(model(x), target).backward()
        return {name: w.grad for name, w in model.weights.items()}
    finally:
        model.weights = {}


@by_name
def test_the_score_is_the_squared_slope_of_the_path_to_the_cut(net: type[WeightedNet]) -> None:
    model, x, target = make(net)
    groups = tc.trace(model, x)
    expected = path(model, x, target, groups.sizes())
    with_term, without = squares(model, x, target), squares(model, x, target, norm_term=False)
    assert set(expected) == set(groups.sizes())
    inside = {group.name for group in groups if group.role("norm")}
    assert inside
    for name, slope in expected.items():
        bound = 1e-10 * slope.square().max()
        assert (with_term[name] - slope.square()).abs().max() <= bound, name
        if name in inside:
            assert (without[name] - slope.square()).abs().max() > 1e6 * bound, name
        else:
            assert torch.equal(with_term[name], without[name]), name


@by_name
def test_the_path_ends_in_the_real_cut_and_its_slope_is_a_finite_difference(net: type[WeightedNet]) -> None:
    model, x, target = make(net)
    sizes = tc.trace(model, x).sizes()
    slopes = path(model, x, target, sizes)

    @torch.no_grad()
    def loss_at(name: str, unit: int, weight: float) -> Tensor:
        model.weights = {name: torch.ones(size, dtype=x.dtype) for name, size in sizes.items()}
        model.weights[name][unit] = weight
        loss = F.cross_entropy(model(x), target)
        model.weights = {}
        return loss

    for name, size in sizes.items():
        small = copy.deepcopy(model)
        groups = tc.trace(small, x)
        tc.cut(small, groups, {name: torch.tensor([0, *range(2, size)])})
        cut_loss = F.cross_entropy(small(x), target).detach()
        torch.testing.assert_close(loss_at(name, 1, 0.0), cut_loss, rtol=1e-12, atol=0)
        difference = torch.stack([loss_at(name, u, 1 + 1e-5) - loss_at(name, u, 1 - 1e-5) for u in range(size)]) / 2e-5
        assert (difference - slopes[name]).abs().max() <= 1e-8 * slopes[name].abs().max()


def copies_of(model: Mlp, copies: int) -> Mlp:
    """The same function with every unit of fc1 ``copies`` times, each with its share at the reader."""
    wide = copy.deepcopy(model)
    for name, parameter in (("weight", wide.fc1.weight), ("bias", wide.fc1.bias)):
        setattr(wide.fc1, name, nn.Parameter(parameter.detach().repeat(copies, *(1,) * (parameter.dim() - 1))))
    for name, parameter in list(wide.norm.named_parameters()):
        setattr(wide.norm, name, nn.Parameter(parameter.detach().repeat(copies)))
    wide.norm.normalized_shape = (8 * copies,)
    wide.fc2.weight = nn.Parameter(model.fc2.weight.detach().repeat(1, copies) / copies)
    wide.fc1.out_features = wide.fc2.in_features = 8 * copies
    return wide


@pytest.mark.parametrize("net", [Mlp, RmsMlp], ids=lambda net: net.__name__)
def test_finite_differences_of_real_cuts(net: type[Mlp]) -> None:
    """Of M copies of a unit one is cut: a real cut by 1/M of the unit, with no path assumed in between."""
    model, x, target = make(net)
    full = F.cross_entropy(model(x), target).detach()
    quotients, scores = {}, {}
    for copies in (32, 64, 128):
        wide = copies_of(model, copies)
        torch.testing.assert_close(F.cross_entropy(wide(x), target).detach(), full, rtol=1e-12, atol=0)
        scores[copies] = squares(wide, x, target)["fc1"].view(copies, 8) * copies**2
        changes = []
        for unit in range(8):
            small = copy.deepcopy(wide)
            groups = tc.trace(small, x)
            tc.cut(small, groups, {"fc1": torch.tensor([at for at in range(8 * copies) if at != unit])})
            changes.append(full - F.cross_entropy(small(x), target).detach())
        quotients[copies] = torch.stack(changes) * copies
    # the quotients' errors are a series in 1/M: eliminate its first two terms
    once = {copies: 2 * quotients[2 * copies] - quotients[copies] for copies in (32, 64)}
    slope = (4 * once[64] - once[32]) / 3
    error = (scores[128][0].sqrt() - slope.abs()).abs().max() / slope.abs().max()
    assert error < 1e-5
    assert (scores[32] - scores[128][:1]).abs().max() <= 1e-10 * scores[32].max()
    without = squares(model, x, target, norm_term=False)["fc1"].sqrt()
    assert (without - slope.abs()).abs().max() > 1e-2 * slope.abs().max()


@pytest.mark.parametrize("net", [Stream, RmsStream], ids=lambda net: net.__name__)
def test_ranks_single_cuts_better_where_the_first_order_counts(net: type[WeightedNet]) -> None:
    """At initialisation; near a minimum curvature decides, which neither estimate knows."""
    with_term, without = [], []
    for seed in range(12):
        model, x, target = make(net, seed)
        groups = tc.trace(model, x)
        full, changes = F.cross_entropy(model(x), target), []
        for unit in range(8):
            with tc.masked(model, groups, {"embed": torch.tensor([at for at in range(8) if at != unit])}):
                changes.append((F.cross_entropy(model(x), target) - full).detach().abs())
        for norm_term, results in ((True, with_term), (False, without)):
            score = squares(model, x, target, groups, norm_term)["embed"]
            results.append(spearmanr(score, torch.stack(changes)).statistic)
    assert sum(with_term) > sum(without)


def test_the_formula_by_hand() -> None:
    """Two channels, one token: x = (3, 1), so mean 2 and variance 1; eps 3 makes x̂ = ±1/2."""
    x = torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    weight, gradient = torch.tensor([2.0, 1.0], dtype=torch.float64), torch.tensor([[1.0, 4.0]], dtype=torch.float64)
    # γ·g = (2, 4): sums 6 and, with x̂, 1 − 2 = −1; x̂² − v/(v+eps) = 1/4 − 1/4 = 0
    expected = torch.tensor([-(0.5 / 2 * 6), 0.5 / 2 * 6], dtype=torch.float64)
    torch.testing.assert_close(statistics_term(x, weight, gradient, 3.0), expected)
    # as an RMSNorm the mean square is 5; eps 4 makes x̂ = (1, 1/3): γ·g·x̂ sums to 10/3; x̂² − 5/9 = ±4/9
    expected = torch.tensor([-(4 / 9 / 4 * 10 / 3), 4 / 9 / 4 * 10 / 3], dtype=torch.float64)
    torch.testing.assert_close(statistics_term(x, weight, gradient, 4.0, centred=False), expected)


@by_name
def test_outputs_and_gradients_stay_bit_for_bit(net: type[WeightedNet]) -> None:
    model, x, target = make(net, dtype=torch.float32)
    plain = model(x)
    F.cross_entropy(plain, target).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    est = tc.Importance(model, tc.trace(model, x), norm_term=True)
    outputs = model(x)
    est.backward(F.cross_entropy(outputs, target), outputs)
    assert torch.equal(outputs, plain)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name
    est.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_without_it_nothing_is_recorded() -> None:
    model, x, target = make(Stream)
    groups = tc.trace(model, x)
    seen: list[str] = []
    model.norms[0].register_forward_hook(lambda _m, _a, y: y.requires_grad and seen.append(type(y.grad_fn).__name__))
    for options in ({}, {"norm_term": False}, {"source": "activations"}, {"norm_term": True}):
        est = tc.Importance(model, groups, **options)
        est.backward(F.cross_entropy(model(x), target))
        est.close()
        model.zero_grad()
    assert seen[:3] == ["NativeLayerNormBackward0"] * 3
    assert seen[3] != seen[0]
    est = tc.Importance(model, groups, source="activations")
    model(x)
    assert {name.rpartition(".")[0] for name in est._sites.passes[0].sums} == {
        "up.0",
        "up.1",
        "down.0",
        "down.1",
        "head",
    }


@pytest.mark.parametrize("net", [Stream, RmsStream, Functional], ids=lambda net: net.__name__)
def test_frozen_parameters(net: type[WeightedNet]) -> None:
    model, x, target = make(net)
    expected = squares(model, x, target)
    model.requires_grad_(False)
    for name, score in squares(model, x, target).items():
        torch.testing.assert_close(score, expected[name], rtol=1e-10, atol=0)


def test_a_frozen_stream_that_is_changed_in_place_behind_its_norm() -> None:
    class InPlace(Stream):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            x += self.block(0, x)
            x = x + self.block(1, x)
            return self.head(self.norms[2](x).mean(1))

    model, x, target = make(Stream)
    expected = squares(model, x, target)
    model.__class__ = InPlace
    model.requires_grad_(False)
    for name, score in squares(model, x, target).items():
        torch.testing.assert_close(score, expected[name], rtol=1e-10, atol=0)


def test_accumulation_loss_scale_and_averages() -> None:
    model, x, target = make(Stream)
    groups = tc.trace(model, x)
    x, target = torch.cat([x, x.flip(0)]), torch.cat([target, target])
    expected = squares(model, x, target, groups)
    est = tc.Importance(model, groups, norm_term=True)
    for half in (slice(0, 3), slice(3, 6)):
        (F.cross_entropy(model(x[half]), target[half]) * 512).backward()
    est.update(grad_scale=1024)
    for name, score in est.scores().items():
        torch.testing.assert_close(score.double(), expected[name], rtol=1e-5, atol=1e-14)


@pytest.mark.parametrize("net", [Mlp, Stream, RmsStream], ids=lambda net: net.__name__)
def test_single_precision_and_autocast(net: type[WeightedNet]) -> None:
    model, x, target = make(net)
    exact = squares(model, x, target)
    model, x = model.float(), x.float()
    for name, score in squares(model, x, target).items():
        assert (score.double() - exact[name]).abs().max() <= 1e-4 * exact[name].max()
    with torch.autocast("cpu", torch.bfloat16):
        for name, score in squares(model, x, target).items():
            assert score.dtype == torch.float32
            assert (score.double() - exact[name]).abs().max() <= 0.1 * exact[name].max()
    model, x = model.bfloat16(), x.bfloat16()
    for name, score in squares(model, x, target).items():
        assert score.dtype == torch.float32
        assert (score.double() - exact[name]).abs().max() <= 0.1 * exact[name].max()


def test_the_term_of_16_bit_inputs_is_computed_in_single_precision() -> None:
    x, gradient = torch.randn(40, 16).bfloat16(), torch.randn(40, 16).bfloat16()
    weight = torch.rand(16).bfloat16()
    exact = statistics_term(x.double(), weight, gradient)
    torch.testing.assert_close(statistics_term(x, weight, gradient, None).double(), exact, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(statistics_term(x, weight, gradient), statistics_term(x, weight, gradient, None))


def test_follows_a_cut() -> None:
    model, x, target = make(Stream)
    groups = tc.trace(model, x)
    est = tc.Importance(model, groups, norm_term=True)
    est.backward(F.cross_entropy(model(x), target))
    keep = {"embed": torch.tensor([0, 2, 3, 6])}
    tc.cut(model, groups, keep)
    est.keep(keep)
    expected = path(model, x, target, groups.sizes())
    est.reset()
    model.zero_grad()
    est.backward(F.cross_entropy(model(x), target))
    for name, score in est.scores().items():
        torch.testing.assert_close(score.double(), expected[name].square(), rtol=1e-5, atol=1e-14)


def test_a_part_that_is_called_on_its_own_is_not_scored() -> None:
    model, x, target = make(Stream)
    expected = squares(model, x, target)
    groups = tc.trace(model, x)
    est = tc.Importance(model, groups, norm_term=True)
    model.norms[0](model.embed(x)).sum().backward()
    model.up[0](torch.randn(8, dtype=x.dtype)).sum().backward()
    est.backward(F.cross_entropy(model(x), target))
    for name, score in est.scores().items():
        torch.testing.assert_close(score.double(), expected[name], rtol=1e-5, atol=1e-14)


def test_passes_without_gradients_are_not_recorded() -> None:
    model, x, target = make(Stream)
    groups = tc.trace(model, x)
    est = tc.Importance(model, groups, norm_term=True)
    with torch.no_grad():
        model(x)
    assert est._sites.passes == []
    est.close()
    est = tc.Importance(model, groups, "taylor_fg")
    loss = F.cross_entropy(model(x), target)
    with torch.no_grad():
        model(x[:2])  # of another batch size than the pass that counts
    est.backward(loss)
    assert est.steps == 1


def test_activations_are_not_stored_twice() -> None:
    model, x, target = make(Stream)
    groups = tc.trace(model, x)

    def stored(norm_term: bool) -> int:
        kept: dict[int, Tensor] = {}
        est = tc.Importance(model, groups, source="activations", norm_term=norm_term)

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            F.cross_entropy(model(x), target)
        est.close()
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    assert stored(norm_term=True) == stored(norm_term=False)


def test_pruner() -> None:
    model, x, target = make(Stream)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    pruner = tc.Pruner(model, x, optimizer, {"macs": 0.6}, every=2, steps=2, norm_term=True)
    reference = tc.Importance(model, pruner.groups, source="activations")
    pruner.backward(F.cross_entropy(model(x), target))
    reference.update()
    inside = pruner.groups[next(name for name in pruner.groups.sizes() if name.startswith("embed"))].name
    assert not torch.allclose(pruner.importance.scores()[inside], reference.scores()[inside], rtol=1e-3)
    reference.close()
    for _ in range(5):
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
        pruner.backward(F.cross_entropy(model(x), target))
    assert pruner.done
    assert pruner.history[-1]["macs"] <= 0.6 * pruner.groups.original_macs


def test_bad_input_is_named() -> None:
    model, x, _ = make(Mlp)
    groups = tc.trace(model, x)
    with pytest.raises(
        tc.InputError, match=r"norm_term: wanted source='activations' or 'auto'.*got source='parameters'"
    ):
        tc.Importance(model, groups, source="parameters", norm_term=True)
    for criterion in ("taylor_fg", "taylor_weight", "taylor_output", "magnitude", "bn_scale", "random"):
        with pytest.raises(tc.InputError, match=rf"norm_term: wanted criterion='taylor_fo'.*got '{criterion}'"):
            tc.Importance(model, groups, criterion, norm_term=True)
    with pytest.raises(tc.InputError, match="norm_term"):
        tc.Pruner(model, x, source="parameters", norm_term=True)

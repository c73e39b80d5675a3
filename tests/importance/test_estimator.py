"""Scores against explicit gates, by hand, and under everything a training loop does to gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taylor_cuda as tc
from tests.importance.gated_nets import NETS, ConvBias, ConvBN, Depthwise, GatedNet, Residual, gate_gradients, make


def one_step(model: GatedNet, x: torch.Tensor, target: torch.Tensor, est: tc.Importance) -> dict[str, torch.Tensor]:
    model.zero_grad()
    est.backward(F.cross_entropy(model(x), target))
    return est.scores()


def estimator(model: GatedNet, x: torch.Tensor, criterion: str = "taylor_fo", **options: object) -> tc.Importance:
    return tc.Importance(model, tc.trace(model, x), criterion, **options)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("source", ["parameters", "activations"])
@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
def test_taylor_fo_is_the_squared_gradient_of_an_explicit_gate(net: type[GatedNet], source: str, train: bool) -> None:
    model, x, target = make(net)
    model.train(train)
    expected = gate_gradients(model, x, target)
    est = estimator(model, x, source=source)
    scores = one_step(model, x, target, est)
    assert set(scores) == set(model.group_sizes)
    for name, gradient in expected.items():
        bound = 1e-6 * gradient.square().max()  # scores are reported in fp32
        assert (scores[name] - gradient.square()).abs().max() <= bound, name
    est.close()


def test_affine_form_is_used_where_it_holds_and_only_there() -> None:
    model, x, _ = make(ConvBN)
    assert {m.tensor for m in tc.trace(model, x)["conv1"].affine} == {"bn1.weight", "bn1.bias"}
    for net in (ConvBias, Depthwise):
        model, x, _ = make(net)
        assert all(not group.affine for group in tc.trace(model, x) if group.name != "project")
    model, x, _ = make(Residual)
    assert not tc.trace(model, x)["stem"].affine


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
def test_taylor_fg_squares_each_example_after_summing_over_readers(net: type[GatedNet]) -> None:
    model, x, target = make(net)
    model.eval()
    est = estimator(model, x, "taylor_fg")
    scores = one_step(model, x, target, est)
    expected = {name: torch.zeros(size, dtype=x.dtype) for name, size in model.group_sizes.items()}
    for n in range(len(x)):  # eval mode: examples are independent, the batch mean is a sum of their losses over N
        for name, gradient in gate_gradients(model, x[n : n + 1], target[n : n + 1]).items():
            expected[name] += (gradient / len(x)).square()
    for name in expected:
        torch.testing.assert_close(scores[name].double(), expected[name], rtol=1e-5, atol=1e-12)


def test_first_order_score_is_at_most_n_times_the_full_gradient_one() -> None:
    model, x, target = make(ConvBN)
    model.eval()
    fo = one_step(model, x, target, estimator(model, x))
    fg = one_step(model, x, target, estimator(model, x, "taylor_fg"))
    for name in fo:
        assert (fo[name] <= len(x) * fg[name] * (1 + 1e-5)).all()
    single = one_step(model, x[:1], target[:1], estimator(model, x))
    alone = one_step(model, x[:1], target[:1], estimator(model, x, "taylor_fg"))
    for name in single:
        torch.testing.assert_close(single[name], alone[name], rtol=1e-5, atol=1e-12)


def test_taylor_output_by_hand() -> None:
    model, x, target = make(ConvBN)
    model.eval()
    captured: list[torch.Tensor] = []
    handle = model.conv2.register_forward_pre_hook(lambda _m, args: captured.append(args[0]) or args[0].retain_grad())
    F.cross_entropy(model(x), target).backward()
    handle.remove()
    a = captured[0]
    expected = (a * a.grad).mean((2, 3)).abs().mean(0)
    expected = expected / (expected.norm() + 1e-8)
    scores = one_step(model, x, target, estimator(model, x, "taylor_output"))
    torch.testing.assert_close(scores["conv1"].double(), expected.detach(), rtol=1e-5, atol=1e-9)


def test_criteria_of_weights_by_hand() -> None:
    model, x, target = make(Depthwise)
    squares = one_step(model, x, target, estimator(model, x, "taylor_weight"))
    w, d = model.expand.weight, model.depthwise.weight
    by_hand = (w * w.grad).square().sum((1, 2, 3)) + (d * d.grad).square().sum((1, 2, 3))  # the depthwise filter counts
    torch.testing.assert_close(squares["expand"].double(), by_hand.detach(), rtol=1e-5, atol=1e-12)
    magnitude = estimator(model, x, "magnitude").scores()["expand"]
    by_hand = w.square().sum((1, 2, 3)) + d.square().sum((1, 2, 3))
    torch.testing.assert_close(magnitude.double(), by_hand.detach(), rtol=1e-5, atol=0)
    scale = estimator(model, x, "bn_scale").scores()["expand"]
    by_hand = (model.bn1.weight.abs() + model.bn2.weight.abs()) / 2
    torch.testing.assert_close(scale.double(), by_hand.detach(), rtol=1e-6, atol=0)


def test_random_has_a_generator_of_its_own() -> None:
    model, x, _ = make(ConvBN)
    state = torch.get_rng_state()
    first = estimator(model, x, "random", seed=3)
    again = estimator(model, x, "random", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.scores()["conv1"], again.scores()["conv1"])
    before = first.scores()["conv1"]
    assert torch.equal(before, first.scores()["conv1"])
    first.fold()
    assert not torch.equal(before, first.scores()["conv1"])


def test_frozen_parameters_fall_back_to_activations() -> None:
    model, x, target = make(ConvBN)
    expected = gate_gradients(model, x, target)
    model.requires_grad_(False)
    est = estimator(model, x)
    scores = one_step(model, x, target, est)
    for name, gradient in expected.items():
        torch.testing.assert_close(scores[name].double(), gradient.square(), rtol=1e-5, atol=1e-12)
    with pytest.raises(tc.InputError, match="frozen"):
        estimator(model, x, source="parameters")
    with pytest.raises(tc.InputError, match="frozen"):
        estimator(model, x, "taylor_weight")


def test_a_group_with_one_frozen_reader_mixes_sources() -> None:
    model, x, target = make(Residual)
    expected = gate_gradients(model, x, target)
    model.b1.weight.requires_grad_(
        False
    )  # reads the stream: the stream's score now needs activations, the others don't
    scores = one_step(model, x, target, estimator(model, x))
    for name, gradient in expected.items():
        torch.testing.assert_close(scores[name].double(), gradient.square(), rtol=1e-5, atol=1e-12)


def test_window_is_the_mean_of_squares_and_folding_is_a_moving_average() -> None:
    model, x, target = make(ConvBN)
    est = estimator(model, x, momentum=0.75)
    halves = [(x[:2], target[:2]), (x[2:], target[2:]), (x, target)]
    squares = [gate_gradients(model, *half)["conv1"].square() for half in halves]
    for half in halves[:2]:
        one_step(model, *half, est)
    first = (squares[0] + squares[1]) / 2
    torch.testing.assert_close(est.scores()["conv1"].double(), first, rtol=1e-5, atol=1e-12)
    assert est.steps == 2
    est.fold()
    assert est.steps == 0
    torch.testing.assert_close(est.scores()["conv1"].double(), first, rtol=1e-5, atol=1e-12)
    one_step(model, *halves[2], est)
    blended = 0.75 * first + 0.25 * squares[2]
    torch.testing.assert_close(est.scores()["conv1"].double(), blended, rtol=1e-5, atol=1e-12)
    est.reset()
    with pytest.raises(tc.InputError, match="no scores yet"):
        est.scores()


@pytest.mark.parametrize("source", ["parameters", "activations"])
def test_gradient_accumulation_is_one_batch(source: str) -> None:
    model, x, target = make(ConvBias)
    expected = gate_gradients(model, x, target)
    est = estimator(model, x, source=source)
    model.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        (F.cross_entropy(model(x[half]), target[half]) / 2).backward()
    est.update()
    for name, gradient in expected.items():
        torch.testing.assert_close(est.scores()[name].double(), gradient.square(), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fg", "taylor_weight"])
def test_loss_scale_is_divided_out(criterion: str) -> None:
    model, x, target = make(ConvBias)
    plain = one_step(model, x, target, estimator(model, x, criterion))
    est = estimator(model, x, criterion)
    model.zero_grad()
    (F.cross_entropy(model(x), target) * 1024).backward()
    est.update(grad_scale=1024)
    for name in plain:
        torch.testing.assert_close(est.scores()[name], plain[name], rtol=1e-5, atol=1e-20)


def test_grad_scaler_is_used_and_divided_out() -> None:
    model, x, target = make(ConvBias, torch.float32)
    plain = one_step(model, x, target, estimator(model, x))
    est, scaler = estimator(model, x), torch.amp.GradScaler("cpu", init_scale=256.0)
    model.zero_grad()
    est.backward(F.cross_entropy(model(x), target), scaler=scaler)
    for name in plain:
        torch.testing.assert_close(est.scores()[name], plain[name], rtol=1e-4, atol=1e-12)
    assert model.head.bias.grad.abs().max() > 1  # the gradients themselves are scaled


def test_a_step_that_is_not_finite_is_skipped_and_counted() -> None:
    model, x, target = make(ConvBN)
    est = estimator(model, x)
    good = one_step(model, x, target, est)
    model.zero_grad()
    est.backward(F.cross_entropy(model(x), target) * float("inf"))
    assert (est.steps, est.skipped) == (1, 1)
    for name in good:
        assert torch.equal(est.scores()[name], good[name])


@pytest.mark.parametrize("source", ["parameters", "activations"])
def test_a_second_run_is_bit_equal(source: str) -> None:
    model, x, target = make(Residual, torch.float32)
    first = one_step(model, x, target, estimator(model, x, source=source))
    second = one_step(model, x, target, estimator(model, x, source=source))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_scoring_changes_neither_outputs_nor_gradients() -> None:
    model, x, target = make(Residual, torch.float32)
    plain = model(x)
    F.cross_entropy(plain, target).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    est = estimator(model, x, "taylor_fg")
    outputs = model(x)
    est.backward(F.cross_entropy(outputs, target), outputs)
    assert torch.equal(outputs, plain)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    est.close()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_state_dict_goes_on_where_it_was() -> None:
    model, x, target = make(ConvBN)
    est = estimator(model, x)
    one_step(model, x, target, est)
    est.fold()
    one_step(model, x[:2], target[:2], est)
    other = estimator(model, x)
    other.load_state_dict(est.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(est.scores().values(), other.scores().values(), strict=True))
    with pytest.raises(tc.InputError, match="criterion"):
        estimator(model, x, "taylor_fg").load_state_dict(est.state_dict())


def test_scores_follow_a_cut() -> None:
    model, x, target = make(Residual)
    groups = tc.trace(model, x)
    est = tc.Importance(model, groups)
    before = one_step(model, x, target, est)
    keep = {"stem": torch.tensor([0, 2, 5]), "a1": torch.tensor([1, 3])}
    tc.cut(model, groups, keep)
    est.keep(keep)
    for name, score in est.scores().items():
        assert torch.equal(score, before[name][keep[name]] if name in keep else before[name])
    model.group_sizes = groups.sizes()
    expected = gate_gradients(model, x, target)
    est.reset()
    for name, score in one_step(model, x, target, est).items():
        torch.testing.assert_close(score.double(), expected[name].square(), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_weight"])
def test_a_parameter_that_was_frozen_since_is_named(criterion: str) -> None:
    model, x, target = make(ConvBN)
    est = tc.Importance(model, tc.trace(model, x), criterion)
    name = est._units.places[0][0][0]
    model.get_parameter(name).requires_grad_(False)
    with pytest.raises(tc.InputError, match=f"{name} was frozen after this Importance was made"):
        one_step(model, x, target, est)


def test_bad_input_is_named() -> None:
    model, x, _ = make(ConvBN)
    groups = tc.trace(model, x)
    with pytest.raises(tc.InputError, match="no scores yet"):
        tc.Importance(model, groups).scores()
    with pytest.raises(tc.InputError, match=r"no gradients yet on any parameter .* \(\w+"):
        tc.Importance(model, groups).update()
    with pytest.raises(tc.InputError, match=r"did you mean 'taylor_fo'"):
        tc.Importance(model, groups, "taylor_f0")
    with pytest.raises(tc.InputError, match="every example"):
        tc.Importance(model, groups, "taylor_fg", source="parameters")
    with pytest.raises(tc.InputError, match="momentum"):
        tc.Importance(model, groups, momentum=1.0)
    with pytest.raises(tc.InputError, match=r"model\.module"):
        tc.Importance(nn.DataParallel(model), groups)
    with pytest.raises(tc.InputError, match="compiled"):
        tc.Importance(torch.compile(model, backend="eager"), groups)
    with pytest.raises(tc.InputError, match="no forward pass"):
        tc.Importance(model, groups, "taylor_fg").update()


def test_bn_scale_needs_a_normalisation() -> None:
    model, x, _ = make(ConvBias)
    with pytest.raises(tc.InputError, match="conv1"):
        estimator(model, x, "bn_scale").scores()

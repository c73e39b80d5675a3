"""Second-order criteria against brute force: Jacobians, Hessians and exact losses, in float64."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_cuda as tc
from taylor_cuda.errors import InputError
from taylor_cuda.importance.unit_gates import UnitGates
from tests.importance.gated_nets import Residual as Normed
from tests.importance.gated_nets import make
from tests.importance.riding_nets import Residual


class Coupled(nn.Module):
    """A residual stream that three layers read, and a plain layer; without a norm, so that examples are independent."""

    shape = (5, 2, 4, 4)

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.a, self.b = nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.b(torch.tanh(self.a(x))))
        return self.head(x.mean((2, 3)))


class Dense(Coupled):
    """The same with a result at every position."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.b(torch.tanh(self.a(x))))
        return self.head(x.movedim(1, -1)).movedim(-1, 1)


def made(net: Callable[[], nn.Module] = Coupled) -> tuple[nn.Module, Tensor, tc.Groups]:
    torch.manual_seed(0)
    model = net().double()
    x = torch.randn(Coupled.shape, dtype=torch.float64)
    return model, x, tc.trace(model, x)


def outputs_of_gates(model: nn.Module, groups: tc.Groups, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The model's outputs as a function of all gates."""

    def run(z: Tensor) -> Tensor:
        gates = UnitGates(model, list(groups))
        gates.lay_out(list(groups))
        gates._gates = z
        try:
            return model(x)
        finally:
            gates.close()

    return run


def units_of(groups: tc.Groups) -> int:
    return sum(group.size for group in groups)


def flat(scores: dict[str, Tensor]) -> Tensor:
    return torch.cat([each.double() for each in scores.values()])


def gauss_newton(
    model: nn.Module, groups: tc.Groups, x: Tensor, loss_of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """dE/dz, and the diagonal of Jᵀ·H·J with the Hessian of the loss in all outputs, of all examples."""
    run, ones = outputs_of_gates(model, groups, x), torch.ones(units_of(groups), dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(run, ones).flatten(0, -2)
    outputs = run(ones).detach()
    hessian = torch.autograd.functional.hessian(loss_of, outputs).reshape(outputs.numel(), -1)
    slope = torch.autograd.functional.jacobian(lambda z: loss_of(run(z)), ones)
    return slope, ((hessian @ jacobian) * jacobian).sum(0)


TARGET = torch.tensor([0, 2, 1, 1, 0])
SOFT = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.0, 0.0, 1.0], [0.2, 0.2, 0.6], [1.0, 0.0, 0.0]]).double()
WEIGHTS = torch.tensor([0.5, 2.0, 1.0]).double()

LOSSES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "mean": ("cross_entropy", lambda y: F.cross_entropy(y, TARGET)),
    "sum": ("cross_entropy", lambda y: F.cross_entropy(y, TARGET, reduction="sum")),
    "smoothed": ("cross_entropy", lambda y: F.cross_entropy(y, TARGET, label_smoothing=0.2)),
    "weighted": ("cross_entropy", lambda y: F.cross_entropy(y, TARGET, WEIGHTS)),
    "both": ("cross_entropy", lambda y: F.cross_entropy(y, TARGET, WEIGHTS, label_smoothing=0.1)),
    "ignored": ("cross_entropy", lambda y: F.cross_entropy(y, TARGET, ignore_index=1)),
    "soft": ("cross_entropy", lambda y: F.cross_entropy(y, SOFT)),
    "bce": ("bce", lambda y: F.binary_cross_entropy_with_logits(y, SOFT, pos_weight=WEIGHTS)),
    "mse": ("mse", lambda y: F.mse_loss(y, SOFT)),
    "any": ("any", lambda y: F.cross_entropy(y, TARGET) + 0.1 * y.logsumexp(1).square().mean()),
}


def all_signs(monkeypatch: pytest.MonkeyPatch, length: int) -> int:
    """Draw every vector of signs once; how many there are."""
    every = itertools.cycle(itertools.product((-1.0, 1.0), repeat=length))
    from taylor_cuda.importance import output_curvature

    def signs(x: Tensor, _generator: torch.Generator) -> Tensor:
        return torch.tensor(next(every), dtype=torch.float64).view(1, *x.shape[1:])

    monkeypatch.setattr(output_curvature, "_signs", signs)
    return 2**length


@pytest.mark.parametrize("name", LOSSES)
def test_all_probes_together_are_the_gauss_newton_diagonal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, groups = made()
    kind, loss_of = LOSSES[name]
    slope, curve = gauss_newton(model, groups, x, loss_of)
    est = tc.Importance(model, groups, "taylor_so", loss=kind, probes=all_signs(monkeypatch, 3))
    outputs = model(x)
    est.backward(loss_of(outputs), outputs)
    torch.testing.assert_close(flat(est.scores()), (0.5 * curve - slope).square(), rtol=1e-5, atol=1e-12)
    est.close()


@pytest.mark.parametrize("last", [False, True], ids=["[N, C, H, W]", "[N, H, W, C] flattened"])
def test_positions_of_an_example_have_signs_of_their_own(last: bool) -> None:
    model, x, groups = made(Dense)
    target = torch.randint(3, (5, 4, 4))
    target[0, 0] = -100

    def loss_of(y: Tensor) -> Tensor:
        flattened = y.flatten(0, -2) if last else y
        return F.cross_entropy(flattened, target.flatten() if last else target)

    run = model.forward
    if last:
        model.forward = lambda x: run(x).movedim(1, -1)  # type: ignore[method-assign]
    slope, curve = gauss_newton(model, groups, x, loss_of)
    errors = []
    for probes in (64, 1024):
        est = tc.Importance(model, groups, "taylor_so", probes=probes)
        outputs = model(x)
        est.backward(loss_of(outputs), outputs)
        assert est._window is not None
        found = est._window.chunk(2)
        torch.testing.assert_close(found[0], slope)
        errors.append(float((found[1] - curve).norm() / curve.norm()))
        est.close()
    assert errors[0] < 4 / 64**0.5
    assert errors[1] < 4 / 1024**0.5


def test_a_probe_is_right_on_average_and_converges_at_the_rate_of_chance() -> None:
    model, x, groups = made()
    loss_of = LOSSES["mean"][1]
    _, curve = gauss_newton(model, groups, x, loss_of)
    est = tc.Importance(model, groups, "taylor_so")
    drawn = []
    for _ in range(400):
        outputs = model(x)
        est.backward(loss_of(outputs), outputs)
        assert est._window is not None
        drawn.append(est._window.chunk(2)[1].clone())
        est.reset()
    sample = torch.stack(drawn)
    spread = sample.std(0) / 400**0.5
    assert ((sample.mean(0) - curve).abs() <= 4.5 * spread + 1e-15).all()
    assert sample.std(0).max() > 0  # no two steps have the same probe


class Quadratic(nn.Module):
    """Linear in the gates of its hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_on_a_quadratic_loss_it_is_the_true_change(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x, target = Quadratic().double(), torch.randn(7, 3).double(), torch.randn(7, 2).double()
    groups = tc.trace(model, x)
    truth = torch.zeros(6, dtype=torch.float64)
    for unit in range(6):
        keep = {"first": torch.tensor([i for i in range(6) if i != unit])}
        with torch.no_grad(), tc.masked(model, groups, keep):
            truth[unit] = F.mse_loss(model(x), target)
    truth -= F.mse_loss(model(x), target).detach()
    for criterion, probes in (("taylor_so", all_signs(monkeypatch, 2)), ("taylor_so_hessian", 1)):
        est = tc.Importance(model, groups, criterion, loss="mse", probes=probes)
        outputs = model(x)
        est.backward(F.mse_loss(outputs, target), outputs)
        torch.testing.assert_close(flat(est.scores()), truth.square(), rtol=1e-5, atol=1e-12)
        est.close()


@pytest.mark.parametrize("together", [16, 1])
def test_the_hessian_is_exact(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, groups = made()
    loss_of = LOSSES["mean"][1]
    run, ones = outputs_of_gates(model, groups, x), torch.ones(units_of(groups), dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda z: loss_of(run(z)), ones).diagonal()
    slope = torch.autograd.functional.jacobian(lambda z: loss_of(run(z)), ones)
    monkeypatch.setattr("taylor_cuda.importance.unit_gates.TOGETHER", together)
    for criterion, wanted in (
        ("taylor_so_hessian", (0.5 * hessian - slope).square()),
        ("obd", (0.5 * hessian.clamp_min(0)).square()),
    ):
        est = tc.Importance(model, groups, criterion)
        outputs = model(x)
        est.backward(loss_of(outputs), outputs)
        torch.testing.assert_close(flat(est.scores()), wanted, rtol=1e-5, atol=1e-12)
        est.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_fisher_is_half_the_mean_square_of_examples_own_gradients() -> None:
    model, x, groups = made()
    run, ones = outputs_of_gates(model, groups, x), torch.ones(units_of(groups), dtype=torch.float64)
    own = torch.autograd.functional.jacobian(lambda z: F.cross_entropy(run(z), TARGET, reduction="none"), ones)
    fisher, slope = own.square().mean(0), own.mean(0)
    for criterion, wanted in (("fisher", 0.5 * fisher), ("taylor_fo_fisher", 0.5 * fisher - slope)):
        est = tc.Importance(model, groups, criterion)
        F.cross_entropy(model(x), TARGET).backward()
        est.update()
        torch.testing.assert_close(flat(est.scores()), wanted.square(), rtol=1e-5, atol=1e-12)
        est.close()


def test_the_window_averages_before_it_squares() -> None:
    model, x, groups = made()
    both = []
    est = tc.Importance(model, groups, "taylor_so_hessian")
    for examples in (slice(0, 3), slice(3, 5)):
        one = tc.Importance(model, groups, "taylor_so_hessian")
        outputs = model(x[examples])
        loss = F.cross_entropy(outputs, TARGET[examples])
        one.backward(loss, outputs)
        assert one._window is not None
        both.append(one._window)
        one.close()
        outputs = model(x[examples])
        est.backward(F.cross_entropy(outputs, TARGET[examples]), outputs)
    slope, curve = torch.stack(both).mean(0).chunk(2)
    torch.testing.assert_close(flat(est.scores()), (0.5 * curve - slope).square(), rtol=1e-5, atol=1e-12)
    est.close()


@pytest.mark.parametrize("criterion", ["taylor_so", "taylor_so_hessian", "fisher"])
def test_accumulated_batches_are_one(criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, groups = made()
    x, target = x[:4], TARGET[:4]
    probes = all_signs(monkeypatch, 3)
    whole, parts = (tc.Importance(model, groups, criterion, probes=probes) for _ in range(2))
    whole_first = model(x)  # both have gates in the model: what whole sees of the parts' passes is thrown away
    whole.backward(F.cross_entropy(whole_first, target), whole_first)
    expected = flat(whole.scores())
    whole.close()
    parts.reset()
    for i in (0, 1):
        half = slice(2 * i, 2 * i + 2)
        outputs = model(x[half])
        parts.backward(F.cross_entropy(outputs, target[half]) / 2, outputs, accumulate=i == 0)
    assert parts.steps == 1
    torch.testing.assert_close(flat(parts.scores()), expected, rtol=1e-5, atol=1e-12)
    parts.close()


class Scaler:
    """What a ``GradScaler`` does to a loss."""

    def scale(self, x: Tensor) -> Tensor:
        return x * 1024.0


@pytest.mark.parametrize("kind", ["mean", "mse", "any"])
def test_a_scaler_changes_nothing(kind: str) -> None:
    name, loss_of = LOSSES[kind]
    found = []
    for scaler in (None, Scaler()):
        model, x, groups = made()
        est = tc.Importance(model, groups, "taylor_so", loss=name)
        outputs = model(x)
        est.backward(loss_of(outputs), outputs, scaler=scaler)
        found.append(flat(est.scores()))
        est.close()
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-14)


def test_a_step_that_overflowed_is_left_out() -> None:
    model, x, groups = made()
    est = tc.Importance(model, groups, "taylor_so")
    for factor in (1.0, float("inf")):
        outputs = model(x)
        est.backward(F.cross_entropy(outputs, TARGET) * factor, outputs)
        model.zero_grad()
    assert (est.steps, est.skipped) == (1, 1)
    assert flat(est.scores()).isfinite().all()
    est.close()


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("criterion", ["taylor_so", "taylor_so_hessian", "fisher"])
def test_gradients_and_random_numbers_are_those_of_a_plain_step(criterion: str, fuse: bool) -> None:
    runs = []
    for scored in (False, True):
        model, x, groups = made()
        torch.manual_seed(3)
        est = tc.Importance(model, groups, criterion, fuse=fuse) if scored else None
        outputs = model(x)
        loss = F.cross_entropy(outputs, TARGET)
        if est is None:
            loss.backward()
        else:
            est.backward(loss, outputs)
            est.close()
        runs.append([*(parameter.grad for parameter in model.parameters()), torch.rand(3)])
    for plain, ours in zip(*runs, strict=True):
        assert torch.equal(plain, ours)


def test_sums_that_ride_on_relus_are_those_of_gates() -> None:
    found = []
    for fuse in (True, False):
        torch.manual_seed(0)
        model, x = Residual().double().eval(), torch.randn(Residual.shape, dtype=torch.float64)
        groups = tc.trace(model, x)
        est = tc.Importance(model, groups, "taylor_so", fuse=fuse, loss="mse")
        outputs = model(x)
        est.backward(F.mse_loss(outputs, torch.zeros_like(outputs)), outputs)
        if fuse:
            assert est._sites is not None
            assert any(program.fused for program in est._sites._sites._programs.values())
        found.append(flat(est.scores()))
        est.close()
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-12)


def test_two_outputs_have_probes_of_their_own() -> None:
    class Two(Coupled):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            x = torch.relu(self.stem(x))
            x = torch.relu(x + self.b(torch.tanh(self.a(x))))
            return {"main": self.head(x.mean((2, 3))), "aux": (self.other(x.amax((2, 3))),), "count": 3}

    torch.manual_seed(0)
    model, x = Two().double(), torch.randn(Coupled.shape, dtype=torch.float64)
    groups = tc.trace(model, x)

    def loss_of(main: Tensor, aux: Tensor) -> Tensor:
        return F.cross_entropy(main, TARGET) + 0.3 * F.cross_entropy(aux, TARGET.clamp_max(1))

    run = model.forward
    curves = []
    for which in (0, 1):
        model.forward = lambda x, which=which: (run(x)["main"], run(x)["aux"][0])[which]  # type: ignore[method-assign]
        alone = [lambda y: F.cross_entropy(y, TARGET), lambda y: 0.3 * F.cross_entropy(y, TARGET.clamp_max(1))]
        curves.append(gauss_newton(model, groups, x, alone[which])[1])
    model.forward = run  # type: ignore[method-assign]
    est = tc.Importance(model, groups, "taylor_so", probes=3000)
    outputs = model(x)
    est.backward(loss_of(outputs["main"], outputs["aux"][0]), outputs)
    assert est._window is not None
    found = est._window.chunk(2)[1]
    wanted = curves[0] + curves[1]
    assert float((found - wanted).norm() / wanted.norm()) < 0.1
    est.close()


def test_a_resumed_run_draws_the_same_probes() -> None:
    model, x, groups = made()

    def step(est: tc.Importance) -> None:
        outputs = model(x)
        est.backward(F.cross_entropy(outputs, TARGET), outputs)

    first = tc.Importance(model, groups, "taylor_so", seed=5)
    step(first)
    state = first.state_dict()
    step(first)
    expected = flat(first.scores())
    first.close()
    second = tc.Importance(model, groups, "taylor_so", seed=5)
    second.load_state_dict(state)
    step(second)
    assert torch.equal(flat(second.scores()), expected)
    second.close()


def test_what_is_collected_follows_a_cut() -> None:
    model, x, groups = made()
    est = tc.Importance(model, groups, "taylor_so_hessian")
    outputs = model(x)
    est.backward(F.cross_entropy(outputs, TARGET), outputs)
    before = est.scores()
    model.zero_grad()
    del outputs
    keep = {"stem": torch.tensor([0, 3])}
    tc.cut(model, groups, keep)
    est.keep(keep)
    after = est.scores()
    for name, scores in before.items():
        assert torch.equal(after[name], scores[keep.get(name, torch.arange(len(scores)))])
    outputs = model(x)
    est.backward(F.cross_entropy(outputs, TARGET), outputs)
    assert est.steps == 2
    est.close()


@pytest.mark.parametrize("mode", ["cut", "compact", "mask"])
def test_a_pruner_takes_it(mode: str) -> None:
    model, x, _ = made()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    pruner = tc.Pruner(
        model, x, optimizer, {"macs": 0.6}, criterion="taylor_so", every=2, steps=2, mode=mode, min_keep=1
    )
    for _ in range(4):
        outputs = model(x)
        pruner.backward(F.cross_entropy(outputs, TARGET), outputs)
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    assert pruner.done
    pruner.finish()


def test_bad_input() -> None:
    model, x, groups = made()
    for wrong in ({"loss": "hinge"}, {"loss": 3}, {"probes": 0}, {"probes": True}, {"source": "parameters"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            tc.Importance(model, groups, "taylor_so", **wrong)
    with pytest.raises(InputError, match="shared_norm"):
        tc.Importance(model, groups, "taylor_so", shared_norm="blocks")
    with pytest.raises(InputError, match="mode='cut'"):
        tc.Pruner(model, x, criterion="obd", mode="compact")
    est = tc.Importance(model, groups, "taylor_so")
    outputs = model(x)
    with pytest.raises(InputError, match=r"outputs: .*what the model returned"):
        est.backward(F.cross_entropy(outputs, TARGET))
    with pytest.raises(InputError, match="loss: the curvature"):
        est.backward(F.mse_loss(outputs, SOFT), outputs)
    other = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True) * 2
    with pytest.raises(InputError, match="doesn't depend"):
        est.backward(F.cross_entropy(outputs, TARGET), other)
    F.cross_entropy(outputs, TARGET).backward()
    with pytest.raises(InputError, match=r"backward\(loss, outputs\)"):
        est.update()
    est.close()


def test_losses_have_names() -> None:
    from taylor_cuda.importance.output_curvature import loss_name

    assert loss_name(nn.CrossEntropyLoss(label_smoothing=0.1)) == loss_name(F.cross_entropy) == "cross_entropy"
    assert (loss_name(nn.BCEWithLogitsLoss()), loss_name(F.mse_loss), loss_name(lambda y: y)) == ("bce", "mse", "any")


def test_shared_norm_divides_streams_by_their_blocks() -> None:
    model, x, groups = made()
    plain, divided = (tc.Importance(model, groups, shared_norm=norm) for norm in ("none", "blocks"))
    F.cross_entropy(model(x), TARGET).backward()
    plain.update(), divided.update()
    assert torch.equal(plain.scores()["stem"], divided.scores()["stem"])  # one addition
    from taylor_cuda.importance.members import blocks_of

    torchvision = pytest.importorskip("torchvision")
    for name, blocks in (("resnet50", [3, 4, 6, 3]), ("resnet34", [3, 4, 6, 3])):
        big = torchvision.models.get_model(name)
        tensors = dict(big.named_parameters())
        counts = [blocks_of(group, tensors) for group in tc.trace(big, torch.zeros(1, 3, 32, 32), prove=False)]
        assert [count for count in counts if count > 1] == [count for count in blocks if count > 1]
        assert set(counts) == {1, 3, 4, 6}


@pytest.mark.parametrize("criterion", ["bn_taylor", "bn_taylor_scale", "taylor_filter"])
def test_sums_over_parameters_are_squared_together(criterion: str) -> None:
    model, x, target = make(Normed)
    model.eval()
    groups = tc.trace(model, x)
    est = tc.Importance(model, groups, criterion)
    est.backward(F.cross_entropy(model(x), target))
    tensors = dict(model.named_parameters())
    for group in groups:
        total = torch.zeros(group.size, dtype=torch.float64)
        for member in group.members:
            is_norm = member.role == "norm" and member.tensor in tensors
            wanted = member.role == "write" if criterion == "taylor_filter" else is_norm
            if criterion == "bn_taylor_scale":
                wanted = wanted and member.tensor.endswith("weight")
            if not wanted:
                continue
            tensor = tensors[member.tensor]
            along = (
                (tensor * tensor.grad).detach().movedim(member.dim, 0).flatten(1).sum(1)
                if tensor.dim() > 1
                else (tensor * tensor.grad).detach()
            )
            total += along[member.index].sum(1)
        torch.testing.assert_close(est.scores()[group.name].double(), total.square(), rtol=1e-5, atol=1e-12)
    est.close()


def test_a_filter_before_a_norm_in_training_is_told_of() -> None:
    model, x, target = make(Normed)
    groups = tc.trace(model, x)
    est = tc.Importance(model.train(), groups, "taylor_filter")
    with pytest.warns(UserWarning, match="taylor_filter"):
        est.backward(F.cross_entropy(model(x), target))
    model.zero_grad()
    est = tc.Importance(model.eval(), groups, "taylor_filter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        est.backward(F.cross_entropy(model(x), target))

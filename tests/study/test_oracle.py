"""``tc.oracle`` and its two relatives: what they mean, and that they leave everything as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_cuda as tc
from tests.study.naive import changes

pytestmark = pytest.mark.usefixtures("one_thread")


class Linear(nn.Module):
    """y = w₂ (w₁ x): the loss change is worked out by hand."""

    def __init__(self, units: int = 3) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(1, units, bias=False), nn.Linear(units, 1, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(torch.arange(1.0, units + 1)[:, None])
            self.b.weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Small(nn.Module):
    """A convolution, a normalisation with statistics, dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(F.relu(self.b(F.relu(self.bn(self.a(x))))).mean((2, 3))))


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean()


def linear() -> tuple[nn.Module, Any, list[Any]]:
    """Targets 6 for x = 1 and 10 for x = 2: the errors of the whole network are 0 and 2."""
    model = Linear().double()
    x, target = torch.tensor([[1.0], [1.0], [2.0]]).double(), torch.tensor([[6.0], [6.0], [10.0]]).double()
    groups = tc.trace(model, x)
    return model, groups, [(x[:2], target[:2]), (x[2:], target[2:])]


def small(batch: int = 6) -> tuple[nn.Module, Any, list[Any]]:
    model = Small()
    with torch.no_grad():
        model.bn.running_mean.normal_()
    data = [(torch.randn(n, 2, 7, 7), torch.randint(3, (n,))) for n in (batch, batch - 2)]
    return model, tc.trace(model, data[0][0]), data


# -- values by hand ------------------------------------------------------------

# without unit u (w = u + 1) the errors are -w on the first batch and 2 - 2w on the second
BY_BATCH = torch.tensor([[1.0, 4.0, 9.0], [0.0 - 4.0, 4.0 - 4.0, 16.0 - 4.0]]).double()


def test_signed_is_the_change_of_the_mean_loss_over_the_set():
    model, groups, batches = linear()
    found = tc.oracle(model, groups, mse, batches)
    assert list(found) == ["a"]
    assert found["a"].dtype == torch.float64
    assert torch.allclose(found["a"], (2 * BY_BATCH[0] + BY_BATCH[1]) / 3, atol=1e-12)


@pytest.mark.parametrize(("form", "of"), [("absolute", torch.abs), ("squared", torch.square), ("signed", lambda x: x)])
def test_forms_over_the_set_and_by_batch(form: Any, of: Any):
    model, groups, batches = linear()
    over_set = tc.oracle(model, groups, mse, batches, form=form, per="set")["a"]
    by_batch = tc.oracle(model, groups, mse, batches, form=form, per="batch")["a"]
    assert torch.allclose(over_set, of((2 * BY_BATCH[0] + BY_BATCH[1]) / 3), atol=1e-12)
    assert torch.allclose(by_batch, (2 * of(BY_BATCH[0]) + of(BY_BATCH[1])) / 3, atol=1e-12)


def test_on_an_exact_quadratic_it_is_the_expansion_to_second_order():
    """SYSTEMS 1.1: -dE/dz + ½ H_zz is the whole change where the loss is quadratic in the gates."""
    model, groups, batches = linear()
    x, target = (torch.cat(part) for part in zip(*batches, strict=True))
    gates = torch.ones(3, dtype=torch.float64, requires_grad=True)

    def loss(z: Tensor) -> Tensor:
        return mse(model.b(model.a(x) * z), target)

    first = torch.autograd.functional.jacobian(loss, gates)
    second = torch.autograd.functional.hessian(loss, gates).diagonal()
    assert torch.allclose(tc.oracle(model, groups, mse, batches)["a"], -first + second / 2, atol=1e-12)


def test_greedy_measures_again_after_each_removal():
    """Alone, unit 0 is best: -2/3. After it, with errors -1, -1, 0, unit 1 costs 4 more than unit 0 would have."""
    model, groups, batches = linear()
    order = tc.greedy_oracle(model, groups, mse, batches, 2)
    assert [(step.group, step.unit) for step in order] == [("a", 0), ("a", 1)]
    # errors of the three examples: 0 0 2 | -1 -1 0 | -3 -3 -4
    assert [step.change for step in order] == pytest.approx([(1 + 1 + 0 - 4) / 3, (9 + 9 + 16 - 2) / 3], abs=1e-12)


def test_greedy_in_absolute_form_takes_what_changes_least():
    model, groups, batches = linear()
    # unit 1: errors -2 -2 -2, 12 - 4 = 8 over 3; unit 0: -2 over 3
    assert tc.greedy_oracle(model, groups, mse, batches, 1, form="absolute")[0].unit == 0
    model.b.weight.data[0, 0] = 3.0  # y = 8x: errors 2 2 6; without unit 0 -1 -1 0; without 1 0 0 2; without 2 -1 -1 0
    signed, absolute = (
        tc.greedy_oracle(model, groups, mse, batches, 1, form=form)[0] for form in ("signed", "absolute")
    )
    assert signed.unit in (0, 2)
    assert signed.change == pytest.approx((2 - 44) / 3)
    assert absolute.unit == 1
    assert absolute.change == pytest.approx((4 - 44) / 3)


def test_combinatorial_tries_every_subset():
    model, groups, batches = linear()
    found = tc.combinatorial_oracle(model, groups, mse, batches, "a", 2)
    assert found.subsets.tolist() == [[0, 1], [0, 2], [1, 2]]
    # w taken away: 3, 4, 5; errors -w -w 2 - 2w, and 4 before
    expected = [(2 * w**2 + (2 - 2 * w) ** 2 - 4) / 3 for w in (3, 4, 5)]
    assert found.changes.tolist() == pytest.approx(expected, abs=1e-12)
    assert found.units.tolist() == [0, 1]
    assert found.change == pytest.approx(expected[0])


def test_greedy_on_a_network_is_the_same_as_by_hand():
    model, groups, batches = small()
    model, batches = model.double().eval(), [(x.double(), target) for x, target in batches]
    order = tc.greedy_oracle(model, groups, F.cross_entropy, batches, 4)
    off: dict[str, list[int]] = {}
    from tests.study.naive import loss_without

    def mean(off: dict[str, list[int]]) -> float:
        losses = [len(x) * loss_without(model, groups, F.cross_entropy, x, target, off) for x, target in batches]
        return sum(losses) / sum(len(x) for x, _ in batches)

    for step in order:
        before, best = mean(off), (float("inf"), "", 0)
        for group in groups:
            gone = off.get(group.name, [])
            if len(gone) < group.size - 1:
                left = [unit for unit in range(group.size) if unit not in gone]
                best = min(best, *((mean({**off, group.name: [*gone, unit]}), group.name, unit) for unit in left))
        assert (step.group, step.unit) == best[1:]
        assert step.change == pytest.approx(best[0] - before, abs=1e-12)
        off.setdefault(step.group, []).append(step.unit)


def test_greedy_empties_no_group():
    model, groups, batches = linear()
    layers = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    for layer in layers:
        nn.init.ones_(layer.weight)
    two, x = tc.trace(layers, torch.ones(2, 1)), torch.ones(2, 1)
    # nothing would be better than an output of zero, which an empty group gives
    assert {step.group for step in tc.greedy_oracle(layers, two, mse, [(x, 0 * x)], 2)} == {"0", "1"}
    with pytest.raises(tc.InputError, match="wanted 1 to 2"):
        tc.greedy_oracle(model, groups, mse, batches, 3)


# -- what it takes -------------------------------------------------------------


def test_any_iterable_is_gone_through_once():
    model, groups, batches = small()
    whole = tc.oracle(model, groups, F.cross_entropy, batches)
    once = tc.oracle(model, groups, F.cross_entropy, iter(batches))
    assert all(torch.equal(whole[name], once[name]) for name in whole)


def test_eval_mode_whatever_the_model_is_in():
    model, groups, batches = small()
    training = tc.oracle(model.train(), groups, F.cross_entropy, batches)
    evaluated = tc.oracle(model.eval(), groups, F.cross_entropy, batches)
    assert all(torch.equal(training[name], evaluated[name]) for name in training)


def test_arguments_are_checked():
    model, groups, batches = small()
    loss = F.cross_entropy
    for given, match in [
        ({"form": "cubed"}, "form: wanted one of"),
        ({"per": "epoch"}, "per: wanted one of"),
        ({"memory": 0}, "memory: wanted a number of bytes"),
        ({"resume": 3}, "resume: wanted a path"),
    ]:
        with pytest.raises(tc.InputError, match=match):
            tc.oracle(model, groups, loss, batches, **given)
    for wrong, match in [([], "at least one example"), (batches[0][0], "wanted a list"), ([3], r"wanted \(inputs, ta")]:
        with pytest.raises(tc.InputError, match=match):
            tc.oracle(model, groups, loss, wrong)
    with pytest.raises(tc.InputError, match="loss_fn: wanted the mean loss"):
        tc.oracle(model, groups, lambda outputs, targets: outputs, batches)
    with pytest.raises(tc.InputError, match="loss_fn: wanted the mean loss"):
        tc.oracle(model, groups, lambda outputs, targets: 1.0, batches)
    with pytest.raises(tc.InputError, match="made for another model"):
        tc.oracle(Linear(), groups, loss, batches)
    with pytest.raises(tc.InputError, match="model was compiled"):
        tc.oracle(torch.compile(model), groups, loss, batches)
    with pytest.raises(tc.InputError, match="group: wanted one of"):
        tc.combinatorial_oracle(model, groups, loss, batches, "c", 1)
    with pytest.raises(tc.InputError, match="count: wanted 1 to 4 units"):
        tc.combinatorial_oracle(model, groups, loss, batches, "a", 5)
    with pytest.raises(tc.InputError, match="has 10 subsets of 2 units, more than limit=9"):
        tc.combinatorial_oracle(model, groups, loss, batches, "a", 2, limit=9)


# -- what it leaves ------------------------------------------------------------


def everything(model: nn.Module) -> list[Any]:
    tensors = [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    return [tensors, grads, modes, hooks, torch.get_rng_state(), torch.is_grad_enabled(), sorted(vars(model))]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


class StoppedError(Exception):
    pass


@pytest.mark.filterwarnings("ignore:oracle. every removal takes a whole forward pass:RuntimeWarning")
@pytest.mark.parametrize("stop", [None, StoppedError, KeyboardInterrupt])
def test_the_model_and_all_states_stay_as_they_were(stop: type[BaseException] | None):
    model, groups, batches = small()
    model.train()
    model.bn.eval()  # the user's own choice
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    calls = 0

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        torch.rand(3)
        if stop is not None and calls >= 4:
            raise stop
        return F.cross_entropy(outputs, targets)

    before = everything(model)
    inputs = [x.clone() for x, _ in batches]
    if stop is None:
        tc.oracle(model, groups, loss_fn, batches)
    else:
        with pytest.raises(stop):
            tc.oracle(model, groups, loss_fn, batches)
    assert same(before, everything(model))
    assert all(torch.equal(x, kept) for (x, _), kept in zip(batches, inputs, strict=True))
    assert not torch.overrides._get_current_function_mode_stack()


# -- going on ------------------------------------------------------------------


@pytest.mark.parametrize("per", ["set", "batch"])
def test_it_goes_on_where_it_was_interrupted(per: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, groups, batches = small()
    path = tmp_path / "deep" / "oracle.pt"
    expected = tc.oracle(model, groups, F.cross_entropy, batches, form="absolute", per=per)
    from taylor_cuda.study.evaluate import Evaluator

    asked: list[str] = []
    losses = Evaluator.losses

    def counted(self: Evaluator, name: str, units: Tensor) -> Tensor:
        asked.append(name)
        if len(asked) == stop_at:
            raise KeyboardInterrupt
        return losses(self, name, units)

    monkeypatch.setattr(Evaluator, "losses", counted)
    names = [group.name for group in groups]
    stop_at = len(names) + 2  # in the second batch, after its first group
    with pytest.raises(KeyboardInterrupt):
        tc.oracle(model, groups, F.cross_entropy, batches, form="absolute", per=per, resume=path)
    assert [entry.name for entry in path.parent.iterdir()] == ["oracle.pt"]
    asked.clear()
    stop_at = -1
    found = tc.oracle(model, groups, F.cross_entropy, batches, form="absolute", per=per, resume=path)
    assert asked == names[1:]
    assert all(torch.equal(found[name], expected[name]) for name in names)
    asked.clear()
    again = tc.oracle(model, groups, F.cross_entropy, iter(batches), form="absolute", per=per, resume=str(path))
    assert not asked
    assert all(torch.equal(again[name], expected[name]) for name in names)


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    model, groups, batches = small()
    path = tmp_path / "oracle.pt"
    tc.oracle(model, groups, F.cross_entropy, batches, resume=path)
    with pytest.raises(tc.InputError, match="other weights, groups or options"):
        tc.oracle(model, groups, F.cross_entropy, batches, form="squared", resume=path)
    with pytest.raises(tc.InputError, match="batch 0 isn't the one"):
        tc.oracle(model, groups, F.cross_entropy, batches[::-1], resume=path)
    more = [*batches, batches[0]]
    found = tc.oracle(model, groups, F.cross_entropy, more, resume=path)
    plain = tc.oracle(model, groups, F.cross_entropy, more)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    with torch.no_grad():
        model.head.bias[0] += 1
    with pytest.raises(tc.InputError, match="other weights, groups or options"):
        tc.oracle(model, groups, F.cross_entropy, batches, resume=path)
    path.write_bytes(b"torn")
    with pytest.raises(tc.CheckpointError, match="can't be read"):
        tc.oracle(model, groups, F.cross_entropy, batches, resume=path)


def test_a_bar_is_shown_when_asked_for(capfd: pytest.CaptureFixture[str]):
    model, groups, batches = small()
    tc.oracle(model, groups, F.cross_entropy, batches)
    assert capfd.readouterr() == ("", "")
    tc.oracle(model, groups, F.cross_entropy, batches, progress=True)
    assert f"{2 * sum(groups.sizes().values())}" in capfd.readouterr().err


def test_a_network_is_measured_as_it_is_defined():
    model, groups, batches = small()
    found = tc.oracle(model, groups, F.cross_entropy, batches, per="batch", form="squared")
    expected = changes(model.eval(), groups, F.cross_entropy, batches)
    weights = torch.tensor([len(x) for x, _ in batches], dtype=torch.float64)
    for name, change in expected.items():
        mean = (change.square() * weights[:, None]).sum(0) / weights.sum()
        assert torch.allclose(found[name], mean, atol=1e-6)

"""What ``taylor_so`` does to a training step, and what a step may be made of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

import taylor_cuda as tc
from taylor_cuda.importance.activations import ReaderSums
from tests.importance.gated_nets import ConvBN, GatedNet, Residual, make
from tests.importance.riding import same_bits
from tests.importance.second_order import EverySign, flat, scored, still
from tests.importance.test_no_synchronisation import NothingWaits
from tests.loops.loop import EXAMPLE, Net, batches

pytestmark = pytest.mark.usefixtures("one_thread")

EXTRA_PASSES = ("taylor_so", "taylor_so_hessian", "obd")


@pytest.fixture
def signs(monkeypatch: pytest.MonkeyPatch) -> EverySign:
    found = EverySign(monkeypatch)
    found.now = (1.0, -1.0, -1.0, 1.0)
    return found


def step(model: nn.Module, x: Tensor, target: Tensor, backward: Callable[[Tensor, Any], None]) -> dict[str, Tensor]:
    model.zero_grad()
    outputs = model(x)
    loss = F.cross_entropy(outputs, target)
    backward(loss, outputs)
    found = {"loss": loss.detach(), "outputs": outputs.detach()}
    found |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def plainly(loss: Tensor, _outputs: Tensor) -> None:
    loss.backward()


@pytest.mark.parametrize("fuse", [True, False], ids=["riding", "gates"])
@pytest.mark.parametrize("criterion", [*EXTRA_PASSES, "fisher"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_step_is_the_plain_one_bit_for_bit(criterion: str, fuse: bool, dtype: torch.dtype) -> None:
    model, x, target = make(Residual, dtype)
    plain = copy.deepcopy(model)
    groups = tc.trace(model, x)
    est = tc.Importance(model, groups, criterion, fuse=fuse, probes=2)
    before = torch.get_rng_state()
    for _ in range(2):
        scored_step = step(model, x, target, est.backward)
        same_bits(scored_step, step(plain, x, target, plainly))
    assert torch.equal(torch.get_rng_state(), before)
    est.close()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    same_bits(step(model, x, target, plainly), step(plain, x, target, plainly))


@pytest.mark.parametrize("fuse", [True, False], ids=["riding", "gates"])
@pytest.mark.parametrize("criterion", ["taylor_so", "taylor_so_hessian", "fisher", "taylor_fo_fisher"])
def test_accumulated_micro_batches_are_one_batch(criterion: str, fuse: bool, signs: EverySign) -> None:
    model, x, target = still(Residual)
    whole = scored(model, x, target, criterion, fuse=fuse).scores()
    est = tc.Importance(model, tc.trace(model, x), criterion, fuse=fuse)
    parts = ((x[:1], target[:1]), (x[1:], target[1:]))
    for at, (inputs, labels) in enumerate(parts):
        outputs = model(inputs)
        loss = F.cross_entropy(outputs, labels) * len(inputs) / len(x)
        if criterion.endswith("fisher"):  # of examples with equal weights
            loss = F.cross_entropy(outputs, labels, reduction="sum") / len(x)
        est.backward(loss, outputs, accumulate=at == 0)
    assert est.steps == 1
    torch.testing.assert_close(flat(model, est.scores()), flat(model, whole), rtol=1e-5, atol=0)


@pytest.mark.parametrize("criterion", ["taylor_so", "taylor_so_hessian"])
def test_several_forward_passes_before_their_backward_passes(criterion: str, signs: EverySign) -> None:
    model, x, target = still(Residual)
    expected = scored(model, x, target, criterion).scores()
    est = tc.Importance(model, tc.trace(model, x), criterion)
    both = [(inputs, model(inputs), labels) for inputs, labels in ((x[:2], target[:2]), (x[2:], target[2:]))]
    for at, (_, outputs, labels) in enumerate(both):
        est.backward(F.cross_entropy(outputs, labels) / 2, outputs, accumulate=at == 0)
    torch.testing.assert_close(flat(model, est.scores()), flat(model, expected), rtol=1e-5, atol=0)


def test_one_loss_of_two_forward_passes(signs: EverySign) -> None:
    model, x, target = still(Residual)
    expected = scored(model, x, target, "taylor_so").scores()
    est = tc.Importance(model, tc.trace(model, x), "taylor_so")
    first, second = model(x[:2]), model(x[2:])
    est.backward((F.cross_entropy(first, target[:2]) + F.cross_entropy(second, target[2:])) / 2, (first, second))
    torch.testing.assert_close(flat(model, est.scores()), flat(model, expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", ["cross_entropy", "any"])
@pytest.mark.parametrize("criterion", ["taylor_so", "taylor_so_hessian", "fisher", "taylor_fo_fisher"])
def test_a_scaler_changes_nothing(criterion: str, loss: str, signs: EverySign) -> None:
    model, x, target = still(Residual, torch.float32)
    expected = scored(model, x, target, criterion, loss=loss).scores()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    est = tc.Importance(model, tc.trace(model, x), criterion, loss=loss)
    outputs = model(x)
    est.backward(F.cross_entropy(outputs, target), outputs, scaler=scaler)
    torch.testing.assert_close(flat(model, est.scores()), flat(model, expected), rtol=1e-3, atol=0)


def test_what_a_probe_sends_has_the_size_of_the_gradients_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scaler's factor keeps these within what 16 bits hold; it would not help a probe of another size."""
    sent: list[Tensor] = []
    probed = ReaderSums.probed
    monkeypatch.setattr(ReaderSums, "probed", lambda self, y, u: (sent.extend(u), probed(self, y, u))[1])
    model, x, target = still(Residual, torch.float32)
    x, target = x.repeat(16, 1, 1, 1), target.repeat(16)
    for scale in (2.0**4, 2.0**16):
        for loss_scale in (1.0, 1e-3):
            sent.clear()
            est = tc.Importance(model, tc.trace(model, x), "taylor_so")
            outputs = model(x)
            outputs.retain_grad()
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            est.backward(F.cross_entropy(outputs, target) * loss_scale, outputs, scaler=scaler)
            assert 1 / 8 < float(sent[0].abs().max() / outputs.grad.abs().max()) < 8
            est.close()


@pytest.mark.parametrize("criterion", ["taylor_so", "taylor_so_hessian", "fisher"])
@pytest.mark.parametrize("first", [True, False], ids=["in the first step", "later"])
def test_an_overflow_leaves_the_step_out(criterion: str, first: bool, signs: EverySign) -> None:
    model, x, target = still(ConvBN, torch.float32)
    expected = scored(model, x, target, criterion).scores()
    est = tc.Importance(model, tc.trace(model, x), criterion)
    for factor in (float("inf"), 1.0) if first else (1.0, float("inf")):
        outputs = model(x)
        est.backward(F.cross_entropy(outputs, target) * factor, outputs)
    assert (est.steps, est.skipped) == (1, 1)
    torch.testing.assert_close(flat(model, est.scores()), flat(model, expected), rtol=1e-5, atol=0)


def test_autocast_is_close() -> None:
    model, x, target = still(Residual, torch.float32)
    expected = flat(model, scored(model, x, target, "taylor_so", probes=4).scores()).sqrt()
    est = tc.Importance(model, tc.trace(model, x), "taylor_so", probes=4)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(x)
        loss = F.cross_entropy(outputs, target)
    est.backward(loss, outputs)
    found = flat(model, est.scores()).sqrt()
    assert float((found - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_waits_for_nothing(scaled: bool) -> None:
    model, x, target = make(Residual, torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
    est = tc.Importance(model, tc.trace(model, x), "taylor_so", probes=2)

    def run() -> None:
        outputs = model(x)
        est.backward(F.cross_entropy(outputs, target), outputs, scaler=scaler)

    run()  # the first one looks at the loss
    with NothingWaits():
        run()
    assert (est.steps, est.skipped) == (2, 0)


def test_probes_follow_from_seed_and_step_alone() -> None:
    model, x, target = still(Residual)
    seen: dict[Any, Tensor] = {}
    for seed in (0, 1):
        for steps in (1, 2):
            for _ in range(2):
                est = tc.Importance(model, tc.trace(model, x), "taylor_so", seed=seed, probes=8)
                torch.rand(3)
                for _ in range(steps):
                    est.reset() if est.steps else None
                    outputs = model(x)
                    est.backward(F.cross_entropy(outputs, target), outputs)
                score = flat(model, est.scores())
                assert torch.equal(seen.setdefault((seed, steps), score), score)
                est.close()
    assert len({tuple(score.tolist()) for score in seen.values()}) == 4


@pytest.mark.parametrize("criterion", EXTRA_PASSES)
def test_gradients_alone_are_not_enough(criterion: str) -> None:
    model, x, target = make(ConvBN)
    est = tc.Importance(model, tc.trace(model, x), criterion)
    F.cross_entropy(model(x), target).backward()
    with pytest.raises(tc.InputError, match="backward"):
        est.update()
    with pytest.raises(tc.InputError, match="source"):
        tc.Importance(model, tc.trace(model, x), criterion, source="parameters")


def test_arguments() -> None:
    model, x, target = make(ConvBN)
    for wrong in (0, 1.5, True):
        with pytest.raises(tc.InputError, match="probes: wanted"):
            scored(model, x, target, "taylor_so", probes=wrong)
    with pytest.raises(tc.InputError, match="loss: wanted"):
        scored(model, x, target, "taylor_so", loss="nll")
    est = tc.Importance(model, tc.trace(model, x), "taylor_so")
    with pytest.raises(tc.InputError, match="outputs"):
        est.backward(F.cross_entropy(model(x), target))
    est.close()


def test_a_step_after_one_that_failed_is_as_if_there_had_been_none(signs: EverySign) -> None:
    model, x, target = still(ConvBN)
    expected = scored(model, x, target, "taylor_so").scores()
    model.zero_grad()
    est = tc.Importance(model, tc.trace(model, x), "taylor_so")
    outputs = model(x)
    with pytest.raises(tc.InputError, match="loss"):
        est.backward(F.mse_loss(outputs, torch.randn_like(outputs)), outputs)
    assert all(p.grad is None for p in model.parameters())
    outputs = model(x)
    est.backward(F.cross_entropy(outputs, target), outputs)
    torch.testing.assert_close(flat(model, est.scores()), flat(model, expected), rtol=1e-5, atol=0)


def run_pruner(criterion: str, mode: str, until: int, state: Any = None, **options: Any) -> tuple[Net, Any, list[Any]]:
    torch.manual_seed(0)
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = tc.Pruner(
        model, EXAMPLE, optimizer, {"macs": 0.5}, criterion, every=3, steps=2, mode=mode, round_to=1, **options
    )
    if state is not None:
        pruner.load_state_dict(state["pruner"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    plans = []
    for x, target in batches(8)[pruner.batches : until]:
        outputs = model(x)
        pruner.backward(F.cross_entropy(outputs, target), outputs)
        optimizer.step()
        optimizer.zero_grad()
        plan = pruner.step()
        plans += [] if plan is None else [plan.keep]
    state = {"pruner": pruner.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return model, (pruner, copy.deepcopy(state)), plans


@pytest.mark.parametrize("criterion", ["taylor_so", "taylor_so_hessian", "taylor_fo_fisher", "bn_taylor"])
def test_a_pruner_in_every_mode(criterion: str) -> None:
    if criterion == "bn_taylor":
        with pytest.raises(tc.InputError, match="no normalisation"):
            run_pruner(criterion, "cut", 8)
        return
    model, (pruner, _), plans = run_pruner(criterion, "cut", 8)
    assert pruner.done
    assert len(plans) == 2
    for mode in ("compact", "mask"):
        try:
            _, (other, _), same = run_pruner(criterion, mode, 8)
        except tc.InputError as error:
            assert criterion == "taylor_so_hessian" and mode in str(error)  # noqa: PT017, PT018
            continue
        other.finish()
        assert len(same) == len(plans)
        for mine, theirs in zip(plans, same, strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert other.model.widths() == model.widths()


@pytest.mark.parametrize("at", [2, 4])
def test_a_pruner_goes_on_from_its_state(at: int) -> None:
    whole, _, plans = run_pruner("taylor_so", "cut", 8, seed=5)
    _, (_, state), before = run_pruner("taylor_so", "cut", at, seed=5)
    resumed, _, after = run_pruner("taylor_so", "cut", 8, state, seed=5)
    assert len(before) + len(after) == len(plans)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_net_of_gates_keeps_what_is_left(signs: EverySign) -> None:
    """After a cut the window is that of the units which are left."""
    model, x, target = still(Residual)
    groups = tc.trace(model, x)
    est = tc.Importance(model, groups, "taylor_so")
    outputs = model(x)
    est.backward(F.cross_entropy(outputs, target), outputs)
    before = est.scores()
    model.zero_grad()
    keep = {"stem": torch.tensor([0, 2, 5]), "a1": torch.tensor([1, 3])}
    tc.cut(model, groups, keep)
    est.keep(keep)
    for name, score in est.scores().items():
        assert torch.equal(score, before[name][keep[name]] if name in keep else before[name])


class Frozen(GatedNet):
    """Nothing before the reader is trained."""

    input_shape = (4, 6)
    group_sizes = {"fc1": 5}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.head = nn.Linear(6, 5), nn.Linear(5, 4)
        self.fc1.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gated("fc1", F.relu(self.fc1(x))))


@pytest.mark.parametrize("criterion", ["taylor_so", "taylor_so_hessian"])
def test_frozen_layers(criterion: str, signs: EverySign) -> None:
    model, x, target = still(Frozen)
    frozen = scored(model, x, target, criterion).scores()
    model.fc1.requires_grad_(True)
    trained = scored(model, x, target, criterion).scores()
    torch.testing.assert_close(frozen, trained, rtol=1e-6, atol=0)

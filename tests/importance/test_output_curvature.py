"""S·Sᵀ is the Hessian of the loss in the outputs, whatever decides the loss's scale; everything here by brute force."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_cuda as tc
from taylor_cuda.importance import output_curvature
from taylor_cuda.importance.output_curvature import OutputCurvature, Probe, loss_name, read_by

CLASSES = 4
LossOf = Callable[[Tensor], Tensor]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def targets(*shape: int) -> Tensor:
    return torch.randint(0, CLASSES, shape, generator=torch.Generator().manual_seed(1))


def ignoring(target: Tensor) -> Tensor:
    return torch.where(torch.arange(target.numel()).view(target.shape) % 3 == 0, -100, target)


WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.7], dtype=torch.float64)
SOFT = drawn(5, CLASSES).softmax(1)
CROSS_ENTROPIES: dict[str, tuple[tuple[int, ...], LossOf]] = {
    "mean": ((5, CLASSES), lambda y: F.cross_entropy(y, targets(5))),
    "sum": ((5, CLASSES), lambda y: F.cross_entropy(y, targets(5), reduction="sum")),
    "smoothing": ((5, CLASSES), lambda y: F.cross_entropy(y, targets(5), label_smoothing=0.3)),
    "weights": ((5, CLASSES), lambda y: F.cross_entropy(y, targets(5), WEIGHTS)),
    "weights and smoothing": ((5, CLASSES), lambda y: F.cross_entropy(y, targets(5), WEIGHTS, label_smoothing=0.2)),
    "ignored": ((5, CLASSES), lambda y: F.cross_entropy(y, ignoring(targets(5)))),
    "soft targets": ((5, CLASSES), lambda y: F.cross_entropy(y, SOFT)),
    "accumulated and scaled": ((5, CLASSES), lambda y: F.cross_entropy(y, targets(5)) / 7 * 1024),
    "log_softmax": ((5, CLASSES), lambda y: F.nll_loss(y.log_softmax(1), targets(5))),
    "two classes": ((5, 2), lambda y: F.cross_entropy(y, targets(5) % 2)),
    "segmentation": ((3, CLASSES, 2, 3), lambda y: F.cross_entropy(y, ignoring(targets(3, 2, 3)), WEIGHTS)),
    "tokens": ((3, 5, CLASSES), lambda y: F.cross_entropy(y.flatten(0, 1), ignoring(targets(15)))),
    "shifted tokens": ((3, 5, CLASSES), lambda y: F.cross_entropy(y[:, :-1].flatten(0, 1), targets(12))),
    "tokens as long as classes": (
        (3, CLASSES, CLASSES),
        lambda y: F.cross_entropy(y.flatten(0, 1), targets(3 * CLASSES)),
    ),
}
ELEMENTWISE: dict[str, tuple[str, tuple[int, ...], LossOf]] = {
    "bce": ("bce", (4, 3), lambda y: F.binary_cross_entropy_with_logits(y, (drawn(4, 3) > 0).double())),
    "bce, weights": (
        "bce",
        (4, 3),
        lambda y: F.binary_cross_entropy_with_logits(y, drawn(4, 3).sigmoid(), pos_weight=drawn(3).exp()),
    ),
    "bce of one logit": ("bce", (6,), lambda y: F.binary_cross_entropy_with_logits(y, (drawn(6) > 0).double())),
    "bce of probabilities": ("bce", (4, 3), lambda y: F.binary_cross_entropy(y.sigmoid(), (drawn(4, 3) > 0).double())),
    "mse": ("mse", (4, 2, 3), lambda y: F.mse_loss(y, drawn(4, 2, 3))),
    "mse, sum": ("mse", (4, 3), lambda y: F.mse_loss(y, drawn(4, 3), reduction="sum") / 3),
}


def outputs_of(*shapes: tuple[int, ...]) -> list[Tensor]:
    """As of a model: not leaves."""
    return [(2 * drawn(*shape)).requires_grad_() * 1.0 for shape in shapes]


def hessian(loss_of: LossOf, y: Tensor) -> Tensor:
    """Blocks ``[N, P, P]`` of one example each; what lies outside of them has to be 0."""
    size = y.numel() // len(y)
    whole: Tensor = torch.autograd.functional.hessian(loss_of, y.detach()).reshape(len(y), size, len(y), size)
    blocks = torch.stack([whole[n, :, n] for n in range(len(y))])
    assert torch.equal(whole.sum((0, 2)), blocks.sum(0)) or torch.allclose(whole.sum((0, 2)), blocks.sum(0))
    return blocks


class Columns:
    """Takes the place of the signs: one position of one output after the other is 1, all others 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at, self.of = 0, 0
        self.calls = 0
        monkeypatch.setattr(output_curvature, "_signs", self)

    def __call__(self, x: Tensor, generator: Any, rows: int) -> Tensor:
        column = torch.zeros(x[0].numel() if x.dim() > 1 else 1, dtype=x.dtype)
        if self.calls == self.of:
            column[self.at] = 1
        self.calls += 1
        return column.view(1, *x.shape[1:])


def probes(draw: Callable[[], Probe], columns: Columns, of: int, size: int) -> list[Probe]:
    found = []
    for at in range(size):
        columns.at, columns.of, columns.calls = at, of, 0
        found.append(draw())
    return found


@pytest.mark.parametrize("name", CROSS_ENTROPIES)
def test_of_a_cross_entropy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, loss_of = CROSS_ENTROPIES[name]
    check_root("cross_entropy", shape, loss_of, monkeypatch)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_of_a_loss_of_single_outputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_root(*ELEMENTWISE[name], monkeypatch)


def check_root(kind: str, shape: tuple[int, ...], loss_of: LossOf, monkeypatch: pytest.MonkeyPatch) -> None:
    (y,) = outputs_of(shape)
    columns = Columns(monkeypatch)
    draw = OutputCurvature(kind).at(loss_of(y), [y], torch.Generator())
    found = probes(draw, columns, 0, y.numel() // len(y))
    root = torch.stack([probe.sent[0].reshape(len(y), -1) for probe in found], 2)  # [N, P, P]
    assert all(probe.other is None for probe in found)
    expected = hessian(loss_of, y)
    assert expected.abs().max() > 0
    torch.testing.assert_close(root @ root.mT, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["weights", "segmentation", "tokens"])
def test_any_loss_has_its_product_beside_the_signs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, loss_of = CROSS_ENTROPIES[name]
    (y,) = outputs_of(shape)
    columns = Columns(monkeypatch)
    draw = OutputCurvature("any").at(loss_of(y), [y], torch.Generator())
    total = torch.zeros_like(expected := hessian(loss_of, y))
    for probe in probes(draw, columns, 0, y.numel() // len(y)):
        assert probe.other is not None
        here, there = (sent[0].reshape(len(y), -1) for sent in (probe.sent, probe.other))
        total += here[:, :, None] * there[:, None, :]  # Σ_v v·(H v)ᵀ = H
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-12)


def test_two_outputs_have_weights_and_signs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = outputs_of((5, CLASSES), (5, 3))
    unread = torch.randn(5, 7, dtype=torch.float64, requires_grad=True) * 1.0
    one: LossOf = lambda y: F.cross_entropy(y, targets(5))  # noqa: E731
    other: LossOf = lambda y: 0.3 * F.cross_entropy(y, targets(5) % 3)  # noqa: E731
    columns = Columns(monkeypatch)
    loss = one(first) + other(second)
    structure = {"loss": loss, "logits": first, "aux": (second, None), "unread": unread, "count": torch.arange(5)}
    draw = OutputCurvature("cross_entropy").at(loss, read_by(loss, structure), torch.Generator())
    for of, (y, loss_of) in enumerate(((first, one), (second, other))):
        found = probes(draw, columns, of, y.shape[1])
        assert [id(x) for x in found[0].outputs] == [id(first), id(second)]
        root = torch.stack([probe.sent[of] for probe in found], 2)
        torch.testing.assert_close(root @ root.mT, hessian(loss_of, y), rtol=1e-9, atol=1e-12)
        for probe in found:
            assert not probe.sent[1 - of].any()


def test_signs_are_shared_by_examples_and_by_nothing_else() -> None:
    (y,) = outputs_of((6, CLASSES, 5, 7))
    signs = output_curvature._signs(y, torch.Generator().manual_seed(3), 1)
    assert signs.shape == (1, CLASSES, 5, 7)
    assert signs.dtype == y.dtype
    assert signs.unique().tolist() == [-1.0, 1.0]
    assert abs(float(signs.mean())) < 0.3
    assert not torch.equal(signs[..., 0], signs[..., 1])
    rows = output_curvature._signs(y, torch.Generator().manual_seed(3), 2)
    assert torch.equal(rows[:2], rows[2:4])
    assert torch.equal(rows[:2], rows[4:])
    assert not torch.equal(rows[0], rows[1])


WRONG: dict[str, tuple[str, tuple[int, ...], LossOf]] = {
    "mse as a cross-entropy": ("cross_entropy", (5, CLASSES), lambda y: F.mse_loss(y, drawn(5, CLASSES))),
    "bce as a cross-entropy": (
        "cross_entropy",
        (5, CLASSES),
        lambda y: F.binary_cross_entropy_with_logits(y, drawn(5, CLASSES).sigmoid()),
    ),
    "a temperature": ("cross_entropy", (5, CLASSES), lambda y: F.cross_entropy(y / 2, targets(5))),
    "a cross-entropy as mse": ("mse", (5, CLASSES), lambda y: F.cross_entropy(y, targets(5))),
    "examples against each other": ("mse", (5, CLASSES), lambda y: (y @ y.T).square().mean()),
    "log-probabilities": ("cross_entropy", (5, CLASSES), lambda y: F.nll_loss(y, targets(5))),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_another_loss_than_it_was_said_to_be_is_noticed(name: str, dtype: torch.dtype) -> None:
    kind, shape, loss_of = WRONG[name]
    y = outputs_of(shape)[0].to(dtype)
    with pytest.raises(tc.InputError, match=r"^loss|loss is linear"):
        OutputCurvature(kind).at(loss_of(y.double()).to(dtype), [y], torch.Generator())


@pytest.mark.parametrize("sure", [0.0, 8.0, 14.0, 17.0, 40.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_trained_network_is_no_wrong_loss(sure: float, dtype: torch.dtype) -> None:
    """Where it is sure of every example, the curvature is all but 0, and what there is of it is rounding."""
    target = targets(8)
    y = (F.one_hot(target, CLASSES) * sure + drawn(8, CLASSES)).to(dtype).requires_grad_() * 1.0
    probe = OutputCurvature("cross_entropy").at(F.cross_entropy(y.float(), target), [y], torch.Generator())()
    assert probe.sent[0].isfinite().all()
    assert float(probe.sent[0].float().abs().max()) <= 1


def test_values_that_are_not_finite_are_no_wrong_loss() -> None:
    """They are the scaler's affair: the step is left out."""
    (y,) = outputs_of((5, CLASSES))
    curvature = OutputCurvature("cross_entropy")
    curvature.at(F.cross_entropy(y, targets(5)) * float("inf"), [y], torch.Generator())()
    with pytest.raises(tc.InputError, match="loss"):  # it has not been believed yet
        curvature.at(F.mse_loss(y, drawn(5, CLASSES)), [y], torch.Generator())


def test_names() -> None:
    assert loss_name(nn.CrossEntropyLoss(label_smoothing=0.1)) == "cross_entropy"
    assert loss_name(F.cross_entropy) == "cross_entropy"
    assert loss_name(partial(F.cross_entropy, label_smoothing=0.1)) == "cross_entropy"
    assert loss_name(nn.BCEWithLogitsLoss()) == loss_name(F.binary_cross_entropy) == "bce"
    assert loss_name(nn.MSELoss()) == loss_name(F.mse_loss) == "mse"
    assert loss_name(lambda y, t: (y - t).abs().mean()) == "any"
    for wrong in ("crossentropy", 3, None):
        with pytest.raises(tc.InputError, match="loss: wanted one of"):
            loss_name(wrong)  # type: ignore[arg-type]


def test_what_the_loss_was_not_computed_from() -> None:
    (y,) = outputs_of((5, CLASSES))
    loss = F.cross_entropy(y, targets(5))
    for outputs in (outputs_of((5, CLASSES))[0], y.detach(), [], {"loss": loss}):
        with pytest.raises(tc.InputError, match="outputs: wanted"):
            read_by(loss, outputs)


def test_what_the_loss_reads_through_the_logits_only_does_not_count() -> None:
    """Hidden states beside the logits, as some models return them."""
    (features,) = outputs_of((5, 6))
    logits = features @ drawn(6, CLASSES)
    loss = F.cross_entropy(logits, targets(5))
    assert [id(x) for x in read_by(loss, {"hidden": features, "logits": logits})] == [id(logits)]
    both = loss + features.square().mean()
    assert [id(x) for x in read_by(both, (features, logits))] == [id(features), id(logits)]

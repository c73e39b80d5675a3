"""``taylor_so`` and its relatives against brute force, on networks with explicit gates."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_cuda as tc
from taylor_cuda.bench.resnet import ResNet
from taylor_cuda.importance import CRITERIA
from tests.importance.gated_nets import NETS, Concat, ConvBN, GatedNet, Linears, Residual, gate_gradients, make
from tests.importance.second_order import (
    EverySign,
    LossOf,
    cross_entropy,
    empirical_fisher_of,
    flat,
    gauss_newton_of,
    hessian_of,
    ones,
    scored,
    second,
    slope_of,
    still,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 4
TIGHT = {"rtol": 1e-5, "atol": 0.0}  # scores are float32


@pytest.fixture
def signs(monkeypatch: pytest.MonkeyPatch) -> EverySign:
    return EverySign(monkeypatch)


def with_every_sign(
    signs: EverySign, model: nn.Module, x: Tensor, target: Tensor, loss_of: LossOf, size: int, **options: object
) -> dict[str, Tensor]:
    """Scores of a window in which every probe came once: its average is the expectation."""
    est = tc.Importance(model, tc.trace(model, x), "taylor_so", **options)
    for _ in signs.all_of(size):
        outputs = model(x)
        est.backward(loss_of(outputs, target), outputs)
    return est.scores()


@pytest.mark.parametrize("fuse", [True, False], ids=["riding", "gates"])
@pytest.mark.parametrize("net", NETS)
def test_all_probes_together_are_the_gauss_newton_diagonal(net: type[GatedNet], fuse: bool, signs: EverySign) -> None:
    """Residual streams and concatenations too: their terms are summed over coupled channels, then squared."""
    model, x, target = still(net)
    scores = with_every_sign(signs, model, x, target, cross_entropy, CLASSES, fuse=fuse)
    expected = second(slope_of(model, x, target), gauss_newton_of(model, x, target))
    torch.testing.assert_close(flat(model, scores), expected, **TIGHT)


WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.7], dtype=torch.float64)
LOSSES: dict[str, tuple[str, LossOf]] = {
    "weights, smoothing, ignored": (
        "cross_entropy",
        lambda y, t: F.cross_entropy(y, torch.where(t == t[0], -100, t), WEIGHTS, label_smoothing=0.2),
    ),
    "sum": ("cross_entropy", lambda y, t: F.cross_entropy(y, t, reduction="sum")),
    "bce": ("bce", lambda y, t: F.binary_cross_entropy_with_logits(y, F.one_hot(t, CLASSES).double())),
    "mse": ("mse", lambda y, t: F.mse_loss(y, F.one_hot(t, CLASSES).double())),
    "any": ("any", lambda y, t: (y - F.one_hot(t, CLASSES)).square().sum(1).add(1).log().mean()),
    "any, of a cross-entropy": ("any", lambda y, t: F.cross_entropy(y, t)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_of_every_loss(name: str, signs: EverySign) -> None:
    loss, loss_of = LOSSES[name]
    model, x, target = still(Residual)
    scores = with_every_sign(signs, model, x, target, loss_of, CLASSES, loss=loss)
    expected = second(slope_of(model, x, target, loss_of), gauss_newton_of(model, x, target, loss_of))
    torch.testing.assert_close(flat(model, scores), expected, **TIGHT)


class Maps(GatedNet):
    """A class at every pixel: three classes, two pixels."""

    input_shape = (4, 3, 4, 3)
    group_sizes = {"conv1": 5}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.gated("conv1", F.relu(self.conv1(x))))


class Tokens(GatedNet):
    """A class at every one of two tokens."""

    input_shape = (4, 2, 7)
    group_sizes = {"fc": 5}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.fc(x)) * self.gates.get("fc", x.new_ones(())))


class FlatTokens(Tokens):
    """The same with one row for every token, as losses want it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(0, 1)


@pytest.mark.parametrize(
    ("net", "loss_of"),
    [
        (Maps, lambda y, t: F.cross_entropy(y, t.view(4, 1, 1).expand(4, 2, 1) % 3)),
        (Tokens, lambda y, t: F.cross_entropy(y.flatten(0, 1), t.repeat(2) % 3)),
    ],
    ids=["segmentation", "tokens"],
)
def test_positions_of_an_example_have_signs_of_their_own(
    net: type[GatedNet], loss_of: LossOf, signs: EverySign
) -> None:
    model, x, target = still(net)
    scores = with_every_sign(signs, model, x, target, loss_of, 6)
    expected = second(slope_of(model, x, target, loss_of), gauss_newton_of(model, x, target, loss_of))
    torch.testing.assert_close(flat(model, scores), expected, **TIGHT)


def test_outputs_with_a_row_for_every_token_are_right_or_refused(signs: EverySign) -> None:
    model, x, target = still(FlatTokens)
    loss_of: LossOf = lambda y, t: F.cross_entropy(y, t.repeat(2) % 3)  # noqa: E731
    try:
        scores = with_every_sign(signs, model, x, target, loss_of, 6)
    except tc.InputError as error:
        assert "outputs" in str(error)  # noqa: PT017
        return
    expected = second(slope_of(model, x, target, loss_of), gauss_newton_of(model, x, target, loss_of))
    torch.testing.assert_close(flat(model, scores), expected, **TIGHT)


class InnerTokens(GatedNet):
    """Tokens are rows inside only: layers read two rows of each example."""

    input_shape = (4, 2, 7)
    group_sizes = {"fc": 5}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.mid, self.head = nn.Linear(7, 5), nn.Linear(5, 3), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.gated("fc", F.gelu(self.fc(x.flatten(0, 1))))
        return self.head(self.mid(rows).view(len(x), 2, 3).mean(1))


def test_rows_of_one_example_are_summed_before_they_are_squared(signs: EverySign) -> None:
    model, x, target = still(InnerTokens)
    groups = tc.trace(model, x, ignore=["mid"])
    est = tc.Importance(model, groups, "taylor_so")
    for _ in signs.all_of(CLASSES):
        outputs = model(x)
        est.backward(F.cross_entropy(outputs, target), outputs)
    expected = second(slope_of(model, x, target), gauss_newton_of(model, x, target))
    torch.testing.assert_close(est.scores()["fc"].double(), expected, **TIGHT)


class TwoHeads(ConvBN):
    """An auxiliary head on the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.bn1(self.conv1(x)))
        aux = self.aux(self.gated("conv1", x).mean((2, 3)))
        x = F.relu(self.bn2(self.conv2(self.gated("conv1", x))))
        return {"out": self.head(self.gated("conv2", x.mean((2, 3)))), "aux": aux}


def test_two_outputs_add_up(signs: EverySign) -> None:
    def main(y: dict[str, Tensor], t: Tensor) -> Tensor:
        return F.cross_entropy(y["out"], t)

    def aux(y: dict[str, Tensor], t: Tensor) -> Tensor:
        return 0.4 * F.cross_entropy(y["aux"], t % 3)

    model, x, target = still(TwoHeads)
    scores = with_every_sign(signs, model, x, target, lambda y, t: main(y, t) + aux(y, t), CLASSES + 3)
    slope = slope_of(model, x, target, lambda y, t: main(y, t) + aux(y, t))
    whole, curve = model.forward, torch.zeros_like(slope)
    for name, part in (("out", main), ("aux", aux)):
        model.forward = lambda x, name=name: whole(x)[name]  # type: ignore[method-assign, misc]
        curve += gauss_newton_of(model, x, target, lambda y, t, name=name, part=part: part({name: y}, t))
    torch.testing.assert_close(flat(model, scores), second(slope, curve), **TIGHT)


class Straight(GatedNet):
    """Linear in every gate."""

    input_shape = (5, 6)
    group_sizes = {"fc1": 4, "fc2": 3}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gated("fc1", self.fc1(x))
        return self.head(self.gated("fc2", self.fc2(x)))


@pytest.mark.parametrize("criterion", ["taylor_so", "taylor_so_hessian"])
def test_on_a_quadratic_loss_it_is_the_true_change(criterion: str, signs: EverySign) -> None:
    model, x, target = still(Straight)
    wanted = F.one_hot(target % 3, 3).double()
    loss_of: LossOf = lambda y, t: F.mse_loss(y, wanted)  # noqa: E731
    if criterion == "taylor_so":
        scores = with_every_sign(signs, model, x, target, loss_of, 3, loss="mse")
    else:
        scores = scored(model, x, target, criterion, loss_of).scores()
    groups, truth = tc.trace(model, x), []
    with torch.no_grad():
        before = loss_of(model(x), target)
        for group, size in model.group_sizes.items():
            for unit in range(size):
                rest = torch.tensor([at for at in range(size) if at != unit])
                with tc.masked(model, groups, {group: rest}):
                    truth.append((loss_of(model(x), target) - before).square())
    torch.testing.assert_close(flat(model, scores), torch.stack(truth), **TIGHT)


def test_the_probes_mean_converges_as_a_mean_does() -> None:
    """The error of a mean of m independent draws goes with 1/√m, and there is no bias under it."""
    model, x, target = still(Residual)
    slope, exact = slope_of(model, x, target), gauss_newton_of(model, x, target)

    def error(probes: int, seed: int) -> Tensor:
        score = flat(model, scored(model, x, target, "taylor_so", probes=probes, seed=seed).scores())
        # (½F − E')² has two roots; the exact one says which of them is meant
        sign = torch.sign(0.5 * exact - slope)
        return (score.sqrt() * sign + slope) * 2 - exact

    few = torch.stack([error(2, seed) for seed in range(32)]).square().mean().sqrt()
    many = torch.stack([error(32, seed) for seed in range(32, 48)]).square().mean().sqrt()
    assert 4 / 1.5 < few / many < 4 * 1.5


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("criterion", ["taylor_so_hessian", "obd"])
def test_the_exact_diagonal(criterion: str, net: type[GatedNet], training: bool) -> None:
    """With batch statistics too."""
    model, x, target = make(net) if training else still(net)
    score = flat(model, scored(model, x, target, criterion).scores())
    curve = hessian_of(model, x, target)
    expected = second(slope_of(model, x, target), curve) if criterion != "obd" else (curve.clamp(min=0) / 2).square()
    torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-12 * float(expected.max()))


@pytest.mark.parametrize("net", NETS)
def test_the_empirical_fisher(net: type[GatedNet]) -> None:
    model, x, target = still(net)
    curve, slope = empirical_fisher_of(model, x, target), slope_of(model, x, target)
    for criterion, expected in (("fisher", (curve / 2).square()), ("taylor_fo_fisher", second(slope, curve))):
        torch.testing.assert_close(flat(model, scored(model, x, target, criterion).scores()), expected, **TIGHT)


AVERAGED = ("taylor_so", "taylor_so_hessian", "obd", "fisher", "taylor_fo_fisher")


@pytest.mark.parametrize("criterion", AVERAGED)
def test_a_window_averages_before_it_squares(criterion: str, signs: EverySign) -> None:
    model, x, target = still(ConvBN)
    signs.now = (1.0, -1.0, 1.0, 1.0)
    batches = [(x, target), (x.flip(2) * 1.5, (target + 1) % CLASSES), (x.flip(3) * 0.5, (target + 2) % CLASSES)]
    alone = [(slope_of(model, *batch), curve_alone(model, *batch, criterion, signs)) for batch in batches]
    est = tc.Importance(model, tc.trace(model, x), criterion)
    for inputs, labels in batches:
        outputs = model(inputs)
        est.backward(F.cross_entropy(outputs, labels), outputs)
        model.zero_grad()
    slope, curve = (torch.stack(each).mean(0) for each in zip(*alone, strict=True))
    if criterion in ("obd", "fisher"):
        slope, curve = torch.zeros_like(slope), curve.clamp(min=0)
    torch.testing.assert_close(flat(model, est.scores()), second(slope, curve), **TIGHT)
    before = est.scores()
    est.fold()
    outputs = model(x)
    est.backward(F.cross_entropy(outputs, target), outputs)
    slope, curve = alone[0]
    if criterion in ("obd", "fisher"):
        slope, curve = torch.zeros_like(slope), curve.clamp(min=0)
    expected = 0.9 * flat(model, before) + 0.1 * second(slope, curve)
    torch.testing.assert_close(flat(model, est.scores()), expected, **TIGHT)


def curve_alone(model: GatedNet, x: Tensor, target: Tensor, criterion: str, signs: EverySign) -> Tensor:
    if criterion in ("fisher", "taylor_fo_fisher"):
        return empirical_fisher_of(model, x, target)
    if criterion != "taylor_so":
        return hessian_of(model, x, target)
    with torch.no_grad():
        p = model(x).softmax(1)
    v = torch.tensor(signs.now, dtype=x.dtype)
    sent = (p.sqrt() * v - p * (p.sqrt() * v).sum(1, keepdim=True)) / len(x) ** 0.5
    found = torch.zeros_like(ones(model, x))
    for n in range(len(x)):
        found += slope_of(model, x[[n]], target, lambda y, _, n=n: (y * sent[[n]]).sum()).square()
    return found


def test_a_filter_as_one_set_and_its_normalisation() -> None:
    model, x, target = make(Concat)
    score = scored(model, x, target, "taylor_filter").scores()
    weight = model.left.weight
    assert weight.grad is not None
    expected = (weight * weight.grad).sum((1, 2, 3)).square()
    torch.testing.assert_close(score["left"].double(), expected.detach(), **TIGHT)


@pytest.mark.parametrize("criterion", ["bn_taylor", "bn_taylor_scale"])
def test_of_a_normalisation(criterion: str) -> None:
    model, x, target = make(ConvBN)
    gate = gate_gradients(model, x, target)
    score = scored(model, x, target, criterion).scores()
    for name, norm in (("conv1", model.bn1), ("conv2", model.bn2)):
        expected = norm.weight.grad * norm.weight
        if criterion == "bn_taylor":
            expected = expected + norm.bias.grad * norm.bias
            torch.testing.assert_close(expected.detach(), gate[name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(score[name].double(), expected.square().detach(), **TIGHT)
    with pytest.raises(tc.InputError, match="no normalisation with a scale"):
        scored(*make(Linears), criterion)


def test_coupled_normalisations_are_summed_and_then_squared() -> None:
    model, x, target = make(Residual)
    score = scored(model, x, target, "bn_taylor").scores()["stem"]
    norms = (model.bn, model.abn2, model.bbn2)
    expected = sum(norm.weight * norm.weight.grad + norm.bias * norm.bias.grad for norm in norms).square()
    torch.testing.assert_close(score.double(), expected.detach(), **TIGHT)


def test_shared_streams_over_their_blocks() -> None:
    model, x, target = make(Residual)
    plain = scored(model, x, target, "taylor_fo").scores()
    divided = scored(model, x, target, "taylor_fo", shared_norm="blocks").scores()
    for name, blocks in (("stem", 2), ("a1", 1), ("b1", 1)):
        torch.testing.assert_close(divided[name] * blocks, plain[name], rtol=1e-6, atol=0)
    for wrong, criterion in (("B", "taylor_fo"), ("blocks", "taylor_so")):
        with pytest.raises(tc.InputError, match="shared_norm: wanted"):
            scored(model, x, target, criterion, shared_norm=wrong)


def test_the_blocks_of_a_resnet() -> None:
    model = ResNet("resnet50")
    groups, x = tc.trace(model, torch.zeros(1, 3, 64, 64)), torch.randn(2, 3, 64, 64)
    scores = []
    for shared_norm in ("none", "blocks"):
        est = tc.Importance(model, groups, shared_norm=shared_norm)
        model.zero_grad()
        torch.manual_seed(0)
        est.backward(model(x).square().mean())
        scores.append(est.scores())
    found = {name: float((plain / scores[1][name]).median().round(decimals=3)) for name, plain in scores[0].items()}
    streams = sorted(count for count in found.values() if count != 1)
    assert streams == [3.0, 3.0, 4.0, 6.0]


def test_every_criterion_is_one_of_those_tested() -> None:
    tested = {*AVERAGED, "taylor_filter", "bn_taylor", "bn_taylor_scale"}
    older = {"taylor_fo", "taylor_fg", "taylor_weight", "taylor_output", "magnitude", "bn_scale", "random"}
    assert set(CRITERIA) == tested | older
    assert all(itertools.chain([CRITERIA["taylor_so"].outputs], [not CRITERIA["fisher"].outputs]))

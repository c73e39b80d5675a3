"""Which sums over parameters are the gradient of a gate, to the last bits of float64, and which are far from it.

The truth is autograd's gradient of a gate of ones (``identity_nets``). The sums are those of ``tc.weight_importance``.
What must fail has to fail by a lot, so that no identity here holds for want of something to measure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import taylor_cuda as tc
from tests.importance.identity_nets import (
    Activated,
    Excited,
    Joined,
    Normed,
    PlacedNet,
    Read,
    Stages,
    Tied,
    Written,
    backward,
    make,
)

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT, FAR = 1e-12, 0.05  # of the norm of the truth


def products(parameter: Tensor, dim: int) -> Tensor:
    assert parameter.grad is not None
    return tc.weight_importance([parameter.detach()], [parameter.grad], [dim])[0]


def affine(norm: nn.Module) -> Tensor:
    """γ·dγ + β·dβ."""
    return products(norm.weight, 0) + products(norm.bias, 0)


def sides(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Σ w·dw over the weights of each channel that a layer writes, and of each that it reads, whatever its groups.

    A weight is [written, read in a group, ...]; a transposed convolution's [read, written in a group, ...].
    """
    assert layer.weight.grad is not None
    groups = getattr(layer, "groups", 1)
    whole = products(layer.weight, 0)
    parts = zip(layer.weight.detach().chunk(groups), layer.weight.grad.chunk(groups), strict=True)
    in_group = torch.cat([tc.weight_importance([w], [g], [1])[0] for w, g in parts])
    return (in_group, whole) if isinstance(layer, nn.ConvTranspose2d) else (whole, in_group)


def written(layer: nn.Module) -> Tensor:
    """<W_o, dW_o> + b_o·db_o of every channel that a layer writes."""
    return sides(layer)[0] + (0 if layer.bias is None else products(layer.bias, 0))


def read(layer: nn.Module) -> Tensor:
    """Σ W·dW over all weights that meet a channel which a layer reads."""
    return sides(layer)[1]


def error(actual: Tensor, truth: Tensor) -> float:
    """||actual - truth|| / ||truth||; the truth must be something."""
    assert truth.norm() > 1e-12
    return float((actual.double() - truth).norm() / truth.norm())


def run(model: PlacedNet, scale: float = 1.0) -> tuple[Any, dict[str, Tensor]]:
    """The model after one backward pass in training mode, and the truth at every place."""
    _, x, target = make(model)
    return model, backward(model, x, target, scale)


NORMS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "batch": (lambda: nn.BatchNorm2d(6), False),
    "layer": (lambda: nn.LayerNorm(6), True),
    "group": (lambda: nn.GroupNorm(2, 6), False),
    "instance": (lambda: nn.InstanceNorm2d(6, affine=True), False),
}


def made(norm: str) -> tuple[nn.Module, bool]:
    """A normalisation, and whether it takes its channels last."""
    make_norm, last = NORMS[norm]
    return make_norm(), last


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_normalisation_s_scale_and_shift_give_every_gate_behind_it(norm: str, train: bool) -> None:
    """Through ReLU, pools and dropout, with the dropped units that this pass drew; and so does the reader."""
    model, x, target = make(Normed(*made(norm)))
    truth = backward(model.train(train), x, target)
    assert set(truth) == {"norm", "ReLU", "max pool", "pools and dropout"}
    for gate in truth.values():
        assert error(affine(model.norm), gate) < EXACT
        assert error(read(model.reader), gate) < EXACT


HOMOGENEOUS = {"ReLU": F.relu, "leaky ReLU": F.leaky_relu, "PReLU": nn.PReLU(), "none": lambda x: x}
OTHERS = {
    **{"GELU": F.gelu, "SiLU": F.silu, "ReLU6": F.relu6, "hard swish": F.hardswish},
    **{"sigmoid": torch.sigmoid, "tanh": torch.tanh, "ELU": F.elu},
}


@pytest.mark.parametrize("name", [*HOMOGENEOUS, *OTHERS])
def test_an_activation_that_keeps_no_proportions_leaves_the_reader_s_side_alone(name: str) -> None:
    model, truth = run(Activated({**HOMOGENEOUS, **OTHERS}[name]))
    assert error(read(model.reader), truth["behind"]) < EXACT
    if name in HOMOGENEOUS:
        assert error(affine(model.norm), truth["behind"]) < EXACT
    else:
        assert error(affine(model.norm), truth["behind"]) > FAR


LAYERS = {
    "convolution": lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1),
    "dilated": lambda: nn.Conv2d(6, 8, 3, dilation=2, padding=2, padding_mode="reflect"),
    "grouped": lambda: nn.Conv2d(6, 8, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6),
    "depthwise, two each": lambda: nn.Conv2d(6, 12, 3, groups=6),
    "transposed": lambda: nn.ConvTranspose2d(6, 8, 3, stride=2),
    "transposed, grouped": lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, groups=2),
    "transposed, depthwise": lambda: nn.ConvTranspose2d(6, 6, 3, groups=6),
    "linear": lambda: nn.Linear(6, 8),
    "without bias": lambda: nn.Conv2d(6, 8, 1, bias=False),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_s_weights_give_the_gates_of_what_it_writes_and_of_what_it_reads(layer: str) -> None:
    model, truth = run(Written(LAYERS[layer]()))
    assert error(written(model.writer), truth["output"]) < EXACT
    model, truth = run(Read(LAYERS[layer]()))
    assert error(read(model.reader), truth["input"]) < EXACT


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_in_front_of_a_normalisation_a_convolution_s_weights_say_nothing(norm: str) -> None:
    """It takes a channel's scale away, and with it the gradient of a gate there, up to what eps leaves of it."""
    model, truth = run(Normed(*made(norm)))
    assert written(model.conv).norm() < 1e-3 * truth["norm"].norm()


def test_running_statistics_are_constants_and_leave_the_scale() -> None:
    model, x, target = make(Normed(nn.BatchNorm2d(6)))
    truth = backward(model.eval(), x, target)
    assert written(model.conv).norm() > 0.1 * truth["norm"].norm()


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_over_the_axis_of_a_normalisation_only_the_sum_of_its_channels_vanishes(norm: str) -> None:
    model, truth = run(Normed(*made(norm)))
    sums = written(model.conv).view(2 if norm == "group" else 1, -1)
    assert (sums.sum(1).abs() < 1e-3 * sums.abs().sum(1)).all()
    assert error(sums.flatten(), truth["norm"]) > FAR


def test_a_concatenation_s_readers_divide_their_sums_and_several_readers_add_theirs() -> None:
    model, truth = run(Joined())
    assert error(read(model.both)[:4], truth["left"]) < EXACT
    assert error(affine(model.norm), truth["left"]) < EXACT
    assert error(read(model.both)[4:] + read(model.alone), truth["right"]) < EXACT
    assert error(read(model.both)[4:], truth["right"]) > FAR


def test_squeeze_and_excitation() -> None:
    """Behind the product only its reader is exact. In front of it the writer, and the two readers together."""
    model, truth = run(Excited())
    assert error(read(model.reader), truth["behind"]) < EXACT
    assert error(affine(model.norm), truth["behind"]) > FAR
    assert error(affine(model.norm), truth["before"]) < EXACT
    assert error(read(model.reader), truth["before"]) > FAR
    assert error(read(model.reader) + read(model.squeeze), truth["before"]) < EXACT


def test_a_layer_that_is_used_twice_has_the_sum_of_its_uses_and_neither_alone() -> None:
    model, truth = run(Tied())
    for measured, place in ((read(model.conv), "input"), (affine(model.norm), "norm")):
        uses = [truth[f"{place}, once"], truth[f"{place}, twice"]]
        assert error(measured, uses[0] + uses[1]) < EXACT
        assert min(error(measured, use) for use in uses) > FAR


def recursions(model: Stages) -> dict[str, list[Tensor]]:
    """S_l of every block's output: from the writers on, and from the next stage's readers back."""
    found: dict[str, list[Tensor]] = {}
    for s, stage in enumerate(model.stages):
        forward, after = [], model.stages[s + 1][0] if s + 1 < len(model.stages) else None
        for block in stage:
            start = forward[-1] - read(block.conv1) if block.down is None else affine(block.down_bn)
            forward.append(affine(block.bn3) + start)
        back = [read(model.head) if after is None else read(after.conv1) + read(after.down)]
        for block in reversed(stage[1:]):
            back.insert(0, back[0] - affine(block.bn3) + read(block.conv1))
        found |= {f"{s} forward": forward, f"{s} back": back}
    return found


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_the_recursion_along_a_residual_stream(train: bool) -> None:
    model, x, target = make(Stages())
    truth = backward(model.train(train), x, target)
    for name, sums in recursions(model).items():
        gates = [truth[f"{name[0]}.{b} output"] for b in range(len(sums))]
        assert max(error(*pair) for pair in zip(sums, gates, strict=True)) < EXACT, name
        assert error(sum(sums), sum(gates)) < EXACT  # one gate shared by the blocks of a stage
    for s, stage in enumerate(model.stages):
        assert error(affine(stage[0].bn3), truth[f"{s}.0 output"]) > FAR  # without the other branch
        assert error(affine(stage[1].bn3), truth[f"{s}.1 output"]) > FAR  # without the stream
        for b, block in enumerate(stage):
            for norm, reader, place in ((block.bn1, block.conv2, "inner1"), (block.bn2, block.conv3, "inner2")):
                assert error(affine(norm), truth[f"{s}.{b} {place}"]) < EXACT
                assert error(read(reader), truth[f"{s}.{b} {place}"]) < EXACT


def test_bfloat16_autocast_keeps_the_ranks() -> None:
    """Errors as they were found on a network like this: 0.3 % from normalisations, 0.8 % from readers, 1.2 % behind a
    recursion; doubled, for they are of one batch. The truth is Σ a·g of the same pass, in float64.
    """
    model, x, target = make(Stages(16), batch=32, size=26)
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        truth = backward(model, x.float(), target)
    measured = {}
    for s, stage in enumerate(model.stages):
        for b, block in enumerate(stage):
            for norm, reader, place in ((block.bn1, block.conv2, "inner1"), (block.bn2, block.conv3, "inner2")):
                measured[f"{s}.{b} {place}", "norm"] = affine(norm), 0.003
                measured[f"{s}.{b} {place}", "reader"] = read(reader), 0.008
    for name, sums in recursions(model).items():
        for b, total in enumerate(sums):
            measured[f"{name[0]}.{b} output", name[2:]] = total, 0.012
    for (place, how), (sums, bound) in measured.items():
        assert error(sums, truth[place]) < 2 * bound, (place, how)
        assert spearmanr(sums.square(), truth[place].square()).statistic >= 0.99, (place, how)


def test_a_loss_scale_is_a_factor_and_accumulation_is_the_gate_of_the_sum() -> None:
    model, truth = run(Stages())
    plain = affine(model.stages[0][1].bn1)
    _, scaled = run(model, scale=1024.0)
    assert torch.equal(affine(model.stages[0][1].bn1), plain * 1024)
    assert torch.equal(scaled["0.1 inner1"], truth["0.1 inner1"] * 1024)

    model, x, target = make(Stages())
    gates, sums = [], []
    for half in (slice(0, 2), slice(2, 4)):
        gates.append(backward(model, x[half], target[half], scale=0.5)["0.1 inner1"])
        sums.append([p.grad.clone() for p in model.parameters()])
    for parameter, first, second in zip(model.parameters(), *sums, strict=True):
        parameter.grad = first + second
    accumulated = affine(model.stages[0][1].bn1)
    assert error(accumulated, gates[0] + gates[1]) < EXACT
    assert error(accumulated.square(), (gates[0].square() + gates[1].square())) > FAR


def test_what_changes_a_gradient_or_a_weight_comes_too_late_or_counts_with_its_own_value() -> None:
    model, truth = run(Read(nn.Conv2d(6, 8, 3)))
    weight = model.reader.weight
    weight.grad += 0.1 * weight.detach()  # weight decay
    assert error(read(model.reader), truth["input"]) > FAR

    model, x, target = make(Read(nn.Conv2d(6, 8, 3)))
    half = torch.full((6,), 0.5, dtype=torch.float64, requires_grad=True)
    model.places = {"input": half}
    F.cross_entropy(model(x), target).backward()
    assert error(read(model.reader), half.detach() * half.grad) < EXACT  # m·dE/dm
    assert error(read(model.reader), half.grad) > FAR


def test_a_reparametrised_weight_counts_as_what_it_becomes() -> None:
    model, x, target = make(Written(nn.Conv2d(6, 8, 3)))
    weight_norm(model.writer)
    with parametrize.cached():
        weight = model.writer.weight
        weight.retain_grad()
        truth = backward(model, x, target)["output"]
        assert error(written(model.writer), truth) < EXACT
    length, direction = (getattr(model.writer.parametrizations.weight, f"original{i}") for i in (0, 1))
    assert error(products(length, 0) + products(model.writer.bias, 0), truth) < EXACT
    assert products(direction, 0).norm() < EXACT * truth.norm()


NETS: dict[str, Callable[[], PlacedNet]] = {
    **{f"{name} norm": lambda name=name: Normed(*made(name)) for name in NORMS},
    **{name: lambda name=name: Activated({**HOMOGENEOUS, **OTHERS}[name]) for name in (*HOMOGENEOUS, *OTHERS)},
    **{f"{name}, read": lambda name=name: Read(LAYERS[name]()) for name in LAYERS},
    **{f"{name}, written": lambda name=name: Written(LAYERS[name]()) for name in LAYERS},
    **{"concat": Joined, "squeeze and excitation": Excited, "tied": Tied, "residual": Stages},
}


@pytest.mark.parametrize("name", NETS)
def test_importance_chooses_a_form_that_holds(name: str) -> None:
    """Parameters alone give what sums over activations at every reader do; the seeds of both passes are the same."""
    model, x, target = make(NETS[name]())
    groups = tc.trace(model, x)
    assert len(groups) > 0
    windows = []
    for source in ("parameters", "activations"):
        estimator = tc.Importance(model, groups, source=source)
        torch.manual_seed(1)
        model.zero_grad()
        estimator.backward(F.cross_entropy(model(x), target))
        estimator.close()
        windows.append(estimator.state_dict()["window"])  # scores() are in float32
    assert windows[0].dtype == torch.float64
    for parameters, activations in zip(*(w.split(list(groups.sizes().values())) for w in windows), strict=True):
        assert error(parameters, activations) < 1e-10

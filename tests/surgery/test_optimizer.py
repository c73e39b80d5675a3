"""After a cut an optimizer goes on exactly as one freshly built over the small network with sliced state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import (
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from taylor_cuda.errors import InputError
from taylor_cuda.surgery import cut
from tests.surgery.nets import ConvBN, Depthwise, Linears, Residual, Tied, make, random_keep, train_steps
from tests.surgery.state import all_tensors, differences, fingerprint, kept_positions, pick, rebuilt

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": partial(SGD, lr=0.05),
    "sgd-momentum": partial(SGD, lr=0.05, momentum=0.9, weight_decay=1e-3, foreach=False),
    "sgd-nesterov-foreach": partial(SGD, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "sgd-fused": partial(SGD, lr=0.05, momentum=0.9, fused=True),
    "adam": partial(Adam, lr=1e-2, foreach=False),
    "adam-foreach": partial(Adam, lr=1e-2, foreach=True),
    "adam-fused": partial(Adam, lr=1e-2, fused=True),
    "adamw-amsgrad": partial(AdamW, lr=1e-2, amsgrad=True, weight_decay=0.1),
    "adamw-capturable-lr": partial(AdamW, lr=torch.tensor(1e-2)),
    "nadam": partial(NAdam, lr=1e-2),
    "radam": partial(RAdam, lr=1e-2),
    "adamax": partial(Adamax, lr=1e-2),
    "rmsprop-centered": partial(RMSprop, lr=1e-3, momentum=0.9, centered=True),
    "adagrad": partial(Adagrad, lr=1e-2),
    "adadelta": partial(Adadelta, lr=1.0),
    "rprop": partial(Rprop, lr=1e-3),
}


def sliced_optimizer(
    make_optimizer: Callable[..., Optimizer],
    old: Optimizer,
    model: nn.Module,
    small: nn.Module,
    kept: dict[str, dict[int, list[int]]],
) -> Optimizer:
    """A new optimizer over ``small`` whose state is that of ``old``, picked position by position."""
    new = make_optimizer(small.parameters())
    for (name, before), after in zip(model.named_parameters(), small.parameters(), strict=True):
        for key, value in old.state.get(before, {}).items():
            if isinstance(value, Tensor) and value.shape == before.shape:
                value = pick(value, kept.get(name, {}))
            new.state[after][key] = copy.deepcopy(value)
    return new


@pytest.mark.parametrize("net", [ConvBN, Residual])
@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_goes_on_as_with_a_fresh_optimizer_of_sliced_state(make_optimizer, net):
    model, x, groups = make(net)
    optimizer = make_optimizer(model.parameters())
    train_steps(model, x, optimizer, 3)
    keep = random_keep(groups, 4)
    kept = kept_positions(groups, keep, all_tensors(model))
    small = rebuilt(model, kept)
    reference = sliced_optimizer(make_optimizer, optimizer, model, small, kept)
    cut(model, groups, keep, optimizer)
    train_steps(model, x, optimizer, 3, seed=8)
    train_steps(small, x, reference, 3, seed=8)
    for (name, p), q in zip(model.named_parameters(), small.parameters(), strict=True):
        assert p.shape == q.shape
        assert torch.equal(p, q), name


@pytest.mark.parametrize("net", [Depthwise, Linears, Tied])
def test_every_state_tensor_of_the_parameter_s_shape_is_sliced(net):
    model, x, groups = make(net)
    optimizer = AdamW(model.parameters(), amsgrad=True)
    train_steps(model, x, optimizer, 2)
    states = {name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters()}
    keep = random_keep(groups, 1)
    kept = kept_positions(groups, keep, all_tensors(model))
    cut(model, groups, keep, optimizer)
    for name, p in model.named_parameters():
        assert optimizer.state[p].keys() == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert torch.equal(optimizer.state[p][key], pick(states[name][key], kept.get(name, {}))), (name, key)
        assert optimizer.state[p]["step"] == 2


def test_parameter_groups_and_their_schedules_stay():
    model, x, groups = make(ConvBN)
    norms = [p for name, p in model.named_parameters() if "bn" in name]
    others = [p for name, p in model.named_parameters() if "bn" not in name]
    optimizer = SGD(
        [{"params": norms, "weight_decay": 0.0}, {"params": others}], lr=0.1, momentum=0.9, weight_decay=1e-2
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train_steps(model, x, optimizer, 1)
    schedule.step()
    ids = [[id(p) for p in one["params"]] for one in optimizer.param_groups]
    cut(model, groups, random_keep(groups), optimizer)
    assert [[id(p) for p in one["params"]] for one in optimizer.param_groups] == ids
    assert [one["weight_decay"] for one in optimizer.param_groups] == [0.0, 1e-2]
    schedule.step()
    assert [one["lr"] for one in optimizer.param_groups] == [0.025, 0.025]
    train_steps(model, x, optimizer, 1)


def test_state_keeps_channels_last():
    model, x, groups = make(ConvBN)
    model = model.to(memory_format=torch.channels_last)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    train_steps(model, x.to(memory_format=torch.channels_last), optimizer, 1)
    cut(model, groups, random_keep(groups), optimizer)
    state = optimizer.state[model.conv2.weight]["momentum_buffer"]
    assert state.is_contiguous(memory_format=torch.channels_last)


def test_factored_state_is_sliced_where_it_has_the_dimension():
    model, x, groups = make(Linears)
    optimizer = Adafactor(model.parameters())
    train_steps(model, x, optimizer, 1)
    rows, columns = (optimizer.state[model.fc2.weight][key].clone() for key in ("row_var", "col_var"))
    cut(model, groups, {"fc1": torch.tensor([1, 5]), "fc2": torch.tensor([0, 2, 4])}, optimizer)
    assert torch.equal(optimizer.state[model.fc2.weight]["row_var"], rows[[0, 2, 4]])
    assert torch.equal(optimizer.state[model.fc2.weight]["col_var"], columns[:, [1, 5]])
    train_steps(model, x, optimizer, 1)


def test_state_in_containers_is_sliced():
    model, _, groups = make(ConvBN)
    optimizer = SGD(model.parameters(), lr=0.1)
    history = [torch.rand(6, 3, 3, 3) for _ in range(2)]
    optimizer.state[model.conv1.weight] = {"history": list(history), "name": "conv", "count": 3}
    cut(model, groups, {"conv1": torch.tensor([2, 3])}, optimizer)
    state = optimizer.state[model.conv1.weight]
    assert state["name"] == "conv"
    assert state["count"] == 3
    assert all(torch.equal(a, b[[2, 3]]) for a, b in zip(state["history"], history, strict=True))


def test_several_optimizers_and_one_inside_another():
    model, x, groups = make(ConvBN)
    weights = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]

    class Averaging(SGD):
        """Holds another optimizer, as Lookahead does."""

        def __init__(self, inner: Optimizer) -> None:
            super().__init__(inner.param_groups, lr=0.1)
            self.inner = inner

    inner = AdamW(rest, lr=1e-2)
    optimizers = [SGD(weights, lr=0.1, momentum=0.9), Averaging(inner)]
    train_steps(model, x, optimizers[0], 1)
    inner.step()
    cut(model, groups, random_keep(groups), optimizers)
    assert optimizers[0].state[model.conv1.weight]["momentum_buffer"].shape == model.conv1.weight.shape
    assert inner.state[model.bn1.weight]["exp_avg"].shape == model.bn1.weight.shape


def test_timm_optimizers_go_on():
    optim = pytest.importorskip("timm.optim")
    for name in ("lamb", "lars", "lookahead_adamw", "madgrad"):
        model, x, groups = make(ConvBN)
        optimizer = optim.create_optimizer_v2(model, opt=name, lr=1e-3)
        train_steps(model, x, optimizer, 7)
        cut(model, groups, random_keep(groups), optimizer)
        train_steps(model, x, optimizer, 7)


def refused(model, groups, optimizer, message):
    before = fingerprint(model, optimizer, groups=groups)
    with pytest.raises(InputError, match=message):
        cut(model, groups, random_keep(groups), optimizer)
    assert not differences(before, fingerprint(model, optimizer, groups=groups))


def test_an_optimizer_that_does_not_own_the_parameters_is_refused():
    model, _, groups = make(ConvBN)
    other = copy.deepcopy(model)
    refused(model, groups, SGD(other.parameters(), lr=0.1), "doesn't own .* and .* more, which this cut would slice")
    refused(model, groups, SGD([p for n, p in model.named_parameters() if n != "bn1.bias"], lr=0.1), r"own bn1\.bias,")
    model.bn1.bias.requires_grad_(False)
    cut(model, groups, random_keep(groups), SGD([p for n, p in model.named_parameters() if n != "bn1.bias"], lr=0.1))


def test_state_that_can_not_be_sliced_is_refused():
    model, x, groups = make(ConvBN)
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.state[model.conv2.weight]["flat"] = torch.zeros(model.conv2.weight.numel())
    refused(model, groups, optimizer, r"state 'flat' of conv2\.weight has shape \(270,\)")
    optimizer = LBFGS(model.parameters(), max_iter=1)
    optimizer.step(lambda: model(x).square().sum())
    refused(model, groups, optimizer, "LBFGS")
    with pytest.raises(InputError, match="wanted a torch optimizer"):
        cut(model, groups, random_keep(groups), "adam")

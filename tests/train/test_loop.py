import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from taylor_cuda.errors import InputError, TaylorError
from taylor_cuda.train.data import TensorData
from taylor_cuda.train.loop import Stage, evaluate, train_stage
from taylor_cuda.train.rates import cosine
from taylor_cuda.train.state import Position
from taylor_cuda.train.step import TrainingStep

CPU = torch.device("cpu")


def norm_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3, momentum=0.3),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(12, 4),
        nn.BatchNorm1d(4, track_running_stats=False),
    )


def tensor_data(count=24, batch=8):
    generator = torch.Generator().manual_seed(1)
    images, labels = (
        torch.randn(count, 2, 4, 4, generator=generator),
        torch.randint(0, 4, (count,), generator=generator),
    )
    return TensorData("random", tuple("abcd"), (images, labels), (images[:10], labels[:10]), batch)


def test_evaluate_is_the_mean_over_examples_in_eval_mode():
    net, data = norm_net()[:5], tensor_data()
    net.train()
    quality = evaluate(
        net, [(data.val_set[0][:7], data.val_set[1][:7]), (data.val_set[0][7:], data.val_set[1][7:])], CPU
    )
    assert net.training
    with torch.no_grad():
        logits = net.eval()(data.val_set[0])
    expected = F.cross_entropy(logits, data.val_set[1])
    assert quality.examples == 10
    assert quality.loss == pytest.approx(float(expected), rel=1e-6)
    assert quality.accuracy == pytest.approx(float((logits.argmax(1) == data.val_set[1]).float().mean()))
    with pytest.raises(InputError, match="at least one batch"):
        evaluate(net, [], CPU)


def stage_of(net, optimizer, epochs=2, **options):
    return Stage("test", epochs, 3, 0, lambda step: 0.1 * cosine(step, 6), TrainingStep(net, optimizer), **options)


def test_a_stage_is_sgd_written_out():
    nets = [norm_net()[:2].append(nn.Flatten()).append(nn.Linear(12, 4)) for _ in range(2)]
    data, rates, records = tensor_data(), [], []
    optimizers = [torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9) for net in nets]
    position = Position("test")
    stage = stage_of(
        nets[0],
        optimizers[0],
        after_step=lambda: rates.append(optimizers[0].param_groups[0]["lr"]),
        after_epoch=records.append,
    )
    train_stage(stage, nets[0], optimizers[0], data, position, CPU)
    for step, (images, labels) in enumerate([*data.train(0), *data.train(1)]):
        optimizers[1].param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / 6))
        optimizers[1].zero_grad()
        F.cross_entropy(nets[1](images), labels).backward()
        optimizers[1].step()
    for mine, expected in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True):
        assert torch.equal(mine, expected)
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 6)) for step in range(6)])
    assert position == Position("test", epoch=2, batch=0)
    assert [record["epoch"] for record in records] == [1, 2]


def test_a_stage_that_was_stopped_goes_on_as_if_it_had_not_been():
    straight, stopped = norm_net()[:2], norm_net()[:2]
    data = tensor_data()
    finals = []
    for net, stop_at in ((straight, None), (stopped, 4)):
        head = nn.Sequential(net, nn.Flatten(), nn.Linear(12, 4))
        head[2].load_state_dict(norm_net()[4].state_dict())
        optimizer, position, taken = torch.optim.SGD(head.parameters(), lr=1.0, momentum=0.9), Position("test"), []

        def count(taken=taken, stop_at=stop_at):
            taken.append(1)
            if len(taken) == stop_at:
                raise KeyboardInterrupt

        stage = stage_of(head, optimizer, after_step=count)
        if stop_at is not None:
            with pytest.raises(KeyboardInterrupt):
                train_stage(stage, head, optimizer, data, position, CPU)
            assert position == Position("test", epoch=1, batch=1)
        train_stage(stage, head, optimizer, data, position, CPU)
        assert len(taken) == 6
        finals.append(head.state_dict())
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())


def test_going_on_from_the_last_minibatch_of_an_epoch_logs_no_figures_of_it():
    net, told = norm_net(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    stage = Stage("base", 2, 3, 0, lambda _: 0.1, TrainingStep(net, optimizer), after_epoch=told.append)
    train_stage(stage, net, optimizer, tensor_data(), Position("base", 0, 3), CPU)
    assert [(record["epoch"], record["loss"] is None, record["accuracy"] is None) for record in told] == [
        (1, True, True),
        (2, False, False),
    ]


def test_groups_of_parameters_may_have_a_share_of_the_rate():
    net = nn.Sequential(nn.Flatten(), nn.Linear(32, 8), nn.Linear(8, 4))
    groups = [{"params": net[1].parameters(), "lr_scale": 0.25}, {"params": net[2].parameters()}]
    optimizer, rates = torch.optim.SGD(groups, lr=1.0), []
    note = {"after_step": lambda: rates.append([group["lr"] for group in optimizer.param_groups])}
    train_stage(stage_of(net, optimizer, epochs=1, **note), net, optimizer, tensor_data(), Position("test"), CPU)
    assert [low / high for low, high in rates] == pytest.approx([0.25] * 3)
    assert rates[0][1] == 0.1


def test_divergence_is_an_error_and_not_a_result():
    net = nn.Sequential(nn.Flatten(), nn.Linear(32, 4))
    with torch.no_grad():
        net[1].weight.fill_(float("inf"))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(TaylorError, match=r"training loss of epoch 1 is nan; try a smaller --lr"):
        train_stage(stage_of(net, optimizer), net, optimizer, tensor_data(), Position("test"), CPU)

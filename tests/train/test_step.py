"""One optimizer step: its parts, its precision, what follows it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taylor_cuda as tc
from taylor_cuda.errors import InputError
from taylor_cuda.train.objective import Objective, mixing_of
from taylor_cuda.train.step import Precision, TrainingStep, moving_average

CPU = torch.device("cpu")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()


def batch(count=8):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 2, 4, 4, generator=generator, dtype=torch.float64)
    return images, torch.arange(count) % 3


def sgd(model, lr=0.5):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def same(mine, other):
    for a, b in zip(mine.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_parts_of_a_minibatch_make_the_step_of_the_whole(micro):
    model, other = net(), net()
    step, optimizer = TrainingStep(model, sgd(model), micro=micro), sgd(other)
    images, labels = batch()
    for _ in range(3):
        before = copy.deepcopy(model)
        for number, (x, y) in enumerate(zip(images.chunk(micro), labels.chunk(micro), strict=True), 1):
            loss, logits = step(x, y)
            if number == 1:
                torch.testing.assert_close(loss, F.cross_entropy(before(x), y))
                assert not logits.requires_grad
            if number < micro:
                same(model, before)
        F.cross_entropy(other(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        same(model, other)


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_so"])
def test_scores_are_those_of_the_whole_minibatch(criterion):
    found = []
    for micro in (1, 4):
        model = net()
        groups = tc.trace(model, torch.zeros(2, 2, 4, 4, dtype=torch.float64))
        scores = tc.Importance(model, groups, criterion)
        step = TrainingStep(model, sgd(model, 0.0), backward=scores, micro=micro)
        images, labels = batch()
        for x, y in zip(images.chunk(micro), labels.chunk(micro), strict=True):
            step(x, y)
        assert scores.steps == 1
        found.append(torch.cat(list(scores.scores().values())))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-12)


def test_gradients_are_clipped_to_a_norm():
    model = net()
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    TrainingStep(model, optimizer, clip=0.01)(*batch())
    moved = [a - b for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    norm = torch.stack([change.norm() for change in moved]).norm()
    torch.testing.assert_close(norm, torch.tensor(0.01, dtype=torch.float64), rtol=1e-4, atol=0)


def test_the_average_remembers_more_as_it_grows_older():
    model = net()
    average, expected = moving_average(model, 0.5), copy.deepcopy(model)
    step = TrainingStep(model, sgd(model), average=average)
    for count in range(8):
        step(*batch())
        past = 0.0 if count == 0 else min(0.5, (1 + count) / (10 + count))  # the first one is taken as it is
        with torch.no_grad():
            for mean, now in zip(expected.parameters(), model.parameters(), strict=True):
                mean.mul_(past).add_(now, alpha=1 - past)
        same(average.module, expected)
    assert min(0.5, 8 / 17) == 8 / 17  # the decay itself has not been reached yet ...
    assert (1 + 9) / (10 + 9) > 0.5  # ... and would be soon


def test_counters_of_batch_norm_are_copied_into_the_average():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).double()
    average = moving_average(model, 0.9)
    step = TrainingStep(model, sgd(model, 0.1), average=average)
    for _ in range(3):
        step(*batch())
    assert int(average.module[1].num_batches_tracked) == 3
    assert not torch.equal(average.module[1].running_mean, model[1].running_mean)


def test_a_step_whose_gradients_overflow_is_left_out():
    model = net().float()
    precision = Precision("fp16", CPU)
    step = TrainingStep(model, sgd(model), precision=precision)
    images, labels = batch()
    before = copy.deepcopy(model)
    scale = precision.scaler.get_scale()
    step(images.float() * 1e30, labels)
    assert precision.scaler.get_scale() == scale / 2
    same(model, before)
    step(images.float(), labels)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_low_precision_trains_nearly_as_single_precision(amp):
    finals = []
    for kind in ("off", amp):
        model = net().float()
        step = TrainingStep(model, sgd(model, 0.1), precision=Precision(kind, CPU), clip=1.0)
        images, labels = batch()
        losses = [float(step(images.float(), labels)[0]) for _ in range(10)]
        assert losses[-1] < 0.8 * losses[0]
        finals.append(losses[-1])
    assert finals[1] == pytest.approx(finals[0], rel=0.05)


def test_mixed_images_are_trained_on_with_their_mixed_targets():
    model, other = net(), net()
    mixing = mixing_of(0.4, 0.0, classes=3)
    images, labels = batch()
    torch.manual_seed(4)
    TrainingStep(model, sgd(model), mixing=mixing)(images, labels)
    torch.manual_seed(4)
    mixed, targets = mixing(images, labels)
    optimizer = sgd(other)
    F.cross_entropy(other(mixed), targets).backward()
    optimizer.step()
    same(model, other)


def test_filters_of_convolutions_shrink_before_each_step():
    model, other = net(), net()
    lr = 1e-30
    TrainingStep(model, sgd(model, lr), group_lasso=0.1)(*batch())
    norms, before = (m[0].weight.flatten(1).norm(dim=1) for m in (model, other))
    torch.testing.assert_close(norms, before - 0.1)
    torch.testing.assert_close(model[4].weight, other[4].weight)


def test_a_teacher_sees_the_images_the_network_sees():
    model, other = net(), net()
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(32, 3)).double()
    mixing = mixing_of(0.4, 0.0, classes=3)
    images, labels = batch()
    torch.manual_seed(4)
    TrainingStep(model, sgd(model), objective=Objective(0.0, teacher, 0.5, 2.0), mixing=mixing)(images, labels)
    torch.manual_seed(4)
    mixed, targets = mixing(images, labels)
    optimizer = sgd(other)
    Objective(0.0, teacher, 0.5, 2.0)(other(mixed), targets, mixed).backward()
    optimizer.step()
    same(model, other)


def test_watchers_would_read_the_scale_as_gradient():
    model = net()
    with pytest.raises(InputError, match="wanted none with a GradScaler"):
        TrainingStep(model, sgd(model), watchers=[object()], precision=Precision("fp16", CPU))

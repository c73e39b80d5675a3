import pytest
import torch
import torch.nn.functional as F
from torch import nn

from taylor_cuda.errors import InputError
from taylor_cuda.train.objective import Objective, main_output, mixing_of


def test_main_output_finds_the_logits():
    x = torch.zeros(2, 3)
    output = type("Output", (), {"logits": x})()
    for outputs in (x, output, {"logits": x}, {"out": x}, (x, torch.ones(1))):
        assert main_output(outputs) is x
    with pytest.raises(InputError, match="wanted logits as output"):
        main_output("text")


def logits_and_images(classes=5, count=6):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 7, generator=generator, dtype=torch.float64)
    return torch.randn(count, classes, generator=generator, dtype=torch.float64, requires_grad=True), images


def test_the_loss_of_labels_is_smoothed_cross_entropy():
    logits, images = logits_and_images()
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    smooth = 0.2
    targets = torch.full((6, 5), smooth / 5, dtype=torch.float64)
    targets[torch.arange(6), labels] += 1 - smooth
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(Objective(smooth)(logits, labels, images), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 1.0), (0.7, 4.0), (1.0, 2.0)])
def test_a_teacher_adds_the_divergence_from_its_predictions(weight, temperature):
    logits, images = logits_and_images()
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    teacher = nn.Sequential(nn.Linear(7, 5), nn.Dropout(0.5)).double()
    objective = Objective(0.0, teacher, weight, temperature)
    with torch.no_grad():
        taught = (teacher[0](images) / temperature).softmax(1)
    student = (logits / temperature).softmax(1)
    divergence = (taught * (taught / student).log()).sum() / 6
    expected = (1 - weight) * F.cross_entropy(logits, labels) + weight * temperature**2 * divergence
    torch.testing.assert_close(objective(logits, labels, images), expected, rtol=1e-12, atol=0)
    objective(logits, labels, images).backward()
    assert all(value.grad is None and not value.requires_grad for value in teacher.parameters())


def test_half_precision_logits_give_a_loss_in_single_precision():
    logits, images = logits_and_images()
    low = logits.detach().bfloat16()
    loss = Objective()(low, torch.zeros(6, dtype=torch.int64), images)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(low.float(), torch.zeros(6, dtype=torch.int64)))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (0.0, 1.0), (0.2, 1.0)])
def test_mixing_gives_shares_of_two_labels(mixup, cutmix):
    torch.manual_seed(0)
    images, labels = torch.rand(8, 3, 4, 4), torch.arange(8) % 3
    mixed, targets = mixing_of(mixup, cutmix, classes=5)(images, labels)
    assert mixed.shape == images.shape
    assert not torch.equal(mixed, images)
    assert targets.shape == (8, 5)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    assert bool((targets[torch.arange(8), labels] > 0).any())
    assert bool((targets[:, 3:] == 0).all())


def test_without_a_parameter_nothing_is_mixed():
    assert mixing_of(0.0, 0.0, 5) is None

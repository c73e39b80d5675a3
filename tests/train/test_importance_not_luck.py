"""Fine-tuned accuracy on digits hardly tells criteria apart; the loss right after removal does."""

import pytest
import torch

from taylor_cuda.graph import masked, trace
from taylor_cuda.importance import Importance
from taylor_cuda.planning import plan
from taylor_cuda.train.data import load_data
from taylor_cuda.train.loop import Stage, evaluate, train_stage
from taylor_cuda.train.models import DigitsResNet
from taylor_cuda.train.rates import cosine
from taylor_cuda.train.state import Position
from taylor_cuda.train.step import TrainingStep

CPU = torch.device("cpu")
EPOCHS, RATE = 5, 0.05


def trained(seed):
    """The default network after a short base training, and its data."""
    torch.manual_seed(seed)
    model, data = DigitsResNet(), load_data("digits", 64, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    total = EPOCHS * data.steps_per_epoch
    stage = Stage(
        "base", EPOCHS, data.steps_per_epoch, 0, lambda step: RATE * cosine(step, total), TrainingStep(model, optimizer)
    )
    train_stage(stage, model, optimizer, data, Position("base"), CPU)
    return model, data


def loss_after_removal(model, data, criterion, seed):
    """Mean training loss with a fifth of the channels gone; the weights stay as they were trained."""
    groups = trace(model, data.val_set[0][:2])
    estimator = Importance(model, groups, criterion, seed=seed)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if criterion == "taylor_fo":
        step = TrainingStep(model, torch.optim.SGD(model.parameters(), lr=0.0), backward=estimator)
        for images, labels in data.train(EPOCHS):
            step(images, labels)
        model.load_state_dict(state)  # running statistics of the BatchNorms moved
    decided = plan(model, groups, estimator.scores(), {"channels": 0.8}, rank="value")
    estimator.close()
    assert sum(kept.numel() for kept in decided.keep.values()) == 230  # 0.8 of 288
    with masked(model, groups, decided):
        return evaluate(model, [data.train_set], CPU).loss


@pytest.fixture(scope="module")
def losses():
    found = {"before": [], "taylor_fo": [], "magnitude": [], "random": []}
    for seed in range(3):
        model, data = trained(seed)
        found["before"].append(evaluate(model, [data.train_set], CPU).loss)
        for criterion in ("taylor_fo", "magnitude", "random"):
            found[criterion].append(loss_after_removal(model, data, criterion, seed))
    return {name: sum(values) / len(values) for name, values in found.items()}


def test_the_networks_are_trained(losses):
    assert losses["before"] < 0.2


@pytest.mark.parametrize("other", ["magnitude", "random"])
def test_taylor_loses_at_most_half_of_what_others_lose(losses, other):
    assert losses["taylor_fo"] <= 0.5 * losses[other], losses

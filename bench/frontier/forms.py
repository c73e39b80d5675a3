"""What a run is: the settings that every method shares."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from taylor_cuda.errors import InputError


@dataclass(frozen=True)
class Form:
    """The settings of a run.

    Attributes:
        name: the rows' case.
        width: channels of the first stage.
        size: pixels of the square images.
        classes: characters.
        batch: images in a step.
        test_images: in the test set.
        seeds: runs, each with a base network of its own.
        budgets: shares of the base network's MACs.
        base_steps: of training before any pruning, from ``base_rate`` down to 0.
        base_rate: learning rate.
        every: steps between removals.
        prune_steps: removals.
        prune_rate: learning rate while pruning.
        finetune_steps: after the last removal, from ``finetune_rate`` down to 0.
        finetune_rate: learning rate.
        weight_decay: of SGD with momentum 0.9, always.
        schedule: of the budget over the removals; see ``tc.Pruner``.
    """

    name: str
    width: int
    size: int
    classes: int
    batch: int
    test_images: int
    seeds: tuple[int, ...]
    budgets: tuple[float, ...]
    base_steps: int
    base_rate: float
    every: int
    prune_steps: int
    prune_rate: float
    finetune_steps: int
    finetune_rate: float
    weight_decay: float = 5e-4
    schedule: str = "cubic"

    def settings(self) -> dict[str, Any]:
        """What a point's result depends on, besides its seed, method and budget."""
        chosen = asdict(self)
        return {key: value for key, value in chosen.items() if key not in ("name", "seeds", "budgets")}

    def sgd(self, model: nn.Module, rate: float) -> torch.optim.SGD:
        """A fresh optimizer of the model's parameters."""
        return torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=self.weight_decay)


BUDGETS = (0.75, 0.5, 0.35, 0.25)

FORMS = {
    form.name: form
    for form in (
        Form(
            name="small",
            width=16,
            size=16,
            classes=48,
            batch=64,
            test_images=4096,
            seeds=(0, 1),
            budgets=BUDGETS,
            base_steps=800,
            base_rate=0.1,
            every=5,
            prune_steps=10,
            prune_rate=0.01,
            finetune_steps=60,
            finetune_rate=0.02,
        ),
        Form(
            name="full",
            width=64,
            size=32,
            classes=384,
            batch=128,
            test_images=20000,
            seeds=(0, 1, 2),
            budgets=BUDGETS,
            base_steps=4000,
            base_rate=0.1,
            every=20,
            prune_steps=10,
            prune_rate=0.01,
            finetune_steps=600,
            finetune_rate=0.02,
        ),
    )
}


def find_form(name: str) -> Form:
    """The form of that name."""
    if name not in FORMS:
        raise InputError(f"form: wanted one of {', '.join(FORMS)}, got {name!r}")
    return FORMS[name]

"""One point of a curve, from the base network to the row."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_cuda.bench.frontier.forms import Form
from taylor_cuda.bench.frontier.glyphs import (
    TEST_FACES,
    TEST_SEED,
    TRAIN_FACES,
    Views,
    find_bank,
)
from taylor_cuda.bench.frontier.methods import WITHIN, Method, Removal, Start
from taylor_cuda.bench.frontier.network import SmallImageResNet18, macs
from taylor_cuda.bench.rows import Row
from taylor_cuda.errors import InputError, TaylorError
from taylor_cuda.files import replacing
from taylor_cuda.train.loop import Quality, evaluate
from taylor_cuda.train.rates import cosine

Batches = Iterator[tuple[Tensor, Tensor]]
ASKED = (1.0, 1.005, 1.01)
"""Shares of the budget that a method is asked for in turn, until its network doesn't cost too little."""
EVALUATED = 512
"""Test images in one forward pass."""


class Task:
    """The images of a form on one device.

    Args:
        form: what a run is.
        device: where everything runs.
        folder: of what is kept between runs.

    Attributes:
        settings: all that a point's result depends on, besides its seed, base network, method and budget.
    """

    def __init__(self, form: Form, device: torch.device, folder: Path) -> None:
        self.form, self.device = form, device
        bank = find_bank(form.classes, folder)
        self._views = Views(bank, TRAIN_FACES, form.size, device)
        test = Views(bank, TEST_FACES, form.size, device)
        images, labels = test.draw(form.test_images, torch.Generator(device).manual_seed(TEST_SEED))
        self._test = list(zip(images.split(EVALUATED), labels.split(EVALUATED), strict=True))
        # with other fonts, or another way of making images, it is another task
        self.settings = {**form.settings(), "images": _digest([images])}

    def batches(self, seed: int, base: bool) -> Batches:
        """The training images of a seed: those of the base network, or those that every method gets."""
        return self._views.stream(2 * seed + (0 if base else 1), self.form.batch)

    def quality(self, model: nn.Module) -> Quality:
        """Over the test images, in eval mode."""
        found = evaluate(model, self._test, self.device)
        if not math.isfinite(found.loss):
            raise TaylorError(f"frontier: the loss on the test images is {found.loss}")
        return found


def base_network(task: Task, seed: int, folder: Path) -> tuple[nn.Module, str]:
    """The trained network of a seed and a digest of its weights; from ``folder`` if it was trained before."""
    form = task.form
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallImageResNet18(form.width, form.classes).to(task.device)
    what = "-".join(str(value) for value in (*task.settings.values(), seed, task.device.type))
    path = folder / f"base-{hashlib.sha256(what.encode()).hexdigest()[:12]}.pt"
    if path.is_file():
        try:
            model.load_state_dict(torch.load(path, map_location=task.device, weights_only=True))
        except Exception as error:  # torch.load has no type of its own for a file it can't read
            raise InputError(f"work: {path} is damaged; delete it ({type(error).__name__})") from error
        return model, _digest(model.state_dict().values())
    optimizer = form.sgd(model, form.base_rate)
    train(model, optimizer, task.batches(seed, base=True), form.base_steps, form.base_rate)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save(model.state_dict(), temporary)
    return model, _digest(model.state_dict().values())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches, steps: int, rate: float) -> None:
    """``steps`` steps on half a cosine, after a linear rise over the first twentieth."""
    model.train()
    rise = max(1, steps // 20)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / rise, cosine(step, steps))
        images, labels = next(batches)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def prune(removal: Removal, batches: Batches, form: Form, device: torch.device) -> float:
    """The pruning phase; seconds of the removals."""
    seconds = 0.0
    for step in range(1, form.every * form.prune_steps + 1):
        images, labels = next(batches)
        removal.model.train()
        logits = removal.model(images)
        removal.backward(F.cross_entropy(logits, labels), logits)
        del logits
        removal.optimizer.step()
        removal.optimizer.zero_grad()
        if step % form.every:
            removal.step()
        else:
            started = _clock(device)
            removal.step()
            seconds += _clock(device) - started
    return seconds


def run_point(task: Task, base: nn.Module, before: Quality, seed: int, method: Method, budget: float) -> Row:
    """Prune a copy of the base network and fine-tune it.

    Args:
        task: the images.
        base: stays as it is.
        before: its quality.
        seed: of the run.
        method: prunes.
        budget: share of the MACs.

    Returns:
        What was measured.

    Raises:
        TaylorError: the network doesn't cost what was asked, or a loss isn't finite.
    """
    form, device = task.form, task.device
    whole, parameters = macs(base, form.size), _size(base)
    for more in ASKED:
        batches = task.batches(seed, base=False)
        started = _clock(device)
        removal = method(Start(form, copy.deepcopy(base), more * budget, seed))
        ready = _clock(device)
        removing = prune(removal, batches, form, device)
        pruned = _clock(device)
        model = removal.model
        cost = macs(model, form.size)
        if cost >= (1 - WITHIN) * budget * whole:
            break
    if abs(cost - budget * whole) > WITHIN * budget * whole:
        raise TaylorError(f"budget: wanted {budget:.1%} of the MACs to within {WITHIN:.0%}, got {cost / whole:.2%}")
    cut = task.quality(model)
    train(model, form.sgd(model, form.finetune_rate), batches, form.finetune_steps, form.finetune_rate)
    after = task.quality(model)
    return {
        "asked": more * budget,
        "macs_before": whole,
        "macs_after": cost,
        "macs": cost / whole,
        "params": _size(model) / parameters,
        "widths": [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)],
        "accuracy_base": before.accuracy,
        "accuracy_cut": cut.accuracy,
        "accuracy": after.accuracy,
        "loss_base": before.loss,
        "loss_cut": cut.loss,
        "loss": after.loss,
        "seconds_setup": ready - started,
        "seconds_removing": removing,
        "seconds_pruning": pruned - ready,
        "seconds": _clock(device) - started,
    }


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _digest(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]

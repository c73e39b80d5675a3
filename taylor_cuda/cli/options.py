"""Options that several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

from taylor_cuda.errors import InputError
from taylor_cuda.planning import parse_budget
from taylor_cuda.train.config import AMP, LR_SCHEDULES

__all__ = [
    "add_augmentation_options",
    "add_large_run_options",
    "add_model_options",
    "add_rate_options",
    "add_training_options",
    "or_none",
    "parse_budgets",
    "parse_round_to",
]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Where data and weights come from."""
    data = parser.add_argument_group("model and data")
    data.add_argument(
        "--data",
        metavar="DATA",
        help="folder with train/CLASS/* and val/CLASS/*; synthetic: noise, of ImageNet's size; or your own loaders, "
        "package.module:function or path/to/file.py:function (default: digits)",
    )
    data.add_argument(
        "--image-size", type=int, metavar="N", help="height and width of the images of --data (default: 224)"
    )
    data.add_argument("--workers", type=int, metavar="N", help="processes that read images (default: 2)")
    data.add_argument(
        "--weights",
        type=or_none(str),
        metavar="FILE",
        help=".safetensors of tc.save, .pt or .pth state_dict, 'pretrained', or what torchvision calls its own: "
        "IMAGENET1K_V1, …; there is no base training then. 'none': random, in place of a recipe's",
    )
    data.add_argument("--num-classes", type=int, metavar="N", help="outputs of the head (default: the model's own)")


def add_training_options(training: Any) -> None:
    """What base training, like every training, takes."""
    training.add_argument(
        "--batch",
        type=or_none(int),
        metavar="N",
        help="examples in one forward pass of one rank (default: 64, or what --global-batch leaves to each)",
    )
    training.add_argument(
        "--lr", type=float, metavar="X", help="peak learning rate (default: 0.05, with --weights 0.001)"
    )
    training.add_argument("--weight-decay", type=float, metavar="X", help="(default: 0.0005)")
    training.add_argument("--seed", type=int, metavar="N", help="(default: 0)")
    training.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")


def add_rate_options(training: Any) -> None:
    """Optimizer, and the path of its learning rate."""
    training.add_argument(
        "--total-epochs",
        type=or_none(int),
        metavar="N",
        help="of pruning and fine-tuning together, under one schedule of the rate, in place of --finetune-epochs",
    )
    training.add_argument(
        "--global-batch",
        type=or_none(int),
        metavar="N",
        help="examples in a minibatch, over all ranks; gradients are accumulated where --batch is less (default: "
        "--batch times the ranks)",
    )
    training.add_argument(
        "--optimizer", metavar="NAME", help="sgd (momentum 0.9), adamw, or one of timm's (default: sgd)"
    )
    training.add_argument(
        "--lr-per",
        type=or_none(int),
        metavar="N",
        help="rates are meant for minibatches of N examples, and grow with --global-batch (default: taken as they are)",
    )
    training.add_argument("--lr-schedule", choices=LR_SCHEDULES, help="(default: cosine, to 0)")
    training.add_argument(
        "--lr-step-epochs", type=int, metavar="N", help="epochs between the drops of --lr-schedule step (default: 10)"
    )
    training.add_argument(
        "--lr-step-factor", type=float, metavar="X", help="what each drop multiplies the rate by (default: 0.1)"
    )
    training.add_argument(
        "--warmup-epochs", type=float, metavar="X", help="over which the rate rises at the beginning (default: 0)"
    )
    training.add_argument("--clip", type=or_none(float), metavar="X", help="greatest norm of the gradients")
    training.add_argument(
        "--group-lasso",
        type=float,
        metavar="X",
        help="taken from the norm of each convolution filter before every step (default: 0)",
    )
    _add_switch(training, "--reset-optimizer", "forget momentum when pruning ends, as the paper's code does")


def add_augmentation_options(training: Any) -> None:
    """What the loss is of, and what is averaged of the weights."""
    training.add_argument("--label-smoothing", type=float, metavar="X", help="of the cross-entropy (default: 0)")
    training.add_argument(
        "--mixup", type=float, metavar="X", help="parameter of the Beta distribution that images are mixed by"
    )
    training.add_argument("--cutmix", type=float, metavar="X", help="the same for patches; each minibatch takes one")
    training.add_argument(
        "--distill",
        type=float,
        metavar="X",
        help="weight, up to 1, of the divergence from the unpruned network's predictions (default: 0)",
    )
    training.add_argument("--distill-temperature", type=float, metavar="X", help="of both predictions (default: 1)")
    training.add_argument(
        "--ema",
        type=float,
        metavar="X",
        help="decay of an average of the weights from the first prune step on, which is what is evaluated and saved "
        "(default: 0, none)",
    )


def add_large_run_options(parser: argparse.ArgumentParser) -> None:
    """How a step is computed, and what is written how often."""
    large = parser.add_argument_group("large runs")
    large.add_argument("--amp", choices=AMP, help="16-bit arithmetic; fp16 with a GradScaler (default: off)")
    _add_switch(large, "--channels-last", "memory format of model and images")
    _add_switch(large, "--compile", "torch.compile the network, anew when widths change")
    _add_switch(large, "--sync-batch-norm", "statistics of BatchNorm over all ranks; on GPUs")
    large.add_argument(
        "--recalibrate",
        type=int,
        metavar="N",
        help="minibatches whose average becomes BatchNorm's statistics before every evaluation; 0: they stay "
        "(default: 50)",
    )
    large.add_argument(
        "--eval-every", type=int, metavar="N", help="epochs between evaluations; 0: at the end of stages (default: 0)"
    )
    large.add_argument(
        "--checkpoint-every",
        type=or_none(int),
        metavar="N",
        help="minibatches between checkpoints (default: one at the end of each epoch)",
    )
    large.add_argument("--checkpoints", type=int, metavar="N", help="how many are kept (default: 3)")
    _add_switch(large, "--tensorboard", "write the log for TensorBoard too")


def _add_switch(group: Any, name: str, text: str) -> None:
    group.add_argument(name, action=argparse.BooleanOptionalAction, help=f"{text} (default: no)")


def or_none(kind: type) -> Callable[[str], Any]:
    """A reader of ``kind`` for argparse that takes ``none`` too, with which a recipe's value is put aside."""

    def read(text: str) -> Any:
        return None if text == "none" else kind(text)

    read.__name__ = kind.__name__  # argparse names it in its errors
    return read


def parse_budgets(texts: Iterable[str]) -> dict[str, list[float]]:
    """Budgets to meet one at a time: ``["macs=0.9", "macs=0.5,params=0.5"]`` as ``{"macs": [0.9, 0.5], …}``.

    Raises:
        InputError: one that can't be read, or isn't a fraction.
    """
    found: dict[str, list[float]] = {}
    for part in (part for text in texts for part in text.split(",") if part.strip()):
        for name, value in parse_budget(part).items():
            found.setdefault(name, []).append(value)
    return found


def parse_round_to(text: str) -> int | str:
    """``--round-to``: a whole number, or ``"auto"``.

    Raises:
        InputError: neither of the two.
    """
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise InputError(f"round_to: wanted 'auto' or a whole number, got {text!r}") from None

"""Options that several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from taylor_cuda.errors import InputError
from taylor_cuda.planning import parse_budget

__all__ = ["add_model_options", "add_training_options", "parse_budgets", "parse_round_to"]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Where data and weights come from."""
    data = parser.add_argument_group("model and data")
    data.add_argument("--data", metavar="DIR", help="folder with train/CLASS/* and val/CLASS/* (default: digits)")
    data.add_argument(
        "--image-size", type=int, metavar="N", help="height and width of the images of --data (default: 224)"
    )
    data.add_argument("--workers", type=int, metavar="N", help="processes that read images (default: 2)")
    data.add_argument(
        "--weights",
        metavar="FILE",
        help=".safetensors of tc.save, .pt or .pth state_dict, or 'pretrained'; there is no base training then",
    )
    data.add_argument("--num-classes", type=int, metavar="N", help="outputs of the head (default: the model's own)")


def add_training_options(training: Any) -> None:
    """What base training, like every training, takes."""
    training.add_argument("--batch", type=int, metavar="N", help="examples in a minibatch (default: 64)")
    training.add_argument(
        "--lr", type=float, metavar="X", help="peak learning rate (default: 0.05, with --weights 0.001)"
    )
    training.add_argument("--weight-decay", type=float, metavar="X", help="(default: 0.0005)")
    training.add_argument("--seed", type=int, metavar="N", help="(default: 0)")
    training.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")


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

"""``taylor-cuda compare``: which criterion is right about a model, and what each of them costs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from taylor_cuda.cli.options import add_model_options, add_training_options, parse_budgets
from taylor_cuda.errors import InputError
from taylor_cuda.files import replacing
from taylor_cuda.importance.criteria import CRITERIA
from taylor_cuda.report.compare_plots import write_removal_png, write_scatter_png, write_sensitivity_png
from taylor_cuda.study.comparison import plain
from taylor_cuda.train.comparison import Answer, Question
from taylor_cuda.train.comparison import run as run_comparison
from taylor_cuda.train.config import RunConfig
from taylor_cuda.train.models import SPEC_FORMS

DESCRIPTION = f"""\
Remove every channel of a trained network, one at a time, and see what the loss does: the truth. Then compare what each
criterion predicts with it, what is left when 10, 25 and 50 % of the MACs go by that criterion without any fine-tuning,
and what it costs. Without arguments: the residual network on scikit-learn's digits that taylor-cuda prune trains.

MODEL is {SPEC_FORMS}.
The truth takes forward passes for every channel: choose --batches to fit.

Written to --out: table.txt, comparison.json, scatter.png, removal.png; with --sensitivity also sensitivity.txt,
sensitivity.json, sensitivity.png. Ctrl-C saves the state; the same command with --resume goes on.
"""


def add_parser(commands: Any) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser(
        "compare",
        help="which criterion is right about a model",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="what to compare on (default: digits)")
    add_model_options(parser)
    asked = parser.add_argument_group("comparing")
    asked.add_argument(
        "--criteria",
        metavar="NAMES",
        help=f"of {', '.join(CRITERIA)}, with commas, or 'all' (default: all but those that take a backward pass a "
        "channel: 5 to 15 minutes on digits)",
    )
    asked.add_argument(
        "--batches", type=int, metavar="N", help="minibatches of training images (default: all of digits, else 4)"
    )
    asked.add_argument(
        "--budget",
        action="append",
        metavar="NAME=X",
        help="what is left of macs, params or channels, one at a time (default: macs=0.9, macs=0.75, macs=0.5)",
    )
    asked.add_argument(
        "--sensitivity",
        nargs="?",
        const="taylor_fo",
        metavar="CRITERION",
        help="also narrow each group alone, by the scores of CRITERION (default: taylor_fo)",
    )
    asked.add_argument(
        "--stop-above", type=float, metavar="LOSS", help="narrow a group no further once the loss exceeds this"
    )
    asked.add_argument("--ignore", action="append", metavar="GLOB", help="modules whose outputs stay; may be repeated")
    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs", type=int, metavar="N", help="of training; none with --weights (default: 12 on digits, else 25)"
    )
    add_training_options(training)
    running = parser.add_argument_group("running")
    running.add_argument("--out", type=Path, metavar="DIR", help="where everything is written (default: runs/compare)")
    running.add_argument("--resume", action="store_true", help="go on where this command was interrupted")
    running.add_argument("--steps-limit", type=int, metavar="N", help="at most N minibatches an epoch, for a trial run")


def asked_for(options: argparse.Namespace) -> tuple[RunConfig, Question]:
    """The network and the question; what was left out gets its default.

    Raises:
        InputError: a value that can't be used.
    """
    given = {key: value for key, value in vars(options).items() if key not in ("run", "command", "resume")}
    given.setdefault("model", "digits")
    given.setdefault("out", Path("runs/compare"))
    digits = given.setdefault("data", "digits") == "digits"
    question: dict[str, Any] = {"batches": None if digits else 4}
    for name in ("batches", "sensitivity", "stop_above"):
        if name in given:
            question[name] = given.pop(name)
    if "criteria" in given:
        names = [name.strip() for name in given.pop("criteria").split(",") if name.strip()]
        question["criteria"] = "all" if names == ["all"] else names
    if "budget" in given:
        question["budgets"] = parse_budgets(given.pop("budget"))
    if "ignore" in given:
        given["ignore"] = tuple(given["ignore"])
    if not digits:
        given.setdefault("epochs", 25)
    if given.get("weights") is not None:
        given.setdefault("lr", 1e-3)
    return RunConfig(**given), Question(**question)


def run(options: argparse.Namespace) -> int:
    """Compare, then print what came of it."""
    config, question = asked_for(options)

    def finish(answer: Answer) -> None:
        write_reports(answer, config.out)

    answer = run_comparison(config, question, getattr(options, "resume", False), print, finish, progress=True)
    print()
    print(answer.comparison.table())
    if answer.sensitivity is not None:
        print()
        print(answer.sensitivity.table())
    print(f"\nwritten to {config.out}/ in {answer.facts['seconds']:.0f} s")
    return 0


def write_reports(answer: Answer, out: Path) -> None:
    """Tables, numbers and pictures; a picture that can't be drawn is said and left out."""
    comparison, narrowed = answer.comparison, answer.sensitivity
    _write(out / "table.txt", comparison.table())
    _write(out / "comparison.json", json.dumps({**plain(answer.facts), **comparison.to_dict()}, indent=1))
    title = f"{answer.facts['model']} on {answer.facts['data']}"
    pictures: list[Callable[[], None]] = [
        lambda: write_scatter_png(comparison, out / "scatter.png", f"{title}: estimate against truth"),
        lambda: write_removal_png(comparison, out / "removal.png", f"{title}: loss right after removal"),
    ]
    if narrowed is not None:
        _write(out / "sensitivity.txt", narrowed.table())
        _write(out / "sensitivity.json", json.dumps({**plain(answer.facts), **narrowed.to_dict()}, indent=1))
        pictures.append(lambda: write_sensitivity_png(narrowed, out / "sensitivity.png"))
    for draw in pictures:
        try:
            draw()
        except InputError as error:  # a picture is no reason to lose a run
            print(f"no picture: {error}")


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
